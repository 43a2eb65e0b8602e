"""DataLoaders of a launched script: batches of recognised data sets at once, where that is faster.

Sampler, order, random state and what comes out stay the loader's own. One with workers, with a
``collate_fn`` or with a data set that is not recognised (``datasets.py``) stays as it is.
"""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import default_collate

from .choice import Choice

if TYPE_CHECKING:
    from .datasets import Read


@dataclass
class Reads:
    """What was read. at_once: batches by one look-up."""

    at_once: int = 0


reads = Reads()
_plain: Any = None
# The choice of each data set, by its address, with what tells whether it is still that one.
_choices: dict[int, tuple[weakref.ref[Any], Choice]] = {}


class _Fetcher:
    """A loader's fetcher, or the batch at once."""

    def __init__(self, plain: Any, read: Read, choice: Choice) -> None:
        self._plain, self._read, self._choice = plain, read, choice

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)

    def fetch(self, places: Any) -> Any:
        started_s = time.perf_counter()
        data = None
        if type(places) is list and places and torch.utils.data.get_worker_info() is None:
            data = self._read(places) if self._choice.next() else None
        at_once = data is not None
        if data is None:
            data = self._plain.fetch(places)
        reads.at_once += at_once
        self._choice.note(at_once, time.perf_counter() - started_s)
        return data


def install() -> None:
    """Give each loader that is iterated without workers such a fetcher; once a process."""
    global _plain
    if _plain is not None:
        return
    module: Any = torch.utils.data.dataloader
    plain = _plain = module._DatasetKind.create_fetcher

    def create_fetcher(
        kind: Any, dataset: Any, auto_collation: Any, collate_fn: Any, drop_last: Any
    ) -> Any:
        fetcher = plain(kind, dataset, auto_collation, collate_fn, drop_last)
        if (
            kind != module._DatasetKind.Map
            or not auto_collation
            or collate_fn is not default_collate
        ):
            return fetcher
        if torch.utils.data.get_worker_info() is not None:
            return fetcher
        try:
            from .datasets import reader_of

            read = reader_of(dataset)
            return fetcher if read is None else _Fetcher(fetcher, read, _choice_of(dataset))
        except Exception:  # It only looked like one: the slow way is always right.
            return fetcher

    module._DatasetKind.create_fetcher = staticmethod(create_fetcher)


def remove() -> None:
    """Put the loaders' own back."""
    global _plain
    module: Any = torch.utils.data.dataloader
    if _plain is not None:
        module._DatasetKind.create_fetcher, _plain = staticmethod(_plain), None


def _choice_of(dataset: Any) -> Choice:
    known = _choices.get(id(dataset))
    if known is not None and known[0]() is dataset:
        return known[1]
    choice = Choice()
    _choices[id(dataset)] = weakref.ref(dataset), choice
    return choice
