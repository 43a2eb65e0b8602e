"""Second stage of a run: its data, opened, and the shape of its batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..data import GlobalSampler, PackedDataset, open_dataset
from ..memory import BatchLayout
from ..plan import Plan
from .arguments import check_alike
from .request import FitRequest
from .resolve import Resolved


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The data of a run.

    Attributes:
        example: one sample and its target as meta tensors ``[1, ...]``.
        layouts: of a batch of samples and of targets.
        batch: a batch as the step will see it, as meta tensors: rows are padded to the cache line,
            and a graph is made for these strides.
    """

    dataset: PackedDataset
    validation: PackedDataset | None
    line_bytes: int
    example: tuple[torch.Tensor, torch.Tensor]
    layouts: tuple[BatchLayout, ...]
    batch: tuple[torch.Tensor, torch.Tensor]

    @property
    def resident_bytes(self) -> int:
        """Samples that stay in memory."""
        tested = self.validation
        return self.dataset.resident_bytes + (tested.resident_bytes if tested else 0)

    @property
    def num_classes(self) -> int | None:
        """The highest label and 1; ``None``: targets are not classes."""
        sets = [self.dataset, *([self.validation] if self.validation else [])]
        return max((d.num_classes for d in sets if d.num_classes), default=None)

    def num_batches(self, batch_size: int) -> int:
        """Of an epoch; the last may be smaller."""
        return -(-self.dataset.num_samples // batch_size)


def open_data(request: FitRequest, run: Resolved) -> RunData:
    """Open training and validation data; all hosts must have as much."""
    above, seed = run.plan.memory.mmap_above_bytes, request.seed
    dataset = open_dataset(request.data, seed=seed, mmap_above_bytes=above)
    validation = None
    if request.validation is not None:
        validation = open_dataset(
            request.validation, split="test", seed=seed, mmap_above_bytes=above
        )
        check_alike(dataset, validation)
    if run.hosts is not None:
        run.hosts.agree(
            samples=dataset.num_samples,
            validation_samples=None if validation is None else validation.num_samples,
        )
    line_bytes = run.plan.memory.line_bytes or 64
    layouts = dataset.layouts(request.batch_size, line_bytes=line_bytes)
    x, y = (
        layout.view(torch.empty(layout.total_bytes, dtype=torch.uint8, device="meta"))
        for layout in layouts
    )
    return RunData(
        dataset=dataset,
        validation=validation,
        line_bytes=line_bytes,
        example=dataset.example(),
        layouts=layouts,
        batch=(x, y),
    )


def first_batches(
    dataset: PackedDataset, layouts: Sequence[BatchLayout], plan: Plan, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The whole batches of epoch 0, one after the other in the same memory."""
    batch_size, micro = layouts[0].num_rows, plan.memory.micro_batch_size
    x, y = (layout.view(torch.empty(layout.total_bytes, dtype=torch.uint8)) for layout in layouts)
    for indices in GlobalSampler(dataset.num_samples, batch_size, seed=seed).batches(0, 0):
        if len(indices) < batch_size:
            # A dataset smaller than one batch: its samples again.
            indices = torch.cat([indices] * -(-batch_size // len(indices)))[:batch_size]
        dataset.gather(indices, x, y, epoch=0, training=True)
        yield x[:micro], y[:micro]
