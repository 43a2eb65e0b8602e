"""Optimizer state that the user changes between steps, or that differs by parameter."""

import copy
from collections import defaultdict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hotloop
from hotloop import kernels
from support.beside_loop import same
from support.kernel_choice import torchs_kernels

if not kernels.is_available():
    pytest.skip(kernels.unavailable_reason(), allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def nothing_is_timed():
    with torchs_kernels():
        yield


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, dampening=0.2),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-3),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01, eps=1e-3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, eps=1e-3),
}


class TwoTasks(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(8, 5)

    def forward(self, x, task):
        hidden = torch.tanh(self.body(x))
        if task == "a":
            return self.a(hidden)
        return self.b(hidden) * (1.0 if hidden.sum().item() > 0 else 0.9)  # Stays plain.


def halved(state):
    return {k: v.clone() * 0.5 if torch.is_tensor(v) else v for k, v in state.items()}


def rewound(model, optimizer):
    if "step" in optimizer.state[model.a.weight]:
        optimizer.state[model.a.weight]["step"].zero_()


def all_rewound(model, optimizer):
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].zero_()


def other_entries(model, optimizer):
    for weight in list(optimizer.state):
        optimizer.state[weight] = halved(optimizer.state[weight])


def other_state(model, optimizer):
    halves = {weight: halved(state) for weight, state in optimizer.state.items()}
    optimizer.state = defaultdict(dict, halves)


CHANGES = {
    "nothing": lambda model, optimizer: None,
    "one entry is gone": lambda model, optimizer: optimizer.state.pop(model.a.weight, None),
    "all are gone": lambda model, optimizer: optimizer.state.clear(),
    "one counter is set back": rewound,
    "all counters are set back": all_rewound,
    "other entries": other_entries,
    "another state": other_state,
}


def train_function(model, optimizer):
    def train(x, y, task):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x, task), y)
        loss.backward()
        optimizer.step()
        return loss

    return train


def batch(number):
    draw = torch.Generator().manual_seed(number)
    return torch.randn(6, 8, generator=draw), torch.randint(0, 3, (6,), generator=draw)


LONG = [pytest.param(name, marks=pytest.mark.full) for name in ("nadam", "rmsprop")]


@pytest.mark.parametrize("as_function", [False, pytest.param(True, marks=pytest.mark.full)])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["sgd", "adam", *LONG])
def test_it_counts(name, change, as_function):
    """``b`` leaves out parameters, on the plain path: those of ``a`` have made fewer steps then."""
    torch.manual_seed(0)
    model = TwoTasks()
    twin = copy.deepcopy(model)
    optimizer, plain = (OPTIMIZERS[name](m.parameters()) for m in (model, twin))
    expected = train_function(twin, plain)
    if as_function:
        step = hotloop.compile_step(train_function(model, optimizer))
    else:
        x = hotloop.Arguments(batch(0)[0], "a")
        step = hotloop.compile_step(model, F.cross_entropy, optimizer, (x, batch(0)[1]))
    for number, task in enumerate("aaabaaaaabbaaa"):
        if number == 6:
            CHANGES[change](model, optimizer)
            CHANGES[change](twin, plain)
        x, y = batch(number)
        loss = step(x, y, task) if as_function else step(hotloop.Arguments(x, task), y)
        if number == 2:
            assert step.path == "compiled", step.reason
        same(loss, expected(x, y, task).detach(), 1e-5)
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            same(one.detach(), other.detach(), 1e-5)
            assert optimizer.state[one].keys() == plain.state[other].keys()
            for key, value in plain.state[other].items():
                same(optimizer.state[one][key], value, 1e-4)
