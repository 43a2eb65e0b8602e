"""Make the digits shipped in the package from the IDX files of MNIST.

    python scripts/make_digits.py FOLDER [--out FOLDER]     (or HOTLOOP_DATA instead of FOLDER)

10,000 of the 60,000 training digits and 2,000 of the 10,000 test digits, stratified: each class has
the share it has in the full set, rounded by largest remainder. Within a class, the digits whose
positions hash lowest under a fixed seed are taken; all keep the order of the full set. The choice
uses no library's random numbers, and the gzip headers hold no name and no time, so the same input
gives the same files, byte for byte (with another zlib: the same contents).
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np

from hotloop.data.hashing import mix
from hotloop.data.idx import IdxSource, find_idx_pair, write_idx
from hotloop.errors import DataError

SEED = 20260101
COUNTS = {"train": 10_000, "test": 2_000}
MAX_BYTES = 2_500_000
NAMES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
# SHA-256 of the unpacked files of MNIST, so that nothing else is taken for it.
ORIGINALS = {
    "train": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
    "test": (
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
}


def class_counts(labels: np.ndarray, count: int) -> dict[int, int]:
    """How many of each class make ``count`` in the proportions of ``labels``."""
    classes, sizes = np.unique(labels, return_counts=True)
    exact = sizes * count / len(labels)
    wanted = np.floor(exact).astype(int)
    largest = np.argsort(wanted - exact, kind="stable")[: count - wanted.sum()]
    wanted[largest] += 1
    return dict(zip(classes.tolist(), wanted.tolist(), strict=True))


def choose(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Positions of a stratified choice, ascending."""
    chosen: list[int] = []
    for label, wanted in class_counts(labels, count).items():
        positions = np.flatnonzero(labels == label).tolist()
        chosen += sorted(positions, key=lambda position: mix(seed, position))[:wanted]
    return np.array(sorted(chosen))


def make(folder: Path, out: Path) -> dict[str, object]:
    """Write the four files and the manifest; returns the manifest.

    Raises:
        DataError: the folder does not hold MNIST.
    """
    out.mkdir(parents=True, exist_ok=True)
    files: dict[str, object] = {}
    for split, count in COUNTS.items():
        pair = find_idx_pair(folder, split)
        if pair is None:
            raise DataError(f"{folder} must hold the IDX files of MNIST's {split} split")
        for path, wanted in zip(pair, ORIGINALS[split], strict=True):
            if hashlib.sha256(unpacked(path)).hexdigest() != wanted:
                raise DataError(f"{path} must be the file of MNIST, by its SHA-256")
        chunks = list(IdxSource(*pair, num_classes=10).chunks())
        images = np.concatenate([x for x, _ in chunks])[:, 0]
        labels = np.concatenate([y for _, y in chunks])
        chosen = choose(labels, count, mix(SEED, len(split)))
        for name, array in zip(NAMES[split], (images[chosen], labels[chosen]), strict=True):
            write_idx(out / name, array)
            packed = (out / name).read_bytes()
            files[name] = {
                "rows": count,
                "size_bytes": len(packed),
                "sha256": hashlib.sha256(packed).hexdigest(),
                "unpacked_sha256": hashlib.sha256(gzip.decompress(packed)).hexdigest(),
            }
    total = sum((out / name).stat().st_size for names in NAMES.values() for name in names)
    if total > MAX_BYTES:
        raise DataError(f"the shipped digits must fit {MAX_BYTES} bytes", got=total)
    manifest = {"seed": SEED, "total_bytes": total, "files": files}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def unpacked(path: Path) -> bytes:
    """The bytes of a file, out of gzip if it is in it."""
    data = path.read_bytes()
    return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data


def main() -> int:
    """Command line; exit code 2 when the input is not MNIST."""
    default_out = Path(__file__).resolve().parent.parent / "src/hotloop/data/digits"
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", nargs="?", default=os.environ.get("HOTLOOP_DATA"))
    parser.add_argument("--out", type=Path, default=default_out)
    arguments = parser.parse_args()
    if arguments.folder is None:
        parser.error("name the folder with the IDX files, or set HOTLOOP_DATA")
    try:
        manifest = make(Path(arguments.folder), arguments.out)
    except DataError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(manifest, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
