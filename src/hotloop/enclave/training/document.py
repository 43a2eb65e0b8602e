"""The document of a training export: a closed schema, checked as it is read. No torch.

``training.json`` names everything by number: tensors (``Tensor``), programs (``ProgramText``) whose
instructions say where in which space their operands lie (space 0 is the arena, space n + 1 tensor
n), and what a checkpoint holds beside weights. Its last field is the sha256 of the rest, and it has
that of each file beside it: any damage shows. That is no signature: seal the folder where somebody
may want to change it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ModelError
from ...kernels import binding
from ...kernels.extents import LARGEST_SIZE, Refused, span
from ...kernels.update_scalars import STATES
from .instructions import closed

FORMAT, VERSION = "hotloop training", 1
DOCUMENT = "training.json"
MODEL_FILE, CONSTANTS_FILE = "model.safetensors", "constants.safetensors"
CHECKPOINT_FILE = "checkpoint.safetensors"
FILES = (MODEL_FILE, CONSTANTS_FILE, CHECKPOINT_FILE)
_MAX_BYTES = 64 * 1024**2
_READ_BYTES = 4 * 1024**2
KINDS = ("weight", "frozen", "buffer", "state", "random", "constant")
DTYPES = ("float32", "int64", "uint8", "float64", "int32", "bool")
_MOST_BYTES = 2**40


@dataclass(frozen=True)
class Tensor:
    """One tensor of an export.

    Attributes:
        kind: of ``KINDS``; ``"random"``: the state of torch's generator.
        names: in the model's ``state_dict``, several where weights are tied; of a constant one.
        dtype: NumPy's name. shape, strides: strides in elements.
        initial: of a state: what it is filled with before the first step.
    """

    kind: str
    names: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    initial: float

    @property
    def count(self) -> int:
        """Elements from the first to the last."""
        return span(self.shape, self.strides)


@dataclass(frozen=True)
class Spec:
    """Shape and NumPy's dtype of one sample, or one target."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Laid:
    """A tensor that a program reads or gives: where it lies, and its shape and strides."""

    place: Any
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class ProgramText:
    """A program before it is bound to memory.

    Attributes:
        kind: ``"train"`` or ``"evaluate"``. batch_size: the samples it takes.
        parts: of the batch (0 x, 1 y) -> where it goes, in the order of the graph.
        loss: one float32. answer: of an evaluation: what the model gives.
        instructions: still values, see ``instructions.Reader``.
    """

    kind: str
    batch_size: int
    arena_bytes: int
    parts: tuple[tuple[int, Laid], ...]
    loss: Laid
    answer: Laid | None
    instructions: tuple[Any, ...]


@dataclass(frozen=True)
class Document:
    """What ``training.json`` says; ``docs/training-without-torch.md`` has it in words."""

    num_threads: int
    batch_size: int
    x: Spec
    y: Spec
    normalize: tuple[tuple[float, ...], tuple[float, ...]] | None
    loss_kind: str
    optimizer: str
    groups: tuple[dict[str, Any], ...]
    interval: str
    rates: tuple[tuple[float, ...], ...]
    tensors: tuple[Tensor, ...]
    programs: tuple[ProgramText, ...]
    checkpoint: dict[str, Any]
    files: Mapping[str, tuple[int, str]]

    @property
    def num_states(self) -> list[int]:
        """States that an update has, by parameter group."""
        if self.optimizer == "SGD":
            return [int(group["momentum"] != 0) for group in self.groups]
        return [len(STATES[self.optimizer])] * len(self.groups)


def read(folder: Path) -> Document:
    """The document of an export, and whether its files are whole.

    Raises:
        ModelError: missing, damaged, of another version of hotloop, or not of this schema.
    """
    try:
        path = folder / DOCUMENT
        if path.stat().st_size > _MAX_BYTES:
            raise Refused(f"a document of more than {_MAX_BYTES >> 20} MiB")
        data = path.read_bytes()
        body = json.loads(data, parse_constant=_no_constant)
        if type(body) is not dict or body.get("format") != FORMAT:
            raise Refused(f"{DOCUMENT} is not that of a training export")
        if body.get("version") != VERSION or body.get("binding") != binding.binding_hash():
            raise ModelError(
                "a training export runs with the version of hotloop that wrote it",
                got=str(folder), next_step="export the model again with this one",
            )  # fmt: skip
        if to_bytes(body) != data:
            raise Refused(f"{DOCUMENT} does not match its sha256")
        document = _document(body)
        for name, (size_bytes, digest) in document.files.items():
            if _size_and_hash(folder / name) != (size_bytes, digest):
                raise Refused(f"{name} does not match its sha256")
    except OSError as error:
        raise _damaged(folder, f"{error.filename}: {error.strerror}") from None
    except (Refused, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise _damaged(folder, str(error) or type(error).__name__) from None
    return document


def to_bytes(body: Mapping[str, Any]) -> bytes:
    """The one text of a document, with the sha256 of the rest of it at the end."""
    rest = {name: value for name, value in body.items() if name != "sha256"}
    digest = hashlib.sha256(_text(rest)).hexdigest()
    return _text(rest | {"sha256": digest})


def file_record(path: Path) -> list[Any]:
    """Bytes and sha256 of a file, as ``files`` has them."""
    return list(_size_and_hash(path))


def _text(body: Mapping[str, Any]) -> bytes:
    return (json.dumps(body, allow_nan=False, separators=(",", ":")) + "\n").encode()


def _size_and_hash(path: Path) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while data := file.read(_READ_BYTES):
            digest.update(data)
            size += len(data)
    return size, digest.hexdigest()


def _damaged(folder: Path, got: str) -> ModelError:
    return ModelError(
        f"{folder} must be a whole training export", got=got, next_step="export the model again"
    )


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


_FIELDS = {
    "format", "version", "binding", "num_threads", "batch_size", "x", "y", "normalize", "loss_kind",
    "optimizer", "schedule", "tensors", "programs", "checkpoint", "files", "sha256",
}  # fmt: skip


def _document(body: dict[str, Any]) -> Document:
    fields = closed(body, _FIELDS)
    optimizer = closed(fields["optimizer"], {"name", "groups"})
    if optimizer["name"] not in STATES or not 1 <= len(_list(optimizer["groups"])) <= 4096:
        raise Refused("the optimizer must be one whose rule hotloop has")
    groups = tuple(_group(group) for group in optimizer["groups"])
    schedule = closed(fields["schedule"], {"interval", "rates"})
    if schedule["interval"] not in ("step", "epoch"):
        raise Refused("a schedule is one of steps or epochs")
    rates = tuple(_rates(row, len(groups)) for row in _list(schedule["rates"]))
    tensors = tuple(_tensor(value) for value in _list(fields["tensors"]))
    programs = tuple(_program(value) for value in _list(fields["programs"]))
    if not any(p.kind == "train" for p in programs):
        raise Refused("there must be a program that trains")
    files = {}
    for name, record in closed(fields["files"], set(FILES)).items():
        size_bytes, digest = record
        files[name] = _whole(size_bytes), _words(digest)
    if fields["loss_kind"] not in ("mean", "sum", "labels", "unknown"):
        raise Refused("the loss must be of a known kind")
    return Document(
        num_threads=_size(fields["num_threads"]),
        batch_size=_size(fields["batch_size"]),
        x=_spec(fields["x"]),
        y=_spec(fields["y"]),
        normalize=_normalize(fields["normalize"]),
        loss_kind=fields["loss_kind"],
        optimizer=optimizer["name"],
        groups=groups,
        interval=schedule["interval"],
        rates=rates,
        tensors=tensors,
        programs=programs,
        checkpoint=_checkpoint(fields["checkpoint"], len(tensors), len(groups)),
        files=files,
    )


# Numbers and switches of the rules of ``kernels.update_scalars``.
_GROUP_NUMBERS = {
    "lr", "eps", "weight_decay", "momentum", "dampening", "alpha", "rho", "lr_decay",
    "momentum_decay",
}  # fmt: skip
_GROUP_SWITCHES = {"nesterov", "decoupled_weight_decay"}
GROUP_FIELDS = _GROUP_NUMBERS | _GROUP_SWITCHES | {"betas"}


def _group(value: Any) -> dict[str, Any]:
    if type(value) is not dict or not set(value) <= GROUP_FIELDS:
        raise Refused("a parameter group has numbers of its rule alone")
    for name, number in value.items():
        if name == "betas":
            if len(_list(number)) != 2 or not all(map(_is_finite, number)):
                raise Refused("betas are two numbers")
            if not all(0 <= beta < 1 for beta in number):
                raise Refused("betas are from 0 to 1")
        elif name in _GROUP_SWITCHES:
            if type(number) is not bool:
                raise Refused(f"{name} must be true or false")
        elif not _is_finite(number):
            raise Refused(f"{name} must be a number")
    return value


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _rates(row: Any, groups: int) -> tuple[float, ...]:
    if len(_list(row)) != groups or not all(map(_is_finite, row)):
        raise Refused("a schedule has a rate for each parameter group")
    return tuple(row)


def _tensor(value: Any) -> Tensor:
    fields = closed(value, {"kind", "names", "dtype", "shape", "strides", "initial"})
    if fields["kind"] not in KINDS or fields["dtype"] not in DTYPES:
        raise Refused("a tensor must be of a known kind and dtype")
    if not _is_finite(fields["initial"]):
        raise Refused("a state begins with a number")
    shape, strides = _layout(fields)
    names = tuple(_words(name) for name in _list(fields["names"]))
    if not names:
        raise Refused("a tensor must have a name")
    return Tensor(fields["kind"], names, fields["dtype"], shape, strides, fields["initial"])


def _layout(fields: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    shape, strides = (tuple(_list(fields[name])) for name in ("shape", "strides"))
    if len(shape) != len(strides) or len(shape) > 16:
        raise Refused("a tensor has as many strides as sizes")
    if any(type(n) is not int or not 1 <= n < LARGEST_SIZE for n in shape):
        raise Refused("sizes must be at least 1")
    if any(type(n) is not int or not 0 <= n < _MOST_BYTES for n in strides):
        raise Refused("strides must be at least 0")
    if span(shape, strides) > _MOST_BYTES or math.prod(shape) > span(shape, strides):
        raise Refused("the elements of a tensor must not overlap")
    return shape, strides


def _spec(value: Any) -> Spec:
    fields = closed(value, {"shape", "dtype"})
    shape = tuple(_list(fields["shape"]))
    if fields["dtype"] not in DTYPES or any(type(n) is not int or n < 1 for n in shape):
        raise Refused("a sample must have sizes and a known dtype")
    return Spec(shape, fields["dtype"])


def _laid(value: Any) -> Laid:
    fields = closed(value, {"place", "dtype", "shape", "strides"})
    if fields["dtype"] not in DTYPES:
        raise Refused("a tensor must be of a known dtype")
    return Laid(fields["place"], fields["dtype"], *_layout(fields))


def _program(value: Any) -> ProgramText:
    names = {"kind", "batch_size", "arena_bytes", "parts", "loss", "answer", "instructions"}
    fields = closed(value, names)
    if fields["kind"] not in ("train", "evaluate"):
        raise Refused("a program trains or evaluates")
    parts = []
    for row in _list(fields["parts"]):
        part = closed(row, {"part", "at"})
        if type(part["part"]) is not int or part["part"] not in (0, 1):
            raise Refused("a batch has two parts")
        parts.append((part["part"], _laid(part["at"])))
    loss = _laid(fields["loss"])
    if loss.shape != () or loss.dtype != "float32":
        raise Refused("a loss must be one float")
    arena_bytes = fields["arena_bytes"]
    if type(arena_bytes) is not int or not 0 <= arena_bytes < _MOST_BYTES:
        raise Refused("an arena must have a size")
    return ProgramText(
        kind=fields["kind"],
        batch_size=_size(fields["batch_size"]),
        arena_bytes=arena_bytes,
        parts=tuple(parts),
        loss=loss,
        answer=None if fields["answer"] is None else _laid(fields["answer"]),
        instructions=tuple(_list(fields["instructions"])),
    )


def _normalize(value: Any) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    if value is None:
        return None
    means, stds = (tuple(_list(row)) for row in _list(value))
    if len(means) != len(stds) or not means or not all(map(_is_finite, (*means, *stds))):
        raise Refused("a normalization has as many deviations as means")
    if min(stds) <= 0:
        raise Refused("deviations must be above 0")
    return means, stds


def _checkpoint(value: Any, num_tensors: int, num_groups: int) -> dict[str, Any]:
    """The document of checkpoints, and where the tensors of each group are."""
    fields = closed(value, {"document", "groups"})
    if type(fields["document"]) is not dict or type(fields["groups"]) is not dict:
        raise Refused("a checkpoint has a document and groups")
    for named in fields["groups"].values():
        if type(named) is not dict:
            raise Refused("a group of a checkpoint names its tensors")
        for source in named.values():
            (kind,) = source
            number = source[kind]
            if kind == "file":
                _words(number)
            elif kind not in ("tensor", "steps", "mu_product") or type(number) is not int:
                raise Refused("a tensor of a checkpoint must be known")
            elif not 0 <= number < (num_tensors if kind == "tensor" else num_groups):
                raise Refused("a tensor of a checkpoint must be there")
    return fields


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise Refused("a list must be one")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise Refused("a number of bytes must be one")
    return value


def _size(value: Any) -> int:
    if type(value) is not int or not 1 <= value < LARGEST_SIZE:
        raise Refused("a size must be at least 1")
    return value


def _words(value: Any) -> str:
    if type(value) is not str or not value:
        raise Refused("a name must be a text")
    return value
