"""Guards follow the code that ran in a step; what code names that did not run does not count."""

import copy
import sys
from collections import OrderedDict

import pytest
import torch
from torch import nn

import hotloop
from hotloop import kernels
from hotloop.step.guards import Guards
from hotloop.step.guards_ran import CodeRun, users
from hotloop.step.recorded import _OTHER_CODE

if not kernels.is_available():
    pytest.skip(kernels.unavailable_reason(), allow_module_level=True)

factor, unused, by_name = 2.0, 3.0, 4.0


def doubled(x):
    return x * factor


def not_called(x):
    return x * unused


def found_by_name(x):
    return x * by_name


class Lazy(OrderedDict):
    """Whoever asks what is in it makes it."""

    def __getitem__(self, key):
        raise AssertionError("it was read")

    __iter__ = keys = values = items = __getitem__


lazy = Lazy()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.takes_other = nn.Linear(4, 3), False

    def forward(self, x):
        if self.takes_other:
            return not_called(self.fc(x))
        assert len(lazy.__dict__) == 0
        return sys.modules[__name__].__dict__["found" + "_by_name"](doubled(self.fc(x)))


def batches(count):
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(5, 4, generator=g), torch.randn(5, 3, generator=g)) for _ in range(count)]


def guards_of(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with CodeRun() as code:
        net(batches(1)[0][0])
    return Guards(net, nn.MSELoss(), optimizer, ran=users(code.ran))


@pytest.mark.parametrize(
    ("name", "counts"), [("factor", True), ("unused", False), ("by_name", True)]
)
def test_a_global_counts_where_code_that_ran_names_it(monkeypatch, name, counts):
    guards = guards_of(Net())
    assert guards.changed() is None
    monkeypatch.setitem(globals(), name, 5.0)
    change = guards.changed()
    assert change == f"global {name} of {name_of_file()} changed from {before(name)} to 5.0" or (
        change is None and not counts
    )
    assert (change is not None) is counts


def before(name):
    return {"factor": 2.0, "unused": 3.0, "by_name": 4.0}[name]


def name_of_file():
    return __file__.rpartition("/")[2]


def test_what_decides_which_code_runs_counts():
    net = Net()
    guards = guards_of(net)
    net.takes_other = True
    assert guards.changed() == "attribute takes_other of the model (Net) changed from False to True"


def test_a_function_that_another_one_takes_the_place_of_counts(monkeypatch):
    guards = guards_of(Net())
    monkeypatch.setitem(globals(), "doubled", not_called)
    assert "doubled" in guards.changed()


def test_all_is_followed_where_somebody_else_looks_at_calls():
    sys.setprofile(lambda *_: None)
    try:
        with CodeRun() as code:
            Net()(batches(1)[0][0])
    finally:
        sys.setprofile(None)
    assert code.ran is None


def train_beside_plain(model, change_at=None, change=None, steps=24):
    torch.manual_seed(0)
    twin = copy.deepcopy(model)
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.01) for m in (model, twin))
    step = hotloop.compile_step(model, nn.functional.mse_loss, ours, example=batches(1)[0])
    seen = []
    for number, (x, y) in enumerate(batches(steps)):
        if number == change_at:
            change()
        theirs.zero_grad()
        loss = nn.functional.mse_loss(twin(x), y)
        loss.backward()
        theirs.step()
        torch.testing.assert_close(step(x, y), loss.detach(), rtol=1e-4, atol=1e-6)
        seen.append(step.reason)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    return step, seen


def test_a_program_beside_a_mapping_that_makes_what_it_is_asked_for():
    step, _ = train_beside_plain(Net())
    assert step.path == "compiled"


def nothing_to_see():
    return unused


class Asks(nn.Module):
    """Which code runs depends on what no guard sees; what is computed does not."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        if sys.getrecursionlimit() % 2:
            nothing_to_see()
        return self.fc(x)


def test_an_audit_finds_other_code_and_it_is_recorded_again():
    limit = sys.getrecursionlimit() // 2 * 2
    sys.setrecursionlimit(limit)
    try:
        step, seen = train_beside_plain(Asks(), 10, lambda: sys.setrecursionlimit(limit + 1))
    finally:
        sys.setrecursionlimit(limit)
    assert seen[18] == _OTHER_CODE
    assert step.path == "compiled"
    assert seen[-1].startswith("forward, loss, backward and update are one program")


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(x) * (2.0 if x.sum().item() > 0 else 1.0)


def test_a_step_that_is_refused_is_not_looked_at_for_ever():
    step, seen = train_beside_plain(Reads())
    assert step._recorded.given_up is not None
    assert step._recorded.given_up in seen[-1]
    assert len(set(seen[2:])) == 1
    for number in range(4):  # Other shapes too.
        step(torch.randn(2 + number, 4), torch.randn(2 + number, 3))
    assert len(step._recorded._shapes) == 1
    step.loss_fn = lambda answer, y: answer
    with pytest.raises(hotloop.HotloopError, match="the loss must be one number"):
        step(*batches(1)[0])
