"""``GradientSynchronizer``: the gradient of a batch from those of its chunks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import InputError


class GradientSynchronizer:
    """Adds gradients of chunks, weighted by their samples, in the order given.

    With losses that are means over samples the result is the gradient of the whole batch, up to
    float32 rounding. The order of the chunks, not who computed them or when, decides the last bit.
    """

    @staticmethod
    def aggregate(
        gradients: Sequence[Sequence[torch.Tensor]], num_samples: Sequence[int]
    ) -> list[torch.Tensor]:
        """The weighted sum.

        Args:
            gradients: for each chunk, one tensor for each parameter; shapes alike across chunks.
            num_samples: of each chunk, at least 1.

        Returns:
            One new tensor for each parameter.

        Raises:
            InputError: no chunks, unequal lengths or shapes, or a chunk without samples.
        """
        if not gradients or len(gradients) != len(num_samples):
            raise InputError(
                "each chunk needs its gradients and its number of samples",
                got=f"{len(gradients)} and {len(num_samples)}",
            )
        if min(num_samples) < 1:
            raise InputError("every chunk needs at least one sample", got=list(num_samples))
        shapes = [[g.shape for g in chunk] for chunk in gradients]
        if any(s != shapes[0] for s in shapes):
            raise InputError("gradients of all chunks must have the same shapes", got=shapes)
        total = sum(num_samples)
        sums = [g.detach() * (num_samples[0] / total) for g in gradients[0]]
        for chunk, count in zip(gradients[1:], num_samples[1:], strict=True):
            for into, gradient in zip(sums, chunk, strict=True):
                into.add_(gradient.detach(), alpha=count / total)
        return sums
