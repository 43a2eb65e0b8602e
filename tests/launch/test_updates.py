"""Updates by hotloop's kernel are torch's to rounding, and only where torch's rule is known."""

import copy
import importlib

import pytest
import torch

from hotloop import kernels
from hotloop.launch import optimizer, updates
from hotloop.launch.choice import Choice


@pytest.fixture
def replaced(monkeypatch):
    """The replacements, always hotloop's; counted."""
    if not kernels.is_available():
        pytest.skip(kernels.unavailable_reason())
    monkeypatch.setattr(Choice, "next", lambda self: True)
    updates.install()
    optimizer.updates.calls = optimizer.updates.fused = 0
    yield optimizer.updates
    updates.remove()


def train(kind, steps=20, **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 5)
    )  # fmt: skip
    x = torch.randn(64, 20)
    y = (x[:, :5] * 2).argmax(1)
    made = kind(model.parameters(), **options)
    losses = []
    for _ in range(steps):
        made.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        made.step()
        losses.append(loss.item())
    return model, made, losses


RULES = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.01}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "dampening": 0.3}),
    (torch.optim.Adadelta, {"lr": 1.0}),
    (torch.optim.Adadelta, {"lr": 0.5, "rho": 0.8, "weight_decay": 0.1}),
    (torch.optim.RMSprop, {"lr": 0.01}),
    (torch.optim.RMSprop, {"lr": 0.01, "alpha": 0.9, "weight_decay": 0.1}),
    (torch.optim.Adagrad, {"lr": 0.1}),
    (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.1}),
]


@pytest.mark.parametrize(("kind", "options"), RULES)
def test_the_same_losses_and_state(replaced, kind, options):
    model, made, losses = train(kind, **options)
    # SGD makes its momentum itself in the first step.
    assert replaced.fused == (19 if kind is torch.optim.SGD else 20)
    updates.remove()
    plain_model, plain, expected = train(kind, **options)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    for found, wanted in zip(model.parameters(), plain_model.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    a, b = made.state_dict(), plain.state_dict()
    assert a["param_groups"] == b["param_groups"]
    for key in b["state"]:
        assert a["state"][key].keys() == b["state"][key].keys()
        for name, value in b["state"][key].items():
            torch.testing.assert_close(a["state"][key][name], value, rtol=1e-4, atol=1e-6)
    plain.load_state_dict(copy.deepcopy(a))
    plain.step()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {"lr": 0.1}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "foreach": True}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "fused": False}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "maximize": True}),
        (torch.optim.RMSprop, {"centered": True}),
        (torch.optim.RMSprop, {"momentum": 0.9}),
        (torch.optim.Adadelta, {"differentiable": False, "foreach": False}),
        (torch.optim.Adagrad, {"lr": torch.tensor(0.1)}),
    ],
)
def test_what_is_left_to_torch(replaced, kind, options):
    train(kind, steps=3, **options)
    assert (replaced.calls, replaced.fused) == (0, 0)


@pytest.mark.parametrize("kind", [torch.optim.Adadelta, torch.optim.RMSprop])
def test_gradients_laid_out_otherwise_and_other_types(replaced, kind):
    weights = [torch.nn.Parameter(torch.randn(6, 4)), torch.nn.Parameter(torch.randn(3).double())]
    for weight in weights:
        made = kind([weight])
        weight.grad = torch.ones(weight.shape[::-1], dtype=weight.dtype).t()
        made.step()
    assert replaced.fused == 0


def test_autograd_notices_the_change(replaced):
    weight = torch.nn.Parameter(torch.ones(3))
    made = torch.optim.RMSprop([weight])
    loss = (weight * weight).sum()
    loss.backward(retain_graph=True)
    made.step()
    assert replaced.fused == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_both_ways_are_tried_and_the_faster_one_stays():
    choice = Choice()
    taken = []
    for _ in range(63):
        ours = choice.next()
        taken.append(ours)
        choice.note(ours, 2.0 if ours else 1.0)
    assert taken[:6] == [True, False] * 3
    assert not any(taken[6:])
    assert not choice.fastest
    later = []
    for _ in range(200):
        ours = choice.next()
        later.append(ours)
        choice.note(ours, 0.5 if ours else 1.0)
    assert later[:6] == [True, False, True, False, True, True]  # Looked at again at call 64.
    assert later.count(False) == 4  # And at call 256.
    assert choice.fastest


def test_they_are_torchs_again_afterwards():
    if not kernels.is_available():
        pytest.skip(kernels.unavailable_reason())
    modules = [importlib.import_module(f"torch.optim.{n}") for n in ("sgd", "adadelta", "adagrad")]
    before = [getattr(m, m.__name__.rpartition(".")[2]) for m in modules]
    updates.install()
    updates.install()
    updates.remove()
    updates.remove()
    assert before == [getattr(m, m.__name__.rpartition(".")[2]) for m in modules]
