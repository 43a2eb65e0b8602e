"""``compile_step``: model, loss and optimizer as one call that trains on a batch."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from ..memory import TensorArena
from ..memory.image_layout import preferred
from ..plan import Plan
from .check import LossFn, check_parts
from .cuda import CudaStep, try_cuda
from .operations import Operation
from .path_choice import choose_path
from .precision import Batches, probe
from .recorded import RecordedStep
from .recorded_shape import shape_key

# Called with loss, samples and seconds when gradients are there; gives the loss of all hosts.
Between = Callable[[torch.Tensor, int, float], torch.Tensor]


class TrainStep:
    """One optimizer step a call, in place on model and optimizer.

    The first steps of each shape of batch run as PyTorch makes them, and are recorded. Where two
    recordings say the same, later batches of that shape run as a program: the same arithmetic on
    the same weights and optimizer state, without autograd and the interpreter. What cannot become
    a program stays plain, and ``reason`` says why; so does a step before which something changed
    that the program took for constant.

    A batch larger than the micro-batch is cut; gradients of the parts are added in place, each
    part's loss weighted by its share of the batch, which for a loss that is a mean over samples
    is the gradient of the whole batch up to float32 rounding. A loss module with
    ``reduction="sum"`` is added without weights. Batch norm sees each part by itself.

    After a step that is one program the parameters' ``grad`` is ``None``: gradients never exist as
    a whole.

    Attributes:
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
        self.precision_reason: str | None = None
        self._reason = "programs were not asked for"
        self._cuda: CudaStep | None = None
        self._recorded: RecordedStep | None = None
        self._layout_of: Any = None
        self._laid_out: Callable[[torch.Tensor], torch.Tensor] = preferred(model, torch.empty(0))
        self._sums = getattr(loss_fn, "reduction", "mean") == "sum"

    @property
    def path(self) -> str:
        """``"compiled"``: batches of a shape run as a program, or as a CUDA graph; ``"plain"``."""
        fast = self._cuda is not None or (self._recorded is not None and self._recorded.has_program)
        return "compiled" if fast else "plain"

    @property
    def reason(self) -> str:
        """Why the last step ran as it did."""
        reason = self._reason if self._recorded is None else self._recorded.reason
        told = self.precision_reason
        return f"{reason}; {told}" if told and told != reason else reason

    @reason.setter
    def reason(self, reason: str) -> None:
        self._reason = reason

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def makes_many(self) -> bool:
        """Whether ``many`` is of use."""
        fast = self._cuda or self._recorded
        return fast is not None and fast.whole

    @property
    def is_recorded(self) -> bool:
        """Whether steps may become programs."""
        return self._recorded is not None

    @property
    def working_bytes(self) -> int | None:
        """What the fast path takes beside weights, optimizer state and batch; ``None``: the plain
        path, or not known yet."""
        if self._recorded is not None:
            return self._recorded.arena_bytes
        return None if self._cuda is None else self._cuda.working_bytes

    def operations(self) -> list[Operation]:
        """Matrix products and convolutions of the program: kernel, seconds, FLOP."""
        if self._recorded is not None:
            return self._recorded.operations()
        return [] if self._cuda is None else self._cuda.operations()

    def use(self, fast: CudaStep | RecordedStep) -> None:
        """Take the fast path from now on."""
        if isinstance(fast, RecordedStep):
            self._recorded = fast
        else:
            self._cuda = fast

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
        losses = self._fast_steps(x, y, 1, None)
        return self._slow_step(x, y) if losses is None else losses[0]

    def _slow_step(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """One step that is not whole on the fast path."""
        self.optimizer.zero_grad(set_to_none=True)
        began_s = time.monotonic()
        micro = self.micro_batch_size or len(x)
        if self.between is not None and len(x) == 0:
            total = torch.zeros(())  # A last, smaller batch leaves this host nothing.
        elif micro >= len(x):
            total = self._part(x, y, 1.0, first=True)
        else:
            total = torch.zeros(())
            for number, (part_x, part_y) in enumerate(
                zip(x.split(micro), y.split(micro), strict=True)
            ):
                weight = 1.0 if self._sums else len(part_x) / len(x)
                total = total + self._part(part_x, part_y, weight, first=number == 0)
        if self.between is not None:
            total = self.between(total, len(x), time.monotonic() - began_s)
        stepped_s = time.monotonic()
        self._clip()
        self.optimizer.step()
        if self._recorded is not None:
            self._recorded.build(time.monotonic() - stepped_s)
        return total

    def _fast_steps(
        self, x: torch.Tensor, y: torch.Tensor, steps: int, rates: list[list[float]] | None
    ) -> torch.Tensor | None:
        """``steps`` whole steps by the fast path; ``None``: it does not take them."""
        rows = len(x) // steps
        if self._cuda is not None and self._cuda.whole and self._cuda.accepts(x[:rows], y[:rows]):
            losses = self._cuda.run(x, y, steps, rates)
        elif self._recorded is not None and self._recorded.whole:
            key = shape_key(x[:rows], y[:rows], 1.0)
            self._rehearse(key, x[:rows], y[:rows], 1.0)
            if self._recorded.ready(key, steps) < steps:
                return None
            losses = self._recorded.run(key, (x, y), steps, rates)
        else:
            return None
        self._forget_gradients()
        # What a scheduler looks at to tell that the optimizer has made its step.
        self.optimizer._opt_called = True  # type: ignore[attr-defined]
        return losses

    def many(
        self, x: torch.Tensor, y: torch.Tensor, steps: int, rates: list[list[float]] | None = None
    ) -> torch.Tensor | None:
        """Several steps in one call, without the interpreter between them where that is possible.

        Args:
            x, y: ``steps`` batches one after the other; as they are until the losses are read.
            rates: learning rate of each step and parameter group; ``None``: the optimizer's.

        Returns:
            Losses, float32 ``[steps]``; ``None``: not possible here, and nothing was done.
        """
        rows = len(x) // steps
        if not self.makes_many or rows * steps != len(x):
            return None
        if self._cuda is not None and not self._cuda.first_is_plain:
            with self.arena:
                return self._fast_steps(x, y, steps, rates)
        found: list[torch.Tensor] = []
        done = 0
        while done < steps:
            count = self._steps_at_once(x[done * rows :], y[done * rows :], rows, steps - done)
            part = slice(done * rows, (done + max(1, count)) * rows)
            its_rates = rates and rates[done : done + max(1, count)]
            losses = None
            if count > 0:
                with self.arena:
                    losses = self._fast_steps(x[part], y[part], count, its_rates)
            if losses is None:
                first = slice(done * rows, (done + 1) * rows)
                losses = self._first_of(x[first], y[first], its_rates).reshape(1)
            found.append(losses)
            done += len(losses)
        return found[0] if len(found) == 1 else torch.cat(found)

    def _steps_at_once(self, x: torch.Tensor, y: torch.Tensor, rows: int, steps: int) -> int:
        """How many of ``steps`` steps the fast path makes now."""
        if self._cuda is not None:
            return 0 if self._cuda.first_is_plain else steps
        assert self._recorded is not None
        return self._recorded.ready(shape_key(x[:rows], y[:rows], 1.0), steps)

    def _first_of(
        self, x: torch.Tensor, y: torch.Tensor, rates: list[list[float]] | None
    ) -> torch.Tensor:
        """One step as a call of its own, at the first of the rates."""
        groups = self.optimizer.param_groups
        present = [group["lr"] for group in groups]
        for group, rate in zip(groups, rates[0] if rates else present, strict=True):
            group["lr"] = rate
        loss = self(x, y)
        for group, rate in zip(groups, present, strict=True):
            group["lr"] = rate
        return loss

    def _part(
        self, x: torch.Tensor, y: torch.Tensor, weight: float, *, first: bool
    ) -> torch.Tensor:
        """Gradients of a batch or a part of it, added to ``grad``; its weighted loss."""
        if self._cuda is not None and not self._cuda.whole and self._cuda.accepts(x, y):
            return self._cuda.add_gradients(x, y, weight, first)[0] * weight
        recorded = self._recorded
        if recorded is None:
            return self._backward(*self._placed(x, y), weight, self.precision == "bfloat16")
        key = shape_key(x, y, weight)
        if not recorded.whole:
            self._rehearse(key, x, y, weight)
        if not recorded.whole and recorded.ready(key):
            return recorded.add_gradients(key, (x, y), first=first)
        x, y = self._placed(x, y)
        return recorded.record(key, (x, y), lambda low: self._backward(x, y, weight, low))

    def _rehearse(self, key: Any, x: torch.Tensor, y: torch.Tensor, weight: float) -> None:
        """Record what ran as a program before the run was resumed."""
        assert self._recorded is not None
        if self._recorded.waits_for(key):
            x, y = self._placed(x, y)
            self._recorded.rehearse(key, (x, y), lambda low: self._backward(x, y, weight, low))

    @property
    def progress(self) -> dict[str, Any] | None:
        """What a checkpoint keeps of the programs; ``None``: nothing is recorded."""
        return None if self._recorded is None else self._recorded.progress()

    def go_on(self, progress: dict[str, Any] | None) -> None:
        """Go on where ``progress`` was: the same batches run as programs."""
        if self._recorded is not None and progress is not None:
            self._recorded.go_on(progress)

    def _placed(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch where the model is, laid out as its layers like it."""
        device = self.device
        x, y = x.to(device), y.to(device)
        key = (x.shape[1:], x.stride()[1:])
        if key != self._layout_of:
            copies = self._recorded is not None
            self._layout_of, self._laid_out = key, preferred(self.model, x, copies=copies)
        return self._laid_out(x), y

    def _backward(
        self, x: torch.Tensor, y: torch.Tensor, weight: float, autocast: bool
    ) -> torch.Tensor:
        """Forward and backward as PyTorch makes them."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            output = self.model(x)
        loss = self.loss_fn(output.float() if autocast else output, y)
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

    def _forget_gradients(self) -> None:
        """Gradients that a plain step left are not this step's."""
        fast = self._cuda or self._recorded
        for weight in fast.weights if fast is not None else ():
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
    batches: Batches | None = None,
) -> TrainStep:
    """A callable ``step(x, y) -> loss`` that makes one optimizer step, in place.

    The first two steps of each shape of batch run as PyTorch makes them and are recorded; the next
    ones run as a program of forward, loss, backward and update (``updates`` has the rules). With
    other optimizers, or micro-batches, forward and backward are the program. What cannot become one
    (control flow that depends on data, hooks) stays as PyTorch runs it, and ``step.reason`` says
    why. ``model.training`` is left as it is; call ``model.train()`` first, as in PyTorch.

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
        return _step(a_model, loss_fn, an_optimizer, x, y, plan, precision, clip_norm, clip_value)

    wanted = plan.step.precision
    step = make(model, optimizer, "float32" if wanted == "auto" else wanted)
    if wanted != "auto":
        return step
    if step.path == "plain" and not step.is_recorded:
        step.precision_reason = "precision auto is float32 on the plain path"
    elif batches is None and x.device.type == "meta":
        step.precision_reason = "precision auto is float32: no batches to probe bfloat16 with"
    else:
        verdict = probe(make, model, optimizer, batches or (lambda: [_cut(x, y, plan)]))
        if verdict.accepted:
            step = make(model, optimizer, "bfloat16")
        step.precision_reason = verdict.reason
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
) -> TrainStep:
    """The step in one precision, recorded where the plan allows it."""
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
    choice = choose_path(model, x, plan)
    if choice.path == "plain":
        step.reason = choice.reason
        return step
    whole = micro is None or micro >= len(x)
    x, y = _cut(x, y, plan)
    limits = {"clip_norm": clip_norm, "clip_value": clip_value}
    if choice.path == "cuda_graph":
        cuda, step.reason = try_cuda(
            model, loss_fn, optimizer, x, y, whole=whole, autocast=precision == "bfloat16",
            fuse=plan.step.compile == "always", **limits,
        )  # fmt: skip
        if cuda is not None:
            step.use(cuda)
        return step
    step.use(
        RecordedStep(
            model,
            loss_fn,
            optimizer,
            num_threads=torch.get_num_threads(),
            whole=whole,
            autocast=precision == "bfloat16",
            **limits,
        )
    )
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
