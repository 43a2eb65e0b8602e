"""A dry run leaves nothing behind: not in a model, a loss, their code, or the random numbers."""

import collections
import functools
import itertools
import random
import sys
import types

import numpy
import pytest
import torch
from torch import nn

import hotloop
from hotloop.memory.image_layout import preferred
from hotloop.memory.preserve import preserved

CALLS = 0
CACHE: dict = {}
SEEN = collections.deque([1])
NUMBERS = itertools.count(7)
SETTINGS = types.ModuleType("users_settings")
SETTINGS.drawn = [0.5]


@functools.lru_cache
def _mask(size):
    return torch.ones(size, size).tril()


def _scale(width):
    if width not in CACHE:
        CACHE[width] = torch.ones(width)
    SETTINGS.drawn.append(random.random())
    return CACHE[width]


class History:
    __slots__ = ("last", "shapes")

    def __init__(self):
        self.shapes, self.last = {(1, 1)}, None

    def note(self, x):
        self.shapes.add(tuple(x.shape))
        self.last = x


class Keeping(nn.Module):
    """Changes whatever a forward pass can change."""

    made = 0

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.calls, self.known, self.order, self.first = 0, {}, [1], None
        self.history, self.ids = History(), itertools.count(3)
        self.drops = numpy.random.default_rng(0)
        self.rates = numpy.zeros(3)
        self.outside = [torch.ones(8, requires_grad=True)]

    def forward(self, x):
        global CALLS
        CALLS += 1
        Keeping.made += 1
        self.calls += next(self.ids)
        self.known.setdefault(len(x), torch.arange(8.0))
        self.order.insert(0, x)
        self.first = x if self.first is None else self.first
        self.history.note(x)
        self.rates[0] = self.drops.random() + numpy.random.rand()
        SEEN.append(next(NUMBERS))
        if random.random() < 2:
            x = nn.functional.dropout(self.layer(x))
        self.added = True
        return x @ _mask(8) * _scale(8) * self.known[len(x)] * self.outside[0]


def _state(model, counter):
    return [
        CALLS, Keeping.made, dict(CACHE), list(SEEN), repr(NUMBERS), list(SETTINGS.drawn),
        set(vars(model)), model.calls, dict(model.known), list(model.order), model.first,
        set(model.history.shapes), model.history.last, repr(model.ids), model.rates.tolist(),
        model.drops.bit_generator.state, model.outside[0].grad, model.layer.weight.grad,
        torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist(),
        _mask.cache_info().currsize, counter(), model.training, hotloop_globals(),
    ]  # fmt: skip


def hotloop_globals():
    return sorted(name for name in globals() if name.startswith("LATER"))


def _counting_loss():
    count = 0

    def loss(output, target):
        nonlocal count
        global LATER
        count, LATER = count + 1, output
        return nn.functional.mse_loss(output, target)

    return loss, lambda: count


@pytest.mark.parametrize("phase", ["train", "infer"])
def test_a_prediction_changes_nothing(phase):
    sys.modules["users_settings"] = SETTINGS
    model = Keeping()
    model.register_forward_hook(lambda module, args, output: SEEN.append(output))
    loss, counter = _counting_loss()
    optimizer = torch.optim.SGD([*model.parameters(), *model.outside], lr=0.1)
    x, y = torch.randn(4, 8), torch.randn(4, 8)
    before = _state(model, counter)
    budget = hotloop.Budget.predict(model, (x, y), 16, phase, loss_fn=loss, optimizer=optimizer)
    assert budget.working_memory_bytes is not None, budget.assumptions
    assert _state(model, counter) == before
    loss(model(x), y)  # It still runs: no fake tensor is left anywhere.
    assert counter() == 1
    assert model.calls == 3


def test_laying_out_images_changes_nothing():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.calls = nn.Conv2d(1, 2, 3), 0

        def forward(self, x):
            self.calls += 1
            return self.layer(x) * random.random()

    model, state = Counting(), random.getstate()
    preferred(model, torch.randn(2, 1, 8, 8))
    assert model.calls == 0
    assert random.getstate() == state


def test_what_a_refusal_or_an_error_leaves():
    class Wrong(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.calls = nn.Linear(3, 3), []

        def forward(self, x):
            self.calls.append(random.random())
            return self.layer(x)

    model, state = Wrong(), random.getstate()
    with pytest.raises(hotloop.ModelError):
        hotloop.Budget.predict(model, (torch.zeros(2, 4), torch.zeros(2, 3)), 2)
    assert model.calls == []
    assert random.getstate() == state


def test_a_fake_call_is_put_back_in_reverse_and_in_whole():
    shared = {"a": [1, 2], "b": {"c": (3, [4])}}
    kept = [shared["a"], shared["b"]["c"][1]]
    ordered = collections.OrderedDict(x=1, y=2)
    with preserved(shared, ordered):
        kept[0].append(5)
        kept[1].clear()
        shared["b"] = None
        shared["d"] = 1
        ordered.move_to_end("x")
        ordered["z"] = 3
    assert shared == {"a": [1, 2], "b": {"c": (3, [4])}}
    assert shared["a"] is kept[0]
    assert shared["b"]["c"][1] is kept[1]
    assert list(ordered.items()) == [("x", 1), ("y", 2)]
