"""``InferenceRunner``: any batch size in, each to the engine that is fastest there.

Imports no torch; a runner whose engines need none answers numpy arrays without it.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from ..errors import DataError, InputError
from ..machine import Machine
from .engine import Engine, check_arrays, not_on_cpu
from .folder_writer import write_folder
from .report import InferenceReport, Setting
from .signature import LEAF, Signature, arguments, flatten, unflatten

if TYPE_CHECKING:
    from .artifacts import ArtifactBuilder

# Batch sizes below it are looked up in a list.
_LISTED = 1025


class InferenceRunner:
    """Answers batches. Torch tensors give torch tensors, numpy arrays numpy arrays.

    Made by ``compile_inference`` and ``load_inference``. It holds the weights of the moment it was
    made; training the model on does not change it. Calls from several threads are allowed.

    It is an ``Engine`` itself: ``name`` and the like are those of the main one.

    Attributes:
        report: what the race found.
        engine: the main one: of the batch size that the goal is about.
        signature: what goes in and comes out, and how. inputs, outputs: of it.
        engines: setting -> engine.
        by_batch_size: from this batch size on this setting; ``exact``: for this size alone (graphs
            bound to one).
    """

    def __init__(
        self,
        engines: Mapping[Setting, Engine],
        by_batch_size: Mapping[int, Setting],
        signature: Signature,
        report: InferenceReport,
        *,
        primary: Setting,
        exact: Mapping[int, Setting] | None = None,
        artifacts: ArtifactBuilder | None = None,
        source: Path | None = None,
    ) -> None:
        self.report = report
        self.engines = dict(engines)
        self.by_batch_size = dict(sorted(by_batch_size.items()))
        self.engine = self.engines[primary]
        self.name, self.precision = self.engine.name, self.engine.precision
        self.num_threads = self.engine.num_threads
        self.num_instances = self.engine.num_instances
        self.signature = signature
        self.inputs, self.outputs = signature.inputs, signature.outputs
        self.exact = dict(exact or {})
        self.artifacts = artifacts
        self.source = source
        self._sizes = list(self.by_batch_size)
        self._settings = list(self.by_batch_size.values())
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._adapters = {
            setting: EngineAdapter(engine) for setting, engine in self.engines.items()
        }
        found = map(self.setting_for, range(_LISTED))
        self._by_size = [None if s is None else self._adapters[s] for s in found]
        plain = signature.only_eager is None and signature.output_structure == LEAF
        self._single = signature.takes_one and plain
        spec = self.inputs[0]
        self._tail = tuple(spec.shape[1:])
        self._dtype = numpy.dtype(spec.dtype) if _is_numpy(spec.dtype) else None
        self._tensor: Any = None
        self._torch_dtype: Any = None
        self._find_torch()

    def _find_torch(self) -> None:
        torch = sys.modules.get("torch")
        if torch is not None and hasattr(torch, "Tensor"):
            self._tensor = torch.Tensor
            self._torch_dtype = getattr(torch, self.inputs[0].dtype)

    def setting_for(self, batch_size: int) -> Setting | None:
        """What answers a batch of this size: the winner of the largest raced size up to it.

        ``None``: the model takes other sizes alone.
        """
        if batch_size in self.exact:
            return self.exact[batch_size]
        place = max(0, bisect.bisect_right(self._sizes, batch_size) - 1)
        return self._settings[place] if self._settings else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's result, as eager would give it.

        Args:
            args, kwargs: as the model's ``forward`` takes them, ``[batch, ...]`` each; or one tree,
                as the example was.

        Raises:
            DataError: not what the model takes.
            RunError: the engine failed.
        """
        if self._single and len(args) == 1 and not kwargs:
            # The short way: nothing is walked through or built.
            x = args[0]
            kind = type(x)
            if kind is self._tensor:
                shape = x.shape
                if x.dtype is self._torch_dtype and shape[1:] == self._tail and shape:
                    size = shape[0]
                    adapter = self._by_size[size] if size < _LISTED else None
                    return (adapter or self._adapter(size)).tensor(x)
            elif kind is numpy.ndarray and x.dtype == self._dtype and x.ndim:
                shape = x.shape
                if shape[1:] == self._tail:
                    size = shape[0]
                    adapter = self._by_size[size] if size < _LISTED else None
                    return (adapter or self._adapter(size)).array(x)
        return self._general(args, kwargs)

    def _adapter(self, size: int) -> EngineAdapter:
        if not self._adapters:
            raise InputError("the runner must be open", next_step="compile or load it again")
        setting = self.setting_for(size)
        if setting is None:
            raise DataError(
                f"the model takes batches of {', '.join(map(str, self.exact))} alone", got=size,
                next_step="export it with an example of another size, or pad the batch",
            )  # fmt: skip
        return self._adapters[setting]

    def _general(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves = self.signature.leaves_of(args, kwargs)
        if leaves is None:
            raise DataError(
                f"the model takes {'; '.join(spec.text() for spec in self.inputs)}",
                got=f"{_count(args, kwargs)} arrays in another arrangement",
                next_step="pass the arguments as in the example",
            )
        as_torch = any(type(leaf).__module__.startswith("torch") for leaf in leaves)
        if as_torch and self._tensor is None:
            self._find_torch()
        check_arrays(self.inputs, leaves)
        sizes = {x.shape[0] for x, s in zip(leaves, self.inputs, strict=True) if s.is_batched}
        if len(sizes) > 1:
            raise DataError("all inputs must have one batch size", got=sorted(sizes))
        adapter = self._adapter(sizes.pop() if sizes else 1)
        if self.signature.only_eager is not None:
            return adapter.whole(leaves, as_torch)
        results = adapter.tensors(leaves) if as_torch else adapter.arrays(leaves)
        return unflatten(self.signature.output_structure, results)

    def run(self, arrays: Sequence[numpy.ndarray]) -> list[numpy.ndarray]:
        """Inputs and results as flat lists of arrays, in the order of ``inputs``, ``outputs``.

        Raises:
            DataError: not what the model takes.
        """
        check_arrays(self.inputs, arrays)
        batched = [a for a, s in zip(arrays, self.inputs, strict=True) if s.is_batched]
        return self._adapter(len(batched[0]) if batched else 1).engine.run(arrays)

    def map(self, batches: Iterable[Any], *, pin: bool = True) -> Iterator[Any]:
        """Answers many batches by all instances at once, in the order they came.

        Args:
            batches: each as the example was. Read a few ahead, so that an endless source may be
                given.
            pin: one CPU for each instance of one thread.

        Raises:
            DataError, RunError: from the first batch that fails; those before it were given.
        """
        workers = self._workers(pin)
        ahead = 2 * self._num_workers() + 1
        source = iter(batches)
        pending: collections.deque[Future[Any]] = collections.deque()
        try:
            for batch in itertools.islice(source, ahead):
                pending.append(workers.submit(self._one, batch))
            while pending:
                answer = pending.popleft().result()
                for batch in itertools.islice(source, 1):
                    pending.append(workers.submit(self._one, batch))
                yield answer
        finally:
            for future in pending:
                future.cancel()

    def _one(self, batch: Any) -> Any:
        args, kwargs = arguments(batch)
        return self(*args, **kwargs)

    def _num_workers(self) -> int:
        return max(engine.num_instances for engine in self.engines.values())

    def _workers(self, pin: bool) -> ThreadPoolExecutor:
        with self._lock:
            if self._threads is None:
                count = self._num_workers()
                cpus = iter(Machine.probe().cpu_ids if pin and self.engine.num_threads == 1 else ())

                def settle() -> None:
                    with self._lock:
                        cpu = next(cpus, None)
                    if cpu is not None:
                        # For good: the thread is the pool's own. Unpinned it only is slower.
                        with contextlib.suppress(OSError, AttributeError):
                            os.sched_setaffinity(0, {cpu})

                self._threads = ThreadPoolExecutor(count, "hotloop-infer", settle)
            return self._threads

    def save(self, folder: str | Path) -> Path:
        """Write a folder that ``load_inference``, ``load_engine`` and ``hotloop serve`` read.

        Whole or not at all; a folder that an export left there before is replaced.

        Raises:
            InputError: something else is there.
            ModelError: the winner cannot be kept in a file.
            StorageError: the folder cannot be written.
        """
        return write_folder(
            Path(folder),
            engines=list(self.engines),
            by_batch_size=self.by_batch_size,
            exact=self.exact,
            signature=self.signature,
            report=self.report,
            artifacts=self.artifacts,
            source=self.source,
        )

    def close(self) -> None:
        """Give memory and threads back; no call may follow."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        for engine in self.engines.values():
            engine.close()
        self.engines.clear()
        self._adapters.clear()
        self._by_size.clear()
        self._single = False
        if self.artifacts is not None:
            self.artifacts.close()

    def __enter__(self) -> InferenceRunner:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _count(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    return len(flatten((args, kwargs), "the input", opaque=True)[0])


def _is_numpy(dtype: str) -> bool:
    try:
        numpy.dtype(dtype)
    except TypeError:
        return False
    return True


class EngineAdapter:
    """An engine's ways in: arrays or tensors, one or many.

    Attributes:
        array, tensor: answer one of them, where one goes in and one comes out.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.takes_tensors = hasattr(engine, "run_tensors")
        direct: Callable[[Any], Any] | None = getattr(engine, "run_one", None)
        self.array: Callable[[Any], Any] = direct or (lambda x: engine.run((x,))[0])
        if self.takes_tensors:
            run_tensors: Any = engine.run_tensors  # type: ignore[attr-defined]
            self.tensor: Callable[[Any], Any] = lambda x: run_tensors((x,))[0]
        else:
            self.tensor = self._tensor_by_array

    def _tensor_by_array(self, x: Any) -> Any:
        import torch

        array = self.array
        from_numpy = torch.from_numpy

        def call(tensor: Any) -> Any:
            try:
                view = tensor.numpy()
            except (RuntimeError, TypeError):
                view = _on_cpu(tensor).numpy()
            return from_numpy(array(view))

        self.tensor = call
        return call(x)

    def arrays(self, leaves: Sequence[Any]) -> list[Any]:
        """Results as arrays."""
        return self.engine.run([numpy.asarray(leaf) for leaf in leaves])

    def whole(self, leaves: Sequence[Any], as_torch: bool) -> Any:
        """The module's own result, whatever is in it; arrays for arrays."""
        answer: Callable[[Any], Any] = self.engine.answer  # type: ignore[attr-defined]
        result = answer(leaves)
        if as_torch:
            return result
        tensors, structure = flatten(result, "the result", opaque=True)
        return unflatten(structure, [tensor.numpy() for tensor in tensors])

    def tensors(self, leaves: Sequence[Any]) -> list[Any]:
        """Results as tensors."""
        import torch

        tensors = [torch.as_tensor(leaf).detach() for leaf in leaves]
        if self.takes_tensors:
            return self.engine.run_tensors(tensors)  # type: ignore[attr-defined,no-any-return]
        tensors = [_on_cpu(tensor) for tensor in tensors]
        return [torch.from_numpy(y) for y in self.engine.run([t.numpy() for t in tensors])]


def _on_cpu(tensor: Any) -> Any:
    if tensor.device.type != "cpu":
        raise not_on_cpu(tensor.device)
    return tensor.detach().resolve_conj().resolve_neg()
