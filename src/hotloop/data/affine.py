"""Small random affine maps of images, drawn from counters and resampled bilinearly.

Everything that decides a sample's map is computed with additions, multiplications and divisions,
which IEEE 754 rounds correctly: vector and scalar code give the same bits, so a sample does not
depend on its place in a batch. Library sines do not promise that, hence the series.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .hashing import uniform

_TERMS = 12  # The first term left out is below 1e-13 at half a turn.


@dataclass(frozen=True)
class AffineRange:
    """How far the maps go; each parameter is drawn uniformly.

    Attributes:
        degrees: rotation between minus and plus this.
        translate: shift between minus and plus this fraction of each side.
        scale: smallest and largest enlargement.
        shear: horizontal shear angle in degrees, between minus and plus this.
    """

    degrees: float
    translate: float
    scale: tuple[float, float]
    shear: float


def draw_inverse_maps(
    ranges: AffineRange, key: int, positions: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """For each sample the map from output pixels to input pixels.

    Args:
        ranges: how far the maps go.
        key: which stream of draws.
        positions: int64 ``[n]``, sample positions.
        height: rows of the images.
        width: columns of the images.

    Returns:
        float32 ``[n, 2, 3]``: ``(column, row) = M @ (column', row', 1)`` with pixel coordinates
        measured from the centre of the image.
    """

    turn, lean = math.radians(ranges.degrees), math.radians(ranges.shear)
    far_x, far_y = ranges.translate * width, ranges.translate * height
    low = torch.tensor([-turn, -lean, ranges.scale[0], -far_x, -far_y], dtype=torch.float64)
    high = torch.tensor([turn, lean, ranges.scale[1], far_x, far_y], dtype=torch.float64)
    drawn = uniform(key, positions, 5) * (high - low) + low
    sines, cosines = _sine_cosine(drawn[:, :2])
    sine, cosine = sines[:, 0], cosines[:, 0]
    shear = sines[:, 1] / cosines[:, 1]
    shrink = 1.0 / drawn[:, 2]
    shift_x, shift_y = drawn[:, 3], drawn[:, 4]
    # The inverse of scale * rotation * shear: shear back after rotating back.
    a = shrink * (cosine + shear * sine)
    b = shrink * (sine - shear * cosine)
    c = -shrink * sine
    d = shrink * cosine
    rows = (a, b, -(a * shift_x + b * shift_y)), (c, d, -(c * shift_x + d * shift_y))
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2).to(torch.float32)


def warp(images: torch.Tensor, inverse_maps: torch.Tensor) -> torch.Tensor:
    """Resample images; what comes from outside is 0.

    Args:
        images: float32 ``[n, C, H, W]``.
        inverse_maps: float32 ``[n, 2, 3]`` of ``draw_inverse_maps``.

    Returns:
        float32 ``[n, C, H, W]``, new.
    """
    height, width = images.shape[-2:]
    columns = torch.arange(width, dtype=torch.float32) - (width - 1) / 2
    rows = (torch.arange(height, dtype=torch.float32) - (height - 1) / 2)[:, None]
    # grid_sample counts in half images from the centre.
    halves = torch.tensor([2.0 / width, 2.0 / height])
    along_x, along_y, shift = (inverse_maps[:, None, None, :, k] * halves for k in range(3))
    grid = along_x * columns[:, None] + (along_y * rows[:, :, None] + shift)
    return torch.nn.functional.grid_sample(
        images, grid, mode="bilinear", padding_mode="zeros", align_corners=False
    )


def distort_bytes(
    images: torch.Tensor, positions: torch.Tensor, seed: int, ranges: AffineRange
) -> torch.Tensor:
    """Distorted copies of byte images, rounded to the nearest byte.

    Args:
        images: uint8 ``[n, C, H, W]``.
        positions: int64 ``[n]``, positions of the new samples, from which the maps are drawn.
        seed: which stream of draws.
        ranges: how far the maps go.

    Returns:
        uint8 ``[n, C, H, W]``.
    """
    maps = draw_inverse_maps(ranges, seed, positions, images.shape[-2], images.shape[-1])
    warped = warp(images.to(torch.float32), maps)
    return warped.add_(0.5).clamp_(0, 255).to(torch.uint8)


def _sine_cosine(angle: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sine and cosine of float64 angles of at most half a turn, by their Taylor series."""
    square = angle * angle
    sine = torch.ones_like(angle)
    cosine = torch.ones_like(angle)
    for term in range(_TERMS, 0, -1):
        sine = 1.0 - square * sine / (2 * term * (2 * term + 1))
        cosine = 1.0 - square * cosine / (2 * term * (2 * term - 1))
    return angle * sine, cosine
