"""Batches that are loaded, not packed: what a source of any kind gives, in its own order.

All have what ``LoadedBatches`` says. What can go on in the middle of an epoch does so exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from ..errors import DataError, HotloopError
from .ahead import read_ahead
from .batch import Batch, ToBatch, batch_of
from .hashing import mix
from .order import LoaderOrder, LoaderState, samples_of, tell_epoch
from .random_state import RandomState, random_state_kept, seed_all
from .sampler import GlobalSampler
from .samples import SampleReader


class LoadedBatches(Protocol):
    """Batches of each epoch.

    Attributes:
        description: for reports. notes: what a reader of the report should know.
        num_samples, num_batches: of an epoch; ``None``: not known.
        batch_size: samples of a whole batch; ``None``: not known. drop_last: whether all are whole.
        restarts: an epoch that was cut off begins again.
    """

    description: str
    notes: tuple[str, ...]
    batch_size: int | None
    drop_last: bool
    restarts: bool

    @property
    def num_samples(self) -> int | None:
        """Samples in an epoch."""

    @property
    def num_batches(self) -> int | None:
        """Batches in an epoch."""

    def first(self) -> Batch:
        """A batch as later ones will be; leaves no trace."""

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from one on; close what it gives."""

    def state_dict(self, *, mid_epoch: bool) -> dict[str, Any]:
        """What a checkpoint must hold to go on from here."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What ``state_dict`` gave; the next epoch is the one it was in."""


class ReadBatches:
    """Batches of a map-style dataset, read here in the order of a sampler; see ``LoadedBatches``.

    Samples that stay the same are read ahead by a thread. Random ones are read between the steps;
    in an order of hotloop's own their random numbers are a function of seed, epoch and batch.
    """

    restarts = False

    def __init__(
        self,
        reader: SampleReader,
        order: GlobalSampler | LoaderOrder,
        *,
        to_batch: ToBatch | None,
        random: bool,
        notes: tuple[str, ...] = (),
    ) -> None:
        self._reader, self._order, self._to_batch, self._random = reader, order, to_batch, random
        self.description, self.notes = reader.description, notes
        self.batch_size, self.drop_last = order.batch_size, order.drop_last

    @property
    def num_samples(self) -> int | None:
        """Samples in an epoch."""
        return self._order.num_samples

    @property
    def num_batches(self) -> int | None:
        """Batches in an epoch."""
        return self._order.num_batches

    def first(self) -> Batch:
        """See ``LoadedBatches``."""
        count = min(self.batch_size or 1, self._reader.num_samples)
        with random_state_kept():
            return self._read(list(range(count)))

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """See ``LoadedBatches``."""
        order = self._order.batches(epoch, start_batch)
        lists = (b.tolist() if isinstance(b, torch.Tensor) else b for b in order)
        if not self._random:
            return read_ahead(self._read, lists)
        if isinstance(self._order, LoaderOrder):
            return map(self._read, lists)
        return self._seeded(lists, self._order.seed, epoch, start_batch)

    def state_dict(self, *, mid_epoch: bool) -> dict[str, Any]:
        """See ``LoadedBatches``."""
        if isinstance(self._order, LoaderOrder):
            return self._order.state.state_dict(mid_epoch=mid_epoch)
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``LoadedBatches``."""
        if isinstance(self._order, LoaderOrder):
            self._order.state.load_state_dict(state)

    def _seeded(
        self, lists: Iterator[list[Any]], seed: int, epoch: int, start_batch: int
    ) -> Iterator[Batch]:
        for number, indices in enumerate(lists, start_batch):
            with random_state_kept():
                seed_all(mix(seed, epoch, number) >> 1)
                batch = self._read(indices)
            yield batch

    def _read(self, indices: list[Any]) -> Batch:
        return batch_of(self._reader.read(indices), self._to_batch)


class LoaderBatches:
    """What iterating a ``DataLoader`` gives; see ``LoadedBatches``.

    Args:
        loader: of torch, or like it. to_batch: the user's rule.
        random: whether samples differ when they are read again.
    """

    def __init__(
        self, loader: Any, *, to_batch: ToBatch | None, random: bool, seed: int, name: str
    ) -> None:
        self._loader, self._to_batch, self._random, self._seed = loader, to_batch, random, seed
        self._keeper = _keeper_of(loader)
        self._iterable = isinstance(loader.dataset, torch.utils.data.IterableDataset)
        self._state = LoaderState(loader)
        self._peeked: tuple[Iterator[Any], Any, RandomState] | None = None
        self._loaded: dict[str, Any] | None = None
        self.batch_size, self.drop_last = loader.batch_size, loader.drop_last
        self.restarts = self._iterable and self._keeper is None
        self.notes: tuple[str, ...] = ()
        if self.restarts:
            self.notes = (
                f"{name} has no state to save: a run that is resumed begins its epoch again; "
                "torchdata's StatefulDataLoader goes on where it was",
            )
        self.description = name

    @property
    def num_samples(self) -> int | None:
        """Samples in an epoch."""
        return samples_of(self._loader)

    @property
    def num_batches(self) -> int | None:
        """Batches in an epoch."""
        try:
            return None if self._iterable else len(self._loader)
        except (TypeError, NotImplementedError):
            return None

    def first(self) -> Batch:
        """See ``LoadedBatches``."""
        if self._peeked is None:
            with random_state_kept():
                torch.manual_seed(self._seed)
                values = _begin(self._loader, 0)
                value = _next(values, self.description)
                self._peeked = values, value, RandomState.now()
        return batch_of(self._peeked[1], self._to_batch)

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """See ``LoadedBatches``."""
        peeked, self._peeked = self._peeked, None
        if self._loaded is not None:
            values = self._resumed(epoch, start_batch)
        else:
            self._state.begin_epoch()
            if peeked is not None and (epoch, start_batch) == (0, 0):
                peeked[2].put_back()
                yield batch_of(peeked[1], self._to_batch)
                values = peeked[0]
            else:
                values = _begin(self._loader, epoch)
        del peeked
        for value in values:
            yield batch_of(value, self._to_batch)

    def _resumed(self, epoch: int, start_batch: int) -> Iterator[Any]:
        """The rest of the epoch that a checkpoint was made in."""
        assert self._loaded is not None
        state, self._loaded = self._loaded, None
        if self._keeper is not None and "keeper" in state:
            now = RandomState.now()
            self._keeper.load_state_dict(state["keeper"])
            values = _begin(self._loader, epoch)
            now.put_back()
            return values
        self._state.load_state_dict(state)
        back = self._state.begin_epoch()
        plain = type(self._loader) is DataLoader and self._loader.batch_sampler is not None
        if self._random or not plain:
            values = _begin(self._loader, epoch)
            for _ in islice(values, start_batch):  # Read as before: random numbers go the same way.
                pass
        else:
            values = _begin(_without_first(self._loader, start_batch), epoch)
        if back is not None:
            back.put_back()
        return values

    def state_dict(self, *, mid_epoch: bool) -> dict[str, Any]:
        """See ``LoadedBatches``."""
        if self.restarts:
            return {}
        state = self._state.state_dict(mid_epoch=mid_epoch)
        if self._keeper is not None and mid_epoch:
            state["keeper"] = self._keeper.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``LoadedBatches``."""
        if self.restarts:
            return
        if state["mid_epoch"]:
            self._loaded = state
        else:
            self._state.load_state_dict(state)


class CalledBatches:
    """Batches of a function that gives an iterator for each epoch; see ``LoadedBatches``."""

    restarts = True
    drop_last = False
    batch_size: int | None = None

    def __init__(
        self, function: Callable[[], Any], *, to_batch: ToBatch | None, seed: int, name: str
    ) -> None:
        self._function, self._to_batch, self._seed = function, to_batch, seed
        self.description = f"batches of {name}"
        self.notes: tuple[str, ...] = (
            f"{name} has no state to save: a run that is resumed begins its epoch again",
        )
        self._peeked: tuple[Iterator[Any], Any, RandomState] | None = None

    @property
    def num_samples(self) -> int | None:
        """Not known."""
        return None

    @property
    def num_batches(self) -> int | None:
        """Not known."""
        return None

    def first(self) -> Batch:
        """See ``LoadedBatches``."""
        if self._peeked is None:
            with random_state_kept():
                torch.manual_seed(self._seed)
                values = self._begin()
                value = _next(values, self.description)
                self._peeked = values, value, RandomState.now()
        return batch_of(self._peeked[1], self._to_batch)

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """See ``LoadedBatches``."""
        peeked, self._peeked = self._peeked, None
        if peeked is not None and epoch == 0:
            peeked[2].put_back()
            yield batch_of(peeked[1], self._to_batch)
            values = peeked[0]
        else:
            values = self._begin()
        del peeked
        for value in values:
            yield batch_of(value, self._to_batch)

    def state_dict(self, *, mid_epoch: bool) -> dict[str, Any]:
        """See ``LoadedBatches``."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``LoadedBatches``."""

    def _begin(self) -> Iterator[Any]:
        values = self._function()
        try:
            return iter(values)
        except TypeError:
            raise DataError(
                "a function given as data must return an iterator of batches",
                got=type(values).__qualname__,
                next_step="write it as a generator function: yield x, y",
            ) from None


def _keeper_of(loader: Any) -> Any:
    """Who knows where in an epoch it is: a stateful loader, or its dataset; ``None``: nobody."""
    for thing in (loader, loader.dataset if loader.num_workers == 0 else None):
        if hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict"):
            return thing
    return None


def _begin(loader: Any, epoch: int) -> Iterator[Any]:
    tell_epoch(loader, epoch)
    return iter(loader)


def _next(values: Iterator[Any], name: str) -> Any:
    try:
        return next(values)
    except StopIteration:
        raise DataError("the data must have at least 1 batch", got=f"none from {name}") from None
    except HotloopError:
        raise
    except Exception as error:
        raise DataError(
            f"{name} must be readable", got=f"{type(error).__name__}: {error}"
        ) from error


def _without_first(loader: DataLoader[Any], count: int) -> DataLoader[Any]:
    """The loader, its first batches left out without reading them."""
    options: dict[str, Any] = {}
    if loader.num_workers:
        options["prefetch_factor"] = loader.prefetch_factor
        options["multiprocessing_context"] = loader.multiprocessing_context
    return DataLoader(
        loader.dataset,
        batch_sampler=_Rest(loader.batch_sampler, count),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        generator=loader.generator,
        **options,
    )


class _Rest:
    """A batch sampler without its first batches."""

    def __init__(self, batch_sampler: Any, count: int) -> None:
        self._batch_sampler, self._count = batch_sampler, count

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self._batch_sampler), self._count, None)

    def __len__(self) -> int:
        return max(0, len(self._batch_sampler) - self._count)
