"""The update fused into the product of its gradient, against torch.optim in double precision."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hotloop
from hotloop import kernels
from hotloop.kernels import calls
from hotloop.kernels.binding import UpdateRule
from hotloop.kernels.update_scalars import COLUMNS
from hotloop.step.updates import Update, reason_outside
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
    "nadam": lambda p: torch.optim.NAdam(p, lr=LR, eps=1e-3, weight_decay=0.1),
    "nadamw": lambda p: torch.optim.NAdam(
        p, lr=LR, eps=1e-3, weight_decay=0.1, decoupled_weight_decay=True, momentum_decay=0.1
    ),
    "radam": lambda p: torch.optim.RAdam(p, lr=LR, eps=1e-3, weight_decay=0.1),
    "radamw": lambda p: torch.optim.RAdam(
        p, lr=LR, eps=1e-3, weight_decay=0.1, decoupled_weight_decay=True, betas=(0.9, 0.99)
    ),
    "adamax": lambda p: torch.optim.Adamax(p, lr=LR, eps=1e-3, weight_decay=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0, eps=1e-3, weight_decay=0.1),
}
NAMES = (
    "momentum_buffer", "exp_avg", "exp_avg_sq", "exp_inf", "square_avg", "acc_delta", "sum"
)  # fmt: skip
sides = st.integers(1, 200)


def rule_of(optimizer, weight, steps_done):
    update = Update(optimizer, [weight], used=[0])
    update.bind()
    (row,) = update.rows(steps_done, 1, None)[0].tolist()
    return rule_from(row)


def rule_from(row):
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


@pytest.mark.parametrize("calls_of", [[10], [1] * 10, [3, 7]])
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_ten_steps_are_torchs(name: str, calls_of: list[int]) -> None:
    draw = torch.Generator().manual_seed(5)
    weight = torch.randn(40, 30, generator=draw).requires_grad_()
    exact = weight.detach().double().requires_grad_()
    optimizer, its_optimizer = (OPTIMIZERS[name]([w]) for w in (weight, exact))
    update = Update(optimizer, [weight], used=[0])
    gradients = torch.randn(10, 40, 30, generator=draw)
    gradients[:, 0] = 0
    done = 0
    for count in calls_of:
        states, counters, first = update.bind()
        if counters:
            assert first == done
        tables = update.rows(max(first, done), count)
        for row, gradient in zip(tables, gradients[done : done + count], strict=True):
            rule = rule_from(row[0].tolist())
            calls.update(weight, gradient, states, rule)()
            for counter in counters:
                counter += 1
        update.advance(done, count)
        done += count
    for gradient in gradients:
        exact.grad = gradient.double()
        its_optimizer.step()
    torch.testing.assert_close(weight.detach().double(), exact.detach(), rtol=1e-5, atol=1e-5)
    state, its_state = optimizer.state[weight], its_optimizer.state[exact]
    kept = {key for key, value in its_state.items() if value is not None}
    assert {key for key, value in state.items() if value is not None} == kept
    for key in kept:
        assert state[key].shape == its_state[key].shape
        torch.testing.assert_close(
            state[key].double(), its_state[key].double(), rtol=1e-5, atol=1e-6
        )


def test_rules_that_are_not_in_the_graph_say_so() -> None:
    weights = [torch.zeros(2, requires_grad=True)]
    assert reason_outside(torch.optim.NAdam(weights)) is None
    assert reason_outside(torch.optim.ASGD(weights)) == "ASGD keeps its own step"
    reason = reason_outside(torch.optim.RAdam(weights, maximize=True))
    assert reason == "RAdam with maximize=True keeps its own step"


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


@pytest.mark.parametrize("momenta", [(0.0, 0.9), (0.9, 0.0), (0.9, 0.5)])
def test_momentum_that_comes_goes_or_changes_between_two_steps(momenta) -> None:
    model = torch.nn.Linear(8, 3)
    twin = copy.deepcopy(model)
    first, later = momenta
    optimizer, plain = (torch.optim.SGD(m.parameters(), 0.1, first) for m in (model, twin))
    x, y = torch.randn(16, 8), torch.arange(16) % 3
    loss_fn = torch.nn.functional.cross_entropy
    step = hotloop.compile_step(model, loss_fn, optimizer, (x, y))
    for number in range(9):
        if number == 4:
            optimizer.param_groups[0]["momentum"] = plain.param_groups[0]["momentum"] = later
        step(x, y)
        plain.zero_grad()
        loss_fn(twin(x), y).backward()
        plain.step()
        torch.testing.assert_close(model.weight, twin.weight, rtol=1e-5, atol=1e-6)
    assert step.path == "compiled", step.reason
