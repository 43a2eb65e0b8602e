"""``compile_step``: a ``TrainStep`` on the path that fits model, batch and plan."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import nn

from ..memory import TensorArena
from ..plan import Plan
from .batch import Batch
from .check import LossFn, check_example, check_parts
from .cuda import try_cuda
from .function import FunctionStep, compile_function
from .path_choice import choose_path
from .precision import Batches, Three, probe
from .recorded import RecordedStep
from .step import TrainStep


@overload
def compile_step(
    model: nn.Module,
    loss_fn: LossFn,
    optimizer: torch.optim.Optimizer,
    example: Sequence[Any],
    plan: Plan | None = None,
    *,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    batches: Batches | None = None,
) -> TrainStep: ...


@overload
def compile_step(model: Callable[..., Any], *, plan: Plan | None = None) -> FunctionStep: ...


def compile_step(
    model: Any,
    loss_fn: Any = None,
    optimizer: Any = None,
    example: Any = None,
    plan: Plan | None = None,
    *,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    batches: Batches | None = None,
) -> TrainStep | FunctionStep:
    """A callable ``step(x, y) -> loss`` that makes one optimizer step, in place.

    The first two steps of each shape of batch run as PyTorch makes them and are recorded; the next
    ones run as a program of forward, loss, backward and update (``updates`` has the rules). With
    other optimizers, or micro-batches, forward and backward are the program. What cannot become one
    (control flow that depends on data, hooks) stays as PyTorch runs it, and ``step.reason`` says
    why. ``model.training`` is left as it is; call ``model.train()`` first, as in PyTorch.

    ``compile_step(train_function)`` takes a function of the user's own that makes whole steps, and
    gives a ``FunctionStep`` that is called as it is.

    Args:
        model: any ``torch.nn.Module``, called as ``model(x)``, ``model(*x)`` or ``model(**x)``.
        loss_fn: ``loss_fn(answer, y)``, or ``loss_fn(answer)`` where there is no y, gives a scalar.
        optimizer: any ``torch.optim.Optimizer`` built on the model's parameters.
        example: ``(x, y)`` or ``(x,)``, one batch as later calls will give it. x and y are trees: a
            tensor, or any tuple, list, dict or dataclass of tensors and plain values.
        plan: ``cpu.num_threads``, ``memory.micro_batch_size`` and ``step`` are used; the defaults
            when ``None``, with torch's present number of threads.
        clip_norm: total norm of the gradients at most, as ``clip_grad_norm_``.
        clip_value: each gradient element at most, in size, as ``clip_grad_value_``; comes first.
        batches: for ``precision="auto"``: gives an iterable of batches like the example, on which
            copies are trained in float32 and in bfloat16 (``precision.probe``); ``None``: the
            example again and again.

    Raises:
        ModelError: model, loss or optimizer cannot be used, in one line.
    """
    if loss_fn is None and optimizer is None and example is None:
        return compile_function(model, plan)
    check_parts(model, loss_fn, optimizer)
    batch = check_example(example)
    plan = plan or Plan()

    def make(three: Three, precision: str) -> TrainStep:
        return _step(three, batch, plan, precision, clip_norm, clip_value)

    wanted, three = plan.step.precision, (model, loss_fn, optimizer)
    step = make(three, "float32" if wanted == "auto" else wanted)
    if wanted != "auto":
        return step
    if step.path == "plain" and not step.is_recorded:
        step.precision_reason = "precision auto is float32 on the plain path"
    elif batches is None and any(t.device.type == "meta" for t in batch.tensors):
        step.precision_reason = "precision auto is float32: no batches to probe bfloat16 with"
    else:
        verdict = probe(make, three, batches or (lambda: [_micro(batch, plan).trees]))
        if verdict.accepted:
            step = make(three, "bfloat16")
        step.precision_reason = verdict.reason
    return step


def _micro(batch: Batch, plan: Plan) -> Batch:
    micro = plan.memory.micro_batch_size
    return batch if micro is None else batch.cut(micro)[0]


def _step(
    three: Three,
    batch: Batch,
    plan: Plan,
    precision: str,
    clip_norm: float | None,
    clip_value: float | None,
) -> TrainStep:
    """The step in one precision, recorded where the plan allows it."""
    model, _, optimizer = three
    micro = plan.memory.micro_batch_size
    limits: dict[str, Any] = {"clip_norm": clip_norm, "clip_value": clip_value}
    step = TrainStep(*three, micro_batch_size=micro, precision=precision, **limits)
    if plan.memory.tensor_arena == "try" and step.device.type == "cpu":
        # Else each step takes fresh pages for its activations: a cnn took 1.8 times as long.
        arena = TensorArena(huge_pages=plan.memory.huge_pages, keep_pages=True)
        step.arena = arena
        weakref.finalize(step, arena.trim).atexit = False
    part = _micro(batch, plan)  # Or the refusal to cut it.
    choice = choose_path(model, batch.trees, plan, optimizer=optimizer)
    if choice.path == "plain":
        step.reason = choice.reason
        return step
    whole = micro is None or batch.fits(micro)
    checked = not whole and step.loss_weight.kind == "unknown"
    if choice.path == "cuda_graph":
        if checked:
            step.reason = "a loss of your own is compared with that of its micro-batches each step"
            return step
        cuda, step.reason = try_cuda(
            *three, part.x, part.y, whole=whole, autocast=precision == "bfloat16",
            fuse=plan.step.compile == "always", **limits,
        )  # fmt: skip
        if cuda is not None:
            step.use(cuda)
        return step
    recorded = RecordedStep(
        *three,
        num_threads=torch.get_num_threads(),
        whole=whole,
        autocast=precision == "bfloat16",
        **limits,
    )
    if checked:
        recorded.judge = step.loss_weight.judge
    step.use(recorded)
    return step
