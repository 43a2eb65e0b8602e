"""Drawn training programs: models, losses, optimizers, schedules and changes in mid-run, combined.

Each is held against the same loop in plain PyTorch: losses, weights, buffers, optimizer state and
all random numbers, after each of thirty steps.
"""

import random

import numpy
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import hotloop
from hotloop import kernels
from support import THOROUGH
from support.beside_loop import same
from support.drawn_models import CLASSES, MODELS, WIDTH
from support.drawn_pieces import LOSSES, OPTIMIZERS, SCHEDULES
from support.drawn_programs import CHANGES, Program
from support.kernel_choice import torchs_kernels

if not kernels.is_available():
    pytest.skip(kernels.unavailable_reason(), allow_module_level=True)

STEPS = 30


@pytest.fixture(scope="module", autouse=True)
def nothing_is_timed():
    with torchs_kernels():
        yield


@st.composite
def programs(draw):
    pick = lambda names: draw(st.sampled_from(sorted(names)))  # noqa: E731
    times = st.dictionaries(st.integers(1, STEPS - 3), st.sampled_from(sorted(CHANGES)), max_size=4)
    return {
        "seed": draw(st.integers(0, 99)),
        "model": pick(MODELS),
        "form": pick(["tensor", "dict", "tuple", "dataclass"]),
        "loss": pick(LOSSES),
        "optimizer": pick(OPTIMIZERS),
        "schedule": pick(SCHEDULES),
        "leaves_out": draw(st.booleans()),
        "changes": draw(times),
        "sizes": draw(st.sampled_from([(8,), (8,), (8, 8, 5), (6, 9)])),
        "void": draw(st.booleans()),
        "clip": draw(st.sampled_from([None, None, 0.5])),
    }


def seed(number):
    torch.manual_seed(number)
    random.seed(number)
    numpy.random.seed(number)


def random_states():
    numpys = numpy.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), numpys[1].tolist(), numpys[2:]


def batch_of(task, number):
    draw = torch.Generator().manual_seed(1000 * task["seed"] + number)
    size = task["sizes"][number % len(task["sizes"])]
    y = torch.randint(0, CLASSES, (size,), generator=draw)
    if task["void"]:
        y[number % 3] = 255
    return torch.randn(size, WIDTH, generator=draw), y


def plain_step(program, clip, x, y):
    program.optimizer.zero_grad()
    loss = program.loss_fn(program.model(x), y)
    loss.backward()
    if clip is not None:
        updated = [p for g in program.optimizer.param_groups for p in g["params"]]
        nn.utils.clip_grad_norm_(updated, clip)
    program.optimizer.step()
    return loss.detach()


def values_of(program):
    found = {**program.parts.state_dict(), **dict(program.parts.named_buffers())}
    return {k: torch.view_as_real(v) if torch.is_tensor(v) and v.is_complex() else v
            for k, v in found.items()}  # fmt: skip


def compare(ours, plain):
    mine, theirs = values_of(ours), values_of(plain)
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            same(mine[name], value, 5e-4)
        else:
            assert mine[name] == value
    groups = zip(ours.optimizer.param_groups, plain.optimizer.param_groups, strict=True)
    for group, other in groups:
        assert {k: v for k, v in group.items() if k != "params"} == {
            k: v for k, v in other.items() if k != "params"
        }
        for one, two in zip(group["params"], other["params"], strict=True):
            assert one.requires_grad == two.requires_grad
            state, expected = ours.optimizer.state.get(one, {}), plain.optimizer.state.get(two, {})
            assert state.keys() == expected.keys()
            for name, value in expected.items():
                if value is None:
                    assert state[name] is None
                else:
                    same(state[name], value, 2e-3)


def train(task):
    """Both for thirty steps; the reasons of ours. Where PyTorch raises, so does ours."""
    ours, plain = Program(task), Program(task)
    step, reasons = None, []
    for number in range(STEPS):
        change = task["changes"].get(number)
        x, y = batch_of(task, number)
        for program in (ours, plain) if change else ():
            seed(number)
            CHANGES[change](program)
        if step is None:
            parts = ours.model, ours.loss_fn, ours.optimizer
            step = hotloop.compile_step(*parts, (x, y), clip_norm=task["clip"])
        seed(number)
        try:
            expected = plain_step(plain, task["clip"], x.clone(), y.clone())
        except Exception:
            with pytest.raises(Exception):  # noqa: B017, PT011
                step(x, y)
            return reasons
        if not expected.isfinite() or expected.abs() > 1e4:
            return reasons  # It diverges, and rounding decides.
        drawn = random_states()
        seed(number)
        loss = step(x, y)
        assert random_states() == drawn
        same(loss, expected, 2e-4)
        for program in (ours, plain):
            program.scheduled()
        compare(ours, plain)
        reasons.append(step.reason)
    return reasons


OPTIONS = {
    "deadline": None,
    # To shrink a failure takes longer than to read it.
    "phases": [Phase.explicit, Phase.generate],
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler", "ignore:Sparse")
@settings(max_examples=200 if THOROUGH else 6, **OPTIONS)
@given(programs())
def test_drawn_programs_are_plain_pytorchs(task):
    train(task)


@pytest.mark.parametrize("model", ["Norms", "Outside", "Steps"])
def test_changes_in_mid_run_leave_a_program(model):
    """Not all of it may end on the plain path."""
    task = {
        "seed": 1, "model": model, "form": "dict", "loss": "with parameters", "optimizer": "adam",
        "schedule": "one cycle", "leaves_out": True, "sizes": (8,), "void": True, "clip": 0.5,
        "changes": {5: "freeze", 9: "inference mode", 13: "told otherwise", 17: "numbers"},
    }  # fmt: skip
    reasons = train(task)
    assert len(reasons) == STEPS
    for number in (4, 8, 12, 16, 20, 28):
        assert "are one program" in reasons[number], reasons[number]


@pytest.mark.parametrize("change", ["step", "option", "numbers", "forward"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_change_between_the_recordings_counts(change, number):
    train({
        "seed": 1, "model": "Norms", "form": "tensor", "loss": "with parameters",
        "optimizer": "adam", "schedule": "one cycle", "leaves_out": False, "sizes": (8,),
        "void": False, "clip": None, "changes": {number: change},
    })  # fmt: skip
