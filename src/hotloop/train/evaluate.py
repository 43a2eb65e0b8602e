"""Loss and accuracy of a model on a data set."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..data import Batches, PackedBatches, Prefetcher
from ..data.batch import Batch, size_of
from ..data.random_state import random_state_kept
from ..memory import MemoryPool
from ..memory.image_layout import preferred
from ..memory.tree import call, map_tensors
from ..step.check import LossFn
from ..step.loss_weight import LossWeight

# Buffers of a pool for evaluation alone: in use, queued, being filled.
_BUFFERS = 3


@dataclass(frozen=True)
class Evaluation:
    """Result of one pass without updates.

    Attributes:
        loss: of the whole set: a mean over samples, or over what the loss divides by (labels that
            are not ``ignore_index``, with their class weights); of a sum, by sample.
        accuracy: share of samples whose greatest score is at the label; ``None``: targets are
            not classes.
        num_samples: how many there were.
        wall_s: seconds it took.
    """

    loss: float
    accuracy: float | None
    num_samples: int
    wall_s: float


def evaluate(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Batches,
    pool: MemoryPool | None,
    *,
    queue_size: int,
) -> Evaluation:
    """Run the model over all samples in order, in evaluation mode; the mode is restored.

    Neither weights nor the random state change. What the model keeps of the pass (a cache that it
    fills) can be trained with: gradients are off, but it is no inference mode.

    Args:
        pool: lends the buffers of packed samples where its layouts are theirs; else one is made.
    """
    started = time.perf_counter()
    loss_sum, weight_sum, count = 0.0, 0.0, 0
    weights = LossWeight(loss_fn)
    correct: int | None = None
    laid_out: Callable[[torch.Tensor], torch.Tensor] | None = None
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(random_state_kept())
            values = _batches_of(batches, pool, queue_size, stack)
            stack.enter_context(torch.no_grad())
            for batch in values:
                size = size_of(batch, batches.batch_size or 1)
                x, *targets = map_tensors(lambda t: t.to(device), batch)
                if isinstance(x, torch.Tensor):
                    laid_out = laid_out or preferred(model, x)
                    x = laid_out(x)
                output = call(model, x)
                weight = weights.count(targets[0] if targets else None, size)
                loss = float(loss_fn(output, *targets))
                if weight != 0.0:  # Of no label that counts the loss is no number.
                    loss_sum += loss * (1.0 if weight is None else weight)
                    weight_sum += size if weight is None else weight
                count += size
                if targets and _are_classes(output, targets[0]):
                    correct = (correct or 0) + int((output.argmax(1) == targets[0]).sum())
    finally:
        for module, mode in modes:
            module.training = mode
    return Evaluation(
        loss=loss_sum / weight_sum if weight_sum else math.nan,
        accuracy=None if correct is None else correct / count,
        num_samples=count,
        wall_s=time.perf_counter() - started,
    )


def told_of(loss_fn: LossFn) -> list[str]:
    """What a reader of the report must know of the loss of an evaluation."""
    if LossWeight(loss_fn).kind != "unknown":
        return []
    return [
        "validation loss: the loss of each batch is weighted by its samples, as is right for a "
        "loss that is a mean over samples"
    ]


def _batches_of(
    batches: Batches, pool: MemoryPool | None, queue_size: int, stack: contextlib.ExitStack
) -> Iterator[Batch]:
    if not isinstance(batches, PackedBatches):
        values = batches.batches(0)
        stack.callback(getattr(values, "close", lambda: None))
        return values
    dataset, size = batches.dataset, batches.batch_size
    layouts = dataset.layouts(size)
    fits = pool is not None and pool.capacity >= size and _rows(pool.layouts) == _rows(layouts)
    if pool is None or not fits:
        pool = stack.enter_context(MemoryPool(layouts, _BUFFERS))
    prefetcher = Prefetcher(dataset, batches.positions(0), pool, queue_size=queue_size)
    return _released(batches, stack.enter_context(prefetcher), pool)


def _released(batches: PackedBatches, prefetcher: Prefetcher, pool: MemoryPool) -> Iterator[Batch]:
    for buffer in prefetcher:
        yield batches.dataset.batch(buffer.rows())
        pool.release(buffer)


def _rows(layouts: Any) -> list[Any]:
    return [(layout.row_shape, layout.dtype, layout.padded) for layout in layouts]


def _are_classes(output: Any, y: Any) -> bool:
    if not (isinstance(output, torch.Tensor) and isinstance(y, torch.Tensor)):
        return False
    # One score is a number, or the logit of a yes: its argmax says nothing.
    return not y.is_floating_point() and y.dim() == 1 and output.dim() == 2 and output.shape[1] > 1
