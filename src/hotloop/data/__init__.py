"""Data: read once, checked, packed; then gathered in batches, ahead of the step.

opening      open_dataset: one door to all kinds of data
mnist        load_mnist: the full set, or the digits shipped in ``digits/``
packed       PackedDataset: packed samples and the transforms applied when gathered
sampler      GlobalSampler: order and batches as a pure function of seed and epoch
prefetch     Prefetcher: batches gathered ahead by a thread, in a bounded queue
transforms   normalize, affine, crop, flip on whole batches
pack         from a source to packed storage; what is checked and how values are kept
source       what a reader yields; readers: idx, npz, parquet, arrays, torch_dataset
storage      packed rows in memory or in a file
affine, hashing, download   random maps, counter-based draws, fetching
"""

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
    "GlobalSampler",
    "Normalize",
    "PackedDataset",
    "Prefetcher",
    "RandomAffine",
    "RandomCrop",
    "RandomFlip",
    "Transform",
    "load_mnist",
    "open_dataset",
    "parse_transforms",
]
