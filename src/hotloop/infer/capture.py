"""A model to the graphs that engines take: ``torch.export``, then ONNX, OpenVINO or AOTInductor."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import MissingExtraError, ModelError
from ..machine import Machine
from ..machine.cache_dir import GRAPHS
from ..memory.preserve import preserved
from .check import FLOAT32_ERROR, difference
from .engine import TensorSpec, dtype_name, first_line
from .signature import (
    Signature,
    Typed,
    arguments,
    flatten,
    leaf_names,
    not_of_arrays,
    plain,
    unflatten,
    without_values,
)

# Above it a protobuf file cannot hold the weights; they go beside it.
_ONE_FILE_BYTES = 1_500_000_000


def own_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode with weights of its own; the user's model stays as it is.

    Raises:
        ModelError: the module cannot be copied.
    """
    try:
        twin = copy.deepcopy(model)
    except Exception as error:
        raise ModelError(
            "the model must be one that copy.deepcopy can copy", got=error,
            next_step="keep tensors with a gradient history out of its attributes",
        ) from error  # fmt: skip
    return twin.eval().requires_grad_(False)


def read_signature(
    model: nn.Module, example: Any, device: torch.device | str = "cpu"
) -> tuple[Signature, list[torch.Tensor]]:
    """The signature of a model in eval mode, and the example as tensors on the model's device.

    The batch is the first dimension of the first input that has one, and of every tensor whose
    first dimension follows it. The model answers twice: what is no function of its input, only the
    module itself can answer. Neither the example nor the model's Python state is changed.

    Raises:
        ModelError: the model cannot take the example.
    """
    args, kwargs = arguments(example)
    leaves, structure = flatten((args, kwargs), "example")
    # A copy, for a model may write into what it is given.
    tensors = [torch.as_tensor(leaf).detach().to(device, copy=True) for leaf in leaves]
    batch = batch_of(tensors)
    if batch is None:
        raise ModelError(
            "the first input must have a batch dimension",
            got=f"{list(tensors[0].shape) if tensors else 'no tensors'}",
            next_step="pass example=x with one batch of samples",
        )
    with preserved(model):
        result, drawn = _answer(model, structure, tensors)
        outputs, output_structure = flatten(result, "the model's result", opaque=True)
        only_eager = None
        if torch.device(device).type == "cpu":
            again = flatten(_answer(model, structure, tensors)[0], "", opaque=True)[0]
            only_eager = _why_only_eager(output_structure, drawn, outputs, again)
    args, kwargs = unflatten(structure, tensors)
    names = _input_names(model, args, kwargs, len(tensors))
    results = _output_names(output_structure, len(outputs), names)
    return (
        Signature(
            structure,
            output_structure,
            tuple(_spec(n, t, batch) for n, t in zip(names, tensors, strict=True)),
            tuple(_spec(n, t, batch) for n, t in zip(results, outputs, strict=True)),
            only_eager,
        ),
        tensors,
    )


def batch_of(tensors: Sequence[torch.Tensor]) -> int | None:
    """The batch size of flat inputs; ``None``: none of them has a dimension."""
    return next((int(t.shape[0]) for t in tensors if t.dim()), None)


def _answer(model: nn.Module, structure: Any, tensors: Sequence[torch.Tensor]) -> tuple[Any, bool]:
    """The model's result for a copy of the inputs, and whether it drew torch's random numbers."""
    args, kwargs = unflatten(structure, [tensor.clone() for tensor in tensors])
    before = torch.get_rng_state()
    try:
        with torch.inference_mode():
            result = model(*args, **kwargs)
    except Exception as error:
        raise ModelError(
            "the model must take the example", got=f"{type(error).__name__}: {error}",
            next_step="pass one batch as the model's forward takes it",
        ) from error  # fmt: skip
    return result, not torch.equal(torch.get_rng_state(), before)


def _why_only_eager(
    structure: Any, drawn: bool, first: list[torch.Tensor], again: list[torch.Tensor]
) -> str | None:
    """Why no other engine can give a model's answers; ``None``: any may."""
    other = not_of_arrays(structure)
    if other is not None:
        return f"the answer has a {other} in it, which only the module itself gives"
    if drawn:
        return (
            "the model draws random numbers in eval mode (dropout without training=self.training?)"
            ", which an export would drop or freeze"
        )
    if difference(again, first)[0] > FLOAT32_ERROR:
        return "the model answers the same input in another way each time, which no export does"
    return None


def _spec(name: str, tensor: torch.Tensor, batch: int) -> TensorSpec:
    shape: tuple[int | None, ...] = tuple(tensor.shape)
    if shape and shape[0] == batch:
        shape = (None, *shape[1:])
    return TensorSpec(name, dtype_name(tensor), shape)


def _input_names(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], count: int
) -> list[str]:
    """As ``forward`` names them, keys behind dots; numbered where that is not unique."""
    names: list[str] = []
    with contextlib.suppress(TypeError, ValueError):
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            kind = bound.signature.parameters[name].kind
            by_key = kind is inspect.Parameter.VAR_KEYWORD
            names += leaf_names(flatten(value, name)[1], "" if by_key else name)
    if len(names) == count and len(set(names)) == count:
        return names
    return [f"input_{i}" if i else "input" for i in range(count)]


def _output_names(structure: Any, count: int, taken: Sequence[str]) -> list[str]:
    """Keys and fields of the result; numbered where it has none."""
    keyed = isinstance(structure, Typed) or (isinstance(structure, dict) and "dict" in structure)
    names = leaf_names(structure, "") if keyed else []
    names = [f"output.{name}" if name in taken else name for name in names]
    if names and len(set(names)) == count and all(names):
        return names
    return [f"output_{i}" if i else "output" for i in range(count)]


def resized(tensors: Sequence[torch.Tensor], specs: Sequence[TensorSpec], batch: int) -> list[Any]:
    """The same inputs with another batch size: rows repeated or cut."""
    result = []
    for tensor, spec in zip(tensors, specs, strict=True):
        if spec.is_batched:
            repeats = -(-batch // max(1, tensor.shape[0]))
            tensor = tensor.repeat(repeats, *[1] * (tensor.dim() - 1))[:batch]
        result.append(tensor.contiguous())
    return result


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters warn about what is none of the user's business; errors still come through."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def export_program(
    model: nn.Module, signature: Signature, tensors: Sequence[torch.Tensor]
) -> tuple[torch.export.ExportedProgram, int | None]:
    """The graph, and ``None`` where any batch size goes, else the only one that does.

    Raises:
        ModelError: the model's course depends on values, or it cannot be captured.
    """
    batch = batch_of(tensors)
    assert batch is not None, "read_signature asks for one"
    with quiet(), torch.no_grad():
        try:
            # A batch of one would be taken for a constant.
            program = _export(
                model, signature, resized(tensors, signature.inputs, max(2, batch)), True
            )
            if _is_dynamic(program):
                return program, None
        except Exception:  # Any: whatever it is, the fixed size below tells it again.
            pass
        try:
            return _export(model, signature, tensors, False), batch
        except Exception as error:
            raise ModelError(
                "torch.export must capture the model", got=f"{type(error).__name__}: {error}"
            ) from error


class PlainTypes(nn.Module):
    """A model between dicts and tuples, in place of types of its own that no graph knows."""

    def __init__(self, model: nn.Module, signature: Signature) -> None:
        super().__init__()
        self.inner = model

        def forward(*args: Any, **kwargs: Any) -> Any:
            leaves = flatten((args, kwargs), "the input")[0]
            return unflatten(plain(signature.output_structure), signature.call(model, leaves))

        args, kwargs = plain(signature.input_structure)["tuple"]
        by_place, by_name = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.KEYWORD_ONLY
        # torch.export asks for a name for each of them.
        forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(f"input_{i}", by_place) for i in range(len(args["tuple"]))]
            + [inspect.Parameter(name, by_name) for name in kwargs["dict"]]
        )
        self.forward = forward


def _export(
    model: nn.Module, signature: Signature, tensors: Sequence[torch.Tensor], dynamic: bool
) -> torch.export.ExportedProgram:
    structure = plain(signature.input_structure)
    if (structure, plain(signature.output_structure)) != (
        signature.input_structure, signature.output_structure,
    ):  # fmt: skip
        model = PlainTypes(model, signature)
    args, kwargs = unflatten(structure, tensors)
    shapes = None
    if dynamic:
        free = {0: torch.export.Dim.AUTO}
        marks = [free if s.is_batched else {} for s in signature.inputs]
        positional, named = unflatten(without_values(structure), marks)
        shapes = _by_parameter(model, positional, named)
    return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)


def _by_parameter(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As torch.export wants them: by the names of forward, ``*args`` as one tuple."""
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)


def _is_dynamic(program: torch.export.ExportedProgram) -> bool:
    """Whether the batch is still a symbol, from two samples on, without an upper bound."""
    user = set(program.graph_signature.user_inputs)
    given = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in user]
    values = [n.meta["val"] for n in given]
    size = next(v.shape[0] for v in values if isinstance(v, torch.Tensor) and v.dim())
    # A size that a branch of the model fixed is a symbol no more.
    if not isinstance(size, torch.SymInt) or not size.node.expr.is_Symbol:
        return False
    limits = program.range_constraints.get(size.node.expr)
    return limits is None or (int(limits.lower) <= 2 and limits.upper > 2**31)


def write_onnx(
    program: torch.export.ExportedProgram, signature: Signature, path: Path, weight_bytes: int
) -> None:
    """The graph as ONNX with the signature's names.

    Raises:
        MissingExtraError: ``onnxscript`` or ``onnx`` is not installed.
        ModelError: an operator has no form in ONNX.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("writing ONNX", str(error.name), "onnx") from error
    with quiet():
        try:
            exported = torch.onnx.export(
                program,
                (),
                dynamo=True,
                verbose=False,
                input_names=[spec.name for spec in signature.inputs],
                output_names=[spec.name for spec in signature.outputs],
            )
            assert exported is not None
            exported.save(str(path), external_data=weight_bytes > _ONE_FILE_BYTES)
        except Exception as error:
            got = f"{type(error).__name__}: {first_line(error)}"
            raise ModelError("torch.onnx must express the model", got=got) from error


def compiled_package(
    program: torch.export.ExportedProgram, archive: Path, precision: str = "float32"
) -> Path:
    """The graph compiled ahead of time, from the cache or now (5 to 60 s).

    Machine code is kept in hotloop's own cache alone, never read from a folder of a model.

    Args:
        archive: the same graph as a file: its bytes name the package.

    Raises:
        ModelError: the compiler failed.
    """
    parts = [Machine.probe().fingerprint(), str(torch.__version__), precision]
    digest = hashlib.sha256(json.dumps(parts).encode())
    with archive.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    path = GRAPHS.path(digest.hexdigest()[:32])
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{os.getpid()}-{path.name}")
    from torch import _inductor

    with quiet(), torch.no_grad():
        try:
            _inductor.aoti_compile_and_package(
                program, package_path=str(partial), inductor_configs={"freezing": True}
            )
            os.replace(partial, path)
        except Exception as error:
            partial.unlink(missing_ok=True)
            raise ModelError(
                "the graph must compile", got=f"{type(error).__name__}: {error}"
            ) from error
    return path


class LowerPrecision(nn.Module):
    """A model in another dtype inside: floating inputs cast in, results cast back.

    Args:
        model: its parameters in float32; copied.
        dtype: of the arithmetic.
        outputs: their dtypes.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, signature: Signature) -> None:
        super().__init__()
        self.inner = copy.deepcopy(model).to(dtype)
        self._dtype = dtype
        self._signature = signature

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Flat tensors in and out, in the signature's order."""
        cast = [t.to(self._dtype) if t.is_floating_point() else t for t in tensors]
        results = self._signature.call(self.inner, cast)
        return tuple(
            t.to(getattr(torch, spec.dtype))
            for t, spec in zip(results, self._signature.outputs, strict=True)
        )

    def flat_signature(self) -> Signature:
        """Its own: as many positional tensors, a tuple of results."""
        many = {"tuple": ["*"] * len(self._signature.inputs)}
        results = {"tuple": ["*"] * len(self._signature.outputs)}
        return Signature(
            {"tuple": [many, {"dict": {}}]}, results,
            self._signature.inputs, self._signature.outputs,
        )  # fmt: skip
