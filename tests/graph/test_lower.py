"""Graphs as instructions: passes change no result, values go when nobody needs them any more."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hotloop import kernels
from hotloop.graph import convolutions, copies, operators, pooling, routes
from hotloop.graph.from_recording import graph_of
from hotloop.graph.late import Late
from hotloop.graph.lower import lower
from hotloop.graph.program import Program
from hotloop.graph.recording import Recorder
from hotloop.graph.routes import Route
from support.beside_plain import called, learns_as_in_plain_pytorch

needs_kernels = pytest.mark.skipif(not kernels.is_available(), reason="no kernels here")
PASSES = {
    "pooling": (pooling, "fuse"),
    "products": (routes, "route"),
    "convolutions": (convolutions, "route"),
    "copies": (copies, "remove"),
    "updates in products": (operators, "fuse"),
}


@pytest.fixture
def own(monkeypatch):
    """hotloop's kernels wherever they can be used: here no clock decides."""
    for module in (routes, convolutions):
        monkeypatch.setattr(module, "fastest", lambda work: Route("hotloop", {"hotloop": 1.0}))


class Network(nn.Module):
    """Something for each pass to do."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.hidden, self.head = nn.Linear(8 * 9, 24), nn.Linear(24, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.second(F.relu(self.first(x)))), 2)
        return self.head(F.relu(self.hidden(x.flatten(1))))


def trained():
    torch.manual_seed(0)
    step, _ = learns_as_in_plain_pytorch(Network(), torch.rand(12, 1, 8, 8), lr=0.1)
    return step


@needs_kernels
@pytest.mark.parametrize(
    "left_out", [[], ["products", "convolutions"], *([name] for name in PASSES)]
)
def test_each_pass_may_be_left_out(own, monkeypatch, left_out):
    for name in left_out:
        monkeypatch.setattr(*PASSES[name], lambda *_, **__: [])
    step = trained()  # Beside PyTorch.
    own_ones = [n for n in called(step) if str(n.target).startswith("hotloop.")]
    assert any("convolve" in str(n.target) for n in own_ones) == ("convolutions" not in left_out)
    products = [n for n in own_ones if n.target is torch.ops.hotloop.gemm.default]
    assert bool(products) == ("products" not in left_out)


def program_of(step, batch):
    """A program of ``step(*batch)``, and what it was lowered to."""
    recorder = Recorder({"batch": batch})
    with recorder:
        loss = step(*batch)
    assert recorder.refusal is None
    recorder.recording.loss = recorder.ref(loss)
    found = graph_of(recorder.recording)
    lowered = lower(found.graph, [None] * len(batch), 1)
    return Program(lowered, []), lowered


@pytest.mark.parametrize(
    "step",
    [
        lambda x: (x.exp() * 2).sum(),  # Each writes where it is told.
        lambda x: x.cumsum(0).logsumexp(1).sum(),  # None does.
        lambda x: F.mse_loss(x.relu(), x.tanh()),
        lambda x: F.smooth_l1_loss(x.relu(), x.tanh()),
        lambda x: F.huber_loss(x.relu(), x.tanh(), reduction="sum"),
        lambda x: F.binary_cross_entropy(x.sigmoid(), x.sigmoid().square()),
        lambda x: F.layer_norm(x, (6,)).std(),
        lambda x: F.gelu(x @ x.t()).amax(),
        lambda x: torch.var_mean(F.softmax(x.half().float(), 1), 1)[0].sum(),
        lambda x: x.topk(2).values.sort(0).values.prod(),
        lambda x: torch.stack([x, x.new_zeros(6, 6)]).mean((0, 1)).norm(),
        lambda x: x.new_empty(0, 6).sum() + x.sum(),
        lambda x: (x > 0).any(1).double().mean() + x.argmax(),
    ],
)
def test_atens_operations_write_where_they_are_told_or_give_tensors(step):
    torch.manual_seed(0)
    x = torch.randn(6, 6)
    program, _ = program_of(step, [x])
    for _ in range(3):
        x = torch.randn(6, 6)
        found = program.run([x], None)[0]
        expected = step(x)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def test_late_values_go_with_their_last_reader():
    made = []

    def step(x):
        for _ in range(4):
            x = x.cumsum(0) * 0.5  # A tensor of its own.
        return x.sum()

    x = torch.randn(8, 8)
    program, lowered = program_of(step, [x])
    assert lowered.late
    most = 0
    for number, instruction in enumerate(list(lowered.instructions)):

        def watched(instruction=instruction):
            instruction()
            made.append(sum(value is not None for value in lowered.late))

        lowered.instructions[number] = watched
    program = Program(lowered, [])
    assert torch.equal(program.run([x], None)[0], step(x))
    most = max(made)
    assert most <= 2
    kept = [o.place for o in lowered.outputs if isinstance(o, Late)]
    assert all(v is None for at, v in enumerate(lowered.late) if at not in kept)


def test_temporaries_share_memory():
    def step(x):
        for _ in range(10):
            x = x.exp().tanh()
        return x.sum()

    _, lowered = program_of(step, [torch.randn(1000)])
    assert 4000 <= lowered.arena_bytes <= 3 * 4096


def test_a_program_keeps_no_batch():
    x = torch.randn(1000)
    program, _ = program_of(lambda x: x.exp().sum(), [x.clone()])
    seen = weakref.ref(x)
    program.run([x], None)
    del x
    gc.collect()
    assert seen() is None


def test_many_steps_are_the_steps_one_by_one():
    program, _ = program_of(lambda x: x.exp().cumsum(0).sum(), [torch.randn(3, 4)])
    x = torch.randn(15, 4)
    one_by_one = torch.cat([program.run([part], None) for part in x.split(3)])
    assert torch.equal(program.run([x], None, 5), one_by_one)


def test_a_copied_program_is_not_needed():
    """A graph may be lowered again: where tensors of the model were replaced."""
    layer = nn.Linear(4, 4, bias=False)
    x, weight = torch.randn(2, 4), layer.weight
    recorder = Recorder({"weight": [weight], "batch": [x]})
    with recorder, torch.no_grad():
        loss = layer(x).sum()
    recorder.recording.loss = recorder.ref(loss)
    recorder.recording.gradients = [None]
    found = graph_of(recorder.recording)
    for other in (weight.detach(), torch.randn(4, 4), copy.deepcopy(weight).detach() * 2):
        tensors = [None if kind == "batch" else other for kind, _ in found.inputs]
        program = Program(lower(found.graph, tensors, 1), [])
        torch.testing.assert_close(program.run([x], None)[0], (x @ other.t()).sum())
