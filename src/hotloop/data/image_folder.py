"""A folder of images for each class (needs Pillow, the extra ``images``)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, MissingExtraError
from .source import Array, ArraySpec, Chunk, chunk_rows

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_SPLITS = {"train": ("train", "training"), "test": ("test", "val", "valid", "validation")}
_GREY, _COLOUR = ("1", "L", "LA"), ("RGB", "RGBA", "P", "CMYK", "YCbCr", "PA")


@dataclass(frozen=True)
class ClassFolders:
    """The images of a folder, by class.

    Attributes:
        root: the folder. names: of the classes, sorted; a class's number is its place.
        images: each image and the number of its class, class after class, sorted.
    """

    root: Path
    names: tuple[str, ...]
    images: tuple[tuple[Path, int], ...]


def find_classes(folder: Path, split: str) -> ClassFolders | None:
    """The classes of a folder, or of its part for a split; ``None``: it has none.

    Args:
        folder: with a folder for each class, or with such folders in ``train`` and ``test``
            (``val``, ``valid``).
    """
    marked = {part: names for part, names in _SPLITS.items() if _child(folder, names)}
    if marked:
        found = _child(folder, _SPLITS[split])
        return None if found is None else _classes_of(found)
    return _classes_of(folder)


def _child(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def _classes_of(folder: Path) -> ClassFolders | None:
    found = []
    for path in sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] != "."):
        files = (p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
        images = sorted(files)
        if images:
            found.append((path.name, images))
    if not found:
        return None
    numbered = ((image, number) for number, (_, images) in enumerate(found) for image in images)
    return ClassFolders(folder, tuple(name for name, _ in found), tuple(numbered))


class ImageFolderSource:
    """Images as bytes ``[C, H, W]`` and the numbers of their classes; see ``SampleSource``.

    All become grey if the first is grey, else colour.

    Args:
        classes: what ``find_classes`` found.
        image_size: height and width that they are resized to (bilinear, smoothed where they
            shrink); default: all must have the size of the first.

    Raises:
        MissingExtraError: Pillow is not installed.
        DataError: the first image cannot be read.
    """

    def __init__(self, classes: ClassFolders, *, image_size: tuple[int, int] | None = None) -> None:
        try:
            from PIL import Image
        except ImportError:
            raise MissingExtraError("reading images", "pillow", "images") from None
        self._image_module: Any = Image
        self._images = classes.images
        self.num_samples = len(self._images)
        self._size = image_size
        first = self._open(self._images[0][0], None)
        self._mode = "L" if first.mode in _GREY else "RGB"
        height, width = image_size or (first.height, first.width)
        self._size = (height, width)
        self._resizes = image_size is not None
        self.x = ArraySpec((1 if self._mode == "L" else 3, height, width), np.dtype(np.uint8))
        self.y = ArraySpec((), np.dtype(np.int64))
        self.description = (
            f"{self.num_samples:,} images of {len(classes.names)} classes in {classes.root}"
        )

    def chunks(self) -> Iterator[Chunk]:
        """Images in turn; see ``SampleSource``."""
        rows = chunk_rows(self.x, self.y)
        for start in range(0, self.num_samples, rows):
            part = self._images[start : start + rows]
            x = np.stack([self._read(path) for path, _ in part])
            yield x, np.array([number for _, number in part], np.int64)

    def _read(self, path: Path) -> Array:
        image = self._open(path, self._mode)
        assert self._size is not None
        height, width = self._size
        if (image.height, image.width) != self._size:
            if not self._resizes:
                raise DataError(
                    f"all images must have one size, as the first of {height} x {width}",
                    got=f"{image.height} x {image.width} in {path}",
                    next_step="pass image_size=(height, width), or --image-size",
                )
            bilinear = self._image_module.Resampling.BILINEAR
            image = image.resize((width, height), bilinear)
        array = np.asarray(image)
        return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)

    def _open(self, path: Path, mode: str | None) -> Any:
        """An image, decoded; in another mode where one is given."""
        try:
            with self._image_module.open(path) as image:
                if image.mode not in (*_GREY, *_COLOUR):
                    raise DataError(
                        "images must have 8 bits a channel", got=f"mode {image.mode} in {path}"
                    )
                image.load()
                return image.copy() if mode is None else image.convert(mode)
        except DataError:
            raise
        except Exception as error:  # Pillow's readers raise many kinds.
            raise DataError(
                f"{path} must be an image that can be read",
                got=f"{type(error).__name__}: {error}",
            ) from error
