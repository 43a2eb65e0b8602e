"""A training run as tensors and a document, and back: what a checkpoint of it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from .checkpoint import Checkpoint
from .encode import join_state, split_state
from .progress import RunState

_FORMAT = 1


@dataclass(frozen=True)
class RunIdentity:
    """What must be the same for a resumed run to be the same run.

    Attributes:
        seed: of shuffling, augmentation and the model's randomness.
        batch_size, num_samples: together they fix the steps of an epoch.
        data: description of the data.
        optimizer, scheduler: class names.
    """

    seed: int
    batch_size: int
    num_samples: int
    data: str
    optimizer: str
    scheduler: str | None


def snapshot(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    state: RunState,
    identity: RunIdentity,
    num_threads: int,
    path: str,
    precision: str,
    tuned: dict[str, Any] | None = None,
    programs: dict[str, Any] | None = None,
) -> tuple[dict[str, Mapping[str, torch.Tensor]], dict[str, Any]]:
    """Tensors by group and the document, for ``CheckpointStore.save``. Copies nothing."""
    optimizer_tensors, optimizer_document = split_state(optimizer.state_dict())
    scheduler_tensors, scheduler_document = split_state(
        None if scheduler is None else scheduler.state_dict()
    )
    tensors: dict[str, Mapping[str, torch.Tensor]] = {
        "model": dict(model.state_dict()),
        "optimizer": optimizer_tensors,
        "scheduler": scheduler_tensors,
        "random": {"torch": torch.random.get_rng_state()},
    }
    document = {
        "format": _FORMAT,
        "torch_version": str(torch.__version__),
        "num_threads": num_threads,
        "path": path,
        "precision": precision,
        "tuned": tuned,
        "programs": programs,
        "identity": vars(identity),
        "run": state.to_dict(),
        "optimizer": optimizer_document,
        "scheduler": scheduler_document,
    }
    return tensors, document


def restore(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    identity: RunIdentity,
) -> RunState:
    """Put a checkpoint into model, optimizer, scheduler and torch's random state.

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
    _check_model(checkpoint, weights, model)
    _check_identity(checkpoint, document["identity"], identity)
    try:
        optimizer_state = join_state(dict(checkpoint.tensors["optimizer"]), document["optimizer"])
        scheduler_state = join_state(dict(checkpoint.tensors["scheduler"]), document["scheduler"])
        state = RunState.from_dict(document["run"])
        random_state = checkpoint.tensors["random"]["torch"]
        optimizer.load_state_dict(optimizer_state)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{checkpoint.path} must fit this run", got=f"{type(error).__name__}: {error}"
        ) from error
    model.load_state_dict(weights)
    if scheduler is not None:
        scheduler.load_state_dict(scheduler_state)
    torch.random.set_rng_state(random_state)
    return state


def _check_model(
    checkpoint: Checkpoint, weights: Mapping[str, torch.Tensor], model: nn.Module
) -> None:
    here = {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}
    there = {name: (tuple(t.shape), t.dtype) for name, t in weights.items()}
    for name in [*here, *there]:
        if here.get(name) != there.get(name):
            raise CheckpointError(
                f"{checkpoint.path} must be of the same model",
                got=f"{name}: {_shape(there.get(name))} saved, {_shape(here.get(name))} here",
                next_step="pass the model it was made with, or another folder",
            )


def _shape(entry: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "none" if entry is None else f"{list(entry[0])} {str(entry[1]).removeprefix('torch.')}"


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
