"""The loop over a program of calls: what it runs is what the calls would do one by one."""

import pytest
import torch

from hotloop import kernels
from hotloop.errors import RunError
from hotloop.kernels import binding, calls
from hotloop.kernels.instructions import Instructions
from hotloop.step.updates import Update

if not kernels.is_available():
    pytest.skip(kernels.unavailable_reason(), allow_module_level=True)

RULE = binding.UpdateCall.rule.offset


class Layer:
    """gradient = left^T right, then Adam: two calls, and the scalars of each step."""

    def __init__(self, rows=33, depth=20, cols=17):
        draw = torch.Generator().manual_seed(0)
        self.left = torch.zeros(depth, rows)
        self.right = torch.randn(depth, cols, generator=draw)
        self.weight = torch.randn(rows, cols, generator=draw)
        self.states = [torch.zeros(rows, cols) for _ in range(2)]
        self.gradient = torch.zeros(rows, cols)
        made = torch.optim.Adam([self.weight.clone().requires_grad_()], lr=0.1)
        self.tables = Update(made, []).rows(0, 5, [[0.1], [0.05], [0.2], [0.01], [0.3]])
        self.product = calls.product(self.left.t(), self.right, self.gradient)
        self.update = calls.update(self.weight, self.gradient, self.states, binding.UpdateRule())
        self.lefts = torch.randn(5, depth, rows, generator=draw)

    def written(self):
        return [self.weight, self.gradient, *self.states]

    def program(self, **options):
        inputs = [(self.left, self.left.nbytes)]
        return Instructions(
            [self.product, self.update], [None, (RULE, 0)], inputs=inputs, **options
        )


def run_one_by_one(layer, steps):
    for step in range(steps):
        layer.left.copy_(layer.lefts[step])
        layer.product()
        columns = [name for name, *_ in binding.ControlRow._fields_ if name != "unused"]
        values = dict(zip(columns, layer.tables[step, 0].tolist(), strict=False))
        values |= {name: int(values[name]) for name in ("kind", "first_step")}
        calls.update(layer.weight, layer.gradient, layer.states, binding.UpdateRule(**values))()


def test_equals_the_same_calls_made_one_by_one():
    run, single = Layer(), Layer()
    losses, counters = torch.full((5,), -1.0), [torch.tensor(3.0), torch.tensor(7.0)]
    program = run.program(loss=run.gradient, counters=counters)
    program.run([run.lefts], 5, tables=run.tables, losses=losses)
    run_one_by_one(single, 5)
    for one, other in zip(run.written(), single.written(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(run.weight, Layer().weight)
    assert [float(c) for c in counters] == [8, 12]
    wanted = [(left.t() @ run.right)[0, 0] for left in run.lefts]
    torch.testing.assert_close(losses, torch.stack(wanted))
    assert (program.steps_done, program.failed) == (5, None)


def test_a_second_run_goes_on():
    run, single = Layer(), Layer()
    program = run.program()
    program.run([run.lefts], 2, tables=run.tables)
    program.run([run.lefts[2:]], 3, tables=run.tables[2:])
    run_one_by_one(single, 5)
    assert torch.equal(run.weight, single.weight)


def test_large_inputs_of_any_stride_and_number_of_threads():
    target = torch.zeros(600_001)
    sources = torch.randn(3, 700_000)
    for threads in (1, 2, 3):
        program = Instructions([], inputs=[(target, target.nbytes)], num_threads=threads)
        program.run([sources], 3, step_bytes=[sources.stride(0) * 4])
        assert torch.equal(target, sources[2, :600_001])
        program.run([sources], 1)
        assert torch.equal(target, sources[0, :600_001])


def failing_call():
    """An activation that a pooling with argmax does not have."""
    places = torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
    call = calls.max_pool(torch.randn(1, 1, 4, 4), torch.zeros(1, 1, 2, 2), places, kernel=(2, 2))
    call.keep[0].activation = 2
    return call


def test_an_error_in_the_middle_ends_the_run():
    layer = Layer()
    counters, losses = [torch.tensor(0.0)], torch.full((3,), -1.0)
    before = layer.weight.clone()
    program = Instructions(
        [layer.product, failing_call(), layer.update],
        [None, None, (RULE, 0)],
        loss=layer.gradient,
        counters=counters,
    )
    with pytest.raises(RunError, match="an argmax of pooling needs relu"):
        program.run((), 3, tables=layer.tables, losses=losses)
    assert (program.steps_done, program.failed) == (0, 1)
    assert float(counters[0]) == 0
    assert losses.tolist() == [-1, -1, -1]
    assert torch.equal(layer.weight, before)


def test_what_is_missing_is_an_error():
    layer = Layer()
    program = layer.program()
    with pytest.raises(ValueError, match="1 inputs must have as many sources"):
        program.run()
    with pytest.raises(ValueError, match="tables must have 6 steps and 1 groups"):
        program.run([layer.lefts], 6, tables=layer.tables)
    with pytest.raises(ValueError, match="argument 2"):
        Instructions([layer.product], [])


def test_no_steps_and_no_calls():
    program = Instructions([])
    program.run((), 3)
    assert program.steps_done == 3
    program.run((), 0)
    assert program.steps_done == 0
