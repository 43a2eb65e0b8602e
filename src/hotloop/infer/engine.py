"""``Engine``: what every backend of inference looks like to runner and server. Imports no torch."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import DataError, InputError, MissingExtraError, ModelError, RunError
from ..files import unicode_name

if TYPE_CHECKING:
    import numpy


def dtype_name(array: Any) -> str:
    """Numpy's name for the dtype of an array or a tensor, such as ``"float32"``."""
    return str(array.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of an engine.

    Attributes:
        name: as the model calls it.
        dtype: numpy's name, such as ``"float32"``.
        shape: ``None`` where any size goes; where there is one, the batch comes first.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    @property
    def is_batched(self) -> bool:
        """Whether the first size is that of the batch."""
        return bool(self.shape) and self.shape[0] is None

    def fits(self, array: Any) -> bool:
        """Whether an array or a tensor can be given."""
        alike = dtype_name(array) == self.dtype and len(array.shape) == len(self.shape)
        sizes = zip(self.shape, array.shape, strict=False)
        return alike and all(want is None or want == got for want, got in sizes)

    def text(self) -> str:
        """``x float32 [batch, 1, 28, 28]``."""
        sizes = ["any" if size is None else str(size) for size in self.shape]
        if self.is_batched:
            sizes[0] = "batch"
        return f"{self.name} {self.dtype} [{', '.join(sizes)}]"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> TensorSpec:
        """What ``to_dict`` gave."""
        return cls(str(document["name"]), str(document["dtype"]), tuple(document["shape"]))


class Engine(Protocol):
    """A model ready to answer.

    Attributes:
        name: ``"hotloop"``, ``"eager"``, ``"inductor"``, ``"onnxruntime"``, ``"openvino"``.
        precision: ``"float32"``, ``"bfloat16"`` or ``"int8"``: of the arithmetic inside; what goes
            in and comes out keeps the dtypes of ``inputs`` and ``outputs``.
        inputs, outputs: in the order of ``run``.
        num_threads: threads inside one call.
        num_instances: calls that may usefully run at the same time. They share the weights.
    """

    name: str
    precision: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    num_threads: int
    num_instances: int

    def run(self, arrays: Sequence[numpy.ndarray]) -> list[numpy.ndarray]:
        """One call. Up to ``num_instances`` threads may call at once.

        Raises:
            DataError: number, dtype or shape of the arrays is not that of ``inputs``.
            RunError: the engine failed.
        """
        ...

    def close(self) -> None:
        """Give memory and threads back; no call may follow."""
        ...


def check_arrays(inputs: Sequence[TensorSpec], arrays: Sequence[Any]) -> None:
    """Whether arrays or tensors can be given to an engine with these inputs.

    Raises:
        DataError: names the first that cannot.
    """
    if len(arrays) != len(inputs):
        raise DataError(
            f"the model takes {len(inputs)} inputs: {'; '.join(s.text() for s in inputs)}",
            got=f"{len(arrays)} arrays",
        )
    for spec, array in zip(inputs, arrays, strict=True):
        if not spec.fits(array):
            got = f"{dtype_name(array)} {list(array.shape)}"
            raise DataError(f"the input must be {spec.text()}", got=got)


def first_line(error: Exception) -> str:
    """Of a message that may have many; the error's type where there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def not_on_cpu(device: Any) -> InputError:
    """A tensor is elsewhere."""
    return InputError(
        "the model is on the CPU, so must its input be", got=device, next_step="pass x.cpu()"
    )


def import_library(name: str, purpose: str, extra: str) -> Any:
    """The module of an engine's library.

    Raises:
        MissingExtraError: it is not installed. RunError: it is, and cannot be loaded here.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(purpose, name, extra) from error
    except Exception as error:  # OpenVINO asks for a home folder, which some containers lack.
        raise RunError(
            f"{name} is installed and cannot be loaded", got=first_line(error),
            next_step="set HOME to a folder, or leave this engine out",
        ) from error  # fmt: skip


def utf8_path(path: str | Path) -> str:
    """A path for libraries that take names in UTF-8, whatever the locale of the process is.

    Raises:
        ModelError: the bytes of the name are no UTF-8.
    """
    name = unicode_name(path)
    if "\ufffd" in name:
        raise ModelError(
            "the path of a model must be UTF-8 for this engine", got=repr(os.fsencode(path)),
            next_step="rename the file or its folder",
        )  # fmt: skip
    return name
