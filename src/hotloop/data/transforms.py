"""Small transforms of whole batches, in place: normalization and augmentation.

A random transform draws from (seed, epoch, sample position) alone, so that a sample is augmented
the same way in any batch, on any worker, and after a resume.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

import torch

from ..errors import DataError, InputError
from .affine import AffineRange, draw_inverse_maps, warp
from .hashing import mix, uniform


class Transform(Protocol):
    """One step applied to batches as they are gathered.

    Attributes:
        name: what it is called on the command line.
        training_only: whether it is left out in evaluation.
    """

    name: ClassVar[str]
    training_only: ClassVar[bool]

    def check(self, sample_shape: tuple[int, ...]) -> None:
        """Refuse samples it cannot take.

        Raises:
            DataError: the shape does not fit.
        """

    def apply(self, batch: torch.Tensor, *, positions: torch.Tensor, epoch: int, seed: int) -> None:
        """Change a batch in place.

        Args:
            batch: float32 ``[n, *sample_shape]``; rows may be apart (padded).
            positions: int64 ``[n]``, sample positions.
            epoch: which pass over the data.
            seed: of this transform's draws.
        """


@dataclass(frozen=True)
class Normalize:
    """``(x - mean) / std``, with one mean and deviation for all values or one a channel.

    Attributes:
        mean: a number, or one for each channel of ``[C, H, W]`` samples.
        std: the same, above 0.
    """

    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]

    name: ClassVar[str] = "normalize"
    training_only: ClassVar[bool] = False

    def __post_init__(self) -> None:
        means, stds = _as_tuple(self.mean), _as_tuple(self.std)
        if len(means) != len(stds) or not means:
            raise InputError(
                "normalize needs as many deviations as means",
                got=f"{len(means)} means and {len(stds)} deviations",
            )
        if not all(map(math.isfinite, (*means, *stds))) or min(stds) <= 0:
            raise InputError("normalize needs finite means and deviations above 0", got=self)

    def check(self, sample_shape: tuple[int, ...]) -> None:
        """See ``Transform``."""
        channels = len(_as_tuple(self.mean))
        if channels > 1 and (len(sample_shape) < 2 or sample_shape[0] != channels):
            raise DataError(
                f"normalize with {channels} means needs samples of {channels} channels first",
                got=list(sample_shape),
            )

    def apply(self, batch: torch.Tensor, *, positions: torch.Tensor, epoch: int, seed: int) -> None:
        """See ``Transform``."""
        factor, offset = self._factor_and_offset
        batch.mul_(factor).add_(offset)

    @cached_property
    def _factor_and_offset(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.factor_and_offset(1.0)

    def factor_and_offset(self, value_scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """``a, b`` such that ``raw * a + b`` normalizes ``raw * value_scale``.

        Returns:
            Two float32 tensors, scalars or ``[C, 1, 1]``, computed in float64.
        """
        mean = torch.tensor(_as_tuple(self.mean), dtype=torch.float64)
        std = torch.tensor(_as_tuple(self.std), dtype=torch.float64)
        shape = () if len(mean) == 1 else (len(mean), 1, 1)
        factor, offset = value_scale / std, -mean / std
        return factor.float().reshape(shape), offset.float().reshape(shape)


@dataclass(frozen=True)
class RandomAffine:
    """A small rotation, shift, enlargement and shear of each image, bilinear; outside is 0.

    Put it before ``Normalize``, where 0 is the background.

    Attributes:
        degrees: rotation between minus and plus this, at most 180.
        translate: shift between minus and plus this fraction of each side, 0 to 1.
        scale: smallest and largest enlargement, above 0.
        shear: horizontal shear angle in degrees, at least 0 and below 90.
    """

    degrees: float = 10.0
    translate: float = 0.07
    scale: tuple[float, float] = (0.9, 1.1)
    shear: float = 5.0

    name: ClassVar[str] = "affine"
    training_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        ok = 0 <= self.degrees <= 180 and 0 <= self.translate <= 1 and 0 <= self.shear < 90
        if not ok or not 0 < self.scale[0] <= self.scale[1] < math.inf:
            raise InputError(
                "affine needs degrees in 0..180, translate in 0..1, shear in 0..90 and a scale "
                "range above 0",
                got=self,
            )

    def check(self, sample_shape: tuple[int, ...]) -> None:
        """See ``Transform``."""
        _check_image(self.name, sample_shape)

    def apply(self, batch: torch.Tensor, *, positions: torch.Tensor, epoch: int, seed: int) -> None:
        """See ``Transform``."""
        height, width = batch.shape[-2:]
        ranges = AffineRange(self.degrees, self.translate, self.scale, self.shear)
        maps = draw_inverse_maps(ranges, mix(seed, epoch), positions, height, width)
        images = batch.reshape(len(batch), -1, height, width)
        batch.copy_(warp(images, maps).view(batch.shape))


@dataclass(frozen=True)
class RandomCrop:
    """Each image shifted by whole pixels, as a random crop of the padded image; outside is 0.

    Attributes:
        padding: largest shift in pixels, at least 0.
    """

    padding: int = 2

    name: ClassVar[str] = "crop"
    training_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.padding != int(self.padding) or self.padding < 0:
            raise InputError("crop needs a whole number of pixels, at least 0", got=self.padding)

    def check(self, sample_shape: tuple[int, ...]) -> None:
        """See ``Transform``."""
        _check_image(self.name, sample_shape)

    def apply(self, batch: torch.Tensor, *, positions: torch.Tensor, epoch: int, seed: int) -> None:
        """See ``Transform``."""
        key, pad = mix(seed, epoch), int(self.padding)
        height, width = batch.shape[-2:]
        images = batch.reshape(len(batch), -1, height, width)
        padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
        corners = (uniform(key, positions, 2) * (2 * pad + 1)).long()
        rows = corners[:, :1] + torch.arange(height)
        columns = corners[:, 1:] + torch.arange(width)
        which = torch.arange(len(batch))[:, None, None]
        # [n, H, W, C]: the indexed dimensions are not adjacent, so torch puts them first.
        cropped = padded[which, :, rows[:, :, None], columns[:, None, :]]
        batch.copy_(cropped.movedim(-1, 1).reshape(batch.shape))


@dataclass(frozen=True)
class RandomFlip:
    """Each image mirrored left to right with a probability.

    Attributes:
        probability: 0 to 1.
    """

    probability: float = 0.5

    name: ClassVar[str] = "flip"
    training_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise InputError("flip needs a probability in 0..1", got=self.probability)

    def check(self, sample_shape: tuple[int, ...]) -> None:
        """See ``Transform``."""
        _check_image(self.name, sample_shape)

    def apply(self, batch: torch.Tensor, *, positions: torch.Tensor, epoch: int, seed: int) -> None:
        """See ``Transform``."""
        chosen = uniform(mix(seed, epoch), positions, 1)[:, 0] < self.probability
        batch[chosen] = batch[chosen].flip(-1)


TRANSFORMS: dict[str, Callable[..., Transform]] = {
    kind.name: kind for kind in (Normalize, RandomAffine, RandomCrop, RandomFlip)
}

_CALL = re.compile(r"\s*([a-z_]+)\s*(?:\(([^()]*)\))?\s*(?:,|$)")


def parse_transforms(text: str) -> tuple[Transform, ...]:
    """Transforms from ``"affine(10,0.07),normalize(0.1307,0.3081)"``.

    Each is a name, with or without numbers in parentheses: ``normalize(mean,std)``,
    ``affine(degrees,translate)``, ``crop(pixels)``, ``flip(probability)``.

    Raises:
        InputError: an unknown name, or numbers that do not fit it.
    """
    transforms: list[Transform] = []
    at = 0
    while at < len(text.rstrip()):
        match = _CALL.match(text, at)
        kind = TRANSFORMS.get(match[1]) if match else None
        if match is None or kind is None:
            raise InputError(
                f"transforms are names out of {', '.join(TRANSFORMS)} with numbers in parentheses",
                got=text[at:].strip(),
            )
        try:
            numbers = [_number(word) for word in (match[2] or "").split(",") if word.strip()]
            transforms.append(kind(*numbers))
        except (TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{match[1]} takes other numbers", got=match[0].strip(" ,")) from None
        at = match.end()
    return tuple(transforms)


def _number(word: str) -> float:
    value = float(word)
    return int(value) if value.is_integer() else value


def _as_tuple(value: float | tuple[float, ...]) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


def _check_image(name: str, sample_shape: tuple[int, ...]) -> None:
    if len(sample_shape) not in (2, 3):
        raise DataError(f"{name} needs images [C, H, W] or [H, W]", got=list(sample_shape))
