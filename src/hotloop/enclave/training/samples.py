"""Data of a file as NumPy arrays, and batches of it in the order of ``Trainer.fit``. No torch.

Values are those of ``data.pack`` and ``data.transforms.Normalize``, bit for bit; the order is that
of ``data.sampler``, whose ``torch.randperm`` is made here by Python's own MT19937.
"""

from __future__ import annotations

import ctypes
import os
import random
from pathlib import Path
from typing import Any

import numpy

from ... import kernels
from ...data.hashing import mix
from ...data.idx import IdxSource, find_idx_pair
from ...data.npz import NpzSource
from ...errors import DataError
from ...kernels import binding
from .document import Spec

Normalize = tuple[tuple[float, ...], tuple[float, ...]]
# Mean and deviation of MNIST's training images over 255: what ``"mnist"`` is normalized by.
MNIST: Normalize = (0.1307,), (0.3081,)
_DATA_VARIABLE = "HOTLOOP_DATA"
_SEEDS = 0xFFFFFFFF
RANDOM_STATE_BYTES = 5056


def order(num_samples: int, seed: int, epoch: int) -> numpy.ndarray:
    """int64 ``[num_samples]``: the positions of ``GlobalSampler.order`` of this seed and epoch.

    ``torch.randperm`` below 2**32 / 20 samples: each place in turn is exchanged with one of those
    from it on, drawn as a word of MT19937 modulo their number.
    """
    draw = _words(mix(seed, epoch) >> 1)
    positions = list(range(num_samples))
    for at in range(num_samples - 1):
        other = at + draw(32) % (num_samples - at)
        positions[at], positions[other] = positions[other], positions[at]
    return numpy.array(positions, dtype=numpy.int64)


def _words(seed: int) -> Any:
    """Words of MT19937 as torch seeds it, by the generator of Python."""
    generator = random.Random()
    generator.setstate((3, (*_seeded(seed), 624), None))
    return generator.getrandbits


def _seeded(seed: int) -> list[int]:
    """The state of MT19937 after "init_genrand" of its authors."""
    words = [seed & _SEEDS]
    for number in range(1, 624):
        before = words[-1]
        words.append((1812433253 * (before ^ before >> 30) + number) & _SEEDS)
    return words


def random_state(seed: int) -> numpy.ndarray:
    """uint8 ``[5056]``: what ``torch.Generator.get_state`` gives after ``manual_seed(seed)``.

    The seed; words left before the next ones are made, and whether it was seeded; the place of the
    next word; 624 words of 8 bytes; what is kept of normal numbers: nothing.
    """
    state = numpy.zeros(RANDOM_STATE_BYTES, numpy.uint8)
    state[:8].view(numpy.uint64)[0] = seed
    state[8:16].view(numpy.int32)[:] = 1, 1
    state[24 : 24 + 8 * 624].view(numpy.uint64)[:] = _seeded(seed)
    return state


class Samples:
    """All samples in memory as they are stored, and what they become in a batch.

    Args:
        x, y: ``[N, ...]``; values are converted as ``Trainer.fit`` does.
        normalize: means and deviations of the channels, or ``None``.
        description: for messages.

    Raises:
        DataError: not numbers, not as many targets as samples, NaN or infinite.
    """

    def __init__(
        self, x: Any, y: Any, normalize: Normalize | None = None, description: str = "arrays"
    ) -> None:
        scale = 1.0 if x.dtype.kind == "b" else 1 / 255
        self.x, self.y = _stored(x, "samples"), _stored(y, "targets")
        if self.y.dtype == numpy.uint8:
            self.y = self.y.astype(numpy.int64)
        if len(self.x) != len(self.y) or not len(self.x):
            raise DataError("there must be a target for each sample", got=f"{len(x)} and {len(y)}")
        self.description = description
        self._table: numpy.ndarray | None = None
        self._terms: tuple[numpy.ndarray, numpy.ndarray] | None = None
        if self.x.dtype == numpy.uint8:
            self._table = _byte_table(scale, normalize)
            self._area = int(numpy.prod(self.x.shape[1:], dtype=numpy.int64))
            if self._area % len(self._table):
                raise DataError("normalize must have as many means as there are channels")
        elif normalize is not None:
            factor, offset = _factor_and_offset(1.0, normalize)
            shape = (-1, *[1] * (self.x.ndim - 2)) if len(factor) > 1 else ()
            self._terms = factor.reshape(shape), offset.reshape(shape)

    def __len__(self) -> int:
        return len(self.x)

    def check(self, x: Spec, y: Spec) -> None:
        """Whether a program takes them.

        Raises:
            DataError: another shape or dtype.
        """
        dtype = "float32" if self._table is not None else self.x.dtype.name
        for what, found, shape, wanted in (
            ("samples", dtype, self.x.shape[1:], x),
            ("targets", self.y.dtype.name, self.y.shape[1:], y),
        ):
            if (found, shape) != (wanted.dtype, wanted.shape):
                raise DataError(
                    f"{what} must be {wanted.dtype} {list(wanted.shape)}, as exported",
                    got=f"{found} {list(shape)} in {self.description}",
                )

    def put(self, indices: numpy.ndarray, part: int, out: numpy.ndarray) -> None:
        """Write samples (part 0) or targets (part 1) to the first rows of ``out``."""
        count = len(indices)
        if part == 1:
            out[:count] = self.y[indices]
        elif self._table is not None:
            rows = out[:count]
            if rows.flags.c_contiguous:
                self._look_up(indices, rows)
            else:
                dense = numpy.empty(rows.shape, numpy.float32)
                self._look_up(indices, dense)
                rows[...] = dense
        elif self._terms is not None:
            out[:count] = self.x[indices] * self._terms[0] + self._terms[1]
        else:
            out[:count] = self.x[indices]

    def _look_up(self, indices: numpy.ndarray, out: numpy.ndarray) -> None:
        assert self._table is not None
        copy = binding.RowCopy(
            rows=self.x.ctypes.data, fd=-1, num_rows=len(self.x), row_bytes=self._area,
            indices=indices.ctypes.data, count=len(indices), out=out.ctypes.data,
            out_step_bytes=4 * self._area, table=self._table.ctypes.data,
            channels=len(self._table), num_threads=1, bad_index=-1, file_error=0,
        )  # fmt: skip
        kernels.call("hotloop_copy_rows", ctypes.addressof(copy))


def open_samples(data: str | Path, split: str, normalize: Normalize | None) -> Samples:
    """Samples of a file or folder.

    Args:
        data: ``"mnist"`` (the IDX files in the folder that ``HOTLOOP_DATA`` names, else the
            digits of the package), an ``.npz`` file, or a folder of IDX files.
        split: ``"train"`` or ``"test"``.

    Raises:
        DataError: missing, damaged, or of another kind.
    """
    source: Any
    if str(data) == "mnist":
        source = IdxSource(*_mnist(split), num_classes=10)
        normalize = normalize or MNIST
    elif Path(data).is_dir():
        pair = find_idx_pair(Path(data), split)
        if pair is None:
            raise DataError(f"{data} must hold the IDX files of the {split} split")
        source = IdxSource(*pair)
    elif Path(data).suffix == ".npz":
        source = NpzSource(Path(data), split=split)
    else:
        raise DataError("data must be mnist, an .npz file or a folder of IDX files", got=str(data))
    return Samples(*_read(source), normalize, source.description)


def _mnist(split: str) -> tuple[Path, Path]:
    shipped = Path(__file__).parents[2] / "data" / "digits"
    named = os.environ.get(_DATA_VARIABLE)
    for folder in (*([Path(named), Path(named) / "mnist"] if named else []), shipped):
        pair = find_idx_pair(folder, split) if folder.is_dir() else None
        if pair is not None:
            return pair
    raise DataError("the digits must be there", got=str(shipped))


def _read(source: Any) -> tuple[numpy.ndarray, numpy.ndarray]:
    """All rows, chunk by chunk: no second copy of them."""
    x, y = (
        numpy.empty((source.num_samples, *spec.shape), _stored_dtype(spec.dtype))
        for spec in (source.x, source.y)
    )
    start = 0
    for x_rows, y_rows in source.chunks():
        end = start + len(x_rows)
        if end > len(x):
            raise DataError(f"{source.description} must yield {len(x)} samples")
        x[start:end] = _stored(x_rows, "samples")
        y[start:end] = _stored(y_rows, "targets")
        start = end
    if start < len(x):
        raise DataError(f"{source.description} must yield {len(x)} samples", got=start)
    if source.x.dtype.kind == "b":
        x = x.view(numpy.bool_)
    return x, y


def _stored_dtype(dtype: Any) -> Any:
    if dtype.kind == "f":
        return numpy.dtype(numpy.float32)
    if dtype.kind == "b" or dtype == numpy.uint8:
        return numpy.dtype(numpy.uint8)
    if dtype.kind in "iu":
        return numpy.dtype(numpy.int64)
    raise DataError("samples and targets must be real numbers", got=f"{dtype} values")


def _stored(rows: Any, what: str) -> numpy.ndarray:
    """Rows in the type in which they are kept, dense."""
    wanted = _stored_dtype(rows.dtype)
    with numpy.errstate(over="ignore"):
        values: numpy.ndarray = numpy.ascontiguousarray(rows, dtype=wanted)
    if wanted == numpy.float32 and not numpy.isfinite(values).all():
        raise DataError(f"{what} must be finite float32 numbers")
    return values


def _factor_and_offset(scale: float, normalize: Normalize) -> tuple[numpy.ndarray, numpy.ndarray]:
    mean, std = (numpy.array(row, dtype=numpy.float64) for row in normalize)
    return (scale / std).astype(numpy.float32), (-mean / std).astype(numpy.float32)


def _byte_table(scale: float, normalize: Normalize | None) -> numpy.ndarray:
    """float32 ``[channels, 256]``: what a byte stands for; each operation rounded by itself."""
    values = numpy.arange(256, dtype=numpy.float32)
    if normalize is None:
        return (values / numpy.float32(round(1 / scale)))[None]
    factor, offset = _factor_and_offset(scale, normalize)
    return numpy.ascontiguousarray(values * factor[:, None] + offset[:, None])
