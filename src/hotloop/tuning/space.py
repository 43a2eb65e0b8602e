"""The choices worth trying for a plan on a machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from ..errors import InputError
from ..machine import Machine
from ..machine.affinity import placement_order
from ..plan import AUTO, Plan
from .candidate import Candidate, Group

LrRule = Literal["linear", "sqrt", "none"]
# Not a knob of the plan: it changes what is computed. A trial knows it by this name.
BATCH_SIZE = "batch_size"
# The one knob that changes results and is one of the plan.
PRECISION = "step.precision"
_QUEUE_SIZES = (1, 16)


def learning_rate_factor(rule: LrRule, batch_size: int, new_batch_size: int) -> float:
    """By what the learning rate is multiplied for another batch size.

    ``linear``: Goyal and others 2017, "Accurate, large minibatch SGD". ``sqrt``: Krizhevsky 2014,
    "One weird trick for parallelizing convolutional neural networks"; for Adam: Malladi and others
    2022, "On the SDEs and scaling rules for adaptive gradient algorithms". ``none``: 1.
    """
    ratio = new_batch_size / batch_size
    return {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[rule]


def space_of(
    machine: Machine,
    present: Plan,
    *,
    batch_size: int,
    batch_sizes: Sequence[int] = (),
    allow_precision: bool = False,
    makes_many: Callable[[Candidate], bool] = lambda _: False,
) -> tuple[Group, ...]:
    """Groups of choices for ``search``, the one that matters most first.

    Kernels, memory layout and steps a call are not among them: the step times the kernels of each
    product when it is made, tries the layouts, and takes as many steps a call as fit.

    Args:
        machine: where it will run.
        present: what the choices are differences to; its threads are a number.
        batch_size: the present one. batch_sizes: others to try; they change the mathematics.
        allow_precision: whether bfloat16 may be tried (under the probe of precision ``auto``).
        makes_many: whether a candidate makes several steps a call, and so has no queue.

    Raises:
        InputError: a batch size below 1, or threads that are not resolved.
    """
    if present.cpu.num_threads == AUTO:
        raise InputError("num_threads must be resolved before a search", got=AUTO)
    for size in batch_sizes:
        if size < 1:
            raise InputError("a batch size must be at least 1", got=size)
    usable = machine.usable_cpus
    compiled = "always" if present.step.compile == "off" else present.step.compile
    groups = [
        Group("batch size", tuple({BATCH_SIZE: n} for n in batch_sizes if n != batch_size)),
        Group("cores", (*_threads(machine), *_workers(usable))),
        # A trial is long, so "auto" compiles in it: it is not to be told apart from "always".
        Group("compile", ({"step.compile": "off"}, {"step.compile": compiled})),
        Group("affinity", tuple({"cpu.thread_affinity": kind} for kind in _affinities(machine))),
        Group(
            "tensor arena",
            ({"memory.tensor_arena": "never"}, {"memory.tensor_arena": "try"}),
        ),
        Group(
            "huge pages",
            ({"memory.huge_pages": "never"}, {"memory.huge_pages": "try"}),
            unless=lambda _: _no_huge_pages(machine),
        ),
        Group(
            "queue",
            tuple({"cpu.queue_size": n} for n in _QUEUE_SIZES),
            unless=lambda best: (
                "batches are filled between calls of several steps: there is no queue"
                if makes_many(best)
                else None
            ),
        ),
    ]
    if allow_precision:
        auto = {PRECISION: "auto"}
        choices = (auto, {**auto, "parallel.num_workers": None})
        groups.insert(3, Group("precision", choices))
    return tuple(g for g in groups if g.choices)


def knobs_of(plan: Plan) -> dict[str, Any]:
    """Every knob of a plan by dotted name."""
    document = plan.to_dict()
    return {f"{part}.{name}": v for part, values in document.items() for name, v in values.items()}


def _threads(machine: Machine) -> list[Candidate]:
    """One, half the usable CPUs, one less, all of them, and the physical cores."""
    usable = machine.usable_cpus
    counts = {1, usable // 2, usable - 1, usable, min(usable, machine.usable_cores or usable)}
    return [
        {"cpu.num_threads": n, "parallel.num_workers": None}
        for n in sorted(counts, reverse=True)
        if n >= 1
    ]


def _workers(usable: int) -> list[Candidate]:
    """As many workers as usable CPUs and half as many, each on a core of its own and not."""
    counts = sorted({usable, usable // 2}, reverse=True)
    return [
        {"parallel.num_workers": n, "cpu.thread_affinity": kind}
        for n in counts
        if n >= 2
        for kind in ("compact", "none")
    ]


def _affinities(machine: Machine) -> tuple[str, ...]:
    if not machine.cpu_ids:
        return ()
    same = placement_order(machine, spread=True) == placement_order(machine, spread=False)
    return ("none", "compact") if same else ("none", "compact", "spread")


def _no_huge_pages(machine: Machine) -> str | None:
    if machine.memory.transparent_huge_pages in (None, "never"):
        return "the kernel gives no transparent huge pages"
    return None
