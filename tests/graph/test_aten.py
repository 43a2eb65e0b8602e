"""ATen's operations are called by the way that costs least, and do the same."""

import pytest
import torch

from hotloop.graph.aten import python_function

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("op", "args", "out"),
    [
        (aten.tanh.out, (torch.randn(3, 4),), (3, 4)),
        (aten.add.out, (torch.randn(3, 4), torch.randn(4)), (3, 4)),
        (aten.sum.IntList_out, (torch.randn(3, 4), [1], True), (3, 1)),
        (aten.threshold_backward.grad_input, (torch.randn(3), torch.randn(3), 0), (3,)),
    ],
)
def test_where_there_is_a_function_it_writes_the_same(op, args, out):
    name = "grad_input" if op is aten.threshold_backward.grad_input else "out"
    wanted, made = torch.zeros(out), torch.zeros(out)
    op(*args, **{name: wanted})
    function = python_function(op, args, {name: made})
    function(*args, **{name: made})
    assert torch.equal(made, wanted)
    assert (function is op) == (name != "out")


def test_what_draws_or_writes_into_arguments_is_left_alone():
    x = torch.randn(4)
    for op, args in ((aten.bernoulli.p, (x, 0.5)), (aten.add_.Tensor, (x, x))):
        assert python_function(op, args, {}) is op
    state = torch.get_rng_state()
    python_function(aten.bernoulli.p, (x, 0.5), {})
    assert torch.equal(state, torch.get_rng_state())


def test_the_copy_of_a_layout_keeps_it():
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    function = python_function(aten.clone.default, (x,), {})
    assert function(x).stride() == aten.clone.default(x).stride()
