"""``compile_step``: model, loss and optimizer as one call that trains on a batch."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ..errors import ModelError, RunError
from ..memory import TensorArena
from ..memory.image_layout import preferred
from ..plan import Plan
from .check import check_parts
from .compiled import CompiledStep, try_compiled
from .cuda import CudaStep, try_cuda
from .operations import Operation
from .path_choice import choose_path
from .precision import Batches, probe

LossFn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# Called with loss, samples and seconds when gradients are there; gives the loss of all hosts.
Between = Callable[[torch.Tensor, int, float], torch.Tensor]


class TrainStep:
    """One optimizer step a call, in place on model and optimizer.

    A batch of the shape given to ``compile_step`` takes the compiled path where there is one; any
    other (the last, smaller batch of an epoch, another mode of the model) takes the plain path:
    forward, backward and update as PyTorch runs them, on the same weights and optimizer state.

    A batch larger than the micro-batch is cut; gradients of the parts are added in place, each
    part's loss weighted by its share of the batch, which for a loss that is a mean over samples
    is the gradient of the whole batch up to float32 rounding. A loss module with
    ``reduction="sum"`` is added without weights. Batch norm sees each part by itself.

    After a compiled step the parameters' ``grad`` is ``None``: gradients never exist as a whole.

    Attributes:
        path: ``"compiled"`` or ``"plain"``.
        reason: why this path.
        precision: ``"float32"``, or ``"bfloat16"`` for forward and backward.
        precision_reason: what decided it where the plan said ``"auto"``, else ``None``.
        between: called when the gradients are there, before they are clipped and used.
        arena: entered around each call: where its tensors come from.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        optimizer: torch.optim.Optimizer,
        *,
        micro_batch_size: int | None,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        precision: str = "float32",
        between: Between | None = None,
    ) -> None:
        self.model = model
        self.loss_fn = loss_fn
        self.optimizer = optimizer
        self.micro_batch_size = micro_batch_size
        self.clip_norm = clip_norm
        self.clip_value = clip_value
        self.precision = precision
        self.between = between
        self.arena: AbstractContextManager[Any] = nullcontext()
        self.reason = "the compiled path was not asked for"
        self.precision_reason: str | None = None
        self._compiled: CompiledStep | CudaStep | None = None
        self._layout_of: Any = None
        self._laid_out: Callable[[torch.Tensor], torch.Tensor] = preferred(model, torch.empty(0))
        self._sums = getattr(loss_fn, "reduction", "mean") == "sum"

    @property
    def path(self) -> str:
        """``"compiled"`` or ``"plain"``."""
        return "plain" if self._compiled is None else "compiled"

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def makes_many(self) -> bool:
        """Whether ``many`` works on batches of the captured shape."""
        return self._compiled is not None and self._compiled.whole

    @property
    def working_bytes(self) -> int | None:
        """What the compiled path takes beside weights, optimizer state and batch, as measured when
        it was compiled; ``None``: the plain path, or not known."""
        return None if self._compiled is None else self._compiled.working_bytes

    def operations(self) -> list[Operation]:
        """Matrix products and convolutions of the compiled graph: kernel, seconds, FLOP."""
        return [] if self._compiled is None else self._compiled.operations()

    def use(self, compiled: CompiledStep | CudaStep | None, reason: str) -> None:
        """Take the compiled path, or the plain one, from now on."""
        self._compiled = compiled
        self.reason = reason

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Train on one batch.

        Args:
            x: samples, ``[batch, ...]``.
            y: targets, ``[batch, ...]``.

        Returns:
            The loss before the update, a detached scalar; of the whole batch.

        Raises:
            ModelError: the loss is not one number that depends on the parameters.
        """
        with self.arena:
            return self._one(x, y)

    def _one(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        compiled = self._compiled
        if compiled is not None and compiled.whole and compiled.accepts(x, y):
            loss = compiled.run(x, y)[0]
            self._forget_gradients(compiled)
            # What a scheduler looks at to tell that the optimizer has made its step.
            self.optimizer._opt_called = True  # type: ignore[attr-defined]
            return loss
        self.optimizer.zero_grad(set_to_none=True)
        began_s = time.monotonic()
        micro = self.micro_batch_size or len(x)
        if self.between is not None and len(x) == 0:
            total = torch.zeros(())  # A last, smaller batch leaves this host nothing.
        elif micro >= len(x):
            total = self._backward(x, y, 1.0, first=True)
        else:
            total = torch.zeros(())
            for number, (part_x, part_y) in enumerate(
                zip(x.split(micro), y.split(micro), strict=True)
            ):
                weight = 1.0 if self._sums else len(part_x) / len(x)
                total = total + self._backward(part_x, part_y, weight, first=number == 0)
        if self.between is not None:
            total = self.between(total, len(x), time.monotonic() - began_s)
        self._clip()
        self.optimizer.step()
        return total

    def many(
        self, x: torch.Tensor, y: torch.Tensor, steps: int, rates: list[list[float]] | None = None
    ) -> torch.Tensor | None:
        """Several steps in one call, without the interpreter between them.

        Args:
            x, y: ``steps`` batches one after the other, each of the captured shape; as they are
                until the losses have been read.
            rates: learning rate of each step and parameter group; ``None``: the optimizer's.

        Returns:
            Losses, float32 ``[steps]``; ``None``: not possible here, and nothing was done.
        """
        compiled = self._compiled
        if compiled is None or not compiled.whole:
            return None
        rows = len(x) // steps
        if rows * steps != len(x):
            return None
        if isinstance(compiled, CudaStep) and compiled.first_is_plain:
            return self._many_after_one(x, y, steps, rates)
        if not compiled.accepts(x[:rows], y[:rows]):
            return None
        with self.arena:
            losses = compiled.run(x, y, steps, rates)
        self._forget_gradients(compiled)
        self.optimizer._opt_called = True  # type: ignore[attr-defined]
        return losses

    def _many_after_one(
        self, x: torch.Tensor, y: torch.Tensor, steps: int, rates: list[list[float]] | None
    ) -> torch.Tensor | None:
        """The first step as a call of its own, which makes the optimizer's state."""
        rows = len(x) // steps
        groups = self.optimizer.param_groups
        present = [group["lr"] for group in groups]
        for group, rate in zip(groups, rates[0] if rates else present, strict=True):
            group["lr"] = rate
        loss = self(x[:rows], y[:rows]).reshape(1)
        for group, rate in zip(groups, present, strict=True):
            group["lr"] = rate
        if steps == 1:
            return loss
        rest = self.many(x[rows:], y[rows:], steps - 1, rates and rates[1:])
        assert rest is not None, "batches of one call are alike"
        return torch.cat([loss, rest])

    def _backward(
        self, x: torch.Tensor, y: torch.Tensor, weight: float, *, first: bool
    ) -> torch.Tensor:
        compiled = self._compiled
        if compiled is not None and not compiled.whole and compiled.accepts(x, y):
            return compiled.add_gradients(x, y, weight, first)[0] * weight
        device = self.device
        x, y = x.to(device), y.to(device)
        key = (x.shape[1:], x.stride()[1:])
        if key != self._layout_of:
            self._layout_of, self._laid_out = key, preferred(self.model, x)
        x = self._laid_out(x)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            output = self.model(x)
        loss = self.loss_fn(output.float() if self.precision == "bfloat16" else output, y)
        if loss.dim() != 0 or not loss.requires_grad:
            raise ModelError(
                "the loss must be one number that depends on the model's parameters",
                got=f"shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}",
                next_step="use reduction='mean' and leave some parameters trainable",
            )
        if weight != 1.0:
            loss = loss * weight
        loss.backward()
        return loss.detach()

    @staticmethod
    def _forget_gradients(compiled: CompiledStep | CudaStep) -> None:
        """Gradients that a plain step left are not this step's."""
        for weight in compiled.weights:
            if weight.grad is not None:
                weight.grad = None

    def _clip(self) -> None:
        parameters = [p for g in self.optimizer.param_groups for p in g["params"]]
        if self.clip_value is not None:
            nn.utils.clip_grad_value_(parameters, self.clip_value)
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self.clip_norm)


def compile_step(
    model: nn.Module,
    loss_fn: LossFn,
    optimizer: torch.optim.Optimizer,
    example: Sequence[torch.Tensor],
    plan: Plan | None = None,
    *,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    expected_s: float | None = None,
    batches: Batches | None = None,
) -> TrainStep:
    """A callable ``step(x, y) -> loss`` that makes one optimizer step, in place.

    Forward, loss, backward and the update (``updates`` has the rules) become one compiled
    graph; with other optimizers, or micro-batches, forward and backward do. What cannot be captured
    (control flow that depends on data, hooks, parameters that are not float32) runs on the plain
    path, and ``step.reason`` says why. ``model.training`` is left as it is; call ``model.train()``
    first, as in PyTorch. Compiling takes 10 to 30 seconds once for each model, shape and machine.

    Args:
        model: any ``torch.nn.Module``; any ``torch.optim.Optimizer`` on its parameters works
            but those that need a closure.
        loss_fn: ``loss_fn(model(x), y)`` gives a scalar, a mean over the samples.
        optimizer: built on the model's parameters.
        example: ``(x, y)``, one batch as later calls will give it.
        plan: ``cpu.num_threads``, ``memory.micro_batch_size`` and ``step`` are used; the defaults
            when ``None``, with torch's present number of threads.
        clip_norm: total norm of the gradients at most, as ``clip_grad_norm_``.
        clip_value: each gradient element at most, in size, as ``clip_grad_value_``; comes first.
        expected_s: seconds the run is expected to take on the plain path; a run too short to pay
            the compiler back is not compiled. ``None``: long.
        batches: for ``precision="auto"``: gives an iterable of batches like the example, on which
            copies are trained in float32 and in bfloat16 (``precision.probe``); ``None``: the
            example again and again.

    Raises:
        ModelError: model, loss or optimizer cannot be used, in one line.
    """
    check_parts(model, loss_fn, optimizer)
    x, y = _check_example(example)
    plan = plan or Plan()

    def make(a_model: nn.Module, an_optimizer: torch.optim.Optimizer, precision: str) -> TrainStep:
        return _step(
            a_model, loss_fn, an_optimizer, x, y, plan, precision, clip_norm, clip_value, expected_s
        )

    wanted = plan.step.precision
    step = make(model, optimizer, "float32" if wanted == "auto" else wanted)
    if wanted != "auto":
        return step
    if step.path == "plain":
        step.precision_reason = "precision auto is float32 on the plain path"
    elif batches is None and x.device.type == "meta":
        step.precision_reason = "precision auto is float32: no batches to probe bfloat16 with"
    else:
        verdict = probe(make, model, optimizer, batches or (lambda: [_cut(x, y, plan)]))
        if verdict.accepted:
            step = make(model, optimizer, "bfloat16")
        step.precision_reason = verdict.reason
    step.reason += f"; {step.precision_reason}"
    return step


def _cut(x: torch.Tensor, y: torch.Tensor, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    micro = plan.memory.micro_batch_size or len(x)
    return x[:micro], y[:micro]


def _step(
    model: nn.Module,
    loss_fn: LossFn,
    optimizer: torch.optim.Optimizer,
    x: torch.Tensor,
    y: torch.Tensor,
    plan: Plan,
    precision: str,
    clip_norm: float | None,
    clip_value: float | None,
    expected_s: float | None,
) -> TrainStep:
    """The step in one precision, compiled where plan and model allow it."""
    micro = plan.memory.micro_batch_size
    step = TrainStep(
        model,
        loss_fn,
        optimizer,
        micro_batch_size=micro,
        clip_norm=clip_norm,
        clip_value=clip_value,
        precision=precision,
    )
    if plan.memory.tensor_arena == "try" and step.device.type == "cpu":
        # Else each step takes fresh pages for its activations: a cnn took 1.8 times as long.
        arena = TensorArena(huge_pages=plan.memory.huge_pages, keep_pages=True)
        step.arena = arena
        weakref.finalize(step, arena.trim).atexit = False
    choice = choose_path(model, x, y, plan, expected_s=expected_s)
    if choice.path == "plain":
        step.reason = choice.reason
        return step
    whole = micro is None or micro >= len(x)
    x, y = _cut(x, y, plan)
    if choice.path == "cuda_graph":
        cuda, step.reason = try_cuda(
            model, loss_fn, optimizer, x, y, whole=whole, autocast=precision == "bfloat16",
            clip_norm=clip_norm, clip_value=clip_value, fuse=plan.step.compile == "always",
        )  # fmt: skip
        if cuda is not None:
            step.use(cuda, step.reason)
        return step
    compiled, reason = try_compiled(
        model,
        loss_fn,
        optimizer,
        x,
        y,
        num_threads=torch.get_num_threads(),
        whole=whole,
        autocast=precision == "bfloat16",
        clip_norm=clip_norm,
        clip_value=clip_value,
    )
    if compiled is None:
        step.reason = reason
        return step
    choice = choose_path(model, x, y, plan, expected_s=expected_s, is_cached=compiled.is_cached)
    if choice.path == "plain":
        step.reason = choice.reason
        return step
    try:
        compiled.load()
    except RunError as error:
        step.reason = str(error)
        return step
    step.use(compiled, reason)
    return step


def _check_example(example: Any) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        x, y = example
        same = len(x) == len(y)
    except (TypeError, ValueError):
        raise ModelError(
            "example must be (x, y), one batch of samples and targets",
            got=type(example).__name__,
            next_step="pass example=(x, y)",
        ) from None
    if not (isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)) or not same:
        raise ModelError(
            "example must be two tensors with the same number of samples",
            got=", ".join(str(tuple(getattr(t, "shape", ()))) for t in (x, y)),
            next_step="pass example=(x, y)",
        )
    return x, y
