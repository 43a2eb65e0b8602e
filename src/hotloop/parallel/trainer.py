"""``DataParallelTrainer``: a batch in, chunks on all workers, one update, the loss out."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch
from torch import nn

from ..errors import InputError, ModelError
from ..memory.tree import num_samples
from ..plan import Plan
from ..step.check import LossFn, check_example, check_parts
from .balance import LoadBalancer, WorkerStats
from .placement import default_num_workers
from .step import ParallelStep


class DataParallelTrainer:
    """Trains on one batch a call without blocking the event loop.

    Batches are processed one after the other, in the order of the calls. The first batch decides
    the size of the chunks; workers begin with the third.

    Args:
        model, loss_fn, optimizer, clip_norm, clip_value: as for ``compile_step``.
        plan: ``parallel.num_workers`` workers; one for each usable core when that is ``None``.

    Raises:
        ModelError: model, loss or optimizer cannot be used.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        optimizer: torch.optim.Optimizer,
        plan: Plan | None = None,
        *,
        clip_norm: float | None = None,
        clip_value: float | None = None,
    ) -> None:
        check_parts(model, loss_fn, optimizer)
        from ..machine import Machine

        self.machine = Machine.probe()
        plan = plan or Plan()
        if plan.parallel.num_workers is None:
            workers = default_num_workers(self.machine)
            plan = plan.replace({"parallel.num_workers": workers})
        self.plan = plan
        self.model, self.loss_fn, self.optimizer = model, loss_fn, optimizer
        self._clip: dict[str, Any] = {"clip_norm": clip_norm, "clip_value": clip_value}
        self._step: ParallelStep | None = None
        # One thread that is worker 0: OpenMP keeps a set of threads for each thread that calls it.
        self._caller = ThreadPoolExecutor(1, thread_name_prefix="hotloop-worker-0")

    async def process_batch(self, batch: Sequence[Any]) -> torch.Tensor:
        """One optimizer step on ``(x, y)`` or ``(x,)``; the loss, a detached scalar.

        x and y are trees of tensors ``[batch, ...]``, as for ``compile_step``.

        Raises:
            InputError: it is no batch.
            RunError: a chunk failed on two workers, or the last worker hangs.
        """
        try:
            trees = check_example(batch).trees
        except ModelError:
            trees = ()
        if not trees or num_samples(*trees) == 0:
            raise InputError(
                "a batch must be (x, y), samples and as many targets", next_step="pass (x, y)"
            )
        return await asyncio.get_running_loop().run_in_executor(self._caller, self._process, trees)

    @property
    def workers(self) -> list[WorkerStats]:
        """What each worker did so far; none before the first batch or on the plain path."""
        return [] if self._step is None else self._step.workers

    @property
    def balancer(self) -> LoadBalancer | None:
        """What decides how many chunks each worker begins with."""
        return None if self._step is None else self._step.balancer

    @property
    def path(self) -> str | None:
        """``"parallel"`` or ``"plain"``, and ``None`` before the first batch."""
        return None if self._step is None else self._step.path

    @property
    def reason(self) -> str | None:
        """Why this path."""
        return None if self._step is None else self._step.reason

    def close(self) -> None:
        """End the workers. Twice is allowed."""
        if self._step is not None:
            self._caller.submit(self._step.close).result()
        self._caller.shutdown()

    def __enter__(self) -> DataParallelTrainer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _process(self, trees: tuple[Any, ...]) -> torch.Tensor:
        if self._step is None:
            self._step = ParallelStep(
                self.model,
                self.loss_fn,
                self.optimizer,
                trees,
                self.plan,
                machine=self.machine,
                **self._clip,
            )
        return self._step(*trees)
