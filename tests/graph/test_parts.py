"""Writes into parts of a temporary: new values where nobody can tell, else as recorded."""

import pytest
import torch

from hotloop.graph.from_recording import _overlap, graph_of
from hotloop.graph.lower import lower
from hotloop.graph.program import Program
from hotloop.graph.recording import Recorder, TensorRef


def graph_and_program(step, x):
    recorder = Recorder({"batch": [x]})
    with recorder:
        loss = step(x)
    assert recorder.refusal is None
    recorder.recording.loss = recorder.ref(loss)
    graph = graph_of(recorder.recording)
    return graph, Program(lower(graph.graph, [None], 1), [])


def gates(x):
    a, b, c = (x @ x.t()).unsafe_chunk(3, 1)
    return (a.add_(b).sigmoid_() * c.tanh_() + b.mul_(2)).sum()


def whole_is_read(x):
    y = x * 2
    y[:, 1].add_(1)
    return y.sum()


def whole_is_read_before(x):
    y = x * 2
    total = y.sum()
    y[:, 1].mul_(0)
    return total + y[:, 1].sum()


def filled(x):
    y = x * 2
    total = y.exp().sum()
    y[:, 1].copy_(x[:, 0])
    return total + y[:, 1].sum() + y[:, 2].sum()


def overlapping(x):
    y = x * 2
    y[:, :4].mul_(3)
    y[:, 2:].mul_(5)
    return y[:, 2:].sum()


def written_twice(x):
    y = x * 2
    y[1:3].mul_(3)
    y[1:3].add_(1)
    return y[1:3].sum() + y[3:].sum() + y[:1].sum()


def through_a_view(x):
    y = x * 2
    part = y[1:3]
    part.mul_(3)
    part.view(-1).add_(1)
    return part.sum()


def drawn(x):
    y = x * 2
    y[:, 1].bernoulli_(0.5)
    return y.sum()


STEPS = [
    gates, whole_is_read, whole_is_read_before, filled, overlapping, written_twice, through_a_view,
    drawn,
]  # fmt: skip


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_is_what_was_recorded(step):
    torch.manual_seed(0)
    _, program = graph_and_program(step, torch.randn(6, 6))
    for seed in range(3):
        x = torch.randn(6, 6)
        torch.manual_seed(seed)
        found = program.run([x], None)[0]
        torch.manual_seed(seed)
        assert torch.equal(found, step(x))


def test_parts_that_nobody_sees_as_a_whole_are_values():
    graph, _ = graph_and_program(gates, torch.randn(6, 6))
    assert graph.movable
    graph, _ = graph_and_program(whole_is_read, torch.randn(6, 6))
    assert not graph.movable


@pytest.mark.parametrize("seed", range(200))
def test_overlap_is_never_missed(seed):
    draw = torch.Generator().manual_seed(seed)

    def number(most):
        return int(torch.randint(0, most + 1, (), generator=draw))

    def part():
        dims = 1 + number(1)
        size = tuple(1 + number(3) for _ in range(dims))
        stride = (1 + number(8), 1 + number(2))[-dims:]
        return TensorRef(0, number(12), size, stride, torch.float32)

    def elements(ref):
        found = {ref.offset}
        for n, s in zip(ref.size, ref.stride, strict=True):
            found = {at + i * s for at in found for i in range(n)}
        return found

    one, other = part(), part()
    other = TensorRef(0, other.offset, one.size, one.stride, torch.float32) if seed % 2 else other
    if elements(one) & elements(other):
        assert _overlap(one, other)


def test_neighbouring_columns_do_not_overlap():
    one, other = (TensorRef(0, at, (64, 128), (384, 1), torch.float32) for at in (0, 128))
    assert not _overlap(one, other)
    assert not _overlap(other, one)
