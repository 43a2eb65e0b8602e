"""Data sets whose samples are rows of tensors: a batch by one look-up instead of sample by sample.

Recognised are ``TensorDataset``, torchvision's image sets under a transform that begins with
``ToTensor`` and ``Normalize``, a class whose ``__getitem__`` is straight arithmetic on its tensors
(``straight.py``), and ``Subset`` of these. Each is compared to the last bit with the slow way on
some samples before it is used; what a script may notice, such as a transform that draws, is not
called for that.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Subset, TensorDataset, default_collate

from . import straight
from .row_index import index_of, is_plain

# Gives the batch of these samples as default_collate would; None: only the slow way can.
Read = Callable[[Sequence[int]], Any]
_CHECKED = 8
# torchvision's sets that keep bytes ``data`` and numbers ``targets``, and read them alike.
_IMAGE_SETS = ("MNIST", "CIFAR10")


@dataclass(frozen=True)
class Reader:
    """A way to read batches.

    Attributes:
        read: see ``Read``. is_pure: it calls nothing of the script, so a sample can be read twice.
    """

    read: Read
    is_pure: bool = True


def reader_of(dataset: Any) -> Read | None:
    """The reader of a data set, checked on samples; ``None``: it is not recognised."""
    reader = _reader(dataset)
    if reader is None or not len(dataset):
        return None
    if reader.is_pure:
        places = _some(len(dataset))
        slow = default_collate([dataset[place] for place in places])
        if not is_same(reader.read(places), slow):
            return None
    return reader.read


def _some(count: int) -> list[int]:
    """Places spread over so many samples, the first and the last among them."""
    return sorted({(count - 1) * k // (_CHECKED - 1) for k in range(_CHECKED)})


def is_same(a: Any, b: Any) -> bool:
    """Whether two batches are of the same types, shapes, strides and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(is_same, a, b))
    if type(a) is not torch.Tensor:
        return False
    if (a.dtype, a.shape, a.stride(), a.device) != (b.dtype, b.shape, b.stride(), b.device):
        return False
    flat = [t.contiguous().reshape(-1).view(torch.uint8) if t.numel() else t for t in (a, b)]
    return not a.requires_grad and not b.requires_grad and torch.equal(*flat)


def _reader(dataset: Any) -> Reader | None:
    kind: Any = type(dataset)
    if kind.__getattribute__ is not object.__getattribute__:
        return None
    if kind.__getitem__ is Subset.__getitem__:
        return _subset_reader(dataset)
    if getattr(dataset, "__getitems__", None):
        return None
    if kind.__getitem__ is TensorDataset.__getitem__:
        return Reader(lambda places: _tensors(dataset, places))
    if _is_torchvisions(kind.__getitem__, "datasets"):
        return _image_reader(dataset)
    read = straight.reader_of(dataset)
    return None if read is None else Reader(read)


def _subset_reader(dataset: Any) -> Reader | None:
    if type(dataset).__getitems__ is not Subset.__getitems__:
        return None
    inner = dataset.dataset
    below = _reader(inner)
    if below is None:
        return None

    def read(places: Sequence[int]) -> Any:
        if dataset.dataset is not inner:
            return None
        return below.read([dataset.indices[place] for place in places])

    return Reader(read, below.is_pure)


def _tensors(dataset: Any, places: Sequence[int]) -> Any:
    tensors = dataset.tensors
    if not all(map(is_plain, tensors)):
        return None
    index = index_of(places, min((len(t) for t in tensors), default=0))
    return None if index is None else [t.index_select(0, index) for t in tensors]


def _is_torchvisions(found: Any, part: str) -> bool:
    return str(getattr(found, "__module__", "")).startswith(f"torchvision.{part}.")


def _image_reader(dataset: Any) -> Reader | None:
    """Images of bytes and class numbers; what follows ``Normalize`` is called image by image."""
    if type(dataset).__getitem__.__qualname__ not in [f"{n}.__getitem__" for n in _IMAGE_SETS]:
        return None
    parts = dataset.data, dataset.targets, dataset.transform
    data, targets, transform = parts
    images = torch.as_tensor(data)
    if images.dtype != torch.uint8 or images.dim() not in (3, 4) or not is_plain(images):
        return None
    images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)
    if transform is None or not _steps(transform):
        return None
    exact, rest = _split(_steps(transform))
    settings = _settings(exact)
    table = _table(exact, images.shape[1])
    if table is None or not _is_same_as_slow(images, table, exact):
        return None

    def read(places: Sequence[int]) -> Any:
        found = dataset.data, dataset.targets, dataset.transform
        if any(a is not b for a, b in zip(found, parts, strict=True)):
            return None
        now = _split(_steps(transform))
        if now != (exact, rest) or _settings(exact) != settings:
            return None
        index = index_of(places, min(len(images), len(targets)))
        if index is None or dataset.target_transform is not None:
            return None
        x: Any = _looked_up(images, index, table)
        if rest:
            x = default_collate([_apply(rest, image) for image in x.unbind()])
        if isinstance(targets, torch.Tensor):
            y = targets.index_select(0, index).to(torch.int64)
        else:
            y = torch.tensor([int(targets[place]) for place in places])
        return [x, y]

    return Reader(read, is_pure=not rest)


def _looked_up(images: torch.Tensor, index: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    from ..data.rows import look_up  # Only where there are such images: it costs to import.

    return look_up(images.index_select(0, index).contiguous(), table)


def _is_same_as_slow(images: torch.Tensor, table: torch.Tensor, exact: list[Any]) -> bool:
    places = _some(len(images))
    slow = [_apply(exact, images[place].permute(1, 2, 0).numpy()) for place in places]
    return is_same(_looked_up(images, torch.tensor(places), table), torch.stack(slow))


def _steps(transform: Any) -> list[Any]:
    """What a transform does in turn: of a ``Compose``, else the transform itself."""
    if _is_torchvisions(type(transform), "transforms") and type(transform).__name__ == "Compose":
        return list(transform.transforms)
    return [transform]


def _split(steps: list[Any]) -> tuple[list[Any], list[Any]]:
    """``ToTensor`` and each ``Normalize`` after it, and the rest; nothing where there is none."""
    names = [
        type(step).__name__ if _is_torchvisions(type(step), "transforms") else "" for step in steps
    ]
    if names[:1] != ["ToTensor"]:
        return [], steps
    count = 1 + sum(1 for _ in itertools.takewhile("Normalize".__eq__, names[1:]))
    return steps[:count], steps[count:]


def _settings(steps: list[Any]) -> list[str]:
    parts = [sorted(vars(step).items()) for step in steps if type(step).__name__ != "ToTensor"]
    return [repr(part) for part in (torch.get_default_dtype(), *parts)]


def _table(steps: list[Any], channels: int) -> torch.Tensor | None:
    """What each byte of each channel becomes, by the script's own transforms: the same bits."""
    if not steps:
        return None
    ramp = torch.arange(256, dtype=torch.uint8).view(16, 16, 1).expand(16, 16, channels)
    table = _apply(steps, ramp.contiguous().numpy())
    if table.dtype != torch.float32 or math.prod(table.shape) != channels * 256:
        return None
    made: torch.Tensor = table.reshape(channels, 256).contiguous()
    return made


def _apply(steps: list[Any], value: Any) -> Any:
    for step in steps:
        value = step(value)
    return value
