import {binaryRequest, digit, nested, picture} from './tensor.js';

const $ = id => document.getElementById(id);
let token = '';
let model = null;

async function ask(path, options = {}) {
  const headers = {...options.headers, ...(token ? {Authorization: `Bearer ${token}`} : {})};
  const response = await fetch(path, {...options, headers});
  if (response.status === 401) {
    $('token-form').hidden = false;
    throw new Error('this server needs a token');
  }
  const text = await response.text();
  let document;
  try { document = JSON.parse(text); } catch { throw new Error(`answer ${response.status}`); }
  if (!response.ok) throw new Error(document.error ?? `answer ${response.status}`);
  return document;
}

function say(text) {
  $('message').textContent = text;
  $('message').hidden = !text;
}

async function guarded(work) {
  try { await work(); say(''); } catch (error) { say(error.message); }
}

function ms(seconds) {
  return seconds == null ? '–' : `${(1000 * seconds).toFixed(seconds < 0.01 ? 2 : 1)} ms`;
}

// --- answers

function show(outputs, classes, milliseconds) {
  const first = Object.values(outputs)[0];
  const picked = classes ? `class ${classes.slice(0, 8).join(', ')}` : 'done';
  $('answer').textContent = `${picked} · ${milliseconds.toFixed(1)} ms`;
  const text = JSON.stringify(outputs);
  $('outputs').textContent = text.length > 4000 ? text.slice(0, 4000) + ' …' : text;
  $('bars').replaceChildren();
  if (!classes || first.length !== 1 || first[0].length > 20) return;
  // Probabilities are shown as they are, logits after a softmax.
  const top = Math.max(...first[0]);
  const total = first[0].reduce((a, b) => a + b);
  const given = Math.min(...first[0]) >= 0 && Math.abs(total - 1) < 1e-3;
  const powers = given ? first[0] : first[0].map(v => Math.exp(v - top));
  const sum = powers.reduce((a, b) => a + b);
  powers.forEach((power, i) => {
    const row = document.createElement('div');
    row.className = 'bar';
    const share = 100 * power / sum;
    const [label, track, figure] = ['span', 'div', 'span'].map(t => document.createElement(t));
    label.textContent = i;
    figure.textContent = `${share.toFixed(1)} %`;
    track.className = 'track';
    const fill = document.createElement('div');
    fill.className = 'fill';
    fill.style.width = `${share}%`;
    track.append(fill);
    row.append(label, track, figure);
    $('bars').append(row);
  });
}

async function sendValues(values) {
  const input = model.inputs[0];
  const {body, headerLength} = binaryRequest(input, values);
  const started = performance.now();
  const answer = await ask(`/v2/models/${encodeURIComponent(model.name)}/infer`, {
    method: 'POST', body, headers: {'Inference-Header-Content-Length': headerLength},
  });
  const taken = performance.now() - started;
  const outputs = {};
  for (const o of answer.outputs) outputs[o.name] = nested(o.data, o.shape);
  const first = answer.outputs[0];
  const classes = first.shape.length === 2 && first.shape[1] > 1
    ? outputs[first.name].map(row => row.indexOf(Math.max(...row))) : null;
  show(outputs, classes, taken);
}

async function sendText() {
  let inputs;
  try { inputs = JSON.parse($('tensor').value); }
  catch { throw new Error('this is not JSON'); }
  const started = performance.now();
  const answer = await ask('/predict', {method: 'POST', body: JSON.stringify({inputs})});
  show(answer.outputs, answer.classes, performance.now() - started);
}

// --- drawing

function startDrawing() {
  const pad = $('pad');
  const context = pad.getContext('2d', {willReadFrequently: true});
  const clear = () => { context.fillStyle = '#000'; context.fillRect(0, 0, 280, 280); };
  clear();
  let last = null, waiting = false;
  const place = event => {
    const box = pad.getBoundingClientRect();
    return [(event.clientX - box.left) * 280 / box.width, (event.clientY - box.top) * 280 / box.height];
  };
  const send = () => {
    if (waiting) return;
    waiting = true;
    // While drawing, one request at a time.
    guarded(async () => {
      const values = digit(pad);
      if (values) await sendValues(values);
    }).finally(() => { waiting = false; });
  };
  pad.addEventListener('pointerdown', event => {
    pad.setPointerCapture(event.pointerId);
    last = place(event);
    stroke(last, last);
  });
  pad.addEventListener('pointermove', event => {
    if (!last) return;
    const next = place(event);
    stroke(last, next);
    last = next;
    send();
  });
  pad.addEventListener('pointerup', () => { last = null; setTimeout(send, 50); });
  pad.addEventListener('pointercancel', () => { last = null; });
  $('clear').addEventListener('click', () => {
    clear();
    $('bars').replaceChildren();
    $('answer').textContent = '–';
    $('outputs').textContent = '';
  });
  function stroke(from, to) {
    context.strokeStyle = '#fff';
    context.lineWidth = 20;
    context.lineCap = context.lineJoin = 'round';
    context.beginPath();
    context.moveTo(...from);
    context.lineTo(to[0] + 0.01, to[1]);
    context.stroke();
  }
}

// --- live

function spark(box, values, text) {
  const most = Math.max(...values, 1e-9);
  box.replaceChildren(...values.map(value => {
    const bar = document.createElement('i');
    bar.style.height = `${Math.max(2, 100 * value / most)}%`;
    return bar;
  }));
  box.setAttribute('aria-label', values.length ? `latest ${text(values[values.length - 1])}, ` +
    `highest ${text(most)}` : 'none yet');
}

async function refresh() {
  const stats = await ask('/stats');
  const figures = {
    'latency p50': ms(stats.latency_p50_s), 'latency p99': ms(stats.latency_p99_s),
    'waiting': stats.queue_requests,
    'calls under way': `${stats.busy_instances} of ${stats.num_instances}`,
    'batch aimed at': stats.best_batch_rows, 'rows so far': stats.rows.toLocaleString('en'),
    'requests': stats.requests.toLocaleString('en'),
    'refused or dropped': Object.values(stats.dropped).reduce((a, b) => a + b, 0),
  };
  $('live').replaceChildren(...Object.entries(figures).map(([name, value]) => {
    const [box, dt, dd] = ['div', 'dt', 'dd'].map(t => document.createElement(t));
    dt.textContent = name;
    dd.textContent = value;
    box.append(dt, dd);
    return box;
  }));
  spark($('rows'), stats.recent_batch_rows, v => `${v} rows`);
  spark($('latency'), stats.recent_latency_s, ms);
  return stats;
}

async function begin() {
  const stats = await refresh();
  model = stats.model;
  $('token-form').hidden = true;
  $('title').textContent = model.name;
  document.title = `${model.name} · hotloop`;
  const tensors = list => list.map(t => `${t.name} ${t.datatype} [${t.shape.join(', ')}]`).join('; ');
  $('about').textContent = `${stats.engine}, ${stats.precision}; takes ${tensors(model.inputs)}; ` +
    `gives ${tensors(model.outputs)}`;
  const only = model.inputs.length === 1 && model.inputs[0].datatype === 'FP32' ? model.inputs[0] : null;
  const rest = only ? only.shape.slice(1) : [];
  const batch = only && (only.shape[0] === -1 || only.shape[0] === 1);
  const isDigit = batch && (rest.join() === '1,28,28' || rest.join() === '784');
  const isImage = batch && rest.length === 3 && [1, 3].includes(rest[0]) && rest[1] > 0 && rest[2] > 0;
  if (isDigit && $('draw').hidden) startDrawing();
  $('draw').hidden = !isDigit;
  $('image').hidden = !isImage;
  setInterval(() => guarded(refresh), 1000);
}

$('token-form').addEventListener('submit', event => {
  event.preventDefault();
  token = $('token').value;
  guarded(begin);
});
$('send').addEventListener('click', () => guarded(sendText));
$('sample').addEventListener('click', () => {
  const zeros = t => {
    const shape = t.shape.map(size => size < 0 ? 1 : size);
    const count = shape.reduce((a, b) => a * b, 1);
    return nested(new Array(count).fill(t.datatype === 'BOOL' ? false : 0), shape);
  };
  const all = Object.fromEntries(model.inputs.map(t => [t.name, zeros(t)]));
  $('tensor').value = JSON.stringify(model.inputs.length === 1 ? Object.values(all)[0] : all);
});
$('file').addEventListener('change', () => guarded(async () => {
  const file = $('file').files[0];
  if (!file) return;
  const [channels, height, width] = model.inputs[0].shape.slice(1);
  const image = await createImageBitmap(file);
  await sendValues(picture(image, channels, height, width));
}));
guarded(begin);
