"""One train step or forward pass on fake tensors: every allocation, in order, with nothing real.

PyTorch's ``FakeTensorMode`` runs the model, the loss, autograd and the optimizer on shapes alone.
A dispatch mode around it sees each storage come and go, and counts floating-point operations
with the formulas of ``torch.utils.flop_counter``.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
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
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from . import tree
from .image_layout import preferred
from .preserve import preserved
from .scratch import note_with_scratch

LossFn = Callable[..., torch.Tensor]


class Untraceable(Exception):
    """What shapes alone cannot stand for."""


# What a model raises that is right but whose course depends on values, not on shapes.
UNTRACEABLE = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    GuardOnDataDependentSymNode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
    Untraceable,
)

_PRODUCTS = ("aten::mm", "aten::addmm")
# Steps traced: the first creates the optimizer state, the second shows the steady order.
_STEPS = 2


@dataclass
class StepTrace:
    """What a step allocates.

    Attributes:
        events: ``(storage number, bytes)``; bytes > 0 is an allocation, 0 the release of it.
        gradient_bytes: gradients of the parameters.
        optimizer_state_bytes: what the optimizer keeps from step to step.
        product_bytes: what the kernel of the largest product may take beside it: its smaller
            factor, packed, and its result, which oneDNN gives in memory of its own.
        flop: floating-point operations of one step (a multiply-add is two).
        operations: names of the operations that ran.
        output_shape: of the model's result; ``None`` when that is not one tensor.
        assumptions: where the trace had to leave the truth.
        complete: whether the step ran to its end.
    """

    events: list[tuple[int, int]] = field(default_factory=list)
    gradient_bytes: int = 0
    optimizer_state_bytes: int = 0
    product_bytes: int = 0
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
        if name in _PRODUCTS:
            beside = min(map(_bytes, args[-2:])) + _bytes(result)
            self.trace.product_bytes = max(self.trace.product_bytes, beside)
        if not note_with_scratch(name, args, result, self._allocate, self._note):
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self._note(leaf)
        if self.count_flop and func.overloadpacket in flop_registry:
            formula = flop_registry[func.overloadpacket]
            self.trace.flop += int(formula(*args, **kwargs, out_val=result))
        return result

    def _note(self, tensor: torch.Tensor) -> None:
        if tensor.layout is not torch.strided:
            raise Untraceable(f"a tensor of layout {str(tensor.layout).removeprefix('torch.')}")
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
    if is_lazy(tensor):
        raise Untraceable("a parameter that has no shape yet")
    if tensor.layout is not torch.strided:
        raise Untraceable(f"a tensor of layout {str(tensor.layout).removeprefix('torch.')}")
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


class _Fakes:
    """Fake parameters and buffers; what is tied stays tied."""

    def __init__(self) -> None:
        self._of: dict[int, torch.Tensor] = {}

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """The fake one of a real one."""
        if id(tensor) not in self._of:
            fake = _fake_like(tensor)
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            self._of[id(tensor)] = fake
        return self._of[id(tensor)]

    def state(self, module: Any) -> dict[str, torch.Tensor]:
        """By name, of a module; of anything else nothing."""
        if not isinstance(module, nn.Module):
            return {}
        named = itertools.chain(
            module.named_parameters(remove_duplicate=False),
            module.named_buffers(remove_duplicate=False),
        )
        return {name: self.like(tensor) for name, tensor in named}

    def trained(self) -> list[torch.Tensor]:
        """All that gradients are made for."""
        return [fake for fake in self._of.values() if fake.requires_grad]

    def all(self) -> list[torch.Tensor]:
        """In the order in which they were asked for."""
        return list(self._of.values())


def call_with(function: Any, state: dict[str, torch.Tensor], x: Any) -> Any:
    """``tree.call``, of a module on other tensors than its own."""
    if not isinstance(function, nn.Module):
        return tree.call(function, x)
    args, kwargs = tree.arguments(x)
    return torch.func.functional_call(function, state, args, kwargs)


def _fake_optimizer(optimizer: torch.optim.Optimizer, fakes: _Fakes) -> torch.optim.Optimizer:
    """A copy without state whose parameters are the fake ones."""
    groups = [
        {**group, "params": [fakes.like(p) for p in group["params"]]}
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


def default_loss(target: Any) -> LossFn:
    """Cross entropy for whole-number targets, mean squared error for the others."""
    functional = nn.functional
    is_float = isinstance(target, torch.Tensor) and target.is_floating_point()
    return functional.mse_loss if is_float else functional.cross_entropy


def at_batch_size(
    example: tuple[Any, ...], batch_size: int
) -> Callable[[torch.Tensor], int | None]:
    """Says of a tensor of an example how many rows it has in a batch; ``None``: those it has.

    The batch is the first size that all tensors have; where they differ, that of the first one.
    """
    tensors = [t for part in example for t in tree.flatten(part)[0] if t.dim() > 0]
    rows = tree.num_samples(*example) if tensors else None
    rows = rows if rows is not None or not tensors else int(tensors[0].shape[0])
    return lambda tensor: batch_size if tensor.dim() > 0 and tensor.shape[0] == rows else None


def _fake_batch(example: tuple[Any, ...], batch_size: int) -> tuple[Any, ...]:
    rows_of = at_batch_size(example, batch_size)

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.layout is not torch.strided:
            return _fake_like(tensor)  # Says that it cannot.
        rows = rows_of(tensor)
        shape = tensor.shape if rows is None else (rows, *tensor.shape[1:])
        return torch.empty(shape, dtype=tensor.dtype)

    return tuple(tree.map_tensors(fake, part) for part in example)


def trace_step(
    model: nn.Module,
    example: tuple[Any, ...],
    *,
    batch_size: int,
    phase: str = "train",
    loss_fn: LossFn | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    micro_batch_size: int | None = None,
) -> StepTrace:
    """Run one step of ``model`` on shapes alone. It leaves nothing behind: see ``preserved``.

    Args:
        model: any module on the CPU or the meta device.
        example: ``(x, y)`` or ``(x,)``, any trees; only shapes and dtypes count, and the first
            dimension becomes ``batch_size``.
        batch_size: samples of a step.
        phase: ``"train"`` or ``"infer"``.
        loss_fn: ``loss_fn(answer, y)``, or ``loss_fn(answer)`` where there is no y; ``None``: see
            ``default_loss``.
        optimizer: built on the model's parameters; ``None``: Adam.
        micro_batch_size: samples of one forward and backward pass.

    Returns:
        The trace of two steps (the first makes the optimizer state); ``flop`` is for one.

    Raises:
        UNTRACEABLE: what the model does depends on values; anything else it raises may be its own,
            or come from the shapes without values.
    """
    trace = StepTrace()
    recorder = _Recorder(trace)
    laid_out = _layout(model, example[0], batch_size)
    with (
        preserved(model, loss_fn, optimizer),
        _uncompiled(),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        model.train(phase == "train")
        fakes = _Fakes()
        state = fakes.state(model)
        x, *targets = _fake_batch(example, batch_size)
        x = laid_out(x)
        for tensor in tree.flatten((x, *targets))[0]:
            recorder.ignore(tensor)
        if phase == "infer":
            for tensor in fakes.all():
                recorder.ignore(tensor)
            with recorder, torch.no_grad():
                recorder.count_flop = True
                trace.output_shape = _shape(call_with(model, state, x))
            return trace
        micro = min(micro_batch_size or batch_size, batch_size)
        parts = [(x, *targets)] if micro == batch_size else list(tree.split((x, *targets), micro))
        loss_fn = loss_fn or default_loss(targets[0] if targets else None)
        step = _FakeStep(model, loss_fn, optimizer, fakes, trace)
        for tensor in fakes.all():
            recorder.ignore(tensor)
        with recorder:
            for index in range(_STEPS):
                recorder.count_flop = index == 0
                if not step.run(parts):
                    break
        step.count()
        # What is still live here stays live between steps; its releases do not belong to the trace.
        trace.events = list(trace.events)
        recorder.trace = StepTrace()
    return trace


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    """What torch.compile has wrapped runs as it was written; no imports where nothing is."""
    if "torch._dynamo.eval_frame" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _layout(model: nn.Module, x: Any, batch_size: int) -> Callable[[Any], Any]:
    """How a step lays out images, see ``preferred``."""
    if not isinstance(x, torch.Tensor) or x.dim() != 4:
        return lambda batch: batch
    shape = (batch_size, *x.shape[1:])
    return preferred(model, torch.empty(shape, dtype=x.dtype, device="meta"))


class _FakeStep:
    """Forward, backward and update on fake tensors."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        optimizer: torch.optim.Optimizer | None,
        fakes: _Fakes,
        trace: StepTrace,
    ) -> None:
        self.model, self.loss_fn, self.trace = model, loss_fn, trace
        self._fakes = fakes
        self._state, self._loss_state = fakes.state(model), fakes.state(loss_fn)
        known = len(fakes.all())
        self._optimizer = (
            torch.optim.Adam(fakes.trained())
            if optimizer is None
            else _fake_optimizer(optimizer, fakes)
        )
        # What neither model nor loss has in it, but the optimizer: a closure's.
        self._others = [fake for fake in fakes.all()[known:] if fake.requires_grad]

    def run(self, parts: list[tuple[Any, ...]]) -> bool:
        """One step over its micro-batches; whether the optimizer could run."""
        for fake in self._fakes.trained():
            fake.grad = None
        for x, *targets in parts:
            output = call_with(self.model, self._state, x)
            self.trace.output_shape = _shape(output)
            answer = tree.Arguments(output, *targets)
            loss = call_with(self.loss_fn, self._loss_state, answer)
            del output, answer
            loss.backward()
            del loss
        for fake in self._others:
            fake.grad = _fake_like(fake)
        try:
            self._optimizer.step()
        except Exception as error:
            self.trace.assumptions.append(
                f"{type(self._optimizer).__name__} cannot run on shapes alone "
                f"({type(error).__name__}); its state is counted as Adam's"
            )
            return False
        return True

    def count(self) -> None:
        """Bytes of gradients and of the optimizer's state, into the trace."""
        trace = self.trace
        gradients = [fake.grad for fake in self._fakes.trained() if fake.grad is not None]
        trace.gradient_bytes = sum(map(_bytes, gradients))
        if trace.assumptions:
            trace.optimizer_state_bytes = 2 * trace.gradient_bytes
            return
        values = [v for entry in self._optimizer.state.values() for v in tree_leaves(entry)]
        tensors = [v for v in values if isinstance(v, torch.Tensor)]
        trace.optimizer_state_bytes = sum(map(_bytes, tensors))


def _shape(output: Any) -> tuple[int, ...] | None:
    return tuple(output.shape) if isinstance(output, torch.Tensor) else None


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
