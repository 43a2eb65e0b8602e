"""Whether a step is compiled, and the reason that is given."""

import pytest
import torch
from torch import nn

import hotloop
from hotloop.step import compiler, path_choice
from hotloop.step.path_choice import PAYS_BACK_S, choose_path, plain_run_s, resumed_plan

SHORT, LONG = PAYS_BACK_S / 2, PAYS_BACK_S * 2
MODEL = nn.Linear(8, 2)
ON_GPU = nn.Linear(8, 2, device="meta")  # Any device that is not the CPU.
BATCH = torch.zeros(32, 8), torch.zeros(32, dtype=torch.int64)


def choose(knobs, *, model=MODEL, **facts):
    return choose_path(model, *BATCH, hotloop.Plan().replace(knobs), **facts)


@pytest.fixture
def looked_for(monkeypatch, request):
    """What was looked for in a cache that has a step, or not, as the test says."""
    seen = []
    monkeypatch.setattr(
        path_choice, "may_be_compiled", lambda model, batch: seen.append(batch) or request.param
    )
    return seen


@pytest.mark.parametrize("looked_for", [False], indirect=True)
@pytest.mark.parametrize(
    ("compiles", "facts", "path", "reason"),
    [
        ("off", {}, "plain", "compile is off in the plan"),
        ("off", {"model": ON_GPU}, "plain", "compile is off in the plan"),
        ("off", {"chunk_size": 8}, "plain", "compile is off in the plan"),
        ("auto", {}, "compiled", ""),
        ("auto", {"expected_s": LONG}, "compiled", ""),
        ("auto", {"expected_s": SHORT}, "plain", "about 30 s of training cannot pay the compiler"),
        ("always", {"expected_s": SHORT}, "compiled", ""),
        ("auto", {"expected_s": SHORT, "is_cached": True}, "compiled", ""),
        ("auto", {"expected_s": SHORT, "is_cached": False}, "plain", "cannot pay the compiler"),
        ("auto", {"expected_s": LONG, "is_cached": False}, "compiled", ""),
        ("auto", {"expected_s": SHORT, "model": ON_GPU}, "cuda_graph", ""),
        ("always", {"model": ON_GPU, "several_hosts": True}, "plain", "several hosts with GPUs"),
        ("auto", {"several_hosts": True, "chunk_size": 8}, "workers", ""),
        ("auto", {"expected_s": SHORT, "chunk_size": 8}, "workers", ""),
        ("auto", {"chunk_size": 5}, "plain", "batches of 32 are not whole chunks of 5"),
    ],
)
def test_path_and_reason(looked_for, compiles, facts, path, reason):
    choice = choose({"step.compile": compiles}, **facts)
    assert choice.path == path
    assert reason in choice.reason
    assert bool(choice.reason) == (path == "plain")
    assert choice.uses_compiler == (path in ("compiled", "workers"))


@pytest.mark.parametrize("looked_for", [True], indirect=True)
def test_a_short_run_takes_what_may_be_compiled_for_its_micro_batch(looked_for):
    knobs = {"step.compile": "auto", "memory.micro_batch_size": 4}
    assert choose(knobs, expected_s=SHORT).path == "compiled"
    ((x, y),) = looked_for
    assert (len(x), len(y)) == (4, 4)


@pytest.mark.parametrize("looked_for", [False, True], indirect=True)
def test_without_a_compiler_only_what_is_cached_is_compiled(looked_for, request, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    compiler.compiler.cache_clear()
    request.addfinalizer(compiler.compiler.cache_clear)
    choice = choose({"step.compile": "always"})
    if request.node.callspec.params["looked_for"]:
        assert choice.path == "compiled"
    else:
        assert choice.path == "plain"
        assert choice.reason == (
            "a compiled step needs a C++ compiler; got no-such-compiler. "
            "Next: install g++, or set plan step.compile to 'off'."
        )


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


def test_a_run_on_the_plain_path_takes_longer_with_more_steps_and_fewer_threads():
    assert plain_run_s(100, None, 1) is None
    one = plain_run_s(100, 10**9, 1)
    assert plain_run_s(200, 10**9, 1) == pytest.approx(2 * one)
    assert plain_run_s(100, 10**9, 2) < one < plain_run_s(100, 2 * 10**9, 1)


@pytest.mark.parametrize(("path", "becomes"), [("plain", "off"), ("compiled", "always")])
def test_a_resumed_run_has_the_path_and_precision_it_had(path, becomes):
    auto = hotloop.Plan().replace({"step.compile": "auto", "step.precision": "auto"})
    plan = resumed_plan(auto, path, "bfloat16")
    assert (plan.step.compile, plan.step.precision) == (becomes, "bfloat16")
    told = hotloop.Plan().replace({"step.compile": "off", "step.precision": "float32"})
    assert resumed_plan(told, "compiled", "bfloat16") == told
