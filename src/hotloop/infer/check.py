"""Whether a candidate answers as eager does: fresh inputs, errors, and accuracy on samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .engine import TensorSpec

# float32 engines add in another order; hundreds of layers stay below this share of the output.
FLOAT32_ERROR = 1e-4


@dataclass(frozen=True)
class Bounds:
    """What lower precision may cost.

    Attributes:
        max_error: largest difference over the largest value; ``None``: no bound of this kind.
        max_accuracy_loss: share of samples; ``None`` likewise.
    """

    max_error: float | None = None
    max_accuracy_loss: float | None = None

    @property
    def allow_lower(self) -> bool:
        """Whether bfloat16 and int8 may be tried."""
        return self.max_error is not None or self.max_accuracy_loss is not None


def fresh_inputs(
    example: Sequence[torch.Tensor], specs: Sequence[TensorSpec], batch: int, seed: int
) -> list[torch.Tensor]:
    """Inputs like the example that no engine has seen.

    Floating values are drawn with the example's mean and spread (1 where it has none), all others
    from the example's own values, so that indices stay in their range. Masks (of 0 and 1 alone) are
    made of rows of the example's: in a causal model one that masks the first token leaves places
    that see nothing, and what stands there means nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for tensor, spec in zip(example, specs, strict=True):
        shape = list(tensor.shape)
        if spec.is_batched:
            shape[0] = batch
        if tensor.is_floating_point() and tensor.numel():
            values = tensor.double()
            mean = float(values.mean()) if math.isfinite(float(values.mean())) else 0.0
            spread = float(values.std(correction=0))
            spread = spread if math.isfinite(spread) and spread > 0 else 1.0
            noise = torch.randn(shape, generator=generator, dtype=torch.float32)
            drawn.append((noise * spread + mean).to(tensor.device, tensor.dtype))
        elif spec.is_batched and _is_mask(tensor):
            drawn.append(
                tensor[torch.randint(len(tensor), (batch,), generator=generator).to(tensor.device)]
            )
        else:
            flat = tensor.reshape(-1)
            indices = torch.randint(max(1, flat.numel()), shape, generator=generator)
            indices = indices.to(tensor.device)
            drawn.append(flat[indices] if flat.numel() else tensor.new_zeros(shape))
    return drawn


def _is_mask(tensor: torch.Tensor) -> bool:
    whole = not tensor.is_floating_point() and not tensor.is_complex()
    rows = tensor.dim() > 1 and tensor.numel() > 0
    return whole and rows and bool(((tensor == 0) | (tensor == 1)).all())


def difference(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> tuple[float, str]:
    """Largest difference over the largest value, and why it cannot be told (else empty).

    Whole numbers and booleans count as the share of elements that differ.
    """
    if len(got) != len(want):
        return math.inf, f"{len(got)} outputs, eager gives {len(want)}"
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if a.dtype != b.dtype or a.shape != b.shape:
            return (
                math.inf,
                f"output {a.dtype} {list(a.shape)}, eager gives {b.dtype} {list(b.shape)}",
            )
        if not b.numel():
            continue
        if b.is_complex():
            a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
        if not b.is_floating_point():
            worst = max(worst, float((a != b).double().mean()))
            continue
        finite = torch.isfinite(b)
        same = torch.equal(torch.isfinite(a), finite) and torch.equal(
            torch.nan_to_num(a[~finite]), torch.nan_to_num(b[~finite])
        )
        if not same:
            return math.inf, "infinite or NaN where eager is not, or the other way round"
        a, b = a[finite].double(), b[finite].double()
        if b.numel():
            scale = float(b.abs().max()) or 1.0
            worst = max(worst, float((a - b).abs().max()) / scale)
    return worst, ""


def accuracy_loss(got: torch.Tensor, want: torch.Tensor, labels: torch.Tensor | None) -> float:
    """Eager's accuracy less the candidate's; without labels the share of other answers.

    Args:
        got, want: scores ``[samples, classes]`` of the candidate and of eager.
        labels: class indices ``[samples]``.
    """
    got, want = got.argmax(-1), want.argmax(-1)
    if labels is None:
        return float((got != want).double().mean())
    labels = labels.reshape(want.shape)
    return float((want == labels).double().mean() - (got == labels).double().mean())
