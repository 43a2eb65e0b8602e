"""How a step is run, and the reason that is given."""

import pytest
import torch
from torch import nn

import hotloop
from hotloop.step.path_choice import choose_path, resumed_plan

MODEL = nn.Linear(8, 2)
ON_GPU = nn.Linear(8, 2, device="meta")  # Any device that is not the CPU.
X = torch.zeros(32, 8)


def choose(knobs, *, model=MODEL, **facts):
    return choose_path(model, X, hotloop.Plan().replace(knobs), **facts)


@pytest.mark.parametrize(
    ("compiles", "facts", "path", "reason"),
    [
        ("off", {}, "plain", "compile is off in the plan"),
        ("off", {"model": ON_GPU}, "plain", "compile is off in the plan"),
        ("off", {"chunk_size": 8}, "plain", "compile is off in the plan"),
        ("auto", {}, "recorded", ""),
        ("always", {}, "recorded", ""),
        ("auto", {"model": ON_GPU}, "cuda_graph", ""),
        ("always", {"model": ON_GPU, "several_hosts": True}, "plain", "several hosts with GPUs"),
        ("auto", {"several_hosts": True, "chunk_size": 8}, "workers", ""),
        ("auto", {"chunk_size": 8}, "workers", ""),
        ("auto", {"chunk_size": 5}, "plain", "batches of 32 are not whole chunks of 5"),
    ],
)
def test_path_and_reason(compiles, facts, path, reason):
    choice = choose({"step.compile": compiles}, **facts)
    assert choice.path == path
    assert reason in choice.reason
    assert bool(choice.reason) == (path == "plain")


def test_no_compiler_is_asked_for(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    model, y = nn.Linear(8, 2), torch.zeros(32, dtype=torch.int64)
    optimizer = torch.optim.SGD(model.parameters())
    step = hotloop.compile_step(model, nn.functional.cross_entropy, optimizer, (X, y))
    for _ in range(3):
        step(X, y)
    assert step.path == ("compiled" if hotloop.kernels.is_available() else "plain"), step.reason


@pytest.mark.parametrize(
    ("knobs", "reason", "of_precision"),
    [
        ({"memory.micro_batch_size": 4}, "micro-batches are run one after the other", None),
        (
            {"step.precision": "bfloat16"},
            "workers compute in float32",
            "workers compute in float32",
        ),
    ],
)
def test_what_workers_do_not_take(knobs, reason, of_precision):
    choice = choose(knobs, chunk_size=8)
    assert (choice.path, choice.reason, choice.precision_reason) == ("plain", reason, of_precision)


@pytest.mark.parametrize(("path", "becomes"), [("plain", "off"), ("compiled", "always")])
def test_a_resumed_run_has_the_path_and_precision_it_had(path, becomes):
    auto = hotloop.Plan().replace({"step.compile": "auto", "step.precision": "auto"})
    plan = resumed_plan(auto, path, "bfloat16")
    assert (plan.step.compile, plan.step.precision) == (becomes, "bfloat16")
    told = hotloop.Plan().replace({"step.compile": "off", "step.precision": "float32"})
    assert resumed_plan(told, "compiled", "bfloat16") == told
