"""Modules from single files: ``.pt2`` archives and ``.safetensors`` weights."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import InputError, ModelError, SealedError
from ..sealed import Sealed
from .archive import read_archive
from .capture import own_copy, read_signature
from .engine import TensorSpec, dtype_name
from .signature import Signature


def read_program(path: Path | Sealed) -> tuple[nn.Module, Signature]:
    """The program of a ``.pt2`` archive.

    Raises:
        ModelError: damaged, or it could run code when it is read.
    """
    program = read_archive(path)
    structure, inputs = _inputs_of(program)
    # Results come as one flat list.
    return program.module(), Signature(structure, None, inputs, _outputs_of(program))


def module_with_weights(path: Path | Sealed, factory: str | None) -> tuple[nn.Module, Signature]:
    """A module from a factory with the weights of a ``.safetensors`` file.

    The factory gives ``(module, example)``, or a module with an attribute ``example_input``: what
    goes in cannot be read off the weights.

    Raises:
        InputError: no factory. ModelError: it fails, or the weights are another model's.
    """
    if factory is None:
        raise InputError(
            "weights alone are no model", got=path.name,
            next_step="pass factory='package.module:function' that builds the module",
        )  # fmt: skip
    made = call_factory(factory)
    model, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{factory} must give a torch.nn.Module", got=type(model).__name__)
    example = getattr(model, "example_input", None) if example is None else example
    if example is None:
        raise ModelError(
            f"{factory} must tell what goes in", got="a module alone",
            next_step="return (module, example) from it, or set module.example_input",
        )  # fmt: skip
    load_weights(model, path)
    model = own_copy(model)
    return model, read_signature(model, example)[0]


def call_factory(spec: str) -> Any:
    """What ``package.module:function`` gives; the working folder is importable.

    Raises:
        ModelError: the name is malformed, the module or function is missing or raises.
    """
    module_name, colon, attribute = spec.partition(":")
    if not colon or not module_name or not attribute:
        raise ModelError(
            "a factory is named package.module:function", got=repr(spec),
            next_step="write mypackage.models:build",
        )  # fmt: skip
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return getattr(importlib.import_module(module_name), attribute)()
    except Exception as error:
        raise ModelError(
            f"the factory {spec} must give a model when called without arguments",
            got=f"{type(error).__name__}: {error}",
        ) from error


def load_weights(model: nn.Module, path: Path | Sealed) -> None:
    """Put the weights of a ``.safetensors`` file into a module; tied names may be left out.

    Raises:
        ModelError: no such file, or weights of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    try:
        if isinstance(path, Sealed):
            _load_sealed(model, path)
        else:
            load_model(model, path)
    except SealedError:
        raise
    except (SafetensorError, OSError, RuntimeError, KeyError) as error:
        raise ModelError(
            f"{path} must hold the weights of {type(model).__name__}", got=error,
            next_step="name the file that was saved from this model",
        ) from None  # fmt: skip


def _load_sealed(model: nn.Module, path: Sealed) -> None:
    """As ``safetensors.torch.load_model`` does: names tied to one that is there may be left out."""
    from safetensors.torch import load

    tensors = load(path.read_bytes())
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    state = model.state_dict()
    there = {state[name].data_ptr() for name in tensors if name in state}
    lost = [name for name in missing if state[name].data_ptr() not in there]
    if lost or unexpected:
        raise KeyError(f"missing {lost}, unexpected {unexpected}")


def _inputs_of(program: torch.export.ExportedProgram) -> tuple[Any, tuple[TensorSpec, ...]]:
    user = list(program.graph_signature.user_inputs)
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    if not all(isinstance(name, str) for name in user):
        raise ModelError("all inputs must be tensors", got=user)
    specs = tuple(_spec(str(name), nodes[str(name)].meta["val"]) for name in user)
    tree = program.call_spec.in_spec
    assert tree is not None
    args, kwargs = torch.utils._pytree.tree_unflatten(["*"] * len(user), tree)
    return {"tuple": [_structure(args), _structure(kwargs)]}, specs


def _outputs_of(program: torch.export.ExportedProgram) -> tuple[TensorSpec, ...]:
    values = next(node for node in program.graph.nodes if node.op == "output").args[0]
    names = {spec.arg.name for spec in program.graph_signature.output_specs}
    kept = [node for node in values if node.name in names]
    named = ((f"output_{i}" if i else "output", node) for i, node in enumerate(kept))
    return tuple(_spec(name, node.meta["val"]) for name, node in named)


def _structure(value: Any) -> Any:
    if isinstance(value, dict):
        return {"dict": {key: _structure(part) for key, part in value.items()}}
    if isinstance(value, tuple | list):
        return {type(value).__name__: [_structure(part) for part in value]}
    return value


def _spec(name: str, value: Any) -> TensorSpec:
    if not isinstance(value, torch.Tensor):
        raise ModelError("inputs and outputs must be tensors", got=f"{name}: {value}")
    shape = tuple(size if isinstance(size, int) else None for size in value.shape)
    return TensorSpec(name, dtype_name(value), shape)
