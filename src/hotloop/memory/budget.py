"""``Budget``: the memory of a run by component, from shapes alone, before it is taken."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..errors import BudgetError, InputError
from ..machine import Machine
from ..monitor import resident_bytes
from ..plan import Plan
from ..units import format_bytes
from . import tree
from .arena_model import ArenaModel
from .layout import BatchLayout
from .misfit import misfit
from .pool import MemoryPool
from .rehearsal import rehearse
from .tensor_arena import TensorArena
from .trace import UNTRACEABLE, LossFn, StepTrace, at_batch_size, default_loss, trace_step

PHASES = ("train", "infer")

# The guide's names, in the guide's order; those it lacks follow.
COMPONENTS = {
    "model_parameters_bytes": "Model parameters",
    "batch_data_bytes": "Batch data",
    "gradient_buffers_bytes": "Gradient buffers",
    "optimizer_state_bytes": "Optimizer state",
    "working_memory_bytes": "Working memory",
    "runtime_base_bytes": "Runtime base",
    "enclave_overhead_bytes": "Enclave overhead",
}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Predicted resident memory of a run, in bytes by component.

    Attributes:
        phase: ``"train"`` or ``"infer"``.
        batch_size: samples of a step.
        micro_batch_size: samples of one forward and backward pass; at most ``batch_size``.
        model_parameters_bytes: parameters and buffers.
        batch_data_bytes: the batch pool, and packed samples that stay in memory.
        gradient_buffers_bytes: one gradient for each trainable parameter (training).
        optimizer_state_bytes: what the optimizer keeps between steps (training).
        working_memory_bytes: activations, temporaries, and the gaps between them; ``None`` where
            the step cannot be run on shapes alone (``assumptions`` says why), and then not in the
            total.
        runtime_base_bytes: interpreter, PyTorch and kernel libraries, measured in this process;
            ``None`` where the kernel does not tell, and then not in the total.
        enclave_overhead_bytes: see ``MemoryConfig``.
        flop_per_step: floating-point operations of one step; ``None`` as above.
        output_shape: of the model's result for one micro-batch; ``None``: not one tensor.
        assumptions: where the prediction had to assume; one line each.
    """

    phase: str
    batch_size: int
    micro_batch_size: int
    model_parameters_bytes: int
    batch_data_bytes: int
    gradient_buffers_bytes: int
    optimizer_state_bytes: int
    working_memory_bytes: int | None
    runtime_base_bytes: int | None
    enclave_overhead_bytes: int
    flop_per_step: int | None
    output_shape: tuple[int, ...] | None
    assumptions: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Sum of the components that are known."""
        return sum(getattr(self, name) or 0 for name in COMPONENTS)

    @classmethod
    def predict(
        cls,
        model: nn.Module,
        example: Any,
        batch_size: int,
        phase: str = "train",
        plan: Plan | None = None,
        *,
        loss_fn: LossFn | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        data_resident_bytes: int = 0,
        machine: Machine | None = None,
    ) -> Budget:
        """Predict the memory of training or inference without allocating it.

        The step is run on fake tensors (``trace_step``) and its allocations are replayed through
        the model of the tensor arena (``ArenaModel``), so that gaps between tensors count.

        Neither model, loss, optimizer nor random numbers are changed, nor anything of Python's that
        their code reaches (``preserved``). Where shapes alone do not do, the budget says why, and
        working memory is unknown.

        Args:
            model: module on the CPU or the meta device.
            example: ``(x, y)``, each a tensor ``[batch, ...]`` or a tree of such (``tree.call``
                says how a model is called with x). ``(x,)``: the loss gets the answer alone. For
                inference ``x`` as ``compile_inference`` takes it; a tuple of two that the model
                does not take by place is ``(x, y)``. Only shapes and dtypes count, and the first
                dimension is replaced by ``batch_size``.
            batch_size: samples of a step, at least 1.
            phase: ``"train"`` or ``"infer"``.
            plan: micro-batch, queue and limits; the defaults when ``None``.
            loss_fn: ``loss_fn(answer, y)`` or ``loss_fn(answer)``; cross entropy for whole-number
                targets, else mean squared error, when ``None``.
            optimizer: Adam when ``None``.
            data_resident_bytes: packed samples that are resident already.
            machine: probed when ``None``.

        Raises:
            InputError: batch size or phase outside their rule.
            ModelError: plain PyTorch cannot run model and loss on the example either.
        """
        parts = _checked(model, example, batch_size, phase, loss_fn)
        machine = machine or Machine.probe()
        plan = (plan or Plan()).resolve(machine)
        micro = min(plan.memory.micro_batch_size or batch_size, batch_size)
        trace = traced(
            model, parts, batch_size, phase, loss_fn=loss_fn, optimizer=optimizer, micro=micro
        )
        layouts = batch_layouts(parts, batch_size, plan.memory.line_bytes or 64)
        num_buffers = pool_buffers(plan)
        flop = trace.flop if trace.complete else None
        base = _runtime_base_bytes(model, trace, phase, data_resident_bytes)
        working, assumptions = working_bytes(trace) if trace.complete else None, trace.assumptions
        if phase == "train" and plan.step.precision == "auto" and working is not None:
            # The probe trains a copy beside the model.
            working += model_bytes(model)
            assumptions = [*assumptions, "precision auto probes on a copy of the model"]
        if plan.memory.tensor_arena == "try" and working is not None:
            missing = TensorArena.unavailable_reason()
            if missing is not None:
                assumptions = [*assumptions, _without_arena(missing)]
        return cls(
            phase=phase,
            batch_size=batch_size,
            micro_batch_size=micro,
            model_parameters_bytes=model_bytes(model),
            batch_data_bytes=MemoryPool.predict_bytes(layouts, num_buffers) + data_resident_bytes,
            gradient_buffers_bytes=trace.gradient_bytes,
            optimizer_state_bytes=trace.optimizer_state_bytes,
            working_memory_bytes=working,
            runtime_base_bytes=base,
            enclave_overhead_bytes=plan.memory.enclave_overhead_bytes or 0,
            flop_per_step=flop,
            output_shape=trace.output_shape,
            assumptions=tuple(assumptions),
        )

    def table(self) -> list[tuple[str, int | None]]:
        """``(component, bytes)`` in the guide's words and order, with the total last.

        Components that the phase does not have are left out.
        """
        training_only = ("gradient_buffers_bytes", "optimizer_state_bytes")
        rows: list[tuple[str, int | None]] = [
            (title, getattr(self, name))
            for name, title in COMPONENTS.items()
            if self.phase == "train" or name not in training_only
        ]
        return [*rows, ("Total", self.total_bytes)]

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON, total included."""
        document = dataclasses.asdict(self)
        document["total_bytes"] = self.total_bytes
        return document

    def require_fit(self, limit_bytes: int | None, largest: int | None) -> None:
        """Refuse a run that cannot fit.

        Args:
            limit_bytes: what there is; ``None``: no limit known, everything fits.
            largest: the largest micro-batch that would fit, for the message.

        Raises:
            BudgetError: the prediction is above the limit.
        """
        if limit_bytes is None or self.total_bytes <= limit_bytes:
            return
        if largest is not None:
            advice = f"use --fit, or --micro-batch-size {largest} (gradients are accumulated)"
        else:
            fixed = self.total_bytes - (self.working_memory_bytes or 0)
            advice = f"raise the limit above {format_bytes(fixed)}, or use a smaller model"
        raise BudgetError(
            f"the run must fit the memory limit of {format_bytes(limit_bytes)}",
            got=f"predicted {format_bytes(self.total_bytes)}"
            f" at micro-batch {self.micro_batch_size}",
            next_step=advice,
        )


def _checked(
    model: nn.Module, example: Any, batch_size: int, phase: str, loss_fn: LossFn | None
) -> tuple[Any, ...]:
    """The example as ``(x, y)`` or ``(x,)``; InputError where an argument is outside its rule."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(
            "batch_size must be a whole number of at least 1",
            got=repr(batch_size),
            next_step="pass a batch size such as 64",
        )
    if phase not in PHASES:
        raise InputError(
            "phase must be 'train' or 'infer'", got=repr(phase), next_step="use 'train'"
        )
    is_pair = type(example) in (tuple, list)
    if phase == "infer":
        by_place = not is_pair or len(example) != 2 or _takes(model, 2)
        return (example,) if by_place else (example[0],)
    parts = tuple(example) if is_pair else (example,)
    alone = len(parts) == 1 and loss_fn is not None and _takes(loss_fn, 1)
    if len(parts) != 2 and not alone:
        raise InputError(
            "example must be (x, y) for training, or (x,) for a loss of the answer alone",
            got=f"{len(parts)} parts",
            next_step="pass example=(x, y) with one batch of samples and labels",
        )
    return parts


def _takes(function: Any, count: int) -> bool:
    """Whether a module or function can be called with so many arguments by place."""
    try:
        inspect.signature(getattr(function, "forward", function)).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # It does not tell.
        return True
    return True


def largest_micro_batch(
    model: nn.Module,
    example: Any,
    batch_size: int,
    limit_bytes: int,
    plan: Plan,
    **options: Any,
) -> tuple[int, Budget] | None:
    """The largest micro-batch, dividing ``batch_size`` or not, whose budget is within the limit.

    Bisection: predicted memory grows with the micro-batch. Options are those of
    ``Budget.predict``.

    Returns:
        The size and its budget; ``None`` when not even one sample fits.
    """

    def at(size: int) -> Budget:
        tried = plan.replace({"memory.micro_batch_size": size})
        return Budget.predict(model, example, batch_size, "train", tried, **options)

    low, high = 0, batch_size
    best: Budget | None = None
    while low < high:
        size = (low + high + 1) // 2
        budget = at(size)
        if budget.total_bytes <= limit_bytes:
            low, best = size, budget
        else:
            high = size - 1
    return None if best is None else (low, best)


def batch_layouts(
    example: tuple[Any, ...], batch_size: int, line_bytes: int
) -> tuple[BatchLayout, ...]:
    """One layout for each tensor of the example that has rows, ``batch_size`` each."""
    rows_of = at_batch_size(example, batch_size)
    tensors = [t for part in example for t in tree.flatten(part)[0]]
    return tuple(
        BatchLayout(rows, tuple(tensor.shape[1:]), tensor.dtype, line_bytes)
        for tensor in tensors
        if (rows := rows_of(tensor)) is not None and 0 not in tensor.shape[1:]
    )


def pool_buffers(plan: Plan) -> int:
    """Buffers of the batch pool: the queue, one being filled and one in the step."""
    return plan.cpu.queue_size + 2


def traced(
    model: nn.Module,
    example: tuple[Any, ...],
    batch_size: int,
    phase: str,
    *,
    loss_fn: LossFn | None,
    optimizer: torch.optim.Optimizer | None,
    micro: int,
) -> StepTrace:
    """``trace_step``; what shapes alone cannot tell is unknown, with its reason.

    Raises:
        InputError: the batch cannot be cut into micro-batches.
        ModelError: plain PyTorch cannot run model and loss on the example either.
    """
    try:
        return trace_step(
            model,
            example,
            batch_size=batch_size,
            phase=phase,
            loss_fn=loss_fn,
            optimizer=optimizer,
            micro_batch_size=micro,
        )
    except UNTRACEABLE as error:
        return _untraced(model, phase, optimizer, error)
    except InputError:
        raise
    except Exception as error:
        loss_fn = loss_fn or default_loss(example[1] if len(example) == 2 else None)
        refusal = misfit(
            model, example, batch_size, loss_fn if phase == "train" else None, traced=error
        )
        if refusal is not None:
            raise refusal from error
        return _untraced(model, phase, optimizer, error)


def _untraced(
    model: nn.Module, phase: str, optimizer: torch.optim.Optimizer | None, error: Exception
) -> StepTrace:
    """What is known without running the step: gradients, and Adam's state where one is kept."""
    gradients = 0
    if phase == "train":
        gradients = sum(tensor_bytes(p) for p in model.parameters() if p.requires_grad)
    stateless = isinstance(optimizer, torch.optim.SGD) and not optimizer.defaults["momentum"]
    line = (str(error).strip().splitlines() or [""])[0]
    why = f"{type(error).__name__}: {line}" if line else type(error).__name__
    counted = "; the optimizer's state is counted as Adam's" if phase == "train" else ""
    return StepTrace(
        complete=False,
        gradient_bytes=gradients,
        optimizer_state_bytes=0 if stateless else 2 * gradients,
        assumptions=[
            "working memory is unknown and not in the total: the step depends on values, or has no "
            f"form in shapes alone ({why[:200]}){counted}"
        ],
    )


def _without_arena(missing: str) -> str:
    return (
        "working memory is that of the tensor arena; the system's allocator, used instead, leaves "
        f"gaps that are not predicted ({missing})"
    )


def working_bytes(trace: StepTrace) -> int:
    """How far the step's tensors reach in the arena, less what is listed by itself.

    And what kernels of products take beside, which no allocation of the step shows.
    """
    arena = ArenaModel()
    handles: dict[int, Any] = {}
    for number, size in trace.events:
        if size:
            handles[number] = arena.malloc(size)
        else:
            arena.free(handles.pop(number))
    held = trace.gradient_bytes + trace.optimizer_state_bytes
    return max(0, arena.peak_top_bytes - held) + trace.product_bytes


def model_bytes(model: nn.Module) -> int:
    """Parameters and buffers; what is tied counts once."""
    return sum(_storages(model).values())


def _storages(model: nn.Module, *, resident_only: bool = False) -> dict[int, int]:
    """Bytes of each distinct storage: tied weights count once."""
    sizes = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if resident_only and tensor.device.type != "cpu":
            continue
        strided = tensor.layout is torch.strided and not is_lazy(tensor)
        key = tensor.untyped_storage().data_ptr() if strided and not tensor.is_meta else id(tensor)
        sizes[key] = tensor.untyped_storage().nbytes() if strided else tensor_bytes(tensor)
    return sizes


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements, of what a sparse one keeps, and none of one without shape."""
    if is_lazy(tensor):
        return 0
    if tensor.layout is torch.strided:
        return tensor.numel() * tensor.element_size()
    if tensor.layout is torch.sparse_coo:
        return tensor._indices().nbytes + tensor._values().nbytes
    kept: tuple[torch.Tensor, ...] = ()  # Of a layout of a library that does not tell.
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        kept = (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        kept = (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    return sum(part.nbytes for part in kept)


def _runtime_base_bytes(
    model: nn.Module, trace: StepTrace, phase: str, data_resident_bytes: int
) -> int | None:
    rehearse(trace.operations, training=phase == "train")
    resident = resident_bytes()
    if resident is None:
        return None
    held = sum(_storages(model, resident_only=True).values()) + data_resident_bytes
    return max(0, resident - held)
