"""A training run as tensors and a document, and back: what a checkpoint of it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..data.random_state import RandomState
from ..errors import CheckpointError
from .checkpoint import Checkpoint
from .encode import join_state, split_state
from .loss_state import check_loss_state, load_loss_state, loss_state
from .progress import RunState
from .tensor_file import DTYPE_NAMES

_FORMAT = 2


@dataclass(frozen=True)
class RunIdentity:
    """What must be the same for a resumed run to be the same run.

    Attributes:
        seed: of shuffling, augmentation and the model's randomness.
        batch_size, num_samples, drop_last: together they fix the steps of an epoch; ``None``: not
            known.
        data: description of the data.
        optimizer, scheduler: class names.
    """

    seed: int
    batch_size: int
    num_samples: int | None
    drop_last: bool
    data: str
    optimizer: str
    scheduler: str | None


# Tensors by group, and the document, for ``CheckpointStore.save``.
Snapshot = tuple[dict[str, Mapping[str, torch.Tensor]], dict[str, Any]]


def snapshot(
    model: nn.Module,
    loss_fn: Any,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    state: RunState,
    identity: RunIdentity,
    facts: Mapping[str, Any],
    data: Mapping[str, Any],
) -> Snapshot:
    """The run as tensors and a document. Copies nothing.

    Args:
        facts: of the step, for the document as they are.
        data: state of the data's order.

    Raises:
        CheckpointError: something in a state is neither a tensor nor a plain value.
    """
    weights, other = split_module(model)
    parts = {
        "model_other": other,
        "loss": loss_state(loss_fn, model, optimizer),
        "optimizer": optimizer.state_dict(),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "random": RandomState.now().to_dict(),
        "data": dict(data),
    }
    tensors: dict[str, Mapping[str, torch.Tensor]] = {"model": weights}
    document: dict[str, Any] = {
        "format": _FORMAT,
        "torch_version": str(torch.__version__),
        **facts,
        "identity": vars(identity),
        "run": state.to_dict(),
    }
    for name, part in parts.items():
        tensors[name], document[name] = split_state(part)
    return tensors, document


def restore(
    checkpoint: Checkpoint,
    model: nn.Module,
    loss_fn: Any,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    identity: RunIdentity,
    load_data: Callable[[dict[str, Any]], None],
) -> RunState:
    """Put a checkpoint into model, loss, optimizer, scheduler, data and the random state.

    Everything is checked before anything is changed.

    Raises:
        CheckpointError: it is of another model, another run, or another format.
    """
    document = checkpoint.document
    if document.get("format") != _FORMAT:
        raise CheckpointError(
            f"{checkpoint.path} must be of format {_FORMAT}",
            got=document.get("format"),
            next_step="use the version of hotloop that wrote it",
        )
    weights = dict(checkpoint.tensors["model"])
    _check_identity(checkpoint, document["identity"], identity)
    names = ("model_other", "loss", "optimizer", "scheduler", "random", "data")
    try:
        parts = {name: join_state(dict(checkpoint.tensors[name]), document[name]) for name in names}
        _check_model(checkpoint, {**weights, **parts["model_other"]}, model)
        state = RunState.from_dict(document["run"])
        check_loss_state(parts["loss"], loss_fn, model, optimizer)
        random_state = RandomState.from_dict(parts["random"])
        optimizer.load_state_dict(parts["optimizer"])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{checkpoint.path} must fit this run", got=f"{type(error).__name__}: {error}"
        ) from error
    model.load_state_dict({**weights, **parts["model_other"]})
    load_loss_state(parts["loss"], loss_fn, model, optimizer)
    if scheduler is not None:
        scheduler.load_state_dict(parts["scheduler"])
    load_data(parts["data"])
    random_state.put_back()
    return state


def split_module(module: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Dense tensors of a module's state, and the rest: extra state, sparse buffers."""
    dense: dict[str, torch.Tensor] = {}
    other: dict[str, Any] = {}
    for name, value in module.state_dict().items():
        plain = isinstance(value, torch.Tensor) and value.layout == torch.strided
        if plain and value.dtype in DTYPE_NAMES:
            dense[name] = value
        else:
            other[name] = value
    return dense, other


def _check_model(checkpoint: Checkpoint, there: Mapping[str, Any], model: nn.Module) -> None:
    here = model.state_dict()
    for name in [*here, *there]:
        mine, saved = (_shape(state, name) for state in (here, there))
        if mine != saved:
            raise CheckpointError(
                f"{checkpoint.path} must be of the same model",
                got=f"{name}: {saved} saved, {mine} here",
                next_step="pass the model it was made with, or another folder",
            )


def _shape(state: Mapping[str, Any], name: str) -> str:
    if name not in state:
        return "none"
    value = state[name]
    if not isinstance(value, torch.Tensor):
        return "no tensor"
    return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"


def _check_identity(
    checkpoint: Checkpoint, there: Mapping[str, Any], identity: RunIdentity
) -> None:
    for name, here in vars(identity).items():
        if there.get(name) != here:
            raise CheckpointError(
                f"to go on from {checkpoint.path}, {name} must be as it was: {there.get(name)!r}",
                got=repr(here),
                next_step="pass the same, or start in another folder",
            )
