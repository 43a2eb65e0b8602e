"""Second stage of a run: its data, opened, and the shape of its batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..data import Batches, GlobalSampler, PackedBatches, open_batches
from ..data.batch import Batch, size_of
from ..data.batches import has_own_batches, takes_to_batch
from ..errors import DataError
from ..memory import BatchLayout
from ..memory.tree import map_tensors
from ..plan import Plan
from .arguments import check_alike
from .request import FitRequest
from .resolve import Resolved


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The data of a run.

    Attributes:
        batches: for training. validation: the same for evaluation.
        batch_size: samples of a batch; of the first where each has its own size.
        batch: a batch as the step will see it; meta tensors where samples are packed.
        layouts: of the tensors of a batch; ``None``: nothing is packed.
    """

    batches: Batches
    validation: Batches | None
    line_bytes: int
    batch_size: int
    batch: Batch
    layouts: tuple[BatchLayout, ...] | None

    @property
    def example(self) -> Batch:
        """The first samples and targets, two where samples are packed; else a batch.

        Their values count where a step cannot be followed on shapes alone: whether it runs at all.
        """
        if not isinstance(self.batches, PackedBatches):
            return self.batch
        dataset = self.batches.dataset
        count = min(2, dataset.num_samples)
        tensors = [torch.empty_like(t, device="cpu") for t in dataset.example_tensors(count)]
        dataset.gather(torch.arange(count), *tensors)
        return dataset.batch(tensors)

    @property
    def resident_bytes(self) -> int:
        """Samples that stay in memory."""
        sets = [self.batches, self.validation]
        return sum(b.dataset.resident_bytes for b in sets if isinstance(b, PackedBatches))

    @property
    def labels(self) -> dict[int, int]:
        """Each class label of training and validation data, and a sample that has it; of packed
        samples."""
        found: dict[int, int] = {}
        for batches in (self.validation, self.batches):
            if isinstance(batches, PackedBatches):
                found.update(batches.dataset.labels or {})
        return found

    @property
    def last_batch_size(self) -> int | None:
        """Samples of the last batch of an epoch; ``None``: not known."""
        count, size = self.batches.num_samples, self.batches.batch_size
        if not count or not size:
            return None
        return size if self.batches.drop_last else count % size or size


def open_data(request: FitRequest, run: Resolved) -> RunData:
    """Open training and validation data; all hosts must have as much."""
    shared: dict[str, Any] = {
        "seed": request.seed,
        "to_batch": request.to_batch,
        "mmap_above_bytes": run.plan.memory.mmap_above_bytes,
    }
    batches = open_batches(
        request.data, batch_size=request.batch_size, drop_last=request.drop_last, **shared
    )
    validation = None
    if request.validation is not None:
        validation = _open_validation(request, batches, shared)
    if run.hosts is not None:
        _require_packed(batches)
        run.hosts.agree(
            samples=batches.num_samples,
            validation_samples=None if validation is None else validation.num_samples,
        )
    line_bytes = run.plan.memory.line_bytes or 64
    layouts: tuple[BatchLayout, ...] | None = None
    if isinstance(batches, PackedBatches):
        batch_size = batches.batch_size
        layouts = batches.dataset.layouts(batch_size, line_bytes=line_bytes)
        batch = batches.dataset.batch(batches.dataset.example_tensors(batch_size))
    else:
        batch = batches.first()
        batch_size = batches.batch_size or size_of(batch)
    return RunData(
        batches=batches,
        validation=validation,
        line_bytes=line_bytes,
        batch_size=batch_size,
        batch=batch,
        layouts=layouts,
    )


def _open_validation(request: FitRequest, batches: Batches, shared: dict[str, Any]) -> Batches:
    data = request.validation
    size = None if has_own_batches(data) else request.batch_size or batches.batch_size
    if not takes_to_batch(data):
        shared = {**shared, "to_batch": None}
    validation = open_batches(data, batch_size=size, training=False, **shared)
    if isinstance(batches, PackedBatches) and isinstance(validation, PackedBatches):
        check_alike(batches.dataset, validation.dataset)
    return validation


def _require_packed(batches: Batches) -> None:
    """Each host takes its part of a batch by the positions of the samples."""
    if not isinstance(batches, PackedBatches) or not isinstance(batches.order, GlobalSampler):
        raise DataError(
            "several hosts need data that each of them packs: arrays, a file, or a Dataset whose "
            "samples stay the same and have one shape",
            got=batches.description,
        )


def first_batches(data: RunData, plan: Plan) -> Iterator[Batch]:
    """Batches to try the step on: the whole ones of epoch 0, or the first again and again."""
    micro = plan.memory.micro_batch_size
    if not isinstance(data.batches, PackedBatches) or data.layouts is None:
        for _ in range(data.batches.num_batches or 1):
            yield data.batch
        return
    dataset = data.batches.dataset
    outs = [layout.view(torch.empty(layout.total_bytes, dtype=torch.uint8)) for layout in
            data.layouts]  # fmt: skip
    order = data.batches.order
    seed = order.seed if isinstance(order, GlobalSampler) else 0
    for indices in GlobalSampler(dataset.num_samples, data.batch_size, seed=seed).batches(0, 0):
        if len(indices) < data.batch_size:
            # A dataset smaller than one batch: its samples again.
            indices = torch.cat([indices] * -(-data.batch_size // len(indices)))[: data.batch_size]
        dataset.gather(indices, *outs, epoch=0, training=True)
        batch = dataset.batch(outs)
        yield batch if micro is None else map_tensors(lambda t: t[:micro], batch)
