"""What a recording refuses, when two are the same step, and that its graph computes what ran."""

import re

import numpy
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from hotloop.graph.compare import difference
from hotloop.graph.from_recording import graph_of
from hotloop.graph.lower import lower
from hotloop.graph.program import Program
from hotloop.graph.recording import Recorder


def recorded(step, batch, weights=()):
    """A recording of ``step(*batch)``, whose loss it gives, and the recorder."""
    recorder = Recorder({"weight": list(weights), "batch": list(batch)})
    for weight in weights:
        weight.grad = None
    with recorder:
        loss = step(*batch)
        if loss.requires_grad:
            loss.backward()
    recording = recorder.recording
    recording.loss = recorder.ref(loss.detach())
    recording.gradients = [None if w.grad is None else recorder.ref(w.grad) for w in weights]
    return recording, recorder


def refusal(step, *batch):
    return recorded(step, batch)[1].refusal


class Tagged(torch.Tensor):
    pass


def writes_into_its_batch(x):
    x.add_(1.0)
    return x.sum()


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (lambda x: x.sum() * x.max().item(), "reads a tensor's value"),
        (lambda x: x.sum() * float(x[0, 0]), "reads a tensor's value"),
        (lambda x: x.sum() if x.sum() > 0 else -x.sum(), "reads a tensor's value"),
        (lambda x: torch.from_numpy(x.numpy() + 1).sum(), "reads a tensor's value (numpy)"),
        (lambda x: torch.tensor(x.tolist()).sum(), "reads a tensor's value (tolist)"),
        (lambda x: torch.tensor(numpy.asarray(x)).sum(), "reads a tensor's value"),
        (lambda x: x.sum() * torch.equal(x, x), "reads a tensor's value"),
        (lambda x: x.nonzero().float().sum(), "depends on the data"),
        (lambda x: x[x > 0].sum(), "depends on the data"),
        (lambda x: torch.unique(x).sum(), "depends on the data"),
        (writes_into_its_batch, "writes into its batch"),
        (lambda x: x[0].zero_().sum(), "writes into its batch"),
        (lambda x: torch.exp(x, out=x).sum(), "writes into its batch"),
    ],
)  # fmt: skip
def test_what_no_program_can_do_again_is_refused_with_its_line(step, reason):
    told = refusal(step, torch.randn(4, 3))
    assert told is not None
    assert reason in told
    assert re.match(r"test_recording\.py:\d+", told)


def test_a_subclass_of_tensor_is_refused():
    assert "Tagged" in refusal(lambda x: (x * 2).sum(), torch.randn(3).as_subclass(Tagged))


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x[torch.tensor([0, 2])].sum(),
        lambda x: x[:, torch.arange(2)].sum(),
        lambda x: torch.where(x > 0, x, 0.0).sum(),
        lambda x: x.masked_fill(x > 0, 1.0).sum(),
        lambda x: x.sort(1).values[:, 0].sum(),
        lambda x: x.sum() * len(x) / x.shape[1],
    ],
)
def test_what_has_a_shape_of_its_own_is_not_refused(step):
    assert refusal(step, torch.randn(4, 3)) is None


def told_of(step, *batch):
    first, second = (recorded(step, batch)[0] for _ in range(2))
    return difference(first, second)


class Calls:
    def __init__(self):
        self.count = 0

    def __call__(self):
        self.count += 1
        return self.count


def test_recordings_that_differ_are_told_with_the_line():
    count = Calls()
    told = told_of(lambda x: (x * count()).sum(), torch.randn(3))
    assert re.match(r"test_recording\.py:\d+: aten.mul.Tensor gets 1 in one step and 2", told)
    count = Calls()
    told = told_of(lambda x: x.relu().sum() if count() == 1 else x.tanh().sum(), torch.randn(3))
    assert "is aten.relu.default in one step and aten.tanh.default in the next" in told
    count = Calls()
    told = told_of(lambda x: x.sum() if count() == 1 else x.sum() + 1, torch.randn(3))
    assert "is called in one step and not in the next" in told
    assert told_of(lambda x: (x * 2).relu().sum(), torch.randn(3)) is None


def test_random_numbers_of_torch_are_no_difference_and_those_of_python_are():
    assert told_of(lambda x: F.dropout(x, 0.5).sum(), torch.randn(3)) is None
    draws = iter([0.25, 0.75])
    assert "0.25" in told_of(lambda x: (x * next(draws)).sum(), torch.randn(3))


def test_a_tensor_from_outside_is_a_constant_while_it_is_the_same():
    table = torch.randn(5000)
    assert told_of(lambda x: (x * table).sum(), torch.randn(5000)) is None
    # Written between two steps.
    told = told_of(lambda x: (x * table.add_(1.0)).sum(), torch.randn(5000))
    assert "differs from step to step" in told
    one, other = (recorded(lambda x: (x * table).sum(), [torch.randn(5000)])[0] for _ in range(2))
    assert difference(one, other) is None
    table.mul_(2.0)
    third = recorded(lambda x: (x * table).sum(), [torch.randn(5000)])[0]
    assert "differs from step to step" in difference(other, third)


def test_a_tensor_made_anew_is_a_constant_if_it_is_small_and_says_the_same():
    assert told_of(lambda x: (x * torch.from_numpy(numpy.ones(3))).sum(), torch.randn(3)) is None
    draws = numpy.random.default_rng(0)
    told = told_of(lambda x: (x * torch.from_numpy(draws.random(3))).sum(), torch.randn(3))
    assert "no operation of the step made differs" in told


# ---- Graphs -----------------------------------------------------------------------------------


def first_column(x):
    x = x * 2
    x[:, 0] = 1
    return x


def views_of_views(x):
    x = x + 1
    row = x.view(-1)[3:9].view(2, 3)
    row[0].mul_(3.0)
    x.t()[1].add_(row.sum())
    return x


def copied(x):
    out = torch.empty_like(x)
    out.copy_(x * 3)
    other = torch.zeros(4, 3)
    other[1:].copy_(out[:-1])
    return out + other


def turned_in_place(x):
    x = (x * 2).transpose_(0, 1)
    x.unsqueeze_(0).squeeze_(0)
    return x.add_(1.0)[1]


def parts(x):
    a, b, c = torch.unsafe_split(x * 2, 1, 1)
    a.add_(b)
    return torch.stack([a, b, c.sigmoid_()]).chunk(3)[2] * a


def strided(x):
    x = x * 2
    return torch.as_strided(x, (2, 2), (3, 1), 4) + torch.as_strided(x, (2, 2), (1, 1), 1)


def filled(x):
    out = torch.zeros(4, 3)
    out[0] += x[0]
    out.view(-1)[4:].add_(1.0)
    return out


def seen_later(x):
    """A value is read before and after it is written."""
    y = x * 2
    before = y.exp()
    y += 1
    return before + y.exp()


def residual(x):
    y = F.relu_(x - 0.1)
    y = y + x
    y.add_(x.tanh())
    return y


@pytest.mark.parametrize(
    "step",
    [
        first_column, views_of_views, copied, turned_in_place, parts, strided, filled, seen_later,
        residual, lambda x: x[1:].clone().clamp_(max=0.5), lambda x: x.flip(0)[::2].t(),
        lambda x: torch.cat([x, x * 2])[3:6].view(9)[2:7], lambda x: x.detach().relu(),
        lambda x: (x * 2).index_put_((torch.tensor([1]),), torch.zeros(3)),
        lambda x: x[torch.tensor([2, 0])].exp(), lambda x: (x * 1).fill_(2.0) * x,
    ],
)  # fmt: skip
def test_a_graph_computes_what_ran(step):
    def loss(x):
        return (step(x) * 1.5).sum()

    torch.manual_seed(0)
    pool = torch.randn(40, 3)
    recording, recorder = recorded(loss, [pool[8:12]])
    assert recorder.refusal is None
    program = program_of(recording)
    for begin in (0, 8, 30):
        x = pool[begin : begin + 4]
        # The second time what the first one left in memory must not count.
        for _ in range(2):
            assert torch.equal(program.run([x], None)[0], loss(x)), step


def program_of(recording, weights=()):
    found = graph_of(recording)
    tensors = {"weight": weights, "constant": [tensor for tensor, _ in found.constants]}
    inputs = [None if kind == "batch" else tensors[kind][n].detach() for kind, n in found.inputs]
    return Program(lower(found.graph, inputs, 1), [])


def test_two_parts_of_one_tensor_are_a_batch():
    tokens = torch.randn(50)

    def loss(x, y):
        return (x * y).sum() + y.view(2, 4)[1].sum() + x.as_strided((2,), (3,)).sum()

    recording, _ = recorded(loss, [tokens[0:8], tokens[1:9]])
    program = program_of(recording)
    for at in (0, 5, 20):
        x, y = tokens[at : at + 8], tokens[at + 1 : at + 9]
        expected = (x * y).sum() + y.view(2, 4)[1].sum() + x[0] + x[3]
        torch.testing.assert_close(program.run([x, y], None)[0], expected)


def test_recording_keeps_no_memory():
    seen = []

    def loss(x):
        for _ in range(3):
            x = x * 2
            seen.append(StorageWeakRef(x.untyped_storage()))
        return x.sum()

    recording, recorder = recorded(loss, [torch.randn(4, 3)])
    assert all(storage.expired() for storage in seen)
    # And what lies at the same addresses later has another name.
    results = [entry.results.storage for entry in recorder.recording.entries]
    assert len(set(results)) == len(results)
    assert recording.loss is not None


def test_samples_and_targets_may_lie_anywhere_in_one_buffer():
    """As a run's buffers have them: how far apart they are changes from step to step."""
    buffer = torch.zeros(4096, dtype=torch.uint8)
    samples, targets = (
        buffer[:2400].view(torch.float32).view(50, 12),
        buffer[2400:].view(torch.int64),
    )
    samples.uniform_(), targets.random_(12)

    def loss(x, y):
        return F.cross_entropy(x, y) + x.detach()[1].sum()

    first, second, third = (
        recorded(loss, [samples[at : at + 5], targets[to : to + 5]])[0]
        for at, to in ((0, 0), (5, 7), (20, 1))
    )
    assert difference(first, second) is None
    assert difference(first, third) is None
    program = program_of(first)
    for at, to in ((3, 9), (40, 2)):
        x, y = samples[at : at + 5], targets[to : to + 5]
        torch.testing.assert_close(program.run([x, y], None)[0], loss(x, y))


def test_weights_that_are_parts_of_one_tensor():
    flat = torch.randn(24)
    weights = [nn.Parameter(flat[:12].view(4, 3)), nn.Parameter(flat[12:].view(4, 3))]

    def loss(x):
        return ((x @ weights[0].t()) * (x @ weights[1].t())[:, :1]).sum()

    x = torch.randn(5, 3)
    recording, _ = recorded(loss, [x], weights)
    program = program_of(recording, weights)
    torch.testing.assert_close(program.run([x], None)[0], loss(x).detach())


def test_gradients_are_outputs_of_the_graph():
    layer = nn.Linear(3, 4)
    recording, _ = recorded(lambda x: layer(x).square().sum(), [torch.randn(5, 3)], [layer.weight])
    found = graph_of(recording)
    assert [g.meta["val"].shape for g in found.gradients] == [layer.weight.shape]
    assert ("weight", 0) in found.inputs
    assert found.movable
