"""``CudaStep``: the train step of a model on a GPU, captured once in a CUDA graph and replayed.

A step of a small model is bound by launching kernels; a replay launches all of them in one call
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). Batches are copied into the
tensors the graph reads; from pinned memory the copy runs beside the step before it.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn, optim

from ..graph.recording import NotRecordable
from ..measure import least_seconds
from .check import LossFn, refuse_hidden
from .cuda_graph import record
from .operations import Operation

# These rules can run inside a CUDA graph with the learning rate in a tensor.
_CAPTURABLE = (optim.Adam, optim.AdamW)
# Of the comparison of two graphs, each so many replays.
_ROUNDS, _REPLAYS = 5, 10


class CudaStep:
    """One CUDA graph for one shape of batch.

    The first batch is left to the plain path, which makes the optimizer's state as PyTorch makes
    it; the graph is captured at the second, with weights, buffers, optimizer state and random state
    put back afterwards. Adam and AdamW are in the graph (they become ``capturable``, with their
    step count on the GPU, which ``state_dict`` keeps and PyTorch loads); any other optimizer makes
    its own step after the replay.

    Args:
        model: all of it on one CUDA device. loss_fn, optimizer: as for ``compile_step``.
        x, y: a batch, on any device; only shapes, strides and dtypes count.
        whole: whether the optimizer may be in the graph.
        autocast: bfloat16 forward and backward.
        clip_norm, clip_value: limits of the gradient; they too are in the graph.
        fuse: try the compiler's kernels too, and keep what is faster (5 to 30 s, once).

    Attributes:
        not_fused: why the compiler failed, if it did.

    Raises:
        NotRecordable: why not.
    """

    working_bytes: int | None = None  # On the GPU: not measured.
    not_fused: str | None = None

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        optimizer: optim.Optimizer,
        x: Any,
        y: Any,
        *,
        whole: bool,
        autocast: bool = False,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        fuse: bool = False,
    ) -> None:
        if not (isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)):
            raise NotRecordable("a CUDA graph takes a batch of two tensors")
        if isinstance(loss_fn, nn.Module) and any(loss_fn.parameters()):
            raise NotRecordable("a CUDA graph takes no loss that has parameters")
        refuse_hidden(model)
        devices = {t.device for t in [*model.parameters(), *model.buffers()]}
        if len(devices) != 1:
            names = ", ".join(sorted(str(d) for d in devices))
            raise NotRecordable(f"the model's tensors are on several devices: {names}")
        (self.device,) = devices
        self.model, self.loss_fn, self.optimizer = model, loss_fn, optimizer
        self.whole = whole and type(optimizer) in _CAPTURABLE
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self._autocast, self._clip_norm, self._clip_value = autocast, clip_norm, clip_value
        self._shape = _signature(x, y)
        self._modules = list(model.modules())
        self._modes = [m.training for m in self._modules]
        self._seen = False
        self._graph: Any = None
        self._settings: Any = None
        self._rates: list[torch.Tensor] = []
        self._filled: list[float] = []
        self._staged: Any = None
        self._fuse, self._forward = fuse, model
        self._x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=self.device)
        self._y = torch.zeros_like(y, device=self.device)
        self._x.zero_()

    @property
    def first_is_plain(self) -> bool:
        """Whether the next batch of the shape is the one that is left to the plain path."""
        return not self._seen

    def accepts(self, x: Any, y: Any) -> bool:
        """Whether this batch, and the model as it is now, are what the graph is for."""
        alike = (
            isinstance(x, torch.Tensor)
            and isinstance(y, torch.Tensor)
            and _signature(x, y) == self._shape
            and [m.training for m in self._modules] == self._modes
            and all(w.requires_grad for w in self.weights)
        )
        if alike and not self._seen:
            self._seen = True
            return False
        return alike

    def operations(self) -> list[Operation]:
        """None: kernels on the GPU are not timed one by one."""
        return []

    def run(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        steps: int = 1,
        rates: list[list[float]] | None = None,
    ) -> torch.Tensor:
        """``steps`` whole steps on rows of x and y; the losses, float32 ``[steps]``, on the GPU.

        With several steps, page-locked x and y must stay as they are until the losses are read.
        """
        rows = len(x) // steps
        losses = torch.empty(steps, device=self.device)
        rest_is_there: Any = None
        if steps > 1 and x.device.type == "cpu":
            x, y, rest_is_there = self._upload(x, y, rows)
        for number in range(steps):
            part = slice(number * rows, (number + 1) * rows)
            given = rates[number] if rates else [float(g["lr"]) for g in self._groups]
            if number == 1 and rest_is_there is not None:
                torch.cuda.current_stream(self.device).wait_event(rest_is_there)
            self._replay(x[part], y[part], given)
            losses[number].copy_(self._loss)
        return losses

    def _upload(
        self, x: torch.Tensor, y: torch.Tensor, rows: int
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """x and y on the GPU; all but the first rows arrive beside the first step, by the event."""
        shape = _signature(x, y)
        if self._staged is None or self._staged[0] != shape:
            places = [
                torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=self.device)
                for t in (x, y)
            ]
            self._staged = shape, places, torch.cuda.Stream(self.device)
        _, places, beside = self._staged
        here = torch.cuda.current_stream(self.device)
        for place, host in zip(places, (x, y), strict=True):
            place[:rows].copy_(host[:rows], non_blocking=True)
        # Steps of the call before may still read the rest.
        beside.wait_stream(here)
        with torch.cuda.stream(beside):
            for place, host in zip(places, (x, y), strict=True):
                place[rows:].copy_(host[rows:], non_blocking=True)
            there = beside.record_event()
        return places[0], places[1], there

    def add_gradients(
        self, x: torch.Tensor, y: torch.Tensor, weight: float, first: bool
    ) -> torch.Tensor:
        """Add ``weight`` times the gradients to the parameters' ``grad``; the loss ``[1]``."""
        held = [None if first else w.grad for w in self.weights]
        self._replay(x, y, [])
        for parameter, before, made in zip(self.weights, held, self._gradients, strict=True):
            if made is not None:
                scaled = made * weight
                parameter.grad = scaled if before is None else before.add_(scaled)
        return self._loss.reshape(1).clone()

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def _replay(self, x: torch.Tensor, y: torch.Tensor, rates: list[float]) -> None:
        settings = _settings(self._groups), [w.data_ptr() for w in self.weights]
        if self._graph is None or settings != self._settings:
            self._capture()
            self._settings = _settings(self._groups), [w.data_ptr() for w in self.weights]
        for place, (tensor, rate) in enumerate(zip(self._rates, rates, strict=self.whole)):
            if rate != self._filled[place]:
                tensor.fill_(rate)
                self._filled[place] = rate
        # The caller may fill page-locked memory again as soon as this returns.
        self._x.copy_(x, non_blocking=not x.is_pinned())
        self._y.copy_(y, non_blocking=not y.is_pinned())
        self._graph.replay()

    def _capture(self) -> None:
        """Record the step; nothing that the user owns has changed afterwards."""
        if self.whole:
            self._make_capturable()
        floats = [group["lr"] for group in self._groups]
        saved = [(t, t.detach().clone()) for t in self._owned()]
        random = torch.cuda.get_rng_state(self.device)
        if self.whole:
            self._rates = [torch.tensor(float(lr), device=self.device) for lr in floats]
            self._filled = [float(lr) for lr in floats]
            for group, tensor in zip(self._groups, self._rates, strict=True):
                group["lr"] = tensor
        try:
            with torch.cuda.device(self.device), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Schedulers warn of steps they did not see.
                self._graph, self._loss, self._gradients = self._fastest()
        finally:
            for group, lr in zip(self._groups, floats, strict=True):
                group["lr"] = lr
            with torch.no_grad():
                for tensor, before in saved:
                    tensor.copy_(before)
            torch.cuda.set_rng_state(random, self.device)
            self.optimizer.zero_grad(set_to_none=True)

    def _fastest(self) -> tuple[Any, torch.Tensor, list[torch.Tensor | None]]:
        """A graph of eager's kernels, or of the compiler's where they were asked for and win."""

        def recorded(forward: nn.Module) -> tuple[Any, torch.Tensor, list[torch.Tensor | None]]:
            self._forward = forward
            graph, loss = record(self._step)
            return graph, loss, [weight.grad for weight in self.weights]

        if not self._fuse:
            return recorded(self._forward)
        self._fuse = False  # Once: what wins is recorded again when settings change.
        plain = recorded(self.model)
        fused: nn.Module = torch.compile(self.model)  # type: ignore[assignment]
        try:
            # Dropout draws what it draws without the compiler.
            with torch._inductor.config.patch(fallback_random=True):
                other = recorded(fused)
        except Exception as error:  # Whatever it is, the step is made without the compiler.
            self.not_fused = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            self._forward = self.model
            return plain
        calls = {"plain": partial(_replays, plain[0]), "fused": partial(_replays, other[0])}
        if least_seconds(calls, rounds=_ROUNDS, limit_s=math.inf).fastest == "fused":
            return other
        self._forward = self.model
        return plain

    def _make_capturable(self) -> None:
        for group in self._groups:
            group["capturable"] = True
            group["fused"], group["foreach"] = True, False
            for parameter in group["params"]:
                state = self.optimizer.state.get(parameter, {})
                if "step" in state:
                    state["step"] = state["step"].to(self.device, torch.float32)

    def _owned(self) -> list[torch.Tensor]:
        state = [
            value
            for entry in self.optimizer.state.values()
            for value in entry.values()
            if isinstance(value, torch.Tensor)
        ]
        return [*self.model.parameters(), *self.model.buffers(), *state]

    def _step(self) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=self._autocast):
            output = self._forward(self._x)
        loss = self.loss_fn(output.float() if self._autocast else output, self._y)
        loss.backward()
        if self.whole:
            if self._clip_value is not None:
                nn.utils.clip_grad_value_(self.weights, self._clip_value)
            if self._clip_norm is not None:
                nn.utils.clip_grad_norm_(self.weights, self._clip_norm)
            self.optimizer.step()
        return loss.detach()


def _replays(graph: Any) -> None:
    """Several, to the end of their work: launching one takes as long as a short graph."""
    for _ in range(_REPLAYS):
        graph.replay()
    torch.cuda.synchronize()


def _settings(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the graph has burnt in: everything but the parameters and the learning rate."""
    return [{k: v for k, v in g.items() if k not in ("params", "lr", "initial_lr")} for g in groups]


def _signature(x: torch.Tensor, y: torch.Tensor) -> tuple[Any, ...]:
    return (x.shape, x.stride(), x.dtype, y.shape, y.stride(), y.dtype)


@contextlib.contextmanager
def page_locked(block: torch.Tensor, device: torch.device) -> Iterator[None]:
    """Lock a block of host memory, so that copies to the GPU run beside its kernels.

    Does nothing for a device that is not a GPU, or where the driver refuses.
    """
    if device.type != "cuda":
        yield
        return
    runtime = torch.cuda.cudart()
    locked = int(runtime.cudaHostRegister(block.data_ptr(), block.nbytes, 0)) == 0
    try:
        yield
    finally:
        if locked:
            torch.cuda.synchronize(device)
            runtime.cudaHostUnregister(block.data_ptr())


def try_cuda(
    model: nn.Module,
    loss_fn: LossFn,
    optimizer: optim.Optimizer,
    x: Any,
    y: Any,
    **options: Any,
) -> tuple[CudaStep | None, str]:
    """A step that captures itself at the second batch, or ``None``; and the reason."""
    try:
        step = CudaStep(model, loss_fn, optimizer, x, y, **options)
    except NotRecordable as verdict:
        return None, str(verdict)
    kernels = ", of the compiler's kernels where those are faster" if options.get("fuse") else ""
    if step.whole:
        return step, f"forward, loss, backward and update are one CUDA graph{kernels}"
    parts = f"forward, loss and backward are one CUDA graph{kernels}"
    return step, f"{parts}; the optimizer keeps its own step"
