"""``CompiledStep``: a captured, compiled step bound to a model and an optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import RunError
from ..graph import convolutions
from .capture import Captured, LossFn, NotCapturable, capture
from .operations import Operation, operations
from .program import Program, compile_captured, compiled_path, working_bytes
from ..graph.rounding import covers, rounds_products
from ..graph.routes import route
from .updates import Update, reason_outside


class CompiledStep:
    """One compiled graph for one shape of batch.

    With ``update`` the graph makes the whole optimizer step; without, it adds weighted gradients
    into ``sums``, and the optimizer's own ``step`` follows.

    Args:
        model, loss_fn, optimizer: as for ``compile_step``.
        x, y: a batch; only shapes, strides and dtypes count (meta tensors will do).
        num_threads: threads the code is compiled for.
        whole: whether the optimizer's rule should be in the graph.
        autocast: bfloat16 forward and backward: by hotloop's own products where these are all that
            there is to compute in it (``rounding``), else under torch's autocast.
        clip_norm, clip_value: limits of the gradient.

    Raises:
        NotCapturable: why not.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        optimizer: torch.optim.Optimizer,
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        num_threads: int,
        whole: bool,
        autocast: bool = False,
        clip_norm: float | None = None,
        clip_value: float | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.num_threads = num_threads
        self.shape = _signature(x, y)
        unique = {id(p): p for p in model.parameters()}
        weights: list[torch.Tensor] = [p for p in unique.values() if p.requires_grad]
        self.update: Update | None = None
        if whole:
            self.update = Update(optimizer, weights, clip_norm, clip_value)
        rounds = autocast and rounds_products()
        self.captured: Captured = capture(
            model, loss_fn, x, y, update=self.update, autocast=autocast and not rounds
        )
        if rounds and not covers(self.captured.graph):
            rounds = False
            self.captured = capture(model, loss_fn, x, y, update=self.update, autocast=True)
        self._autocast = autocast and not rounds
        graph = self.captured.graph
        self.routes = [] if self._autocast else route(graph, num_threads, rounds=rounds)
        self._convolutions = [] if self._autocast else convolutions.route(graph, num_threads)
        self.sums = [] if whole else [torch.zeros_like(w, requires_grad=False) for w in weights]
        self._modules = list(model.modules())
        self._modes = [m.training for m in self._modules]
        self._tensors = [
            *self.captured.weights,
            *self.captured.frozen,
            *self.captured.buffers,
        ]
        self._program: Program | None = None
        self._bound: Any = None
        self._owned: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        self._steps_done = 0.0
        self._counter: torch.Tensor | None = None

    @property
    def whole(self) -> bool:
        """Whether the optimizer's rule is in the graph."""
        return self.update is not None

    @property
    def weights(self) -> list[torch.Tensor]:
        """Trainable parameters, each once."""
        return self.captured.weights

    @property
    def is_cached(self) -> bool:
        """Whether the compiled code lies in the cache."""
        return compiled_path(self.captured, self.num_threads).is_file()

    @property
    def working_bytes(self) -> int | None:
        """Of one step, beside weights, optimizer state and batch; ``None``: not known."""
        return working_bytes(compiled_path(self.captured, self.num_threads))

    def load(self) -> None:
        """Compile, or take from the cache, and load.

        Raises:
            RunError: no compiler, or it refused.
        """
        self._program = Program(compile_captured(self.captured, self.num_threads), self.num_threads)

    def accepts(self, x: torch.Tensor, y: torch.Tensor) -> bool:
        """Whether this batch, and the model as it is now, are what was captured."""
        return (
            _signature(x, y) == self.shape
            and [m.training for m in self._modules] == self._modes
            and all(w.requires_grad for w in self.captured.weights)
        )

    def operations(self) -> list[Operation]:
        """Products and convolutions, timed alone (once for a machine); none under autocast."""
        if self._autocast:
            return []
        return operations(self.captured.graph, self.routes, self._convolutions, self.num_threads)

    def run(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        steps: int = 1,
        rates: list[list[float]] | None = None,
    ) -> torch.Tensor:
        """``steps`` whole steps on rows of x and y; the losses, float32 ``[steps]``."""
        assert self.update is not None
        self._rebind()
        if self._counter is not None:  # A plain step may have been in between.
            self._steps_done = self._counter.item()
        tables = self.update.rows(self._steps_done, steps, rates)
        losses = self._call(x, y, tables, steps)
        self.update.advance(self._steps_done, steps)
        self._steps_done += steps
        return losses

    def add_gradients(
        self, x: torch.Tensor, y: torch.Tensor, weight: float, first: bool
    ) -> torch.Tensor:
        """Add ``weight`` times the gradients to the parameters' ``grad``; the loss ``[1]``.

        ``first``: begin anew. What the plain path added so far is kept.
        """
        for parameter, total in zip(self.weights, self.sums, strict=True):
            if not first and parameter.grad is not None and parameter.grad is not total:
                total.copy_(parameter.grad)
            parameter.grad = None
        self._rebind()
        loss = self._call(x, y, torch.tensor([[weight, 0.0 if first else 1.0]]), 1)
        for parameter, total in zip(self.weights, self.sums, strict=True):
            parameter.grad = total
        return loss

    def _call(
        self, x: torch.Tensor, y: torch.Tensor, tables: torch.Tensor, steps: int
    ) -> torch.Tensor:
        assert self._program is not None
        return self._program.run(x, y, tables, steps)

    def _rebind(self) -> None:
        """Bind again where a tensor was replaced: weights moved, a state dict loaded."""
        state = self.optimizer.state
        now = (id(state), [t.data_ptr() for t in self._tensors])
        if now == self._bound and all(owner.get(n) is t for owner, n, t in self._owned):
            return
        assert self._program is not None
        counters: list[torch.Tensor] = []
        with torch.no_grad():
            if self.update is None:
                states, self._steps_done = self.sums, 0.0
                control = torch.zeros(2)
            else:
                states, counters, self._steps_done = self.update.bind()
                control = self.update.control()
            inputs = [t.detach() for t in (*self._tensors, *states, control)]
            self._program.bind(inputs, inputs[-1], counters)
        self._counter = counters[0] if counters else None
        held = {id(t) for t in (*states, *counters)}
        self._owned = [
            (owner, name, value)
            for owner in (state[w] for w in self.captured.weights if w in state)
            for name, value in owner.items()
            if id(value) in held
        ]
        self._bound = (id(self.optimizer.state), [t.data_ptr() for t in self._tensors])


def _signature(x: torch.Tensor, y: torch.Tensor) -> tuple[Any, ...]:
    return (x.shape, x.stride(), x.dtype, y.shape, y.stride(), y.dtype)


def try_compiled(
    model: nn.Module,
    loss_fn: LossFn,
    optimizer: torch.optim.Optimizer,
    x: torch.Tensor,
    y: torch.Tensor,
    **options: Any,
) -> tuple[CompiledStep | None, str]:
    """A compiled step that is not loaded yet, or ``None``; and the reason for the report."""
    outside = reason_outside(optimizer)
    whole = options.pop("whole", True) and outside is None
    try:
        step = CompiledStep(model, loss_fn, optimizer, x, y, whole=whole, **options)
    except NotCapturable as verdict:
        return None, str(verdict)
    except RunError as error:
        return None, str(error)
    if whole:
        return step, "forward, loss, backward and update are one compiled graph"
    reason = outside or "gradients are accumulated over micro-batches"
    return step, f"forward, loss and backward are one compiled graph; {reason}"
