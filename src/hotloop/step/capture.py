"""One train step as one flat graph: forward, loss, backward and update, traced on fake tensors.

``aot_export_module`` gives forward and backward as one functional graph, with the changes of
buffers (batch norm's statistics) as results. The update of each weight is added as one operator
of ``operators``, and what the graph changes it changes in its inputs.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ..graph import operators, pooling
from ..memory.image_layout import preferred
from . import chunk_random
from .chunk import Part, hand_over, parts_of
from .updates import Update

LossFn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class NotCapturable(Exception):
    """Why this step cannot be one graph, in words for the report."""


@dataclass
class Captured:
    """A step as a graph whose inputs are flat.

    Attributes:
        graph: takes ``[*weights, *frozen, *buffers, *states, *control, x, y]``, gives the loss;
            where it is ``drawing``, the key of its random numbers before ``control``.
        weights: trainable parameters, each once. frozen: the others. buffers: of the modules.
        gradients: whether it adds gradients into its ``states`` instead of updating.
        parts: of a chunk: what it hands over for each weight, in the order of ``states``.
        drawing: of a chunk: whether it draws random numbers, by its key.
        key: hash of everything the compiled code depends on, but the machine.
    """

    graph: fx.GraphModule
    weights: list[torch.Tensor]
    frozen: list[torch.Tensor]
    buffers: list[torch.Tensor]
    gradients: bool
    example: list[torch.Tensor] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    drawing: bool = False

    @property
    def key(self) -> str:
        """Hash of the graph, its constants, and the shapes and strides of its inputs."""
        digest = hashlib.sha256(self.graph.code.encode())
        for tensor in self.example:
            digest.update(repr((tensor.shape, tensor.stride(), tensor.dtype)).encode())
        for name, value in sorted(vars(self.graph).items()):
            if isinstance(value, torch.Tensor):
                digest.update(name.encode() + value.contiguous().numpy(force=True).tobytes())
        return digest.hexdigest()[:24]


class _Flat(nn.Module):
    """The model with each distinct parameter and buffer once, returning only the loss."""

    def __init__(self, model: nn.Module, loss_fn: LossFn, autocast: bool, x: torch.Tensor) -> None:
        super().__init__()
        self._laid_out = preferred(model, x, copies=True)
        self._call = (model, loss_fn)  # A tuple: not registered, so not traced as a submodule.
        self._autocast = autocast
        self._names: dict[str, str] = {}
        flat: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) not in flat:
                flat[id(parameter)] = f"p{len(flat)}"
                self.register_parameter(flat[id(parameter)], parameter)
            self._names[name] = flat[id(parameter)]
        for name, buffer in model.named_buffers(remove_duplicate=False):
            if id(buffer) not in flat:
                flat[id(buffer)] = f"b{len(flat)}"
                self.register_buffer(flat[id(buffer)], buffer)
            self._names[name] = flat[id(buffer)]

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor]:
        model, loss_fn = self._call
        x = self._laid_out(x)
        tensors = {name: getattr(self, flat) for name, flat in self._names.items()}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self._autocast):
            output = torch.func.functional_call(model, tensors, (x,))
        if self._autocast:
            output = output.float()
        return (loss_fn(output, y),)


def capture(
    model: nn.Module,
    loss_fn: LossFn,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    update: Update | None,
    autocast: bool = False,
    is_chunk: bool = False,
) -> Captured:
    """Trace one step.

    Args:
        model: in the mode (training or not) it will run in.
        loss_fn: of the model's result and ``y``.
        x, y: a batch, only its shapes, strides and dtypes count.
        update: the optimizer's rule in the graph; ``None``: gradients are added up in buffers.
        autocast: whether the forward pass computes in bfloat16 where autocast says so.
        is_chunk: without ``update``: the batch is a chunk of a larger one. Its gradients, times
            ``control[0]``, overwrite the states (``chunk.parts_of``).

    Raises:
        NotCapturable: the step depends on values, or does what a graph cannot hold.
    """
    from torch._functorch.aot_autograd import aot_export_module

    refuse_hidden(model)
    _refuse_tensors(model)
    flat = _Flat(model, loss_fn, autocast, x)
    flat.train(model.training)
    joint: Any
    parameters = dict(flat.named_parameters())
    buffers = dict(flat.named_buffers())
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with mode:
                fake = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for t in (x, y)]
            joint, signature = aot_export_module(
                flat,
                tuple(fake),
                trace_joint=True,
                output_loss_index=0,
                decompositions={},  # The compiler decomposes; its import would cost seconds here.
            )
    except Exception as error:
        raise NotCapturable(_why(error)) from None
    weights: list[torch.Tensor] = [p for p in parameters.values() if p.requires_grad]
    frozen: list[torch.Tensor] = [p for p in parameters.values() if not p.requires_grad]
    back: Any = signature.backward_signature
    written_by: Any = signature.buffers_to_mutate
    order = [*signature.parameters, *signature.buffers]
    gradients = {
        target: number
        for number, name in enumerate(_outputs(joint))
        if (target := back.gradients_to_parameters.get(name))
    }
    written = {
        target: number
        for number, name in enumerate(_outputs(joint))
        if (target := written_by.get(name))
    }
    # New values of buffers come first; the signature names the first output as the loss even so.
    loss_at = len(written)
    names = {
        "weights": [n for n, p in parameters.items() if p.requires_grad],
        "frozen": [n for n, p in parameters.items() if not p.requires_grad],
        "buffers": list(buffers),
    }
    parts: list[Part] = []
    drawing = is_chunk and chunk_random.draws(joint)
    if is_chunk:
        parts = parts_of(joint, list(zip(names["weights"], weights, strict=True)), gradients)
        states = [
            torch.empty(shape, device="meta")
            if len(part.shapes) == 2
            else torch.empty_like(weight, device="meta")
            for part, weight in zip(parts, weights, strict=True)
            for shape in part.shapes
        ]
    else:
        states = [s for w in weights for s in (update.state_shapes(w) if update else [w])]

    def step(*inputs: torch.Tensor) -> tuple[torch.Tensor]:
        left = list(inputs)

        def take(count: int) -> list[torch.Tensor]:
            taken, left[:] = left[:count], left[count:]
            return taken

        known = {
            name: tensor
            for kind in ("weights", "frozen", "buffers")
            for name, tensor in zip(names[kind], take(len(names[kind])), strict=True)
        }
        state = take(len(states))
        run = chunk_random.Drawing(joint, take(1)[0]).run if drawing else joint
        control = take(1)[0]
        results = run(*[known[name] for name in order], *left)
        with torch.no_grad():
            for name, number in written.items():
                known[name].copy_(results[number])
            if is_chunk:
                hand_over(parts, results, state, control[0])
                return (results[loss_at],)
            used = [results[gradients[n]] if n in gradients else None for n in names["weights"]]
            if update is None:
                _accumulate(state, used, control)
            else:
                update.trace([known[n] for n in names["weights"]], used, state, control)
        return (results[loss_at],)

    control = update.control() if update else torch.zeros(2)
    keys = [torch.zeros(1, dtype=torch.int64)] if drawing else []
    example = [*weights, *frozen, *buffers.values(), *states, *keys, control, x, y]
    with mode, torch.no_grad():
        fakes = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for t in example]
    try:
        with mode, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = make_fx(step, tracing_mode="real")(*fakes)
    except Exception as error:
        raise NotCapturable(_why(error)) from None
    operators.fuse(graph)
    pooling.fuse(graph)
    changed = list(buffers.values())
    return Captured(graph, weights, frozen, changed, update is None, example, parts, drawing)


def _outputs(graph: Any) -> list[str]:
    (node,) = [n for n in graph.graph.nodes if n.op == "output"]
    return [getattr(value, "name", "") for value in node.args[0]]


def _accumulate(
    sums: list[torch.Tensor], gradients: list[torch.Tensor | None], control: torch.Tensor
) -> None:
    """``sum = sum * keep + gradient * weight``, control being ``[weight, keep]``."""
    weight, keep = control[0], control[1] != 0
    for total, gradient in zip(sums, gradients, strict=True):
        if gradient is not None:
            total.copy_(torch.where(keep, total, 0.0) + gradient * weight)


def refuse_hidden(model: nn.Module) -> None:
    """Refuse what runs beside the mathematics and would be lost in a graph.

    Raises:
        NotCapturable: hooks on a module or a parameter, or parameters still to be made.
    """
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    for name, module in model.named_modules():
        if any(getattr(module, kind) for kind in hooks):
            raise NotCapturable(f"module {name or type(module).__name__} has hooks")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise NotCapturable(f"parameter {name} gets its shape in the first forward pass")
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise NotCapturable(f"parameter {name} has hooks")
        if type(parameter) not in (nn.Parameter, torch.Tensor):
            raise NotCapturable(f"parameter {name} is a {type(parameter).__name__}")


def _refuse_tensors(model: nn.Module) -> None:
    """Refuse tensors that the kernels cannot take.

    Raises:
        NotCapturable: a tensor is not on the CPU, or a parameter not float32.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if any(t.device.type != "cpu" for t in tensors):
        raise NotCapturable("not every tensor of the model is on the CPU")
    dtypes = {t.dtype for t in model.parameters()} - {torch.float32}
    if dtypes:
        raise NotCapturable(f"parameters are {', '.join(str(d) for d in dtypes)}, not float32")


def _why(error: BaseException) -> str:
    name = type(error).__name__
    if "DataDependent" in name or "data-dependent" in str(error).lower():
        return "control flow or a shape depends on the data"
    first = str(error).strip().splitlines()
    return f"{name}: {first[0][:160]}" if first else name
