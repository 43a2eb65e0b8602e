"""What kernels take along: the same answers, and only what nothing else reads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn import functional as F

from hotloop.graph import copies, epilogues, layers
from hotloop.graph.epilogues import epilogue_of, pool_window
from support import examples
from support.exported import answer, exported

aten = torch.ops.aten


def calls(graph):
    return [n for n in graph.nodes if n.op == "call_function"]


def fused(model, *shape):
    """The layers of a model, checked against PyTorch."""
    model = model.eval()
    graph, constants = exported(model, torch.randn(4, *shape))
    copies.remove_identities(graph)
    epilogues.fuse(graph)
    x = torch.randn(5, *shape)
    with torch.no_grad():
        want = model(x)
    torch.testing.assert_close(answer(graph, constants, x), want, rtol=1e-5, atol=1e-5)
    return calls(graph)


class Residual(nn.Module):
    def __init__(self, after):
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 1)
        self.drop, self.after = nn.Dropout(), after

    def forward(self, x):
        y = self.drop(self.one(F.relu(x)))
        return self.after(y + self.two(x))


def test_a_sum_goes_into_the_layer_that_is_made_last():
    relu, one, two = fused(Residual(nn.ReLU(inplace=True)), 2, 6, 5)
    assert (relu.target, relu.args[1:]) == (layers.pointwise, (None, "relu"))
    assert one.args[3] is None
    assert two.args[3] is one
    assert two.args[6:] == ("relu", False)


def test_a_convolution_leaves_gelu_to_a_layer_of_its_own():
    assert [n.target for n in fused(Residual(nn.GELU()), 2, 6, 5)] == [
        layers.pointwise, layers.convolution, layers.convolution, layers.pointwise,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "activation", "pooled"),
    [
        (nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2)), "relu", True),
        (nn.Sequential(nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), nn.ReLU()), "relu", True),
        (nn.Sequential(nn.Conv2d(2, 3, 3, padding=2), nn.MaxPool2d(2)), "none", True),
        (nn.Sequential(nn.Conv2d(2, 3, 3), nn.MaxPool2d(3, 2)), "none", False),
        (nn.Sequential(nn.Conv2d(2, 3, 3), nn.MaxPool2d(2, 2, 1), nn.ReLU()), "none", False),
        (nn.Sequential(nn.Conv2d(2, 3, 3, 2), nn.ReLU(), nn.MaxPool2d(2)), "relu", False),
        (nn.Sequential(nn.Conv2d(2, 3, (3, 2)), nn.MaxPool2d(2)), "none", False),
    ],
    ids=str,
)
def test_pooling_goes_into_small_filters(model, activation, pooled):
    nodes = fused(model, 2, 9, 8)
    assert nodes[0].args[6:] == (activation, pooled)
    assert [n.target for n in nodes[1:]] == ([] if pooled else [layers.max_pool])


class Readers(nn.Module):
    """What lies between is read once more."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        y = self.linear(x)
        z = torch.add(F.relu(y), y)
        return torch.add(z, x, alpha=2)


def test_what_others_read_stays():
    assert [n.target for n in fused(Readers(), 4)] == [
        layers.linear, layers.pointwise, layers.pointwise, aten.add.Tensor,
    ]  # fmt: skip


def test_a_result_stays():
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(aten.mm.default, (x, x))
    graph.output((y,))
    assert epilogue_of(y).taken == ()


@pytest.mark.parametrize(
    ("target", "into", "taken"),
    [
        (aten.add.Tensor, True, True),
        (aten.add_.Tensor, True, False),
        (aten.add_.Tensor, False, True),
    ],
    ids=["sum", "into a buffer", "into the result"],
)
def test_what_is_written_into_a_buffer_is_no_sum(target, into, taken):
    graph = fx.Graph()
    x, buffer = graph.placeholder("x"), graph.placeholder("buffer")
    product = graph.call_function(aten.mm.default, (x, x))
    args = (buffer, product) if into else (product, buffer)
    total = graph.call_function(target, args)
    graph.output((graph.call_function(aten.neg.default, (total,)),))
    found = epilogue_of(product, fits_addend=lambda other, before: other is buffer)
    assert found.taken == ((total,) if taken else ())
    assert found.addend is (buffer if taken else None)


@st.composite
def networks(draw):
    """Rows through linear layers, sums with what came before, activations."""

    class Drawn(nn.Module):
        def __init__(self):
            super().__init__()
            self.linears = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))

        def forward(self, x):
            values = [x]
            for layer, (kind, one, other) in zip(self.linears, plan, strict=False):
                a, b = values[one % len(values)], values[other % len(values)]
                made = {
                    "linear": lambda a, b, layer=layer: layer(a),
                    "sum": lambda a, b, layer=layer: layer(a) + b,
                    "sum first": lambda a, b, layer=layer: b + layer(a),
                    "twice": lambda a, b: a + a,
                    "relu": lambda a, b: F.relu(a),
                    "gelu": lambda a, b: F.gelu(a, approximate="tanh"),
                    "both": lambda a, b: F.gelu(a + b),
                }[kind]
                values.append(made(a, b))
            return values[-1] + values[len(values) // 2]

    kinds = st.sampled_from(["linear", "sum", "sum first", "twice", "relu", "gelu", "both"])
    plan = draw(st.lists(st.tuples(kinds, st.integers(0, 9), st.integers(0, 9)), max_size=6))
    return Drawn()


@settings(max_examples=examples(30), deadline=None)
@given(networks(), st.integers(0, 2**31))
def test_any_network_answers_the_same(model, seed):
    torch.manual_seed(seed)
    nodes = fused(model, 4)
    assert {n.target for n in nodes} <= {layers.linear, layers.pointwise}


def backward(gate_shape, threshold=0, wanted=0):
    """relu's backward behind a product, as a step has it."""
    graph = fx.Graph()
    values = [graph.placeholder(name) for name in ("a", "b", "gate")]
    shapes = [(3, 4), (4, 5), gate_shape]
    for value, shape in zip(values, shapes, strict=True):
        value.meta["val"] = torch.empty(shape, device="meta")
    a, b, gate = values
    product = graph.call_function(aten.mm.default, (a, b))
    product.meta["val"] = torch.empty(3, 5, device="meta")
    given = [product, gate] if wanted == 0 else [gate, product]
    end = graph.call_function(aten.threshold_backward.default, (*given, threshold))
    graph.output((end,))
    return product, gate, end


def test_relus_backward_is_a_mask_where_the_kernel_reads_its_layout():
    product, gate, end = backward((3, 5))
    found = epilogue_of(product, fits_mask=lambda value: value.shape == (3, 5))
    assert (found.taken, found.mask, found.activation) == ((end,), gate, "none")
    assert epilogue_of(product).taken == ()
    for other in (backward((3, 1)), backward((3, 5), threshold=1), backward((3, 5), wanted=1)):
        assert epilogue_of(other[0], fits_mask=lambda value: value.shape == (3, 5)).taken == ()


@pytest.mark.parametrize(
    ("args", "window"),
    [
        (([2, 2],), (2, 2)),
        (([3, 2], [3, 2]), (3, 2)),
        (([2],), (2, 2)),
        (([2, 2], [2, 1]), None),
        (([2, 2], [2, 2], [1, 1]), None),
        (([2, 2], [2, 2], [0, 0], [2, 1]), None),
        (([2, 2], [], [0, 0], [1, 1], True), None),
    ],
)
def test_windows_next_to_each_other(args, window):
    graph = fx.Graph()
    x = graph.placeholder("x")
    for target in (aten.max_pool2d.default, aten.max_pool2d_with_indices.default):
        assert pool_window(graph.call_function(target, (x, *args))) == window
    assert pool_window(graph.call_function(aten.relu.default, (x,))) is None
