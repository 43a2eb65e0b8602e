"""One train step or forward pass on fake tensors: every allocation, in order, with nothing real.

PyTorch's ``FakeTensorMode`` runs the model, the loss, autograd and the optimizer on shapes alone.
A dispatch mode around it sees each storage come and go, and counts floating-point operations
with the formulas of ``torch.utils.flop_counter``.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .fake_call import functional_call
from .image_layout import preferred
from .scratch import note_with_scratch

LossFn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# What a model raises that is right but whose course depends on values, not on shapes.
UNTRACEABLE = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    GuardOnDataDependentSymNode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

# Steps traced: the first creates the optimizer state, the second shows the steady order.
_STEPS = 2


@dataclass
class StepTrace:
    """What a step allocates.

    Attributes:
        events: ``(storage number, bytes)``; bytes > 0 is an allocation, 0 the release of it.
        gradient_bytes: gradients of the parameters.
        optimizer_state_bytes: what the optimizer keeps from step to step.
        flop: floating-point operations of one step (a multiply-add is two).
        operations: names of the operations that ran.
        output_shape: of the model's result; ``None`` when that is not one tensor.
        assumptions: where the trace had to leave the truth.
        complete: whether the step ran to its end.
    """

    events: list[tuple[int, int]] = field(default_factory=list)
    gradient_bytes: int = 0
    optimizer_state_bytes: int = 0
    flop: int = 0
    operations: set[str] = field(default_factory=set)
    output_shape: tuple[int, ...] | None = None
    assumptions: list[str] = field(default_factory=list)
    complete: bool = True

    @property
    def peak_live_bytes(self) -> int:
        """The most bytes live at once."""
        sizes: dict[int, int] = {}
        live = peak = 0
        for number, size in self.events:
            live += size or -sizes[number]
            sizes[number] = size
            peak = max(peak, live)
        return peak


class _Recorder(TorchDispatchMode):
    """Notes each new storage, and its end through a weak reference."""

    def __init__(self, trace: StepTrace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = trace
        self.count_flop = False
        self._known: dict[int, weakref.ref[Any]] = {}
        self._next = 0

    def ignore(self, tensor: torch.Tensor) -> None:
        """Treat a tensor as there before the step."""
        storage = tensor.untyped_storage()
        self._known[id(storage)] = weakref.ref(storage, lambda _: None)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name
        self.trace.operations.add(name)
        if not note_with_scratch(name, args, result, self._allocate, self._note):
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self._note(leaf)
        if self.count_flop and func.overloadpacket in flop_registry:
            formula = flop_registry[func.overloadpacket]
            self.trace.flop += int(formula(*args, **kwargs, out_val=result))
        return result

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if size == 0 or key in self._known:
            return
        release = self._allocate(size)

        def gone(_: Any) -> None:
            self._known.pop(key, None)
            release()

        self._known[key] = weakref.ref(storage, gone)

    def _allocate(self, size: int) -> Callable[[], None]:
        """Note an allocation; the result notes its release."""
        if size == 0:
            return lambda: None
        number = self._next
        self._next += 1
        self.trace.events.append((number, size))
        return lambda: self.trace.events.append((number, 0))


def _fake_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


@contextlib.contextmanager
def _training_mode(model: nn.Module, training: bool) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


def _fake_optimizer(
    optimizer: torch.optim.Optimizer, fake_of: dict[int, nn.Parameter]
) -> torch.optim.Optimizer:
    """A copy without state whose parameters are the fake ones."""
    groups = [
        {**group, "params": [fake_of[id(p)] for p in group["params"] if id(p) in fake_of]}
        for group in optimizer.param_groups
    ]
    copy = type(optimizer).__new__(type(optimizer))
    # A scheduler puts a `step` of its own on the instance, bound to the real optimizer, and hooks
    # are the user's: neither may run here.
    left = ("state", "param_groups", "step")
    copy.__dict__.update(
        {k: v for k, v in optimizer.__dict__.items() if k not in left and "_hooks" not in k}
    )
    copy.__setstate__(
        {"defaults": optimizer.defaults, "state": defaultdict(dict), "param_groups": groups}
    )
    return copy


def default_loss(target: torch.Tensor) -> LossFn:
    """Cross entropy for whole-number targets, mean squared error for the others."""
    functional = nn.functional
    return functional.mse_loss if target.is_floating_point() else functional.cross_entropy


def trace_step(
    model: nn.Module,
    example: tuple[torch.Tensor, ...],
    *,
    batch_size: int,
    phase: str = "train",
    loss_fn: LossFn | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    micro_batch_size: int | None = None,
) -> StepTrace:
    """Run one step of ``model`` on shapes alone.

    Args:
        model: any module on the CPU or the meta device; it is not changed.
        example: ``(x, y)`` or ``(x,)``; only shapes beyond the first dimension and dtypes count.
        batch_size: samples of a step.
        phase: ``"train"`` or ``"infer"``.
        loss_fn: ``loss_fn(model(x), y)``; ``None``: see ``default_loss``.
        optimizer: built on the model's parameters; ``None``: Adam.
        micro_batch_size: samples of one forward and backward pass.

    Returns:
        The trace of two steps (the first makes the optimizer state); ``flop`` is for one.

    Raises:
        UNTRACEABLE: what the model does depends on values; anything else it raises is its own.
    """
    trace = StepTrace()
    recorder = _Recorder(trace)
    first = example[0]
    laid_out = preferred(
        model, torch.empty((batch_size, *first.shape[1:]), dtype=first.dtype, device="meta")
    )
    with _training_mode(model, phase == "train"), FakeTensorMode(allow_non_fake_inputs=True):
        fake_of: dict[int, nn.Parameter] = {}
        state: dict[str, torch.Tensor] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) not in fake_of:
                fake = nn.Parameter(_fake_like(parameter), requires_grad=parameter.requires_grad)
                fake_of[id(parameter)] = fake
            state[name] = fake_of[id(parameter)]
        buffers = {name: _fake_like(buffer) for name, buffer in model.named_buffers()}
        state.update(buffers)
        inputs = [torch.empty((batch_size, *t.shape[1:]), dtype=t.dtype) for t in example]
        inputs[0] = laid_out(inputs[0])
        for tensor in [*state.values(), *inputs]:
            recorder.ignore(tensor)

        def forward(x: torch.Tensor) -> Any:
            return functional_call(model, state, x)

        if phase == "infer":
            with recorder, torch.no_grad():
                recorder.count_flop = True
                trace.output_shape = _shape(forward(inputs[0]))
            return trace

        x, y = inputs
        loss_fn = loss_fn or default_loss(y)
        fakes = list(fake_of.values())
        stepper = (
            torch.optim.Adam([p for p in fakes if p.requires_grad])
            if optimizer is None
            else _fake_optimizer(optimizer, fake_of)
        )
        micro = min(micro_batch_size or batch_size, batch_size)
        with recorder:
            for index in range(_STEPS):
                recorder.count_flop = index == 0
                for fake in fakes:
                    fake.grad = None
                for part_x, part_y in zip(x.split(micro), y.split(micro), strict=True):
                    output = forward(part_x)
                    trace.output_shape = _shape(output)
                    loss = loss_fn(output, part_y)
                    del output
                    loss.backward()
                    del loss
                try:
                    stepper.step()
                except Exception as error:
                    trace.assumptions.append(
                        f"{type(stepper).__name__} cannot run on shapes alone "
                        f"({type(error).__name__}); its state is counted as Adam's"
                    )
                    break
        trace.gradient_bytes = sum(_bytes(p.grad) for p in fakes if p.grad is not None)
        if trace.assumptions:
            trace.optimizer_state_bytes = 2 * trace.gradient_bytes
        else:
            values = [v for entry in stepper.state.values() for v in tree_leaves(entry)]
            tensors = [v for v in values if isinstance(v, torch.Tensor)]
            trace.optimizer_state_bytes = sum(map(_bytes, tensors))
        # What is still live here stays live between steps; its releases do not belong to the trace.
        trace.events = list(trace.events)
        recorder.trace = StepTrace()
    return trace


def _shape(output: Any) -> tuple[int, ...] | None:
    return tuple(output.shape) if isinstance(output, torch.Tensor) else None


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
