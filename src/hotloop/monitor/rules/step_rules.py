"""The step itself: batch size, layout, program, kernels, precision, checkpoints."""

from __future__ import annotations

import math

from ...units import format_rate, format_seconds, format_share
from ..optimization import Change, Optimization
from . import thresholds as t
from .facts import Facts, Rule, found, gain_of

_TRAIN_RESULTS = "benchmarks/results/train-{small,big,cnn}.json"


def checkpoints(facts: Facts) -> Optimization | None:
    """Writing checkpoints takes a noticeable part of the time."""
    step = facts.report.step
    count = step.checkpoints or 0
    share = step.checkpoint_s / (facts.train_s + step.checkpoint_s)
    if count < 2 or share < t.CHECKPOINT.value:
        return None
    each_s = step.checkpoint_s / count
    goal_s = max(60.0, round(each_s / t.CHECKPOINT_GOAL.value))
    change = Change(command=f"save every {goal_s:.0f} s, not every {facts.train_s / count:.2g} s")
    if facts.has_plan:
        every_s = facts.knob("checkpoint.every_s") or math.inf
        if facts.knob("checkpoint.every_steps") is None and every_s >= goal_s:
            return None  # They are those at the ends of epochs, which no knob leaves out.
        change = Change(plan={"checkpoint.every_steps": None, "checkpoint.every_s": goal_s})
    return found(
        "checkpoints",
        f"{count} checkpoints of {format_seconds(each_s)} take {format_share(share)} of the time",
        "step.checkpoint_s",
        share,
        t.CHECKPOINT,
        change,
        gain=gain_of(share),
        gain_source="share of the time spent on checkpoints",
    )


def batch_size(facts: Facts) -> Optimization | None:
    """A step so small that most of it is not arithmetic."""
    size, step_s, floor_s = facts.report.work.batch_size, facts.step_s, facts.floor_s
    goal = int(t.GOOD_BATCH.value)
    if not size or not step_s or floor_s is None or size >= goal:
        return None
    overhead = 1 - min(1.0, floor_s / step_s)
    if overhead < t.OVERHEAD.value:
        return None
    times = goal / size
    after_s = (step_s - floor_s) + times * floor_s
    return found(
        "batch-size",
        f"batches of {size}: {format_share(overhead)} of a step of {format_seconds(step_s)} is "
        "not arithmetic",
        "1 - arithmetic and memory at the measured ceilings / step",
        overhead,
        t.OVERHEAD,
        Change(
            command=f"batch_size={goal}, with the learning rate changed by the rule you choose "
            "(linear or square root)"
        ),
        exact=False,
        gain=times * step_s / after_s - 1,
        gain_source="the part that is not arithmetic stays, the arithmetic grows with the batch",
    )


def memory_layout(facts: Facts) -> Optimization | None:
    """Convolutions on images with channels apart are laid out anew in every call."""
    work = facts.report.work
    if not work.has_convolutions or work.memory_format != "contiguous":
        return None
    return found(
        "memory-layout",
        "convolutions run on images whose channels lie apart",
        "work.memory_format",
        work.memory_format,
        t.Threshold(0, "PyTorch, channels last tutorial; docs/notes/convolutions.md"),
        Change(
            command="model = model.to(memory_format=torch.channels_last); "
            "x = x.to(memory_format=torch.channels_last)"
        ),
        gain=None,
    )


def compiled(facts: Facts) -> Optimization | None:
    """The step runs as PyTorch runs it, operation by operation."""
    work = facts.report.work
    if work.path != "plain" or (facts.has_plan and facts.knob("step.compile") != "off"):
        return None  # The plan asks for a program, and the path's reason says why there is none.
    change = Change(command="hotloop.compile_step(model, loss_fn, optimizer, example=(x, y))")
    if facts.has_plan:
        change = Change(plan={"step.compile": "auto"})
    return found(
        "compile",
        f"the step runs as PyTorch runs it: {work.path_reason or 'nobody asked for it'}",
        "work.path",
        work.path,
        t.Threshold(0, _TRAIN_RESULTS),
        change,
        kind="opportunity",
    )


def slow_kernels(facts: Facts) -> Optimization | None:
    """Arithmetic far below the measured ceiling in steps long enough to reach it."""
    work, step_s = facts.report.work, facts.step_s
    if not work.flop_per_step or not work.ceiling_flop_per_s or not step_s or step_s < 2e-3:
        return None
    rate = work.flop_per_step / step_s
    share = rate / work.ceiling_flop_per_s
    if share >= 0.5 or work.path == "compiled" or work.has_convolutions:
        return None
    return found(
        "slow-kernels",
        f"float32 products run at {format_rate(rate, 'FLOP')}, {format_share(share)} of what this "
        "machine does",
        "work.flop_per_step / step / work.ceiling_flop_per_s",
        share,
        t.Threshold(0.5, f"{_TRAIN_RESULTS}: routed products pass it"),
        Change(
            command="hotloop run script.py  (routes float32 products to the faster measured "
            "library), or hotloop.compile_step"
        ),
        kind="opportunity",
    )


def precision(facts: Facts) -> Optimization | None:
    """bfloat16 where the processor multiplies it faster."""
    work = facts.report.work
    if work.precision not in (None, "float32") or not facts.has_plan:
        return None
    if facts.knob("step.precision") != "float32" or work.path != "compiled":
        return None
    if not {"avx512_bf16", "amx_bf16", "bf16"} & set(facts.machine.isa):
        return None
    gain = None
    source = "not known: measure the ceilings (hotloop machine --ceilings)"
    step_s = facts.step_s
    fast, slow = work.ceiling_bfloat16_flop_per_s, work.ceiling_flop_per_s
    if fast and slow and work.flop_per_step and step_s:
        arithmetic = min(1.0, work.flop_per_step / slow / step_s)
        gain = gain_of(arithmetic * (1 - slow / fast)) if fast > slow else 0.0
        source = "measured bfloat16 over float32 products, for the arithmetic's share of a step"
        if gain < 0.05:
            return None
    return found(
        "precision",
        "float32 on a processor that multiplies bfloat16 faster",
        "work.precision",
        work.precision or "float32",
        t.Threshold(0, "docs/notes: accepted only where a probe shows the same losses"),
        Change(plan={"step.precision": "auto"}),
        kind="opportunity",
        exact=False,
        gain=gain,
        gain_source=source,
    )


def steps_per_call(facts: Facts) -> Optimization | None:
    """Short steps of a program that come back to Python after each."""
    work, step_s = facts.report.work, facts.step_s
    if work.path != "compiled" or work.steps_per_call != 1 or not step_s or step_s > 0.5e-3:
        return None
    change = Change(command="checkpoint by time, not after every few steps: calls end at them")
    if facts.knob("checkpoint.every_steps") is not None:
        change = Change(plan={"checkpoint.every_steps": None})
    return found(
        "steps-per-call",
        f"steps of {format_seconds(step_s)} come back to Python after each",
        "work.steps_per_call",
        work.steps_per_call,
        t.Threshold(16, "docs/step.md: up to 16 steps a call"),
        change,
        kind="opportunity",
    )


RULES: tuple[Rule, ...] = (
    checkpoints,
    batch_size,
    memory_layout,
    compiled,
    slow_kernels,
    precision,
    steps_per_call,
)
