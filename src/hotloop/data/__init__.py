"""Data: read once, checked, packed; then gathered in batches, ahead of the step.

batches      open_batches: one door to all kinds of data, as batches of epochs
opening      open_dataset: what can be packed, packed
packed       PackedDataset: packed samples and the transforms applied when gathered
loaded       batches that are not packed: read ahead, or as a loader or function gives them
batch        what a batch is: (x, y) or (x,)
sampler      GlobalSampler: order and batches as a pure function of seed and epoch
order        LoaderOrder: the order that a DataLoader's sampler draws, and how to find it again
prefetch     Prefetcher: batches gathered ahead by a thread, in a bounded queue; ahead: read ahead
transforms   normalize, affine, crop, flip on whole batches
pack         from a source of pairs to packed storage; what is checked, how values are converted
pack_rows    trees of tensors to packed storage, as they are; rows_source: where the rows come from
source       what a reader of pairs yields; readers: idx, npz, tables, image_folder, arrays
samples      a map-style dataset read as a DataLoader would; array_tree: trees of arrays
storage      packed rows in memory or in a file
mnist        load_mnist: the full set, or the digits shipped in ``digits/``
labels, random_state, affine, hashing, download, table_files   parts of these

Importing loads no torch, nor do source, idx, npz and hashing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import names_in

if TYPE_CHECKING:
    from .batches import Batches, PackedBatches, open_batches
    from .mnist import load_mnist
    from .opening import open_dataset
    from .packed import PackedDataset
    from .prefetch import Prefetcher
    from .sampler import GlobalSampler
    from .transforms import (
        TRANSFORMS,
        Normalize,
        RandomAffine,
        RandomCrop,
        RandomFlip,
        Transform,
        parse_transforms,
    )

__all__ = [
    "TRANSFORMS",
    "Batches",
    "GlobalSampler",
    "Normalize",
    "PackedBatches",
    "PackedDataset",
    "Prefetcher",
    "RandomAffine",
    "RandomCrop",
    "RandomFlip",
    "Transform",
    "load_mnist",
    "open_batches",
    "open_dataset",
    "parse_transforms",
]

_MODULE_OF = {
    "batches": ("Batches", "PackedBatches", "open_batches"),
    "mnist": ("load_mnist",),
    "opening": ("open_dataset",),
    "packed": ("PackedDataset",),
    "prefetch": ("Prefetcher",),
    "sampler": ("GlobalSampler",),
    "transforms": (
        "TRANSFORMS", "Normalize", "RandomAffine", "RandomCrop", "RandomFlip", "Transform",
        "parse_transforms",
    ),
}  # fmt: skip
__getattr__ = names_in(__name__, {n: module for module, names in _MODULE_OF.items() for n in names})
