"""hotloop's own convolution against float64, and where the graph uses it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from hotloop import kernels
from hotloop.graph import convolutions
from hotloop.graph.routes import Route
from hotloop.kernels import calls
from hotloop.train.zoo import build_model
from support import examples
from support.beside_plain import called, learns_as_in_plain_pytorch, with_program

if not kernels.is_available():
    pytest.skip(kernels.unavailable_reason(), allow_module_level=True)
LAST, DENSE = torch.channels_last, torch.contiguous_format
OWN = torch.ops.hotloop


def result_shape(x, w, padding):
    (n, _, h, v), (ph, pw), (kh, kw) = x.shape, padding, w.shape[2:]
    return n, len(w), h + 2 * ph - kh + 1, v + 2 * pw - kw + 1


def forward(x, w, bias, padding, *, relu=False, threads=2):
    out = torch.full(result_shape(x, w, padding), -7.0).contiguous(memory_format=LAST)
    calls.convolve(x, w, bias, out, padding=padding, relu=relu, num_threads=threads)()
    return out


def pooled(x, w, bias, padding, layout, *, relu):
    n, o, h, v = result_shape(x, w, padding)
    out = torch.full((n, o, h // 2, v // 2), -7.0).contiguous(memory_format=layout)
    argmax = torch.full((n, h // 2, v // 2, o), 77, dtype=torch.uint8)
    calls.convolve(x, w, bias, out, argmax, padding=padding, relu=relu, num_threads=2)()
    return out, argmax


def input_gradient(x, w, g, padding, threads=2, places=None, mask=None):
    out = torch.full_like(x, -7.0)
    shared = {"padding": padding, "num_threads": threads}
    calls.convolve_input_gradient(g, w, out, places, mask, **shared)()
    return out


def weight_gradient(x, w, g, padding, threads=2, places=None):
    out = [torch.full_like(w, -7.0), torch.full((len(w),), -7.0)]
    shared = {"padding": padding, "num_threads": threads}
    calls.convolve_filter_gradient(x, g, *out, places, **shared)()
    return out


@st.composite
def cases(draw):
    kh, kw = draw(st.just((3, 3)) | st.tuples(st.integers(1, 7), st.integers(1, 7)))
    pad_h, pad_w = draw(st.integers(0, kh - 1)), draw(st.integers(0, kw - 1))
    n, c, o = draw(st.integers(1, 5)), draw(st.integers(1, 40)), draw(st.integers(1, 80))
    h = draw(st.integers(max(1, kh - 2 * pad_h), 15))
    v = draw(st.integers(max(1, kw - 2 * pad_w), 27))
    rng = torch.Generator().manual_seed(n * 7919 + c * 31 + o)
    x = torch.randn(n, c, h, v, generator=rng).contiguous(memory_format=LAST)
    layout = draw(st.sampled_from([LAST, DENSE]))
    w = torch.randn(o, c, kh, kw, generator=rng).contiguous(memory_format=layout)
    return x, w, torch.randn(o, generator=rng), (pad_h, pad_w), rng


def within_rounding(found, expected, count, size):
    """As far as sums of ``count`` products of numbers of size 1 may be off.

    The transforms of F(2x2, 3x3) enlarge the rounding of a direct sum, sqrt(count) u, by less than
    an order of magnitude (Lavin and Gray, 2016).
    """
    assert (found.double() - expected).abs().max() <= 20 * 2**-24 * (1 + count**0.5) * size


@settings(max_examples=examples(60))
@given(cases())
def test_a_convolution_and_its_gradients_are_torchs(case):
    x, w, bias, padding, rng = case
    exact = [t.double().requires_grad_() for t in (x, w, bias)]
    expected = F.conv2d(*exact, padding=padding)
    g = torch.randn(expected.shape, generator=rng).contiguous(memory_format=LAST)
    expected.backward(g.double())
    gx, gw, gb = (t.grad for t in exact)
    n, o, h, v = g.shape
    largest = float(max(x.abs().max(), w.abs().max(), g.abs().max())) ** 2
    taps = w[0, 0].numel()
    within_rounding(forward(x, w, bias, padding), expected, taps * x.shape[1], largest)
    own_w, own_b = weight_gradient(x, w, g, padding)
    within_rounding(own_w, gw, n * h * v, largest)
    within_rounding(own_b, gb, n * h * v, largest)
    if x.shape[1] >= 8:
        within_rounding(input_gradient(x, w, g, padding), gx, taps * o, largest)
        assert torch.equal(input_gradient(x, w, g, padding, 1), input_gradient(x, w, g, padding, 3))
    # The same bits on any number of threads.
    assert torch.equal(forward(x, w, bias, padding), forward(x, w, bias, padding, threads=3))
    for one, three in zip(
        weight_gradient(x, w, g, padding, 1), weight_gradient(x, w, g, padding, 3), strict=True
    ):
        assert torch.equal(one, three)


@settings(max_examples=examples(40))
@given(cases(), st.booleans(), st.sampled_from([LAST, DENSE]))
def test_what_follows_is_as_if_done_after(case, relu, layout):
    x, w, bias, padding, rng = case
    plain = forward(x, w, bias, padding)
    assert torch.equal(forward(x, w, bias, padding, relu=True), plain.relu())
    gate = torch.randn(x.shape, generator=rng).contiguous(memory_format=LAST)
    g = torch.randn(plain.shape, generator=rng).contiguous(memory_format=LAST)
    if x.shape[1] >= 8:
        masked = input_gradient(x, w, g, padding, mask=gate)
        assert torch.equal(masked, torch.where(gate > 0, input_gradient(x, w, g, padding), 0.0))
    if min(plain.shape[2:]) < 2:
        return
    found, places = pooled(x, w, bias, padding, layout, relu=relu)
    leaf = plain.clone(memory_format=LAST).requires_grad_()
    expected = F.max_pool2d(leaf.relu() if relu else leaf, 2)
    assert torch.equal(found, expected)
    small = torch.randn(expected.shape, generator=rng).contiguous(memory_format=layout)
    expected.backward(small)
    large = leaf.grad.contiguous(memory_format=LAST)
    largest = float(max(x.abs().max(), w.abs().max(), small.abs().max())) ** 2
    for ours, theirs in zip(
        weight_gradient(x, w, small, padding, places=places),
        weight_gradient(x, w, large, padding),
        strict=True,
    ):
        # Sums of other products than those with 0, or the same ones in the order of the windows.
        within_rounding(ours, theirs.double(), large.numel() // len(w), largest)
    if x.shape[1] >= 8:
        ours = input_gradient(x, w, small, padding, places=places, mask=gate)
        theirs = torch.where(gate > 0, input_gradient(x, w, large, padding), 0.0)
        within_rounding(ours, theirs.double(), w[:, 0].numel(), largest)
        again = input_gradient(x, w, small, padding, 3, places, gate)
        assert torch.equal(ours, again)
    for one, three in zip(
        weight_gradient(x, w, small, padding, 1, places),
        weight_gradient(x, w, small, padding, 3, places),
        strict=True,
    ):
        assert torch.equal(one, three)


def test_products_with_a_gradient_of_0_are_not_made():
    """What lies outside of a pooled result's own window does not reach the gradients."""
    x = torch.randn(1, 16, 12, 12).contiguous(memory_format=LAST)
    w, g = torch.randn(8, 16, 5, 5), torch.randn(1, 8, 4, 4).contiguous(memory_format=LAST)
    places = torch.full((1, 4, 4, 8), 3, dtype=torch.uint8)  # Below, on the right.
    places[0, 0, 0] = 255  # Cut off by relu.
    x[0, :, 0], x[0, :, 3, 1] = float("inf"), float("nan")
    clean = x.nan_to_num(0.0, 0.0)
    small = weight_gradient(clean, w, g, (0, 0), places=places)
    g[0, :, 0, 0] = 0.0
    again = weight_gradient(clean, w, g, (0, 0), places=places)
    for ours, theirs in zip(again, small, strict=True):
        assert torch.equal(ours, theirs), "what was cut off counts as 0"
    seen = weight_gradient(x, w, g, (0, 0), places=places)[0]
    assert seen[..., 0, 0].isnan().all(), "of the window below"
    assert seen.flatten(2)[..., 1:].isfinite().all()


def test_nan_and_infinity_stay_in_their_tiles():
    x = torch.randn(1, 16, 12, 12).contiguous(memory_format=LAST)
    x[0, 3, 0, 0] = float("nan")
    out = forward(x, torch.randn(16, 16, 3, 3), None, (0, 0), relu=True)
    assert out[..., 0, 0].isnan().all()
    assert out[..., 2:, 2:].isfinite().all()


@pytest.fixture
def own(monkeypatch):
    """hotloop's kernel wherever it can be used: here no clock decides."""
    monkeypatch.setattr(convolutions, "fastest", lambda work: Route("hotloop", {"hotloop": 1.0}))


def of_the_cnn():
    model, x, y = build_model("cnn"), torch.rand(8, 1, 28, 28), torch.zeros(8, dtype=torch.long)
    return with_program(model, F.cross_entropy, torch.optim.Adam(model.parameters()), x, y)


def test_the_cnn_is_convolved_pooled_and_masked_in_one_go(own):
    step = of_the_cnn()
    nodes = called(step)
    found = [n.target for n in nodes]
    assert found.count(OWN.convolve.default) == 1
    assert found.count(OWN.convolve_pool.default) == 1
    assert found.count(OWN.convolve_weight_gradient.default) == 2
    (gradient,) = [n for n in nodes if n.target is OWN.convolve_input_gradient.default]
    assert gradient.args[3] is not None, "places of the pooling"
    assert gradient.args[4] is not None, "relu's mask"
    gone = ("convolution", "pool_backward", "hotloop.pool.", "clone")
    assert not [t for t in found if any(word in str(t) for word in gone)]
    kinds = {o.kind for o in step.operations()}
    assert kinds >= {"convolution", "input gradient", "weight gradient"}


def test_five_by_five_is_convolved_pooled_and_cut_off_in_one_go(own):
    """The network that learns MNIST to 99 %."""
    model = nn.Sequential(
        nn.Conv2d(1, 16, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(16, 32, 5), nn.MaxPool2d(2),
        nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip
    torch.manual_seed(0)
    found = learns(model, torch.rand(16, 1, 28, 28))
    assert found.count(OWN.convolve_pool.default) == 2
    assert found.count(OWN.convolve_weight_gradient.default) == 2
    assert found.count(OWN.convolve_input_gradient.default) == 1
    gone = ("aten.convolution", "aten.relu", "pool_backward", "hotloop.pool.")
    assert not [t for t in found if any(word in str(t) for word in gone)]


def test_only_the_faster_gradient_is_taken(monkeypatch):
    """It is made from the pooled gradient, the other one by oneDNN from the whole."""
    chosen = {"input gradient": "onednn"}
    monkeypatch.setattr(
        convolutions, "fastest", lambda work: Route(chosen.get(work.part, "hotloop"), {})
    )
    model = nn.Sequential(
        nn.Conv2d(1, 8, 5), nn.ReLU(), nn.Conv2d(8, 8, 5), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(8 * 100, 10),
    )  # fmt: skip
    torch.manual_seed(0)
    step, twin = learns_as_in_plain_pytorch(model, torch.rand(16, 1, 28, 28), lr=0.05)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    nodes = called(step)
    first, _ = [n for n in nodes if n.target is OWN.convolve_weight_gradient.default]
    assert first.args[3] is not None, "places of the pooling"
    assert [n for n in nodes if n.target is torch.ops.aten.convolution_backward.default]


def test_a_slower_kernel_is_not_taken(monkeypatch):
    monkeypatch.setattr(convolutions, "fastest", lambda work: Route("onednn", {"onednn": 1.0}))
    assert not [n for n in called(of_the_cnn()) if "convolve" in str(n.target)]


class Residual(nn.Module):
    """Convolutions without bias, whose results are used twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, x):
        x = F.relu(self.first(x))
        x = x + F.relu(self.norm(self.second(x)))
        return self.head(x.mean((2, 3)))


class Turned(nn.Module):
    """Rows and columns change places behind the pooling: its gradient is laid out neither way."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8 * 144, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.second(F.relu(self.first(x)))), 2)
        return self.head(x.transpose(2, 3).flatten(1))


def frozen(model):
    model[2].weight.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    "make",
    [
        Residual,
        Turned,
        lambda: nn.Sequential(
            nn.Conv2d(1, 9, 3, padding=2), nn.MaxPool2d(2), nn.Conv2d(9, 20, 3, padding=1),
            nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(20 * 7 * 7, 10),
        ),
        lambda: frozen(nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(8 * 144, 10),
        )),
        lambda: nn.Sequential(
            nn.Conv2d(1, 16, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(16, 24, 5), nn.MaxPool2d(2),
            nn.ReLU(), nn.Flatten(), nn.Linear(24 * 16, 10),
        ),
        lambda: nn.Sequential(
            nn.Conv2d(1, 9, 7, padding=3), nn.ReLU(), nn.Conv2d(9, 12, (5, 1), bias=False),
            nn.ReLU(), nn.Conv2d(12, 8, (2, 6)), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(8 * 11 * 11, 10),
        ),
        lambda: nn.Sequential(
            nn.Conv2d(1, 8, 5), nn.Conv2d(8, 16, 3, stride=2), nn.Conv2d(16, 16, 3, groups=2),
            nn.Conv2d(16, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
        ),
    ],
)  # fmt: skip
def test_networks_learn_as_in_plain_pytorch(own, make):
    torch.manual_seed(0)
    learns(make(), torch.rand(16, 1, 28, 28))


def test_images_in_colour_are_turned_once(own):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3),
        nn.AvgPool2d(4), nn.Flatten(), nn.Linear(8 * 4, 10),
    )  # fmt: skip
    torch.manual_seed(0)
    found = learns(model, torch.rand(16, 3, 14, 14))
    assert found.count(OWN.convolve.default) == 2
    assert found.count(OWN.convolve_weight_gradient.default) == 2
    assert found.count(OWN.convolve_input_gradient.default) == 1


def learns(model, x):
    """As in plain PyTorch, weights too; what the program calls."""
    step, twin = learns_as_in_plain_pytorch(model, x, lr=0.05)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    return [node.target for node in called(step)]
