"""Whole train functions: the same results, weights, states and random numbers as called alone."""

import inspect
import itertools
import logging
import os
import queue
import random
import re
import time

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import _global_optimizer_pre_hooks
from torch.utils import checkpoint

import hotloop
from hotloop import kernels
from hotloop.errors import ModelError
from hotloop.memory.tree import flatten
from support.train_functions import PROGRAMS, batch, mlp

if not kernels.is_available():
    pytest.skip(kernels.unavailable_reason(), allow_module_level=True)


def close(found, expected, rtol=2e-4, atol=2e-5):
    found, expected = flatten(found), flatten(expected)
    assert found[1] == expected[1]
    for a, b in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=rtol, atol=atol)
        assert not a.requires_grad


def same_state(program, twin):
    for a, b in zip(program.state(), twin.state(), strict=True):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        else:
            assert a == pytest.approx(b, rel=1e-12)


@pytest.mark.parametrize("name", PROGRAMS)
def test_functions_are_plain_pytorchs(name):
    torch.manual_seed(0)
    program = PROGRAMS[name]()
    torch.manual_seed(0)
    twin = PROGRAMS[name]()
    step = hotloop.compile_step(program.function)
    fast = 0
    for number in range(program.num_calls):
        torch.manual_seed(number)
        found = step(*batch(number))
        state = torch.get_rng_state()
        torch.manual_seed(number)
        expected = twin.function(*batch(number))
        assert torch.equal(state, torch.get_rng_state())
        close(found, expected)
        fast += step.path == "compiled"
        if number == 10:
            same_state(program, twin)
    assert step.path == "compiled", step.reason
    assert fast >= program.num_calls - 3, step.reason
    same_state(program, twin)


# ---- What may change between two calls -------------------------------------------------------


class Trained:
    """A function beside its twin in plain PyTorch."""

    def __init__(self, make):
        torch.manual_seed(0)
        self.parts, self.function = make()
        torch.manual_seed(0)
        self.twin_parts, self.twin = make()
        self.step = hotloop.compile_step(self.function)
        self.number = 0

    def calls(self, count, *args):
        for _ in range(count):
            self.number += 1
            given = args or batch(self.number)
            torch.manual_seed(self.number)
            found = self.step(*given)
            torch.manual_seed(self.number)
            close(found, self.twin(*given))
        return self

    def same_weights(self):
        for one, other in zip(self.parts, self.twin_parts, strict=True):
            if isinstance(one, nn.Module):
                close(list(one.state_dict().values()), list(other.state_dict().values()), 1e-3)

    def both(self, change):
        change(*self.parts)
        change(*self.twin_parts)


def simple(optimizer=lambda p: torch.optim.Adam(p, lr=1e-2), dropout=0.0):
    def make():
        model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 2))
        opt = optimizer(model.parameters())

        def train(x, y, _t):
            loss = F.cross_entropy(model(x), y)
            opt.zero_grad()
            loss.backward()
            opt.step()
            return loss

        return (model, opt), train

    return make


def rate(value):
    def change(_model, opt):
        for group in opt.param_groups:
            group["lr"] = value

    return change


def freeze(model, _opt):
    model[0].requires_grad_(False)


def reload(model, opt):
    model.load_state_dict({k: v * 0.5 for k, v in model.state_dict().items()})
    opt.load_state_dict(opt.state_dict())


def replace_weight(model, _opt):
    model[0].weight.data = model[0].weight.data * 0.5


CHANGES = {
    "rate": rate(1e-4),
    "freeze": freeze,
    "eval": lambda model, _: model.eval(),
    "dropout": lambda model, _: setattr(model[2], "p", 0.5),
    "reload": reload,
    "data": replace_weight,
    "weight": lambda model, _: model[3].weight.data.mul_(2),
    "betas": lambda _, opt: opt.param_groups[0].update(betas=(0.5, 0.9)),
    "decay": lambda _, opt: opt.param_groups[0].update(weight_decay=0.1),
    "amsgrad": lambda _, opt: opt.param_groups[0].update(amsgrad=False, maximize=True),
    "hook": lambda model, _: model[0].register_forward_hook(lambda m, i, o: o * 2),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_between_two_calls_counts(name):
    trained = Trained(simple(dropout=0.2)).calls(5)
    assert trained.step.path == "compiled", trained.step.reason
    trained.both(CHANGES[name])
    trained.calls(6)
    trained.same_weights()


def test_a_variable_of_the_closure_that_is_assigned_anew_counts():
    def make():
        model = mlp(12, 8, 2)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        scale = [1.0]

        def train(x, y, _t):
            opt.zero_grad()
            loss = scale[0] * F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            return loss

        return (model, opt, scale), train

    trained = Trained(make).calls(5)
    trained.both(lambda model, opt, scale: scale.__setitem__(0, 3.0))
    trained.calls(4)
    assert trained.step.path == "compiled", trained.step.reason
    trained.same_weights()


def test_arguments_of_another_shape_are_another_program_and_plain_values_count():
    def make():
        model = mlp(12, 8, 2)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)

        def train(inputs, *, weight=1.0):
            opt.zero_grad()
            loss = weight * F.cross_entropy(model(inputs["x"]), inputs["y"])
            loss.backward()
            opt.step()
            return loss

        return (model, opt), train

    trained = Trained(make)
    for rows in (8, 8, 8, 5, 5, 5, 8, 5):
        x, y, _ = batch(rows, rows)
        trained.calls(1, {"x": x, "y": y})
    assert trained.step.path == "compiled"
    found = trained.step({"x": x, "y": y}, weight=2.0)
    close(found, trained.twin({"x": x, "y": y}, weight=2.0))
    trained.same_weights()


def test_gradients_that_nobody_lets_go_add_up_as_in_pytorch():
    def make():
        model, other = mlp(12, 8, 2), mlp(12, 8, 2)
        opt = torch.optim.SGD(model.parameters(), lr=0.05)

        def train(x, y, _t):  # The second model's gradients are never zeroed.
            opt.zero_grad()
            loss = F.cross_entropy(model(x) + other(x), y)
            loss.backward()
            opt.step()
            return loss

        return (model, other, opt), train

    trained = Trained(make).calls(8)
    assert trained.step.path == "compiled", trained.step.reason
    for one, twin in zip(
        trained.parts[1].parameters(), trained.twin_parts[1].parameters(), strict=True
    ):
        torch.testing.assert_close(one.grad, twin.grad, rtol=1e-4, atol=1e-6)
    trained.both(lambda model, other, opt: other.zero_grad())
    trained.calls(4)
    for one, twin in zip(
        trained.parts[1].parameters(), trained.twin_parts[1].parameters(), strict=True
    ):
        torch.testing.assert_close(one.grad, twin.grad, rtol=1e-4, atol=1e-6)


def test_gradients_of_the_call_before_are_used_as_in_pytorch():
    def make():
        model = mlp(12, 8, 2)
        opt = torch.optim.SGD(model.parameters(), lr=0.05)

        def train(x, y, _t):  # The update of the batch before.
            opt.step()
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        return (model, opt), train

    trained = Trained(make).calls(8)
    trained.same_weights()


# ---- What stays plain, and says why -----------------------------------------------------------


QUEUE = queue.Queue()


def plain(body, calls=6):
    """A function with something in it that no program can have."""

    def make():
        model = mlp(12, 8, 2)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        notes = []

        def train(x, y, _t):
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            return body(loss, model, opt, notes)

        return (model, opt, notes), train

    trained = Trained(make).calls(calls)
    assert trained.step.path == "plain"
    trained.same_weights()
    return trained


def appended(loss, model, opt, notes):
    notes.append(1)
    return loss


def drawn(loss, model, opt, notes):
    return loss * (random.random() < 2)


def branches(loss, model, opt, notes):
    if loss > 1e9:
        opt.step()
    return loss


def seeded(loss, model, opt, notes):
    torch.manual_seed(7)
    return loss


def rated(loss, model, opt, notes):
    opt.param_groups[0]["lr"] *= 0.9
    return loss


def printed(loss, model, opt, notes):
    print("a step", end="\r")
    return loss


def logged(loss, model, opt, notes):
    logging.getLogger("hotloop.tests").warning("a step")
    return loss


def queued(loss, model, opt, notes):
    QUEUE.put(loss.detach())
    return loss


REASONS = {
    "printed": (printed, r"test_function.py:\d+ calls print"),
    "logged": (logged, r"test_function.py:\d+ calls "),
    "queued": (queued, r"test_function.py:\d+ calls put"),
    "appended": (appended, "notes"),
    "drawn": (drawn, "random"),
    "branches": (branches, r"test_function.py:\d+ reads a tensor's value"),
    "seeded": (seeded, "random state is set"),
    "rated": (rated, "lr"),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_no_program_can_have_stays_plain(name):
    body, reason = REASONS[name]
    trained = plain(body)
    assert re.search(reason, trained.step.reason), trained.step.reason


def test_a_rate_that_the_function_reads_counts():
    def make():
        model = mlp(12, 8, 2)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)

        def train(x, y, _t):
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            for group in opt.param_groups:
                for p in group["params"]:
                    p.data.mul_(1 - group["lr"] * 0.1)
            return loss

        return (model, opt), train

    trained = Trained(make).calls(5)
    assert trained.step.path == "compiled", trained.step.reason
    trained.both(rate(0.01))
    trained.calls(5)
    trained.same_weights()


def test_a_recomputed_dropout_draws_what_it_drew_before():
    def make():
        first, second = mlp(12, 16, last=nn.Dropout(0.5)), nn.Linear(16, 2)
        opt = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1)

        def train(x, y, _t):
            opt.zero_grad()
            h = checkpoint.checkpoint(first, x, use_reentrant=False)
            loss = F.cross_entropy(second(h), y)
            loss.backward()
            opt.step()
            return loss

        return (first, second, opt), train

    trained = Trained(make).calls(6)
    assert trained.step.path == "plain"
    assert "random state is set" in trained.step.reason
    trained.same_weights()


def test_an_optimizer_with_a_closure_or_a_step_of_its_own_is_plain():
    def make():
        model = mlp(12, 8, 2)
        opt = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

        def train(x, y, _t):
            def closure():
                opt.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                return loss

            return opt.step(closure)

        return (model, opt), train

    trained = Trained(make).calls(4)
    assert trained.step.path == "plain"
    assert "LBFGS" in trained.step.reason
    trained.same_weights()
    trained = Trained(simple(lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True))).calls(4)
    assert "amsgrad" in trained.step.reason
    trained.same_weights()


def test_a_closure_that_is_none_is_no_closure():
    def make():
        model = mlp(12, 8, 2)
        opt = torch.optim.AdamW(model.parameters(), lr=1e-2)

        def train(x, y, _t):
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step(None)
            return loss

        return (model, opt), train

    trained = Trained(make).calls(6)
    assert trained.step.path == "compiled", trained.step.reason
    trained.same_weights()


def test_an_optimizer_that_writes_into_gradients_is_plain():
    def make():
        model = mlp(12, 8, 2)
        opt = torch.optim.SGD(model.parameters(), 0.1, 0.9, nesterov=True, foreach=True)

        def train(x, y, _t):
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            return sum(p.grad.square().sum() for p in model.parameters())

        return (model, opt), train

    trained = Trained(make).calls(6)
    assert "writes into gradients" in trained.step.reason
    trained.same_weights()


def test_a_scheduler_that_is_stepped_through_a_bound_method_is_not_lost():
    def make():
        model = mlp(12, 8, 2)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        move_on = torch.optim.lr_scheduler.StepLR(opt, 2, 0.5).step

        def train(x, y, _t):
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            move_on()
            return loss

        return (model, opt), train

    trained = Trained(make).calls(6)
    assert trained.parts[1].param_groups[0]["lr"] == trained.twin_parts[1].param_groups[0]["lr"]
    trained.same_weights()


def test_a_schedule_that_the_function_returns_is_right():
    def make():
        model = mlp(12, 8, 2)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(opt, 5, 0.5)

        def train(x, y, _t):
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            scheduler.step()
            return loss, scheduler.get_last_lr()[0]

        return (model, opt), train

    trained = Trained(make).calls(12)
    assert "scheduler" in trained.step.reason


def test_a_call_that_raises_leaves_everything_as_it_would():
    trained = Trained(simple()).calls(1)
    with pytest.raises(RuntimeError):
        trained.step(torch.randn(4, 5), torch.zeros(4), None)
    assert not _global_optimizer_pre_hooks
    trained.calls(5)
    assert trained.step.path == "compiled", trained.step.reason
    trained.same_weights()


# ---- Values that are read to be returned ------------------------------------------------------


def item(loss, other):
    return loss.item()


def floats_in_a_dict(loss, other):
    return {"loss": float(loss), "other": other.item(), "tensor": loss, "one": 1.0}


def kept_in_variables(loss, other):
    first = loss.item()
    other.add_(1.0)  # After it was read below, too.
    second = other.item()
    other.mul_(2.0)
    return first, [second, first], other


def inside_a_block(loss, other):
    with torch.no_grad():
        value = loss.item()
        more = other * 2
        return value, more


def rounded(loss, other):
    return round(loss.item(), 3)


def compared(loss, other):
    value = loss.item()
    return value if value < 100 else 0.0


def added(loss, other):
    return loss.item() + other.item()


def sorted_ones(loss, other):
    return sorted(map(torch.Tensor.item, [loss, other]))


def formatted(loss, other):
    return f"{loss.item():.3f}"


def looped(loss, other):
    value = loss.item()
    for _ in range(2):
        value = value * 2
    return value


READS = {
    f.__name__: (f, fast)
    for fast, found in {
        True: (item, floats_in_a_dict, kept_in_variables, inside_a_block),
        False: (rounded, compared, added, sorted_ones, formatted, looped),
    }.items()
    for f in found
}


@pytest.mark.parametrize("name", READS)
def test_values_that_are_read_only_to_be_returned_are_right(name):
    body, fast = READS[name]

    def make():
        model = mlp(12, 8, 2)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)

        def loss_of(x, y):
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            return loss.detach(), model[0].weight.square().sum().detach()

        # The code of the body itself is what is looked at.
        source = inspect.getsource(body).splitlines()
        head = ["def train(x, y, _t):", "    loss, other = loss_of(x, y)"]
        scope = {"loss_of": loss_of, "torch": torch}
        exec(compile("\n".join([*head, *source[1:]]), __file__, "exec"), scope)
        return (model, opt), scope["train"]

    trained = Trained(make)
    for _ in range(8):
        trained.number += 1
        given = batch(trained.number)
        found, wanted = trained.step(*given), trained.twin(*given)
        assert str(type(found)) == str(type(wanted))
        same_values(found, wanted)
    assert trained.step.path == ("compiled" if fast else "plain"), trained.step.reason
    assert fast or "return the tensor" in trained.step.reason, trained.step.reason
    trained.same_weights()


def same_values(found, wanted):
    if isinstance(found, dict):
        assert found.keys() == wanted.keys()
        found, wanted = list(found.values()), list(wanted.values())
    if isinstance(found, (list, tuple)):
        for a, b in zip(found, wanted, strict=True):
            same_values(a, b)
    elif isinstance(found, str):
        assert float(found) == pytest.approx(float(wanted), abs=2e-3)
    else:
        assert type(found) is type(wanted)
        assert float(found) == pytest.approx(float(wanted), rel=1e-4)


def test_what_it_gives_is_the_callers_own():
    trained = Trained(simple()).calls(3)
    first = trained.step(*batch(0))
    value = first.item()
    trained.step(*batch(1))
    assert first.item() == value


def test_it_can_be_off_and_takes_only_functions():
    plan = hotloop.Plan().replace({"step.compile": "off"})
    _, train = simple()()
    step = hotloop.compile_step(train, plan=plan)
    step(*batch(0))
    assert (step.path, step.reason) == ("plain", "compile is off in the plan")
    for wrong in (nn.Linear(2, 2), 3, nn.Linear):
        with pytest.raises(ModelError, match="one train function"):
            hotloop.compile_step(wrong)


# ---- What is done beside the mathematics ------------------------------------------------------


class Owner:
    """What a function belongs to, and may leave something in."""

    def __init__(self):
        self.model = mlp(12, 8, 2)
        self.opt = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.calls, self.large, self.table = 0, numpy.zeros(5000), {}
        self.numbers = itertools.count()
        self.hidden = torch.zeros(2)

    def loss(self, x, y):
        self.opt.zero_grad()
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        self.opt.step()
        return loss.detach()


def leaves_an_attribute(owner, loss):
    owner.last = loss


def counts(owner, loss):
    owner.calls += 1


def sets_a_global(owner, loss):
    global LAST
    LAST = loss


def writes_a_large_array(owner, loss):
    owner.large[owner.model[0].out_features] += 1


def fills_a_table(owner, loss):
    owner.table[len(owner.table)] = 1


def takes_the_next(owner, loss):
    return loss * next(owner.numbers)


def asks_the_time(owner, loss):
    if time.time() < 0:
        owner.calls += 1


def asks_for_a_file(owner, loss):
    if os.path.exists("/nowhere"):
        owner.calls += 1


def keeps_a_state(owner, loss):
    owner.hidden = owner.hidden * 0.5 + loss
    return owner.hidden.sum()


def sets_gradient_mode(owner, loss):
    torch.set_grad_enabled(False)
    torch.set_grad_enabled(True)
    owner.model.train(not owner.model.training)


def adds_a_group(owner, loss):
    if len(owner.opt.param_groups) < 3:
        owner.opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    else:
        owner.opt.param_groups.pop()


BESIDE = [
    leaves_an_attribute, counts, sets_a_global, writes_a_large_array, fills_a_table,
    takes_the_next, asks_the_time, asks_for_a_file, keeps_a_state, sets_gradient_mode,
    adds_a_group,
]  # fmt: skip
LAST = None


@pytest.mark.parametrize("body", BESIDE, ids=lambda body: body.__name__)
def test_what_is_done_beside_the_mathematics_is_done_each_time(body):
    def make():
        owner = Owner()

        def train(x, y, _t):
            loss = owner.loss(x, y)
            found = body(owner, loss)
            return loss if found is None else found

        return (owner.model, owner), train

    trained = Trained(make).calls(7)
    assert trained.step.path == "plain"
    owner, twin = trained.parts[1], trained.twin_parts[1]
    assert owner.calls == twin.calls
    assert owner.table == twin.table
    assert numpy.array_equal(owner.large, twin.large)
    torch.testing.assert_close(owner.hidden, twin.hidden)
    torch.testing.assert_close(getattr(owner, "last", None), getattr(twin, "last", None))
    assert len(owner.opt.param_groups) == len(twin.opt.param_groups)
    trained.same_weights()


def momentum_later(_model, opt):
    opt.param_groups[0]["momentum"] = 0.9


def test_momentum_that_comes_later_counts():
    trained = Trained(simple(lambda p: torch.optim.SGD(p, lr=0.01))).calls(5)
    assert trained.step.path == "compiled", trained.step.reason
    trained.both(momentum_later)
    trained.calls(6)
    trained.same_weights()


def test_an_argument_that_the_function_writes_is_seen_as_in_pytorch():
    def make():
        model = mlp(12, 8, 2)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        mean = torch.zeros(12)

        def train(x, y, shift):
            opt.zero_grad()
            with torch.no_grad():
                mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
            loss = F.cross_entropy(model(x - mean + shift), y)
            loss.backward()
            opt.step()
            return loss

        return (model, mean), train

    trained = Trained(make)
    for number in range(8):
        x, y, _ = batch(number)
        shifts = [torch.ones(12), torch.ones(12)] if number != 5 else [
            trained.parts[1], trained.twin_parts[1]]  # fmt: skip
        close(trained.step(x, y, shifts[0]), trained.twin(x, y, shifts[1]))
        if number == 4:
            assert trained.step.path == "compiled", trained.step.reason
    trained.same_weights()
    torch.testing.assert_close(trained.parts[1], trained.twin_parts[1])


def test_a_value_that_is_read_again_after_it_was_written_is_the_new_one():
    def make():
        model = mlp(12, 8, 2)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        mean, count = torch.zeros(12), torch.zeros((), dtype=torch.long)

        def train(x, y, _t):
            opt.zero_grad()
            before = x - mean  # Read before the write, used after it.
            with torch.no_grad():
                mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
                count.add_(1)
            after = x - mean / (1 - 0.9**2)
            loss = F.cross_entropy(model(before * 2) + model(after), y) * (1 + 0 * count)
            loss.backward()
            with torch.no_grad():
                half = mean[:6]
                half.mul_(0.5)
            opt.step()
            return loss + F.cross_entropy(model(x + mean), y), mean.clone(), count.clone()

        return (model, opt), train

    trained = Trained(make).calls(8)
    assert trained.step.path == "compiled", trained.step.reason
    trained.same_weights()
