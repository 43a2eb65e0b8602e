"""``TrainingExport``: trains, evaluates and writes checkpoints with NumPy alone. No torch."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from ...errors import CheckpointError, DataError, DivergedError, InputError, ModelError
from ...kernels import update_scalars
from ...train import array_file
from ...train.checkpoint import Checkpoint, CheckpointStore
from ...train.progress import RunState
from . import document as documents
from .document import Document
from .memory import Memory
from .program import TrainingProgram
from .samples import RANDOM_STATE_BYTES, Samples, order, random_state

# Steps whose scalars are computed at once.
_TABLE_STEPS = 64


@dataclass(frozen=True)
class Evaluation:
    """Loss and accuracy over a data set; ``None``: the targets are no classes."""

    loss: float
    accuracy: float | None
    num_samples: int


class TrainingExport:
    """A training run that an export makes: weights, optimizer state, programs.

    Args:
        document: of the export. folder: where its files are.
        num_threads: inside each kernel.

    Attributes:
        state: where the run stands.
        tensors: name -> array of what the model's ``state_dict`` has, where it lies.

    Raises:
        ModelError: the export is damaged.
        RunError: there are no kernels here.
    """

    def __init__(self, document: Document, folder: Path, num_threads: int) -> None:
        self.document, self.num_threads = document, num_threads
        self.state = RunState()
        arena_bytes = max(program.arena_bytes for program in document.programs)
        self._memory = Memory(document.tensors, arena_bytes)
        self._folder = folder
        self._fill()
        self._programs = {
            (text.kind, text.batch_size): TrainingProgram(
                text, self._memory, num_threads, document.num_states
            )
            for text in document.programs
        }
        self._mu_products = [1.0] * len(document.groups)
        self.tensors = {
            name: array
            for tensor, array in zip(document.tensors, self._memory.arrays, strict=True)
            if tensor.kind in ("weight", "frozen", "buffer")
            for name in tensor.names
        }

    def _fill(self) -> None:
        of_file: dict[str, dict[str, numpy.ndarray]] = {
            documents.MODEL_FILE: {}, documents.CONSTANTS_FILE: {}
        }  # fmt: skip
        for tensor, array in zip(self.document.tensors, self._memory.arrays, strict=True):
            if tensor.kind == "state":
                array.fill(tensor.initial)
            elif tensor.kind == "random":
                if (tensor.dtype, tensor.shape) != ("uint8", (RANDOM_STATE_BYTES,)):
                    raise ModelError("a random state must have its size", got=tensor.shape)
                array[...] = random_state(0)
            else:
                constant = tensor.kind == "constant"
                name = documents.CONSTANTS_FILE if constant else documents.MODEL_FILE
                of_file[name][tensor.names[0]] = array
        try:
            for name, arrays in of_file.items():
                array_file.read_into(self._folder / name, arrays)
        except (CheckpointError, OSError) as error:
            raise ModelError(f"{self._folder} must be a whole training export", got=error) from None

    @property
    def batch_sizes(self) -> list[int]:
        """Sizes of batch that there is a training program for."""
        return sorted(size for kind, size in self._programs if kind == "train")

    def seed(self, seed: int) -> None:
        """Draw from here on what torch draws after ``torch.manual_seed(seed)``."""
        for tensor, array in zip(self.document.tensors, self._memory.arrays, strict=True):
            if tensor.kind == "random":
                array[...] = random_state(seed)

    @property
    def evaluates(self) -> bool:
        """Whether there is an evaluation."""
        return ("evaluate", 1) in self._programs

    @property
    def memory_bytes(self) -> int:
        """Of weights, optimizer states, constants and the arena."""
        return self._memory.size_bytes

    # ---- Steps -------------------------------------------------------------------------------

    def step(self, x: numpy.ndarray, y: numpy.ndarray) -> float:
        """One optimizer step; the loss before the update.

        Args:
            x, y: of a size and dtype that there is a program for.

        Raises:
            DataError: there is none.
        """
        program = self._program(len(x))
        for what, array, wanted in (("x", x, self.document.x), ("y", y, self.document.y)):
            if (array.dtype.name, array.shape[1:]) != (wanted.dtype, wanted.shape):
                raise DataError(
                    f"{what} must be {wanted.dtype} {list(wanted.shape)}, as exported",
                    got=f"{array.dtype} {list(array.shape[1:])}",
                )
        program.put((x, y))
        loss = program.run(self._tables(1)[0])
        self._note(loss, len(x))
        return loss

    def _program(self, batch_size: int, kind: str = "train") -> TrainingProgram:
        program = self._programs.get((kind, batch_size))
        if program is None:
            raise DataError(
                f"the export trains on batches of {', '.join(map(str, self.batch_sizes))}",
                got=f"{batch_size} samples",
                next_step="pass drop_last, or export with the number of samples of your data",
            )
        return program

    def _tables(self, count: int) -> numpy.ndarray:
        """Scalars of the next steps, float64 ``[count, groups, 16]``."""
        document, first = self.document, self.state.step
        rates = None
        if document.rates:
            last = len(document.rates) - 1
            if document.interval == "step":
                rates = [document.rates[min(first + n, last)] for n in range(count)]
            else:
                rates = [document.rates[min(self.state.epoch, last)]] * count
        return update_scalars.table(
            document.optimizer, document.groups, first, count, rates, self._mu_products
        )

    def _note(self, loss: float, num_samples: int) -> None:
        """Count one step."""
        if self.document.optimizer == "NAdam":
            for number, group in enumerate(self.document.groups):
                before = self._mu_products[number]
                (product,) = update_scalars.mu_products(group, self.state.step, 1, before)
                self._mu_products[number] = float(product)
        self.state.note_step(loss, num_samples)

    # ---- Epochs ------------------------------------------------------------------------------

    def fit(
        self,
        samples: Samples,
        epochs: int = 1,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        validation: Samples | None = None,
        checkpoint_dir: str | Path | None = None,
        resume: bool = False,
        max_steps: int | None = None,
        on_epoch: Callable[[RunState], None] | None = None,
    ) -> RunState:
        """Train to the end of ``epochs``, in the order of ``Trainer.fit`` for the same seed.

        Args:
            samples, validation: the data; ``validation`` is evaluated after each epoch.
            epochs: of the whole run, those before a resume included.
            drop_last: leave out the last batch of an epoch where it is smaller; else there must
                be a program for its size.
            checkpoint_dir: where a checkpoint goes after each epoch.
            resume: go on from the newest checkpoint there; start anew if there is none.
            max_steps: stop after so many steps of the whole run.
            on_epoch: called after each epoch.

        Raises:
            DataError: the data does not fit. CheckpointError: of another run. DivergedError: the
                loss became NaN or infinite.
        """
        document, state = self.document, self.state
        if epochs < 1:
            raise InputError("epochs must be at least 1", got=epochs)
        for each in (samples, *([] if validation is None else [validation])):
            each.check(document.x, document.y)
        rest = len(samples) % document.batch_size
        if rest and not drop_last:
            self._program(rest)
        elif len(samples) < document.batch_size:
            raise DataError("the data must fill one batch", got=len(samples))
        identity = self._identity(samples, seed, drop_last=drop_last)
        store = None
        if checkpoint_dir is not None:
            store = CheckpointStore(checkpoint_dir, tensor_files=array_file)
            found = store.latest() if resume else None
            if not resume and store.newest_step() is not None:
                raise CheckpointError(
                    "a new run needs a folder without checkpoints", got=checkpoint_dir,
                    next_step="resume, or name another folder",
                )  # fmt: skip
            if found is not None:
                self._restore(found, identity)
                state = self.state
        if state.step == 0:
            self.seed(seed)
        while state.epoch < epochs and state.step != max_steps:
            whole = self._epoch(samples, seed, shuffle, drop_last, max_steps)
            if whole:
                result = None if validation is None else self.evaluate(validation)
                state.finish_epoch(
                    learning_rate=float(self._tables(1)[0, 0, update_scalars.AT["lr"]]),
                    loss=None if result is None else result.loss,
                    accuracy=None if result is None else result.accuracy,
                )
                if on_epoch is not None:
                    on_epoch(state)
            if store is not None:
                self.save(store, identity)
        return state

    def _epoch(
        self, samples: Samples, seed: int, shuffle: bool, drop_last: bool, max_steps: int | None
    ) -> bool:
        """Train to the end of the epoch under way, or to the last step; whether it is done."""
        state, size = self.state, self.document.batch_size
        count = len(samples)
        positions = order(count, seed, state.epoch) if shuffle else numpy.arange(count)
        num_batches = count // size if drop_last else -(-count // size)
        began_s = time.perf_counter()
        tables, at = self._tables(1)[:0], 0
        while state.batch < num_batches and state.step != max_steps:
            if at == len(tables):
                tables, at = self._next_tables(num_batches - state.batch), 0
            rows = positions[state.batch * size : (state.batch + 1) * size]
            program = self._program(len(rows))
            for number, array in program.parts:
                samples.put(rows, number, array)
            loss = program.run(tables[at])
            at += 1
            if not math.isfinite(loss):
                raise DivergedError(
                    "the loss must stay finite", got=f"{loss} at step {state.step + 1}",
                    next_step="export with a lower learning rate",
                )  # fmt: skip
            self._note(loss, len(rows))
        state.train_s += time.perf_counter() - began_s
        return state.batch == num_batches

    def _next_tables(self, left: int) -> numpy.ndarray:
        # NAdam carries a product from step to step: one at a time.
        return self._tables(1 if self.document.optimizer == "NAdam" else min(left, _TABLE_STEPS))

    def evaluate(self, samples: Samples) -> Evaluation:
        """Loss and accuracy of the model as it stands.

        Raises:
            DataError: the data does not fit. ModelError: the export has no evaluation.
        """
        samples.check(self.document.x, self.document.y)
        if not self.evaluates:
            raise ModelError(
                "the export must have an evaluation", got="none",
                next_step="read why in what hotloop export --training said",
            )  # fmt: skip
        loss_sum, correct, classes = 0.0, 0, True
        for positions in self._evaluated(len(samples)):
            program = self._programs["evaluate", len(positions)]
            for number, array in program.parts:
                samples.put(positions, number, array)
            loss = program.run()
            loss_sum += loss * (1 if self.document.loss_kind == "sum" else len(positions))
            answer, y = program.answer, samples.y[positions]
            assert answer is not None
            classes = answer.ndim == 2 and answer.shape[1] > 1 and y.dtype == numpy.int64
            classes = classes and y.ndim == 1
            if classes:
                correct += int((answer.argmax(1) == y).sum())
        weight = 1 if self.document.loss_kind == "sum" else len(samples)
        accuracy = correct / len(samples) if classes else None
        return Evaluation(loss_sum / weight, accuracy, len(samples))

    def _evaluated(self, count: int) -> Iterator[numpy.ndarray]:
        """Positions of whole batches, then one by one."""
        size = self.document.batch_size
        size = size if ("evaluate", size) in self._programs else 1
        whole = count // size * size
        for start in range(0, whole, size):
            yield numpy.arange(start, start + size)
        for position in range(whole, count):
            yield numpy.arange(position, position + 1)

    # ---- Checkpoints -------------------------------------------------------------------------

    def save(self, store: CheckpointStore, identity: dict[str, Any]) -> Path:
        """A checkpoint that ``Trainer.fit`` and this class go on from.

        Raises:
            StorageError: it could not be written.
        """
        tensors: dict[str, dict[str, Any]] = {"model": dict(self.tensors)}
        kept = array_file.load_tensors(self._folder / documents.CHECKPOINT_FILE)
        for group, named in self.document.checkpoint["groups"].items():
            tensors[group] = {name: self._kept(kept, ref) for name, ref in named.items()}
        body = copy.deepcopy(self.document.checkpoint["document"])
        body["identity"], body["run"] = identity, self.state.to_dict()
        return store.save(self.state.step, tensors=tensors, document=body)

    def _kept(self, kept: dict[str, numpy.ndarray], ref: dict[str, Any]) -> numpy.ndarray:
        ((kind, value),) = ref.items()
        if kind == "tensor":
            found: numpy.ndarray = self._memory.arrays[value]
            return found
        if kind == "steps":
            return numpy.array(float(self.state.step), numpy.float32)
        if kind == "mu_product":
            return numpy.array(self._mu_products[value], numpy.float32)
        array: numpy.ndarray = kept[value]
        return array

    def _identity(self, samples: Samples, seed: int, *, drop_last: bool) -> dict[str, Any]:
        return {
            "seed": seed, "batch_size": self.document.batch_size, "num_samples": len(samples),
            "drop_last": drop_last, "data": samples.description,
            "optimizer": self.document.optimizer,
            "scheduler": self.document.checkpoint["document"]["identity"]["scheduler"],
        }  # fmt: skip

    def _restore(self, found: Checkpoint, identity: dict[str, Any]) -> None:
        """Go on from a checkpoint; everything is checked before anything is changed."""
        try:
            for name, value in identity.items():
                if found.document["identity"][name] != value:
                    raise CheckpointError(
                        f"to go on from {found.path}, {name} must be as it was",
                        got=repr(value),
                    )
            pairs: list[tuple[numpy.ndarray, Any]] = [
                (array, found.tensors["model"][name]) for name, array in self.tensors.items()
            ]
            products = list(self._mu_products)
            for group, named in self.document.checkpoint["groups"].items():
                for name, ref in named.items():
                    saved: Any = found.tensors[group][name]
                    if "tensor" in ref:
                        pairs.append((self._memory.arrays[ref["tensor"]], saved))
                    elif "mu_product" in ref:
                        products[ref["mu_product"]] = float(saved)
            for array, saved in pairs:
                if (array.shape, array.dtype) != (saved.shape, saved.dtype):
                    raise CheckpointError("a checkpoint must be of the same model", got=found.path)
            state = RunState.from_dict(dict(found.document["run"]))
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{found.path} must be of this export", got=f"{type(error).__name__}: {error}"
            ) from None
        for array, saved in pairs:
            array[...] = saved
        self.state, self._mu_products = state, products


def load_training(folder: str | Path, *, num_threads: int | None = None) -> TrainingExport:
    """A training run from a folder of ``hotloop export --training``. Imports no torch.

    Args:
        num_threads: inside each kernel; ``None``: as exported, but no more than usable CPUs.

    Raises:
        ModelError: missing, damaged, or of another version of hotloop.
        RunError: there are no kernels here.
    """
    folder = Path(folder)
    found = documents.read(folder)
    usable = len(os.sched_getaffinity(0))
    threads = max(1, min(num_threads or found.num_threads, usable))
    return TrainingExport(dataclasses.replace(found, num_threads=threads), folder, threads)
