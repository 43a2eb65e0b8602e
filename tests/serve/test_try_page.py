"""The page in a real browser: a drawn digit, an image, a pasted tensor, the live figures."""

import json
import time

import numpy as np
import pytest

from hotloop.infer import TensorSpec
from hotloop.serve import AppOptions, Tokens
from support import chromium
from support.chromium import OUTSIDE, TEXTS, luminance
from support.serving import Doubler, Running

pytestmark = pytest.mark.skipif(
    chromium.find() is None, reason="no Chromium on this machine (apt-get install chromium)"
)


class Bands(Doubler):
    """Ten scores: the ink in each tenth of the picture's columns."""

    def __init__(self):
        super().__init__()
        self.inputs = (TensorSpec("x", "float32", (None, 1, 28, 28)),)
        self.outputs = (TensorSpec("y", "float32", (None, 10)),)
        self.seen = []

    def run(self, arrays):
        (x,) = arrays
        self.seen.append(x.copy())
        columns = np.pad(x[:, 0].sum(1), ((0, 0), (1, 1)))
        return [columns.reshape(len(x), 10, 3).sum(2)]


@pytest.fixture(scope="module")
def browser():
    with chromium.Chromium(chromium.find()) as opened:
        yield opened


@pytest.fixture(scope="module")
def served():
    with Running(Bands(), name="digits & <b>bands</b>") as running:
        running.engine = running.server.model.lane.engine
        yield running


def until(browser, expression, timeout_s=20):
    """The first value of the expression that is true."""
    ends_at = time.monotonic() + timeout_s
    while not (value := browser.evaluate(expression)):
        assert time.monotonic() < ends_at, (expression, browser.evaluate("document.body.innerText"))
        time.sleep(0.05)
    return value


def opened(browser, served, *, width=1000, dark=False):
    browser.open(served.address + "/", width=width, dark=dark)
    until(browser, "document.querySelectorAll('#live dd').length === 8")


def draw(browser, points):
    box = browser.evaluate(
        "(b => [b.left, b.top, b.width])(document.querySelector('#pad').getBoundingClientRect())"
    )
    for at, (x, y) in enumerate(points):
        kind = "mousePressed" if at == 0 else "mouseMoved"
        place = {"x": box[0] + x * box[2], "y": box[1] + y * box[2]}
        browser.send("Input.dispatchMouseEvent", type=kind, button="left", buttons=1,
                     clickCount=1, **place)  # fmt: skip
    browser.send("Input.dispatchMouseEvent", type="mouseReleased", button="left", clickCount=1,
                 **place)  # fmt: skip


def test_a_drawn_digit_is_answered(browser, served):
    opened(browser, served)
    assert browser.evaluate("document.title") == "digits & <b>bands</b> · hotloop"
    assert not browser.evaluate("document.querySelector('#draw').hidden")
    draw(browser, [(0.2, 0.2 + 0.05 * n) for n in range(12)])
    until(browser, "document.querySelector('#answer').textContent.startsWith('class ')")
    until(browser, "document.querySelectorAll('#bars .bar').length === 10")
    time.sleep(0.3)  # The last request is sent after the last move.
    image = served.engine.seen[-1][0, 0]
    assert image.min() == 0
    assert 0.9 < image.max() <= 1
    # An upright stroke, 20 pixels tall, its mass in the middle although drawn at the side.
    rows, columns = np.nonzero(image > 0.5)
    assert 17 <= rows.max() - rows.min() <= 21
    assert abs(np.average(columns) - 13.5) < 1.5
    assert abs(np.average(rows) - 13.5) < 1.5
    scores = json.loads(browser.evaluate("document.querySelector('#outputs').textContent"))["y"][0]
    (wanted,) = Bands().run([served.engine.seen[-1]])
    assert np.allclose(scores, wanted[0])
    picked = browser.evaluate("document.querySelector('#answer').textContent")
    assert picked.startswith(f"class {int(np.argmax(wanted))} · ")
    browser.evaluate("document.querySelector('#clear').click()")
    assert browser.evaluate("document.querySelector('#answer').textContent") == "–"
    assert browser.complaints() == []
    assert all(url.startswith((served.address, "data:")) for url in browser.requests())


def test_a_tensor_is_pasted_and_a_mistake_is_told(browser, served):
    opened(browser, served)
    browser.evaluate("document.querySelector('#sample').click()")
    browser.evaluate("document.querySelector('#send').click()")
    until(browser, "document.querySelector('#answer').textContent.startsWith('class 0')")
    for text, told in (("[[1, 2]]", "shape of input x must be"), ("[1,", "this is not JSON")):
        browser.evaluate(f"document.querySelector('#tensor').value = {json.dumps(text)}")
        browser.evaluate("document.querySelector('#send').click()")
        script = "document.querySelector('#message').textContent.includes(%s)"
        until(browser, script % json.dumps(told))


def test_an_image_is_scaled_and_sent(browser, served):
    opened(browser, served)
    before = len(served.engine.seen)
    browser.evaluate("""(() => {
      const canvas = document.createElement('canvas');
      canvas.width = 100; canvas.height = 50;
      const context = canvas.getContext('2d');
      context.fillStyle = '#fff';
      context.fillRect(0, 0, 50, 50);
      canvas.toBlob(blob => {
        const files = new DataTransfer();
        files.items.add(new File([blob], 'half.png', {type: 'image/png'}));
        const input = document.querySelector('#file');
        input.files = files.files;
        input.dispatchEvent(new Event('change'));
      });
    })()""")
    served.until(lambda: len(served.engine.seen) > before)
    image = served.engine.seen[-1][0, 0]
    assert np.allclose(image[:, :13], 1, atol=0.02)
    assert np.allclose(image[:, 15:], 0, atol=0.02)


def test_the_figures_move(browser, served):
    opened(browser, served)
    requests = (
        "+[...document.querySelectorAll('#live div')].find("
        "d => d.textContent.startsWith('requests')).querySelector('dd').textContent"
    )
    before = browser.evaluate(requests)
    browser.evaluate("document.querySelector('#sample').click()")
    browser.evaluate("document.querySelector('#send').click()")
    until(browser, f"{requests} > {before}")
    until(browser, "document.querySelectorAll('#rows i').length > 0")


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("path", ["/", "/docs"])
def test_it_fits_and_can_be_read(browser, served, path, dark, width):
    if path == "/":
        opened(browser, served, width=width, dark=dark)
        draw(browser, [(0.3 + 0.04 * n, 0.5) for n in range(8)])
        until(browser, "document.querySelectorAll('#bars .bar').length === 10")
    else:
        browser.open(served.address + path, width=width, dark=dark)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(OUTSIDE) == []
    texts = browser.evaluate(TEXTS)
    assert len(texts) > 20
    for text, colour, behind, size in texts:
        low, high = sorted([luminance(colour), luminance(behind)])
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, colour, behind)
        assert size >= 12, text
    assert browser.complaints() == []


def test_a_token_is_asked_for_and_kept_in_the_page(browser, tmp_path):
    (tmp_path / "tokens").write_text("a-token-for-the-page")
    with Running(Doubler(), app=AppOptions(tokens=Tokens(tmp_path / "tokens"))) as served:
        browser.open(served.address + "/", width=1000)
        until(browser, "!document.querySelector('#token-form').hidden")
        browser.evaluate("document.querySelector('#token').value = 'a-token-for-the-page'")
        browser.evaluate("document.querySelector('#token-form button').click()")
        until(browser, "document.querySelector('#title').textContent === 'm'")
        assert browser.evaluate("document.querySelector('#token-form').hidden")
        assert browser.evaluate("document.querySelector('#draw').hidden")
        assert browser.evaluate("localStorage.length + sessionStorage.length") == 0
