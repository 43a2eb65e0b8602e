"""A batch of one sample before a normalisation over the batch: told before the first step."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..data import PackedBatches
from ..data.batch import Batch
from ..data.random_state import random_state_kept
from ..errors import ModelError
from ..memory.tree import call, map_tensors, num_samples, part_sizes
from .run_data import RunData

# What torch says of a batch that has one value a channel.
_SAID = "Expected more than 1 value per channel"


def check_lone_sample(model: nn.Module, data: RunData, micro_batch_size: int | None) -> None:
    """Check that a model trains on one sample where a batch or micro-batch will have only one.

    The model is copied and tried, so it is only done where there will be such a batch and a
    layer that may refuse it.

    Raises:
        ModelError: it does not.
    """
    where = _lone_sample(data, micro_batch_size)
    if where is None or not any(_normalises(module) for module in model.modules()):
        return
    said = _refusal(model, _one_sample(data))
    if said is None:
        return
    raise ModelError(
        "a model with batch norm needs batches of more than 1 sample while it trains",
        got=f"{where}: {said}",
        next_step="pass drop_last=True, or another batch_size or micro-batch size",
    )


def _lone_sample(data: RunData, micro_batch_size: int | None) -> str | None:
    last, size = data.last_batch_size, data.batch_size
    micro = micro_batch_size
    for name, count in (("a batch", size), ("the last batch of an epoch", last)):
        if count == 1:
            return f"{name} has 1 sample"
        parts = [] if micro is None or count is None else part_sizes(count, micro)
        if len(parts) > 1 and 1 in parts:
            return f"{name} has {count} samples, in micro-batches of {micro}"
    return None


def _normalises(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training


def _one_sample(data: RunData) -> Batch | None:
    """A batch of one sample, with values; ``None``: the batch has no samples to take one of."""
    if isinstance(data.batches, PackedBatches):
        dataset = data.batches.dataset
        outs = [torch.empty_like(t, device="cpu") for t in dataset.example_tensors()]
        dataset.gather(torch.zeros(1, dtype=torch.int64), *outs)
        return dataset.batch(outs)
    if num_samples(*data.batch) is None:
        return None

    def first(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[:1] if tensor.dim() else tensor

    cut: Batch = map_tensors(first, data.batch)
    return cut


def _refusal(model: nn.Module, batch: Batch | None) -> str | None:
    """What a copy of the model says to one sample; ``None``: it takes it, or it is not known."""
    if batch is None:
        return None
    device = next(model.parameters()).device
    x: Any = map_tensors(lambda t: t.to(device), batch[0])
    try:
        with random_state_kept(), torch.no_grad():
            twin = copy.deepcopy(model)
            if not twin.training:
                twin.train()
            call(twin, x)
    except ValueError as error:
        text = " ".join(str(error).split())
        return text if _SAID in text else None
    except Exception:  # Told by the first step.
        return None
    return None
