"""MNIST: the full set where it can be had, the digits shipped in the package where not."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from ..errors import DataError
from ..machine.cache_dir import DOWNLOADS
from ..sealed import Sealed
from .affine import AffineRange, distort_bytes
from .download import RemoteFile, fetch
from .hashing import mix
from .idx import IdxSource, find_idx_pair
from .pack import MMAP_ABOVE_BYTES, pack
from .packed import PackedDataset
from .transforms import Normalize, Transform

Split = Literal["train", "test"]
Prefer = Literal["auto", "full", "shipped"]

SHIPPED_FOLDER = Path(__file__).parent / "digits"
# Mean and deviation of the 60,000 training images over 255, as customary.
NORMALIZE = Normalize(0.1307, 0.3081)
# Small enough that a digit stays itself: a six turned further begins to look like something else.
DISTORTION = AffineRange(degrees=10.0, translate=0.07, scale=(0.9, 1.1), shear=5.0)

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
FILES: dict[str, tuple[RemoteFile, ...]] = {
    "train": (
        RemoteFile(
            "train-images-idx3-ubyte.gz",
            9_912_422,
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        ),
        RemoteFile(
            "train-labels-idx1-ubyte.gz",
            28_881,
            "d53e105ee54ea40749a09fcbcd1e9432",
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        ),
    ),
    "test": (
        RemoteFile(
            "t10k-images-idx3-ubyte.gz",
            1_648_877,
            "9fb629c4189551a2d022fa330f9573f3",
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        ),
        RemoteFile(
            "t10k-labels-idx1-ubyte.gz",
            4_542,
            "ec29112dd5afa0611ce80d1b7f02629c",
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    ),
}

# Why the mirrors could not be reached, kept so that the second split does not wait for them again.
_unreachable: dict[tuple[str, ...], str] = {}


def load_mnist(
    split: Split,
    *,
    num_samples: int | None = None,
    folder: str | Path | Sealed | None = None,
    allow_download: bool = True,
    prefer: Prefer = "auto",
    transforms: Sequence[Transform] = (NORMALIZE,),
    seed: int = 0,
    mmap_above_bytes: int = MMAP_ABOVE_BYTES,
    storage_folder: Path | None = None,
    mirrors: Sequence[str] = MIRRORS,
) -> PackedDataset:
    """Digits as samples ``[1, 28, 28]`` with classes 0 to 9.

    The full set is looked for in ``folder``, then in the folder ``HOTLOOP_DATA`` names (and its
    ``mnist``), then in the cache, then on the mirrors; what ``prefer="auto"`` finds nowhere is
    replaced by the 10,000 and 2,000 digits shipped in the package. ``description`` says which.

    Args:
        split: ``"train"`` or ``"test"``.
        num_samples: default all. Fewer: the first so many. More: the rest are small random affine
            distortions of the real ones in turn, drawn from ``seed`` and the sample's position.
        folder: the only place to look for the full set.
        allow_download: whether the mirrors may be asked.
        prefer: ``"auto"``; ``"full"`` refuses the shipped digits; ``"shipped"`` takes them at once.
        transforms: applied to batches.
        seed: of distortions and random transforms.
        mmap_above_bytes: larger samples go to a file; see ``pack``.
        storage_folder: where that file is made.
        mirrors: addresses that hold the files.

    Raises:
        DataError: no such split, a folder without the files, damaged files, or no full set.
        StorageError: the packed samples could not be written.
    """
    if split not in FILES:
        raise DataError("split must be train or test", got=repr(split))
    if prefer not in get_args(Prefer):
        raise DataError("prefer must be auto, full or shipped", got=repr(prefer))
    pair, origin = _locate(split, folder, allow_download, prefer, mirrors)
    source = IdxSource(*pair, num_classes=10)
    if source.x.shape != (1, 28, 28):
        raise DataError(f"{pair[0]} must hold images of 28 by 28", got=list(source.x.shape[1:]))
    real = min(num_samples or source.num_samples, source.num_samples)
    text = f"MNIST {split}: {real:,} real digits ({origin})"
    if num_samples is not None and num_samples > real:
        text += f" and {num_samples - real:,} small affine distortions of them"
    return pack(
        source,
        num_samples=num_samples,
        extend=partial(distort_bytes, seed=mix(seed, len(split)), ranges=DISTORTION),
        transforms=transforms,
        seed=seed,
        mmap_above_bytes=mmap_above_bytes,
        storage_folder=storage_folder,
        description=text,
    )


def _locate(
    split: str,
    folder: str | Path | Sealed | None,
    allow_download: bool,
    prefer: Prefer,
    mirrors: Sequence[str],
) -> tuple[tuple[Path | Sealed, Path | Sealed], str]:
    """Image and label file, and where they are from."""
    if folder is not None:
        place = folder if isinstance(folder, Sealed) else Path(folder)
        pair = find_idx_pair(place, split)
        if pair is None:
            raise DataError(
                f"{place} must hold the IDX files of MNIST's {split} split",
                got=_listing(place),
                next_step=f"put {FILES[split][0].name} and {FILES[split][1].name} there",
            )
        return pair, str(pair[0].parent)
    missing = "shipped in the package, as asked"
    if prefer != "shipped":
        for place in _given_places():
            pair = find_idx_pair(place, split)
            if pair is not None:
                return pair, str(pair[0].parent)
        cache = DOWNLOADS.folder
        images, labels = (cache / file.name for file in FILES[split])
        # One of the two alone is a download that was cut short, to be gone on with.
        if images.is_file() and labels.is_file():
            return (images, labels), str(cache)
        reason = _download(split, cache, mirrors) if allow_download else "not asked for"
        if reason is None:
            return (images, labels), f"fetched to {cache}"
        missing = f"shipped in the package; the full set is not here, download: {reason}"
        if prefer == "full":
            raise DataError(
                f"the full MNIST {split} split must be in HOTLOOP_DATA or the cache, or be fetched",
                got=f"download: {reason}",
                next_step="set HOTLOOP_DATA to a folder with its IDX files",
            )
    images, labels = (SHIPPED_FOLDER / file.name for file in FILES[split])
    return (images, labels), missing


def _given_places() -> list[Path]:
    given = os.environ.get("HOTLOOP_DATA")
    return [Path(given), Path(given) / "mnist"] if given else []


def _download(split: str, folder: Path, mirrors: Sequence[str]) -> str | None:
    key = tuple(mirrors)
    if key not in _unreachable:
        reason = fetch(FILES[split], folder, mirrors)
        if reason is None:
            return None
        _unreachable[key] = reason
    return _unreachable[key]


def _listing(folder: Path | Sealed) -> str:
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        return error.strerror or str(error)
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") if names else "an empty folder"
