// Pictures to tensors, and tensors to the protocol's binary form.

// Values of a shape as nested lists.
export function nested(values, shape) {
  if (shape.length === 1) return Array.from(values);
  const size = values.length / shape[0];
  return Array.from({length: shape[0]}, (_, i) =>
    nested(values.slice(i * size, (i + 1) * size), shape.slice(1)));
}

// A drawing of white on black as MNIST has it: the ink in a box of 20 pixels, its centre of mass in the
// middle of 28. Returns null where nothing is drawn.
export function digit(pad) {
  const size = pad.width;
  const pixels = pad.getContext('2d').getImageData(0, 0, size, size).data;
  let [left, right, top, bottom] = [size, -1, size, -1];
  for (let y = 0; y < size; y++) for (let x = 0; x < size; x++) {
    if (pixels[4 * (y * size + x)] < 32) continue;
    left = Math.min(left, x); right = Math.max(right, x);
    top = Math.min(top, y); bottom = Math.max(bottom, y);
  }
  if (right < 0) return null;
  const [width, height] = [right - left + 1, bottom - top + 1];
  const scale = 20 / Math.max(width, height);
  const small = scaled(pad, [left, top, width, height], 28, 28,
    [14 - width * scale / 2, 14 - height * scale / 2, width * scale, height * scale]);
  let [sum, sumX, sumY] = [0, 0, 0];
  const at = (d, x, y) => d[4 * (y * 28 + x)];
  for (let y = 0; y < 28; y++) for (let x = 0; x < 28; x++) {
    const ink = at(small, x, y);
    sum += ink; sumX += ink * x; sumY += ink * y;
  }
  const [dx, dy] = [Math.round(sumX / sum - 13.5), Math.round(sumY / sum - 13.5)];
  const values = new Float32Array(784);
  for (let y = 0; y < 28; y++) for (let x = 0; x < 28; x++) {
    const [fromX, fromY] = [x + dx, y + dy];
    if (fromX >= 0 && fromX < 28 && fromY >= 0 && fromY < 28)
      values[y * 28 + x] = at(small, fromX, fromY) / 255;
  }
  return values;
}

// An image in the model's size: channels first, values from 0 to 1.
export function picture(image, channels, height, width) {
  const pixels = scaled(image, [0, 0, image.width, image.height], width, height,
    [0, 0, width, height]);
  const values = new Float32Array(channels * height * width);
  for (let i = 0; i < height * width; i++) {
    const [r, g, b] = pixels.slice(4 * i, 4 * i + 3);
    if (channels === 1) values[i] = (0.299 * r + 0.587 * g + 0.114 * b) / 255;
    else [r, g, b].forEach((c, k) => { values[k * height * width + i] = c / 255; });
  }
  return values;
}

function scaled(source, from, width, height, to) {
  const canvas = document.createElement('canvas');
  canvas.width = width; canvas.height = height;
  const context = canvas.getContext('2d', {willReadFrequently: true});
  context.fillStyle = '#000';
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = 'high';
  context.drawImage(source, ...from, ...to);
  return context.getImageData(0, 0, width, height).data;
}

// The body of an infer request with one binary tensor, and the length of its JSON.
export function binaryRequest(input, values) {
  const shape = [1, ...input.shape.slice(1)];
  const head = new TextEncoder().encode(JSON.stringify({inputs: [{
    name: input.name, datatype: input.datatype, shape,
    parameters: {binary_data_size: values.byteLength},
  }]}));
  return {body: new Blob([head, values]), headerLength: head.length};
}
