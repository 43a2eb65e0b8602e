"""The update fused into the product of its gradient, against torch.optim in double precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hotloop import kernels
from hotloop.kernels import calls
from hotloop.kernels.binding import UpdateRule
from hotloop.step.updates import COLUMNS, Update
from support import examples

if not kernels.is_available():
    pytest.skip(kernels.unavailable_reason(), allow_module_level=True)

LR = 0.05
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=LR, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, dampening=0.2),
    "nesterov": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.8, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=LR, eps=1e-3, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=LR, eps=1e-3, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=LR, eps=1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=LR, eps=1e-3, lr_decay=0.01),
}
NAMES = ("momentum_buffer", "exp_avg", "exp_avg_sq", "square_avg", "sum")
sides = st.integers(1, 200)


def rule_of(optimizer, weight, steps_done):
    update = Update(optimizer, [weight])
    update.bind()
    (row,) = update.rows(steps_done, 1, None)[0].tolist()
    values = dict(zip(COLUMNS, row, strict=False))
    return UpdateRule(**values | {n: int(values[n]) for n in ("kind", "first_step")})


def fused(rule, a, b, w, states, *, threads, kept=None):
    calls.product_update(a, b, w, states, rule, gradient=kept, num_threads=threads)()


@settings(max_examples=examples(80), deadline=None)
@given(
    name=st.sampled_from(sorted(OPTIMIZERS)), m=sides, k=st.integers(1, 100), n=sides,
    threads=st.integers(1, 3), padding=st.integers(0, 3), keep=st.booleans(),
)  # fmt: skip
def test_a_fused_update_is_torchs(
    name: str, m: int, k: int, n: int, threads: int, padding: int, keep: bool
) -> None:
    draw = torch.Generator().manual_seed(m * 7919 + k * 31 + n)
    weight = torch.randn(m, n, generator=draw, dtype=torch.float64).requires_grad_()
    optimizer = OPTIMIZERS[name]([weight])
    for _ in range(2):
        weight.grad = torch.randn(m, n, generator=draw, dtype=torch.float64)
        optimizer.step()
    a, b = torch.randn(k, m, generator=draw).t(), torch.randn(k, n, generator=draw)

    def laid_out(value):
        return torch.empty(m, n + padding).fill_(-7)[:, :n].copy_(value)

    ours = laid_out(weight.detach())
    state = optimizer.state[weight]
    states = [laid_out(state[key]) for key in NAMES if key in state]
    kept = torch.empty(m, n + padding)[:, :n] if keep else None
    rule = rule_of(optimizer, weight, 2.0)
    again = [t.clone() if not padding else laid_out(t) for t in (ours, *states)]
    fused(rule, a, b, ours, states, threads=threads, kept=kept)
    fused(rule, a, b, again[0], again[1:], threads=4 - threads)
    weight.grad = a.double() @ b.double()
    optimizer.step()
    expected = [weight.detach(), *(state[key] for key in NAMES if key in state)]
    for mine, theirs in zip((ours, *states), expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4)
    # A result does not depend on the number of threads.
    assert all(map(torch.equal, (ours, *states), again))
    if kept is not None:
        torch.testing.assert_close(kept.double(), weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2])
def test_moments_that_have_faded_are_zero_and_arithmetic_elsewhere_is_as_before(
    threads: int,
) -> None:
    weight = torch.ones(64, 64, requires_grad=True)
    optimizer = torch.optim.Adam([weight])
    rule = rule_of(optimizer, weight, 2000.0)
    faded = torch.full((64, 64), 1e-40)
    w, m, v = torch.ones(64, 64), faded.clone(), faded.clone()
    fused(rule, torch.zeros(64, 8), torch.zeros(8, 64), w, [m, v], threads=threads)
    assert not m.any()
    assert not v.any()
    assert torch.equal(w, torch.ones(64, 64))
    none = torch.zeros(4096)
    alone = [torch.ones(4096), torch.full((4096,), 1e-40), torch.full((4096,), 1e-40)]
    calls.update(alone[0], none, alone[1:], rule, num_threads=threads)()
    assert not alone[1].any()
    assert not alone[2].any()
    # The processor's mode was put back, in this thread and in the pool's.
    assert (torch.full((100_000,), 1e-40) * 0.5).all()
