"""``compile_inference``: builds the candidates, checks them, races them, keeps the winners."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import InputError, ModelError
from ..machine import Machine
from ..measure import now
from ..memory.preserve import preserved
from ..plan import Plan
from . import remembered
from .artifacts import ENGINES, ArtifactBuilder, settings_for
from .capture import batch_of, own_copy, read_signature
from .check import Bounds
from .report import InferenceReport, Setting
from .runner import InferenceRunner
from .selector import EngineSelector, Samples
from .signature import Signature

GOALS = ("latency", "throughput")
BATCH_SIZES = (1, 32, 64)
# CPUs that other processes may keep busy during a race whose winners are remembered.
BUSY = 0.25


def compile_inference(
    model: nn.Module,
    example: Any,
    goal: str = "latency",
    *,
    engines: Sequence[str] | None = None,
    max_error: float | None = None,
    max_accuracy_loss: float | None = None,
    samples: Any = None,
    batch_sizes: Sequence[int] | None = None,
    plan: Plan | None = None,
    budget_s: float = 60.0,
    cache: bool = True,
    on_event: Callable[[str], None] | None = None,
) -> InferenceRunner:
    """The fastest way to run a model on this machine, found by racing checked candidates.

    The model is evaluated in eval mode on a copy, and left as it was found. In float32 every
    candidate gives what eager gives to float32 rounding (``check.FLOAT32_ERROR``); bfloat16 and
    int8, on a GPU TF32 and bfloat16, are tried only under a bound.

    Args:
        model: any module on the CPU or on one CUDA device, the batch as first dimension of what
            it takes and gives. What it answers comes back as eager gives it: tensors in tuples,
            lists, dicts, dataclasses, a ``ModelOutput``. Answers that hold something else, that are
            random, or that follow from earlier ones, only eager gives.
        example: one batch: a tensor or array, a tuple of positional arguments, a mapping of
            named ones, or ``hotloop.Arguments``; as a train step takes ``x``.
        goal: ``"latency"``: one call at a time, the 99th percentile decides at batch 1;
            ``"throughput"``: as many samples a second as several pinned instances give.
        engines: of ``"hotloop"``, ``"eager"``, ``"inductor"``, ``"onnxruntime"``, ``"openvino"``;
            on a GPU of ``"cuda graph"``, ``"cuda graph of inductor"``; ``None``: all that are
            installed and take the model.
        max_error: what bfloat16 or int8 may differ, over the largest value of the output.
        max_accuracy_loss: share of ``samples`` that may be classified worse.
        samples: ``x`` or ``(x, labels)``, real samples for accuracy and int8's ranges; the example
            where there are none, which then cannot show accuracy. A model of several inputs:
            a tuple of tensors without labels.
        batch_sizes: raced sizes; others go to the largest at most as large. ``None``: 1, 32, 64
            and the example's.
        plan: ``plan.cpu.num_threads``, if it is set, bounds the threads.
        budget_s: seconds to spend, about: no compiler is started after half of it.
        cache: remember the winners for this machine and model, and use what was remembered.
        on_event: told in a few words what is being done.

    Raises:
        InputError: an argument outside its rule.
        ModelError: the model cannot take the example.
        MissingExtraError: an engine that was named is not installed.
    """
    start_s = now()
    bounds = _checked_bounds(goal, max_error, max_accuracy_loss, budget_s)
    device = _device(model)
    twin = own_copy(model)
    signature, tensors = read_signature(twin, example, device)
    if signature.only_eager is not None:
        twin = own_copy(model)  # As it was before it answered: its answers may follow each other.
    sizes = _sizes(batch_sizes, batch_of(tensors) or 1)
    given = Samples(samples, signature, tensors, bounds)
    artifacts, settings = _candidates(twin, signature, tensors, given, bounds, goal, engines, plan)
    random_numbers = contextlib.ExitStack()
    try:
        random_numbers.enter_context(preserved())  # A model may draw some.
        tell = on_event or (lambda what: None)
        selector = EngineSelector(
            artifacts, goal, sizes, bounds, given, budget_s, start_s, tell, plan
        )
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        limits = bounds.max_error, bounds.max_accuracy_loss, where
        question = remembered.question(twin, signature, goal, sizes, settings, *limits)
        report = _recalled(selector, question) if cache else None
        if report is None:
            report = selector.select(settings, required=engines is not None)
            if cache:
                _remember(question, report)
        return selector.runner(report)
    except BaseException:
        artifacts.close()
        raise
    finally:
        random_numbers.close()


def _candidates(
    twin: nn.Module,
    signature: Signature,
    tensors: list[torch.Tensor],
    given: Samples,
    bounds: Bounds,
    goal: str,
    engines: Sequence[str] | None,
    plan: Plan | None,
) -> tuple[ArtifactBuilder, list[Setting]]:
    """What makes the engines of the model's device, and all settings that may race."""
    if tensors[0].device.type == "cpu":
        named = _engine_names(engines, ENGINES)
        precisions = ["float32", "bfloat16", "int8"] if bounds.allow_lower else ["float32"]
        images = any(isinstance(part, nn.Conv2d) for part in twin.modules())
        settings = settings_for(goal, named, precisions, _usable_cpus(plan), images)
        return ArtifactBuilder(twin, signature, tensors, given.inputs), settings
    from .cuda import CUDA_ENGINES, CudaArtifactBuilder, cuda_settings

    named = _engine_names(engines, CUDA_ENGINES)
    builder = CudaArtifactBuilder(twin, signature, tensors, tensors[0].device)
    return builder, cuda_settings(named, bounds.allow_lower)


def _recalled(selector: EngineSelector, question: str) -> InferenceReport | None:
    """The winners of an earlier race, if they still hold."""
    known = remembered.recall(question)
    return selector.recall(known) if known else None


def _remember(question: str, report: InferenceReport) -> None:
    """Keep the winners, unless other work may have chosen them."""
    if report.other_load is not None and report.other_load > BUSY:
        report.notes.append(
            f"other work kept {report.other_load:.1f} CPUs busy during the race: "
            "the winners are not remembered"
        )
    else:
        remembered.remember(question, report)


def _checked_bounds(
    goal: str, max_error: float | None, max_accuracy_loss: float | None, budget_s: float
) -> Bounds:
    if goal not in GOALS:
        raise InputError("goal must be latency or throughput", got=repr(goal))
    for name, value in (("max_error", max_error), ("max_accuracy_loss", max_accuracy_loss)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise InputError(f"{name} must be a number of at least 0", got=value)
    if not budget_s > 0:
        raise InputError("budget_s must be above 0", got=budget_s)
    return Bounds(max_error, max_accuracy_loss)


def _device(model: nn.Module) -> torch.device:
    devices = {t.device for t in [*model.parameters(), *model.buffers()]}
    kinds = sorted({device.type for device in devices})
    if len(devices) > 1 or (kinds and kinds[0] not in ("cpu", "cuda")):
        named = ", ".join(sorted(map(str, devices)))
        raise ModelError("the model must be on the CPU or on one CUDA device", got=named)
    return devices.pop() if devices else torch.device("cpu")


def _sizes(batch_sizes: Sequence[int] | None, example: int) -> list[int]:
    sizes = [*BATCH_SIZES, example] if batch_sizes is None else list(batch_sizes)
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InputError("batch_sizes must be whole numbers of at least 1", got=sizes)
    if not sizes:
        raise InputError("batch_sizes must name one size at least")
    return sorted(set(sizes))


def _engine_names(engines: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    names = list(known if engines is None else engines)
    for name in names:
        if name not in known:
            raise InputError(f"an engine is one of {', '.join(known)}", got=repr(name))
    if not names:
        raise InputError("engines must name one at least", next_step="leave it out for all")
    return names


def _usable_cpus(plan: Plan | None) -> int:
    usable = Machine.probe().usable_cpus
    wanted = plan.cpu.num_threads if plan is not None else None
    return min(usable, wanted) if isinstance(wanted, int) else usable
