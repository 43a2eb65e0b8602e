"""The model that is served, and its replacement without a dropped request."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..infer import Engine
from .batcher import Batcher
from .log import Log
from .stats import Stats
from .tensors import Signature


@dataclass(frozen=True)
class BatchOptions:
    """How requests are batched; see ``Batcher``."""

    max_batch: int = 64
    target_s: float = 0.02
    max_queue: int = 1024


@dataclass(frozen=True)
class Lane:
    """One loaded engine with the queue before it."""

    engine: Engine
    signature: Signature
    batcher: Batcher
    version: str


class Model:
    """One name, and the lane that answers for it now.

    Args:
        name: in the protocol's paths.
        load: gives an engine; called in a thread for each version.
        path: what ``load`` reads, watched for changes; ``None``: nothing to watch.
        options: of the batcher.
        place: CPUs of each instance of an engine; see ``Batcher``.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[], Engine],
        *,
        path: Path | None = None,
        options: BatchOptions | None = None,
        place: Callable[[Engine], Sequence[Sequence[int]]] = lambda engine: (),
    ) -> None:
        self.name = name
        self.path = path
        self._load = load
        self._options = options or BatchOptions()
        self._place = place
        self._number = 0
        self._swap = asyncio.Lock()
        self._loaded_mark: tuple[object, ...] | None = None
        self._lane: Lane | None = None

    @property
    def lane(self) -> Lane:
        """What answers now; only after ``load``."""
        assert self._lane is not None
        return self._lane

    async def load(self, stats: Stats, log: Log) -> None:
        """Load what is there now and let it take all requests from here on.

        What the one before has accepted it still answers; then it is closed. For that time both
        are in memory.

        Raises:
            HotloopError: the model cannot be loaded; the one before goes on.
        """
        async with self._swap:
            loop = asyncio.get_running_loop()
            mark = self.mark()
            lane = await loop.run_in_executor(None, self._make, loop, stats, log)
            before, self._lane = self._lane, lane
            self._loaded_mark = mark
            if before is not None:
                threading.Thread(
                    target=before.batcher.close, name="hotloop-close", daemon=True
                ).start()

    def mark(self) -> tuple[object, ...] | None:
        """What tells one state of the files from another; ``None`` while they are replaced."""
        if self.path is None:
            return None
        try:
            if not self.path.is_dir():
                return (_file_mark(self.path),)
            with os.scandir(self.path) as found:
                names = sorted(entry.name for entry in found)
            return tuple((name, _file_mark(self.path / name)) for name in names)
        except OSError:
            return None

    @property
    def has_changed(self) -> bool:
        """Whether the files are others than those that were loaded."""
        mark = self.mark()
        return mark is not None and mark != self._loaded_mark

    def refuse_mark(self) -> None:
        """Do not try these files again: they could not be loaded."""
        self._loaded_mark = self.mark()

    def metadata(self) -> dict[str, Any]:
        """As the protocol has it."""
        lane = self.lane
        signature = lane.signature
        return {
            "name": self.name,
            "versions": [lane.version],
            "platform": f"hotloop_{lane.engine.name}",
            "inputs": _described(signature.inputs, signature.input_types),
            "outputs": _described(signature.outputs, signature.output_types),
        }

    def _make(self, loop: asyncio.AbstractEventLoop, stats: Stats, log: Log) -> Lane:
        engine = self._load()
        try:
            signature = Signature(engine.inputs, engine.outputs)
            batcher = Batcher(
                engine, signature, loop, stats, log,
                max_batch=self._options.max_batch, target_s=self._options.target_s,
                max_queue=self._options.max_queue, cpus=self._place(engine),
            )  # fmt: skip
            batcher.start()
        except BaseException:
            engine.close()
            raise
        self._number += 1
        return Lane(engine, signature, batcher, str(self._number))


def _file_mark(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _described(specs: Sequence[Any], types: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "name": spec.name,
            "datatype": datatype,
            "shape": [-1 if size is None else size for size in spec.shape],
        }
        for spec, datatype in zip(specs, types, strict=True)
    ]
