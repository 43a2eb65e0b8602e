"""``LoaderOrder``: which samples make which batch by the sampler of a ``DataLoader``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from .random_state import RandomState


class LoaderState:
    """The random numbers that decide the batches of a loader, of its epoch and of now.

    A resumed run takes those of its epoch, makes the same order, leaves out what was done, and
    takes those of now.
    """

    def __init__(self, loader: Any) -> None:
        holders = [loader, *(getattr(loader, name, None) for name in ("sampler", "batch_sampler"))]
        found = [getattr(holder, "generator", None) for holder in holders]
        self._generators = list(
            {id(g): g for g in found if isinstance(g, torch.Generator)}.values()
        )
        self._epoch: dict[str, Any] | None = None
        self._given: dict[str, Any] | None = None

    def begin_epoch(self) -> RandomState | None:
        """Note where an epoch begins. Of one that is gone on with: take its numbers.

        Returns:
            What must be put back once the epoch's order is made; ``None``: nothing.
        """
        back = None
        if self._given is not None:
            back = RandomState.now()
            self._take(self._given)
            self._given = None
        self._epoch = self._now()
        return back

    def state_dict(self, *, mid_epoch: bool) -> dict[str, Any]:
        """Plain values and tensors, for a checkpoint."""
        state = self._epoch if mid_epoch and self._epoch is not None else self._now()
        return {"mid_epoch": mid_epoch, **state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What ``state_dict`` gave."""
        if state["mid_epoch"]:
            self._given = state
        else:
            self._take_generators(state)

    def _now(self) -> dict[str, Any]:
        generators = [g.get_state() for g in self._generators]
        return {"random": RandomState.now().to_dict(), "generators": generators}

    def _take(self, state: dict[str, Any]) -> None:
        RandomState.from_dict(state["random"]).put_back()
        self._take_generators(state)

    def _take_generators(self, state: dict[str, Any]) -> None:
        for generator, numbers in zip(self._generators, state["generators"], strict=True):
            generator.set_state(numbers)


class LoaderOrder:
    """The batches that a loader's own sampler draws; see ``GlobalSampler``.

    Draws the random numbers that iterating the loader would draw.

    Args:
        loader: map-style, with a ``batch_sampler`` that knows its length.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader
        self.batch_size = loader.batch_size
        self.drop_last = loader.drop_last
        self.num_samples = samples_of(loader)
        self.state = LoaderState(loader)

    @property
    def num_batches(self) -> int:
        """Batches in an epoch."""
        return len(self._loader)

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[list[Any]]:
        """Indices of the batches of an epoch from one on.

        The order is made at once, before anything else draws random numbers.
        """
        back = self.state.begin_epoch()
        tell_epoch(self._loader, epoch)
        torch.empty((), dtype=torch.int64).random_(generator=self._loader.generator)
        order = list(self._loader.batch_sampler or ())
        if back is not None:
            back.put_back()
        return iter(order[start_batch:])


def tell_epoch(loader: Any, epoch: int) -> None:
    """Samplers and datasets that ask for it are told which epoch begins."""
    things = [getattr(loader, name, None) for name in ("sampler", "batch_sampler", "dataset")]
    for thing in {id(thing): thing for thing in things}.values():
        if thing is not None and hasattr(thing, "set_epoch"):
            thing.set_epoch(epoch)


def samples_of(loader: Any) -> int | None:
    """Samples that the sampler of a loader draws in an epoch; ``None``: not known."""
    if isinstance(loader.dataset, torch.utils.data.IterableDataset):
        return None
    try:
        return len(loader.sampler)
    except (TypeError, AttributeError, NotImplementedError):
        return None
