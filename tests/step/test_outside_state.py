"""State that neither attributes nor containers hold, changed between two steps."""

import array
import collections
import contextvars
import ctypes
import itertools
import multiprocessing
import os
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hotloop
from hotloop import kernels
from support.kernel_choice import torchs_kernels

if not kernels.is_available():
    pytest.skip(kernels.unavailable_reason(), allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def nothing_is_timed():
    with torchs_kernels():
        yield


FLAG = contextvars.ContextVar("flag", default=1.0)
LOCAL = threading.local()


class Net(nn.Module):
    """What it holds is read, as ``gain`` says, and changed, as ``change`` says."""

    def __init__(self, held, gain):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)
        self.held, self.gain = held(), gain

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)) * self.gain(self))


def function_with_an_attribute():
    def gain():
        return gain.value

    gain.value = 1.0
    return gain


def set_first(values):
    values[0] = 0.5


# What is held; how it is read; how it changes.
KINDS = {
    "context variable": (
        lambda: FLAG, lambda m: m.held.get(), lambda m: FLAG.set(0.5)),
    "thread": (
        lambda: setattr(LOCAL, "gain", 1.0), lambda m: LOCAL.gain,
        lambda m: setattr(LOCAL, "gain", 0.5)),
    "environment": (
        lambda: None, lambda m: float(os.environ.get("HOTLOOP_GAIN", "1")),
        lambda m: os.environ.update(HOTLOOP_GAIN="0.5")),
    "getenv": (
        lambda: None, lambda m: float(os.getenv("HOTLOOP_GAIN", "1")),
        lambda m: os.environ.update(HOTLOOP_GAIN="0.5")),
    "function": (
        function_with_an_attribute, lambda m: m.held(), lambda m: setattr(m.held, "value", 0.5)),
    "user dict": (
        lambda: collections.UserDict(g=1.0), lambda m: m.held["g"],
        lambda m: m.held.update(g=0.5)),
    "chain of dicts": (
        lambda: collections.ChainMap({}, {"g": 1.0}), lambda m: m.held["g"],
        lambda m: m.held.update(g=0.5)),
    "array": (
        lambda: array.array("d", [1.0]), lambda m: m.held[0], lambda m: set_first(m.held)),
    "memory of C": (
        lambda: ctypes.c_double(1.0), lambda m: m.held.value,
        lambda m: setattr(m.held, "value", 0.5)),
    "shared memory": (
        lambda: multiprocessing.Value("d", 1.0), lambda m: m.held.value,
        lambda m: setattr(m.held, "value", 0.5)),
    "attribute of a parameter": (
        lambda: None, lambda m: getattr(m.a.weight, "gain", 1.0),
        lambda m: setattr(m.a.weight, "gain", 0.5)),
    "iterator": (
        lambda: iter([1.0] * 5 + [0.5] * 10), lambda m: next(m.held), lambda m: None),
    "counter": (
        itertools.count, lambda m: 1.0 if next(m.held) < 5 else 0.5, lambda m: None),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    monkeypatch.setenv("HOTLOOP_GAIN", "1")
    token = FLAG.set(1.0)
    yield
    FLAG.reset(token)


def another_step(model, optimizer):
    """A step of the user's own around the optimizer's."""
    own = optimizer.step

    def step(closure=None):
        own()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)

    optimizer.step = step


def losses_of(kind, make, change, *, own_step_at=None):
    held, gain, _ = KINDS[kind]
    torch.manual_seed(0)
    model = Net(held, gain)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step, losses = None, []
    for number in range(8):
        if number == own_step_at:
            another_step(model, optimizer)
        step = step or make(model, optimizer)
        if number == 5:
            change(model)
        draw = torch.Generator().manual_seed(number)
        x, y = torch.randn(6, 8, generator=draw), torch.randint(0, 3, (6,), generator=draw)
        losses.append(float(step(x, y)))
    return losses, step


def plain(model, optimizer):
    def step(x, y):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def recorded(model, optimizer):
    example = torch.randn(6, 8), torch.randint(0, 3, (6,))
    return hotloop.compile_step(model, F.cross_entropy, optimizer, example)


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_counts(kind, monkeypatch):
    change = KINDS[kind][2]
    expected, _ = losses_of(kind, plain, change)
    FLAG.set(1.0)
    monkeypatch.setenv("HOTLOOP_GAIN", "1")
    losses, step = losses_of(kind, recorded, change)
    assert losses == pytest.approx(expected, rel=1e-5)
    if kind in ("iterator", "counter"):
        assert step.reason == "a step may take the next value of attribute held of the model (Net)"
    else:
        assert step.path == "compiled", step.reason


@pytest.mark.parametrize("at", [0, 5])
def test_a_step_of_the_users_own_is_made(at):
    expected, _ = losses_of("thread", plain, lambda model: None, own_step_at=at)
    losses, step = losses_of("thread", recorded, lambda model: None, own_step_at=at)
    assert losses == pytest.approx(expected, rel=1e-5)
    if at == 0:
        assert "the step of this SGD is not torch's" in step.reason
