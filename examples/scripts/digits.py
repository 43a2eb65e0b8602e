"""MNIST for the scripts beside this file: IDX files in $HOTLOOP_DATA, else digits drawn here."""

import gzip
import os
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset


def read_idx(path):
    """The array in an IDX file: a header of big-endian numbers, then bytes."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as file:
        content = file.read()
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", dimensions, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def load(train=True, count=None):
    """Images uint8 ``[n, 28, 28]`` and labels int64 ``[n]``."""
    folder = os.environ.get("HOTLOOP_DATA")
    if not folder:
        return draw(count or 10_000, seed=0 if train else 1)
    name = "train" if train else "t10k"
    found = [next(Path(folder).rglob(f"{name}-{kind}*")) for kind in ("images", "labels")]
    images, labels = (torch.from_numpy(read_idx(path).copy()) for path in found)
    return images[:count], labels[:count].long()


def draw(count, seed):
    """Blurred strokes, one pattern for each class, shifted and with noise."""
    patterns = torch.rand(10, 1, 7, 7, generator=torch.Generator().manual_seed(7)) > 0.6
    patterns = torch.nn.functional.interpolate(patterns.float(), (28, 28), mode="bilinear")[:, 0]
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    shifts = torch.randint(-3, 4, (count,), generator=generator)
    images = patterns[labels]
    images = torch.stack([torch.roll(i, int(s), -1) for i, s in zip(images, shifts, strict=True)])
    images += 0.2 * torch.randn(images.shape, generator=generator)
    return (images.clamp(0, 1) * 255).byte(), labels


class Digits(Dataset):
    """One image ``[1, 28, 28]``, normalised, and its label at a time."""

    def __init__(self, train=True, count=None):
        self.images, self.labels = load(train, count)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index].float().div(255).sub(0.1307).div(0.3081)
        return image.unsqueeze(0), self.labels[index]
