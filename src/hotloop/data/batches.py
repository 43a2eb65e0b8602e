"""``open_batches``: any source of data as batches of epochs, packed where it can be."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import data as torch_data

from ..errors import DataError, InputError
from .batch import Batch, ToBatch
from .loaded import CalledBatches, LoadedBatches, LoaderBatches, ReadBatches
from .opening import is_sample_source, open_dataset
from .order import LoaderOrder
from .pack import MMAP_ABOVE_BYTES
from .pack_rows import pack_rows
from .packed import PackedDataset
from .rows_source import NotPackable, SampleRows, vectorized
from .sampler import GlobalSampler
from .samples import SampleReader, is_map_style

DEFAULT_BATCH_SIZE = 64
# What is larger, or takes longer to read, is read while it trains: a run begins at once.
_MOST_PACKED_BYTES = 8 * 1024**3
_MOST_READ_S = 10.0
_TIMED_SAMPLES = 4
# Samplers that draw numbers of samples, all at the beginning of an epoch.
_SAMPLERS = (
    torch_data.RandomSampler, torch_data.SequentialSampler, torch_data.SubsetRandomSampler,
    torch_data.WeightedRandomSampler, torch_data.DistributedSampler,
)  # fmt: skip


@dataclass(frozen=True)
class PackedBatches:
    """Batches of packed samples; they are gathered by whoever has the buffers.

    Attributes:
        dataset: the samples. order: which of them make which batch.
        notes: what a reader of the report should know.
    """

    dataset: PackedDataset
    order: GlobalSampler | LoaderOrder
    notes: tuple[str, ...] = ()
    restarts = False

    @property
    def description(self) -> str:
        """For reports."""
        return self.dataset.description

    @property
    def num_samples(self) -> int | None:
        """Samples in an epoch."""
        return self.order.num_samples

    @property
    def num_batches(self) -> int | None:
        """Batches in an epoch."""
        return self.order.num_batches

    @property
    def batch_size(self) -> int:
        """Samples of a whole batch."""
        assert self.order.batch_size is not None
        return self.order.batch_size

    @property
    def drop_last(self) -> bool:
        """Whether all batches are whole."""
        return self.order.drop_last

    def positions(self, epoch: int, start_batch: int = 0) -> Iterator[torch.Tensor]:
        """int64 ``[n]`` of each batch of an epoch from one on."""
        return map(_positions, self.order.batches(epoch, start_batch))

    def first(self) -> Batch:
        """A batch as later ones will be, of meta tensors."""
        size = min(self.batch_size, self.dataset.num_samples)
        return self.dataset.batch(self.dataset.example_tensors(size))

    def state_dict(self, *, mid_epoch: bool) -> dict[str, Any]:
        """What a checkpoint must hold to go on from here."""
        if isinstance(self.order, LoaderOrder):
            return self.order.state.state_dict(mid_epoch=mid_epoch)
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What ``state_dict`` gave."""
        if isinstance(self.order, LoaderOrder):
            self.order.state.load_state_dict(state)


Batches = PackedBatches | LoadedBatches


def _positions(indices: Any) -> torch.Tensor:
    return torch.as_tensor(indices, dtype=torch.int64)


def open_batches(
    data: Any,
    *,
    batch_size: int | None = None,
    seed: int = 0,
    training: bool = True,
    drop_last: bool = False,
    to_batch: ToBatch | None = None,
    mmap_above_bytes: int = MMAP_ABOVE_BYTES,
) -> Batches:
    """Batches of any source of data.

    Args:
        data: what ``open_dataset`` takes; a map-style or iterable ``Dataset``; a ``DataLoader``; a
            function that gives an iterator of batches, called for each epoch.
        batch_size: samples of a batch, default 64; left out where the data comes in batches.
        seed: of the order and of random transforms.
        training: the training split, shuffled; else the test split, in order.
        drop_last: leave out the last batch of an epoch when it is smaller.
        to_batch: makes ``(x, y)`` or ``(x,)`` of what a loader gives for a batch; default:
            two parts are ``x`` and ``y``, anything else is ``x``.
        mmap_above_bytes: larger packed columns go to a file.

    Raises:
        InputError: ``batch_size`` or ``to_batch`` where the data decides.
        DataError: the data is missing, damaged, or of no supported kind.
    """
    if isinstance(data, torch_data.DataLoader) or _is_like_a_loader(data):
        _refuse(batch_size, data.batch_size, drop_last, "a DataLoader")
        return _of_loader(data, seed, to_batch, mmap_above_bytes)
    if _comes_in_batches(data):
        _refuse(batch_size, None, drop_last, "data that comes in batches")
        name = getattr(data, "__qualname__", type(data).__qualname__)
        function: Callable[[], Any] = data if callable(data) else lambda: data
        return CalledBatches(function, to_batch=to_batch, seed=seed, name=name)
    size = DEFAULT_BATCH_SIZE if batch_size is None else batch_size
    if _is_stream(data):
        loader: Any = torch_data.DataLoader(data, batch_size=size, drop_last=drop_last)
        name = f"samples of {type(data).__qualname__}"
        return LoaderBatches(loader, to_batch=to_batch, random=True, seed=seed, name=name)

    def order_of(num_samples: int) -> GlobalSampler:
        return GlobalSampler(num_samples, size, seed=seed, shuffle=training, drop_last=drop_last)

    if is_sample_source(data):
        reader = SampleReader(data)
        order = order_of(reader.num_samples)
        return _of_samples(reader, order, seed, to_batch, mmap_above_bytes)
    if to_batch is not None:
        raise InputError(
            "to_batch is for a Dataset or loader, whose batches it takes apart",
            got=type(data).__qualname__,
            next_step="pass (x, y) as you want the batches",
        )
    split = "train" if training else "test"
    dataset = open_dataset(data, split=split, seed=seed, mmap_above_bytes=mmap_above_bytes)
    return PackedBatches(dataset, order_of(dataset.num_samples))


def _of_loader(loader: Any, seed: int, to_batch: ToBatch | None, above: int) -> Batches:
    """The batches of a loader: its sampler and ``collate_fn``, packed or read ahead if possible."""
    kind = type(loader.dataset).__qualname__
    batched = type(loader) is torch_data.DataLoader and loader.batch_sampler is not None
    random = True
    if is_map_style(loader.dataset) and loader.batch_sampler is not None:
        reader = SampleReader(loader.dataset, loader.collate_fn)
        try:
            random = reader.looks_random()
        except DataError:  # Made for whole batches, or a sample that cannot be read: told later.
            random = True
        if batched and not random:
            known = type(loader.batch_sampler) is torch_data.BatchSampler
            if known and type(loader.sampler) in _SAMPLERS:
                order = LoaderOrder(loader)
                if loader.collate_fn is torch_data.default_collate or not loader.num_workers:
                    made = _of_samples(
                        reader, order, seed, to_batch, above, known_random=False,
                        packs=loader.collate_fn is torch_data.default_collate,
                    )  # fmt: skip
                    if isinstance(made, PackedBatches) or not loader.num_workers:
                        return _named(made, f"{reader.description} through a DataLoader")
    name = f"batches of a {type(loader).__qualname__} of {kind}"
    return LoaderBatches(loader, to_batch=to_batch, random=random, seed=seed, name=name)


def _of_samples(
    reader: SampleReader,
    order: GlobalSampler | LoaderOrder,
    seed: int,
    to_batch: ToBatch | None,
    above: int,
    *,
    known_random: bool | None = None,
    packs: bool = True,
) -> Batches:
    """Samples of a map-style dataset, packed where they stay the same and have one shape."""
    random = reader.looks_random() if known_random is None else known_random
    note = f"{reader.name} draws random numbers, so its samples are read between the steps"
    if not random and packs:
        try:
            return PackedBatches(_packed(reader, to_batch, seed, above), order)
        except NotPackable as error:
            note = f"samples are read while training: {str(error).rstrip('.')}"
    elif not random:
        note = "samples are read while training: the DataLoader has a collate_fn"
    return ReadBatches(reader, order, to_batch=to_batch, random=random, notes=(note,))


def _packed(reader: SampleReader, to_batch: ToBatch | None, seed: int, above: int) -> PackedDataset:
    """All samples, if that does not take too long."""
    rows = vectorized(reader) if to_batch is None else None
    if rows is not None:
        return pack_rows(rows, mmap_above_bytes=above, seed=seed)
    source = SampleRows(reader, to_batch)
    size = reader.num_samples * sum(spec.row_bytes for spec in source.specs)
    if size > _MOST_PACKED_BYTES:
        raise NotPackable(f"packed they would take {size >> 30} GiB")
    seconds = _read_s(reader) * reader.num_samples
    if seconds > _MOST_READ_S:
        raise NotPackable(f"packing them first would take about {seconds:.0f} s")
    return pack_rows(source, mmap_above_bytes=above, seed=seed)


def _read_s(reader: SampleReader) -> float:
    """Seconds that a sample takes to read, at best."""
    count = min(_TIMED_SAMPLES, reader.num_samples)
    best = math.inf
    for _ in range(2):
        began_s = time.perf_counter()
        reader.read(list(range(count)))
        best = min(best, (time.perf_counter() - began_s) / count)
    return best


def _named(batches: Batches, name: str) -> Batches:
    if isinstance(batches, PackedBatches):
        batches.dataset.description = name
        return dataclasses.replace(batches)
    batches.description = name
    return batches


def _refuse(batch_size: int | None, own: int | None, drop_last: bool, kind: str) -> None:
    if batch_size is not None and batch_size != own:
        raise InputError(
            f"{kind} has its own batch size; batch_size must be left out", got=batch_size
        )
    if drop_last:
        raise InputError(f"{kind} decides itself on its last batch; leave drop_last out")


def has_own_batches(data: Any) -> bool:
    """Whether data decides itself which samples make a batch."""
    return (
        isinstance(data, torch_data.DataLoader)
        or _is_like_a_loader(data)
        or _comes_in_batches(data)
    )


def takes_to_batch(data: Any) -> bool:
    """Whether what a loader gives for a batch is taken apart by ``to_batch``."""
    return has_own_batches(data) or _is_stream(data) or is_sample_source(data)


def _is_like_a_loader(data: Any) -> bool:
    """Of torchdata and others: not a class of torch, but with all that a loader has."""
    return not isinstance(data, torch_data.Dataset) and all(
        hasattr(data, name)
        for name in ("__iter__", "dataset", "batch_size", "sampler", "batch_sampler", "collate_fn",
                     "num_workers", "drop_last")
    )  # fmt: skip


def _is_stream(data: Any) -> bool:
    """An iterable of samples: of torch, or of a library that names it so."""
    return isinstance(data, torch_data.IterableDataset) or (
        hasattr(data, "__iter__")
        and not hasattr(data, "__getitem__")
        and any(kind.__name__ == "IterableDataset" for kind in type(data).__mro__)
    )


def _comes_in_batches(data: Any) -> bool:
    """A function that gives batches, or an object of the user's that can be iterated anew."""
    no_batches = (str, os.PathLike, PackedDataset, type)
    if isinstance(data, no_batches) or _is_stream(data) or is_map_style(data):
        return False
    if hasattr(data, "__next__"):
        raise DataError(
            "an iterator is empty after one epoch",
            got=type(data).__qualname__,
            next_step="pass the function that makes it, without calling it",
        )
    return callable(data) or hasattr(data, "__iter__")
