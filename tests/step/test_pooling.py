"""Pooling kernels against torch's, and where the graph uses them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from hotloop import kernels
from hotloop.graph import convolutions, native, operators
from hotloop.graph.routes import Route
from hotloop.kernels import calls
from hotloop.train.zoo import build_model
from support.beside_plain import called, learns_as_in_plain_pytorch, with_program

if not kernels.is_available():
    pytest.skip(kernels.unavailable_reason(), allow_module_level=True)


@pytest.fixture(autouse=True)
def pooling_by_itself(monkeypatch):
    """Not as a part of the convolution before it (``test_convolutions``)."""
    monkeypatch.setattr(convolutions, "fastest", lambda work: Route("onednn", {"onednn": 1.0}))


def forward_backward(x, g, kh, kw, relu, last):
    out, argmax = operators._fake_pool(x, kh, kw, relu, last)
    calls.max_pool(x, out, argmax, kernel=(kh, kw), relu=relu, num_threads=2)()
    gx = operators._dense(list(x.shape), argmax, x.dtype).fill_(7)
    calls.max_pool_gradient(g, argmax, gx, kernel=(kh, kw), num_threads=2)()
    return out, gx


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)),
    st.integers(1, 4),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["noise", "ties", "nan"]),
)
def test_pooling_is_torchs(shape, kh, kw, relu, last, out_last, values):
    if shape[2] < kh or shape[3] < kw:
        shape = (*shape[:2], shape[2] + kh, shape[3] + kw)
    torch.manual_seed(0)
    x = torch.randn(shape)
    if values == "ties":
        x = x.round()
    elif values == "nan":
        x = torch.where(torch.rand(shape) < 0.1, torch.nan, x)
    if last:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    expected = F.max_pool2d(F.relu(x) if relu else x, (kh, kw))
    g = torch.randn(expected.shape)
    if relu:
        g = g.to(memory_format=torch.channels_last)
    expected.backward(g)
    out, gx = forward_backward(x.detach(), g, kh, kw, relu, out_last)
    torch.testing.assert_close(out, expected.detach(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(gx, x.grad, rtol=0, atol=0, equal_nan=True)


def recorded(model):
    x, y = torch.rand(4, 1, 28, 28), torch.randint(0, 10, (4,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return called(with_program(model, F.cross_entropy, optimizer, x, y))


def names(nodes):
    return [str(node.target) for node in nodes]


def test_the_cnn_pools_with_its_relu_and_passes_channels_adjacent():
    nodes = recorded(build_model("cnn"))
    (pool,) = [n for n in nodes if n.target is torch.ops.hotloop.pool.default]
    assert pool.args[1:4] == (2, 2, 1)
    assert "hotloop.pool_backward.default" in names(nodes)
    assert not any("max_pool2d" in name for name in names(nodes))
    first = next(n for n in nodes if n.target is torch.ops.aten.convolution.default)
    assert first.args[0].meta["val"].stride(1) == 1


def network(*middle, width):
    return nn.Sequential(nn.Conv2d(1, 4, 3), *middle, nn.Flatten(), nn.Linear(width, 10))


@pytest.mark.parametrize(
    "pool", [nn.MaxPool2d(3, 2), nn.MaxPool2d(2, padding=1), nn.MaxPool2d(2, ceil_mode=True)]
)
def test_windows_that_overlap_or_leave_the_image_stay_torchs(pool):
    width = pool(torch.rand(1, 4, 26, 26)).numel()
    nodes = recorded(network(nn.ReLU(), pool, width=width))
    assert any("max_pool2d" in name for name in names(nodes))


class Twice(nn.Module):
    """Uses what lies between relu and pooling once more: relu must stay."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4 * 13 * 13 + 4, 10)

    def forward(self, x):
        x = F.relu(self.conv(x))
        return self.head(torch.cat([F.max_pool2d(x, 2).flatten(1), x.mean((2, 3))], 1))


def test_a_relu_that_others_need_stays():
    nodes = recorded(Twice())
    (pool,) = [n for n in nodes if n.target is torch.ops.hotloop.pool.default]
    assert pool.args[3] == 0
    chains = [n.args[0] for n in nodes if n.target is native.elementwise]
    assert any(o.name == "relu" for chain in chains for o in chain.operations)


@pytest.mark.parametrize(
    "make",
    [
        Twice,
        lambda: network(nn.MaxPool2d(3), nn.Tanh(), width=4 * 8 * 8),
        lambda: network(nn.ReLU(), nn.Conv2d(4, 6, 3), nn.MaxPool2d(2), width=6 * 12 * 12),
        lambda: network(nn.ReLU(), nn.MaxPool2d((3, 2)), nn.Conv2d(4, 3, 3), width=3 * 6 * 11),
    ],
)
def test_networks_that_pool_learn_as_in_plain_pytorch(make):
    torch.manual_seed(0)
    learns_as_in_plain_pytorch(make(), torch.rand(16, 1, 28, 28), lr=0.1)
