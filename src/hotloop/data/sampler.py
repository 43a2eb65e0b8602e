"""Which samples make which batch: a pure function of seed and epoch, so a run can be resumed."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..errors import DataError, PlanError
from .hashing import mix


class GlobalSampler:
    """Positions of all samples, in the order of an epoch, cut into batches.

    The order is ``torch.randperm`` of a generator seeded from (seed, epoch) and nothing else: no
    state is carried from epoch to epoch, and workers that agree on the seed agree on every batch.

    Args:
        num_samples: samples in the data, at least 1.
        batch_size: samples in a batch, at least 1.
        seed: any integer.
        shuffle: ``False`` keeps the order of the data in every epoch.
        drop_last: leave out the last batch of an epoch when it is smaller.

    Raises:
        PlanError: ``batch_size`` below 1.
        DataError: no samples, or none left by ``drop_last``.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        if batch_size < 1:
            raise PlanError(
                "batch_size must be at least 1", got=batch_size, next_step="pass --batch-size 64"
            )
        if num_samples < 1:
            raise DataError("the data must have at least 1 sample", got=num_samples)
        if drop_last and num_samples < batch_size:
            raise DataError(
                f"with drop_last the data must fill one batch of {batch_size}", got=num_samples
            )
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last

    @property
    def num_batches(self) -> int:
        """Batches in an epoch."""
        whole, rest = divmod(self.num_samples, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def order(self, epoch: int) -> torch.Tensor:
        """int64 ``[num_samples]``: every position once."""
        if not self.shuffle:
            return torch.arange(self.num_samples)
        generator = torch.Generator()
        generator.manual_seed(mix(self.seed, epoch) >> 1)
        return torch.randperm(self.num_samples, generator=generator)

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[torch.Tensor]:
        """Batches of an epoch from one on: int64 ``[n]``, views of ``order(epoch)``.

        Raises:
            DataError: ``start_batch`` is not between 0 and ``num_batches``.
        """
        if not 0 <= start_batch <= self.num_batches:
            raise DataError(
                f"start_batch must be between 0 and the {self.num_batches} batches of an epoch",
                got=start_batch,
            )
        return self._batches(epoch, start_batch)

    def _batches(self, epoch: int, start_batch: int) -> Iterator[torch.Tensor]:
        order = self.order(epoch)
        for batch in range(start_batch, self.num_batches):
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size]
