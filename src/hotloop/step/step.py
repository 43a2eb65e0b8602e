"""``TrainStep``: model, loss and optimizer as one call that trains on a batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from ..memory import TensorArena, tree
from .batch import NO_TARGET, Batch
from .check import LossFn, needs_closure
from .cuda import CudaStep
from .layout import Layout
from .loss_weight import LossWeight, weighted
from .operations import Operation
from .recorded import RecordedStep

# Called when gradients are there, with the loss, its samples, seconds and weight (``LossWeight.
# count``); gives the loss of all hosts.
Between = Callable[[torch.Tensor, int, float, float | None], torch.Tensor]
LEFT_OUT = "labels are left out in a loss of your own, which is compared with that of its parts"
_WITHOUT_PARTS = "leave memory.micro_batch_size out, or pass the loss of torch.nn itself"


class TrainStep:
    """One optimizer step a call, in place on model and optimizer.

    The first steps of each shape of batch run as PyTorch makes them, and are recorded. Where two
    recordings say the same, later batches of that shape run as a program: the same arithmetic on
    the same weights and optimizer state, without autograd and the interpreter. What cannot become
    a program stays plain, and ``reason`` says why; so does a step before which something changed
    that the program took for constant.

    A batch larger than the micro-batch is cut; gradients of the parts are added in place, each
    part's loss weighted by its share of the batch's (``loss_weight``), which gives the gradient of
    the whole batch up to float32 rounding. Batch norm sees each part by itself.

    An optimizer whose ``step`` needs a closure evaluates the loss as often as it likes, as PyTorch
    runs it.

    After a step that is one program the parameters' ``grad`` is ``None``: gradients never exist as
    a whole.

    Attributes:
        precision: ``"float32"``, or ``"bfloat16"`` for forward and backward.
        precision_reason: what decided it where the plan said ``"auto"``, else ``None``.
        between: called when the gradients are there, before they are clipped and used.
        arena: entered around each call: where its tensors come from.
        loss_weight: what the loss is the mean of.
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
        self._layout: Layout | None = None
        self.loss_weight = LossWeight(loss_fn)
        self._needs_closure = needs_closure(optimizer)
        # What the model answers to each part of a batch, where somebody wants to know.
        self._answers: list[tuple[Any, Batch]] | None = None
        # Whether ``many`` still serves who was told that it does, after a fast path was given up.
        self._one_by_one = False
        # Whether the parts of the batch under way must not be programs.
        self._is_plain = False

    @property
    def path(self) -> str:
        """``"compiled"``: batches of a shape run as a program, or as a CUDA graph; ``"plain"``."""
        fast = self._cuda is not None or (self._recorded is not None and self._recorded.has_program)
        return "compiled" if fast else "plain"

    @property
    def reason(self) -> str:
        """Why the last step ran as it did."""
        reason = self._reason if self._recorded is None else self._recorded.reason
        told = [self.precision_reason, self.loss_weight.note]
        return "; ".join([reason, *(each for each in told if each and each != reason)])

    @reason.setter
    def reason(self, reason: str) -> None:
        self._reason = reason

    @property
    def notes(self) -> list[str]:
        """What a user should know of the run beside its path."""
        return [note for note in (self.precision_reason, self.loss_weight.note) if note]

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
    def recorded(self) -> RecordedStep | None:
        """What records steps and runs programs; ``None``: nothing is recorded."""
        return self._recorded

    @property
    def working_bytes(self) -> int | None:
        """What the fast path takes beside weights, optimizer state and batch; ``None``: the plain
        path, or not known yet."""
        if self._recorded is not None:
            return self._recorded.arena_bytes
        return None if self._cuda is None else self._cuda.working_bytes

    @contextmanager
    def memory_lent(self) -> Iterator[None]:
        """Others may have the memory of programs meanwhile: an evaluation between two epochs.

        What they leave free is given back after it.
        """
        recorded = self._recorded
        if recorded is None or not recorded.has_program:
            yield
            return
        recorded.lend_pages()
        try:
            yield
        finally:
            TensorArena().trim()

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

    def __call__(self, x: Any, y: Any = NO_TARGET) -> torch.Tensor:
        """Train on one batch.

        Args:
            x: samples: a tensor, or any tuple, list, dict or dataclass of tensors and plain values.
                The model is called as ``model(x)``, ``model(*x)`` or ``model(**x)``
                (``memory.tree.call``).
            y: targets, likewise; left out, the loss is ``loss_fn(answer)``.

        Returns:
            The loss before the update, a detached scalar; of the whole batch.

        Raises:
            ModelError: the loss is not one number that depends on the parameters; or the batch is
                larger than the micro-batch and cannot be cut, or its loss is not one of parts.
        """
        with self.arena:
            if self._is_as_written:
                return self._as_written(x, y)
            return self._one(Batch(x, y))

    @property
    def _is_as_written(self) -> bool:
        """Whether it is settled that steps are PyTorch's own, with nothing around them."""
        recorded = self._recorded
        if recorded is None or recorded.given_up is None or self.micro_batch_size is not None:
            return False
        clips = self.clip_norm is not None or self.clip_value is not None
        return not clips and self.between is None and not self._needs_closure

    def _as_written(self, x: Any, y: Any) -> torch.Tensor:
        """One step as a loop of the user's own would make it, next to nothing beside it."""
        self.optimizer.zero_grad(set_to_none=True)
        if self._layout is not None and self._layout.has_images:
            x = self._layout(x)
        loss = self._forward_backward(x, y, self.precision == "bfloat16")
        self.optimizer.step()
        return loss

    def _one(self, batch: Batch) -> torch.Tensor:
        losses = self._fast_steps(batch, 1, None)
        return self._slow_step(batch) if losses is None else losses[0]

    def _slow_step(self, batch: Batch) -> torch.Tensor:
        """One step that is not whole on the fast path."""
        if self._needs_closure:
            return self._closure_step(batch)
        loss = self._gradients(batch)
        stepped_s = time.monotonic()
        self._clip()
        self.optimizer.step()
        if self._recorded is not None:
            self._recorded.build(time.monotonic() - stepped_s)
        return loss

    def _closure_step(self, batch: Batch) -> torch.Tensor:
        """A step of an optimizer that evaluates the loss itself; the first of its losses."""
        losses: list[torch.Tensor] = []

        def closure() -> torch.Tensor:
            losses.append(self._gradients(batch))
            self._clip()
            return losses[-1]

        self.optimizer.step(closure)  # type: ignore[arg-type]
        return losses[0]

    def _gradients(self, batch: Batch) -> torch.Tensor:
        """Gradients of the batch, of all hosts, in ``grad``; the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        began_s = time.monotonic()
        if self.between is None:
            return self._of_parts(batch)
        count = batch.num_samples
        if count is None:
            raise ModelError(
                "a batch that several hosts share needs the samples in the first dimension of "
                "every tensor"
            )
        # A last, smaller batch may leave this host nothing.
        total = self._of_parts(batch) if count else torch.zeros(())
        return self._of_hosts(total, batch, time.monotonic() - began_s)

    def _of_hosts(self, loss: torch.Tensor, batch: Batch, seconds: float) -> torch.Tensor:
        """The loss of all hosts, whose gradients are then in ``grad``."""
        assert self.between is not None
        count = batch.num_samples or 0
        return self.between(loss, count, seconds, self.loss_weight.count(batch.y, count))

    def _cut(self, batch: Batch) -> list[Batch]:
        """Micro-batches, with their shares in the loss."""
        micro = self.micro_batch_size
        if micro is None or batch.fits(micro):
            return [batch]
        return self.loss_weight.shared(batch.cut(micro))

    def _of_parts(self, batch: Batch) -> torch.Tensor:
        """Gradients of all parts of a batch, and its loss."""
        parts = self._cut(batch)
        checks = len(parts) > 1 and not self.loss_weight.is_settled
        self._answers = [] if checks else None
        self._is_plain = checks and self.loss_weight.leaves_out(batch)
        total = self._part(parts[0], first=True)
        for part in parts[1:]:
            total = total + self._part(part, first=False)
        answers, self._answers = self._answers, None
        # Before the update: a loss that is none of parts must not train anything.
        if answers is not None and len(answers) == len(parts):
            self.loss_weight.check(answers, _WITHOUT_PARTS)
        return total

    def _fast_steps(
        self, batch: Batch, steps: int, rates: list[list[float]] | None
    ) -> torch.Tensor | None:
        """``steps`` whole steps by the fast path; ``None``: it does not take them."""
        fast: CudaStep | RecordedStep | None = self._cuda or self._recorded
        if fast is None or not fast.whole:
            return None
        first = batch if steps == 1 else batch.part(0, (batch.num_samples or 0) // steps)
        if self._cuda is not None:
            if not self._cuda.accepts(first.x, first.y):
                return None
            losses = self._cuda.run(batch.x, batch.y, steps, rates)
        else:
            assert self._recorded is not None
            key = first.key()
            self._rehearse(key, first)
            if self._recorded.ready(key, steps) < steps:
                return None
            losses = self._recorded.run(key, batch.tensors, steps, rates)
        self._forget_gradients()
        # What a scheduler looks at to tell that the optimizer has made its step.
        self.optimizer._opt_called = True  # type: ignore[attr-defined]
        return losses

    def many(
        self, x: Any, y: Any, steps: int, rates: list[list[float]] | None = None
    ) -> torch.Tensor | None:
        """Several steps in one call, without the interpreter between them where that is possible.

        Args:
            x, y: ``steps`` batches one after the other, in each tensor; as they are until the
                losses are read. ``y`` may be ``NO_TARGET``.
            rates: learning rate of each step and parameter group; ``None``: the optimizer's.

        Returns:
            Losses, float32 ``[steps]``; ``None``: not possible here, and nothing was done.
        """
        batch = Batch(x, y)
        rows = (batch.num_samples or 0) // steps
        able = self.makes_many or self._one_by_one
        if not able or not batch.is_rows or rows * steps != batch.num_samples:
            return None
        if self._cuda is not None and not self._cuda.first_is_plain:
            with self.arena:
                return self._fast_steps(batch, steps, rates)
        found: list[torch.Tensor] = []
        done = 0
        while done < steps:
            left = batch.part(done * rows, (steps - done) * rows) if done else batch
            count = self._steps_at_once(left, rows, steps - done)
            its_rates = rates and rates[done : done + max(1, count)]
            losses = None
            if count > 0:
                with self.arena:
                    part = left if count == steps - done else left.part(0, count * rows)
                    losses = self._fast_steps(part, count, its_rates)
            if losses is None:
                losses = self._first_of(left.part(0, rows), its_rates).reshape(1)
            found.append(losses)
            done += len(losses)
        return found[0] if len(found) == 1 else torch.cat(found)

    def _steps_at_once(self, batch: Batch, rows: int, steps: int) -> int:
        """How many of ``steps`` steps the fast path makes now."""
        if self._cuda is not None:
            return 0 if self._cuda.first_is_plain else steps
        assert self._recorded is not None
        if self._recorded.given_up is not None:
            return 0
        return self._recorded.ready(batch.part(0, rows).key(), steps)

    def _first_of(self, batch: Batch, rates: list[list[float]] | None) -> torch.Tensor:
        """One step as a call of its own, at the first of the rates."""
        groups = self.optimizer.param_groups
        present = [group["lr"] for group in groups]
        for group, rate in zip(groups, rates[0] if rates else present, strict=True):
            group["lr"] = rate
        loss = self(*batch.trees)
        for group, rate in zip(groups, present, strict=True):
            group["lr"] = rate
        return loss

    def _part(self, batch: Batch, *, first: bool) -> torch.Tensor:
        """Gradients of a batch or a part of it, added to ``grad``; its loss times its share."""
        cuda, recorded = self._cuda, self._recorded
        captured = cuda is not None and not cuda.whole and self._answers is None
        if cuda is not None and captured and cuda.accepts(batch.x, batch.y):
            share = float(batch.share)
            loss = cuda.add_gradients(batch.x, batch.y, share, first)[0]
            return loss * share if share else torch.zeros_like(loss)
        if recorded is None:
            return self._backward(self._placed(batch), self.precision == "bfloat16")
        batch = self._moved(batch)
        key = batch.key()
        if not recorded.whole and not self._is_plain:
            self._rehearse(key, batch)
            if recorded.ready(key):
                return recorded.add_gradients(key, batch.tensors, first=first)
        placed = self._laid_out(batch)
        if self._is_plain:
            return recorded.leave_out(lambda low: self._backward(placed, low), LEFT_OUT)
        return recorded.record(key, placed, lambda low: self._backward(placed, low))

    def _rehearse(self, key: Any, batch: Batch) -> None:
        """Record what ran as a program before the run was resumed."""
        assert self._recorded is not None
        if self._recorded.waits_for(key):
            answers, self._answers = self._answers, None
            placed = self._placed(batch)
            self._recorded.rehearse(key, placed, lambda low: self._backward(placed, low))
            self._answers = answers

    @property
    def progress(self) -> dict[str, Any] | None:
        """What a checkpoint keeps of the programs; ``None``: nothing is recorded."""
        return None if self._recorded is None else self._recorded.progress()

    def go_on(self, progress: dict[str, Any] | None) -> None:
        """Go on where ``progress`` was: the same batches run as programs."""
        if self._recorded is not None and progress is not None:
            self._recorded.go_on(progress)

    def _moved(self, batch: Batch) -> Batch:
        """The batch where the model is."""
        device = self.device
        if all(t.device == device for t in batch.tensors):
            return batch
        return batch.mapped(lambda t: t.to(device))

    def _placed(self, batch: Batch) -> Batch:
        """The batch where the model is, images laid out as its layers like them."""
        return self._laid_out(self._moved(batch))

    def _laid_out(self, batch: Batch) -> Batch:
        if self._layout is None:
            self._layout = Layout(self.model, copies=self._recorded is not None)
        x = self._layout(batch.x) if any(t.dim() == 4 for t in batch.tensors) else batch.x
        return batch if x is batch.x else Batch(x, batch.y, batch.share)

    def _backward(self, batch: Batch, autocast: bool) -> torch.Tensor:
        """Forward and backward of a batch as PyTorch makes them."""
        return self._forward_backward(batch.x, batch.y, autocast, batch.share, batch)

    def _forward_backward(
        self,
        x: Any,
        y: Any,
        autocast: bool,
        share: float | torch.Tensor = 1.0,
        batch: Batch | None = None,
    ) -> torch.Tensor:
        """Forward and backward; the loss, ``share`` times. ``batch``: for whom answers are kept."""
        if autocast or _is_autocast():
            with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
                answer = tree.call(self.model, x)
        else:
            answer = tree.call(self.model, x)
        if autocast:
            answer = tree.map_tensors(_as_float32, answer)
        if self._answers is not None and batch is not None:
            self._answers.append((answer, batch))
        loss = self.loss_fn(answer) if y is NO_TARGET else self.loss_fn(answer, y)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise ModelError(
                "the loss must be one number that depends on the model's parameters",
                got=f"shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}"
                if isinstance(loss, torch.Tensor)
                else type(loss).__name__,
                next_step="use reduction='mean' and leave some parameters trainable",
            )
        loss = weighted(loss if loss.dim() == 0 else loss.reshape(()), share)
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


_is_autocast: Any = torch._C._is_any_autocast_enabled


def _as_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype is torch.bfloat16 else tensor
