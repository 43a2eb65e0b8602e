"""``ParallelStep``: one optimizer step a call, on a team of workers."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable

import torch
from torch import nn

from ..errors import RunError
from ..machine import Machine
from ..machine.threads import num_threads
from ..plan import ParallelConfig, Plan
from ..step.capture import LossFn, NotCapturable
from ..step.operations import Operation
from ..step.path_choice import choose_path
from ..step.step import Between, TrainStep
from .balance import LoadBalancer, WorkerStats
from .placement import place_workers, placed
from .processes import ProcessTeam
from .team import Team, WorkerHangs

_LARGEST_CHUNK, _SMALLEST_CHUNK = 32, 4
# A team that was given up: a thread that hangs may still write there.
_ABANDONED: list[Team] = []


def default_chunk_size(batch_size: int, usable_cpus: int) -> int:
    """Samples of a chunk: one chunk for each CPU, but 4 to 32 samples, and dividing the batch.

    It does not depend on the number of workers, so that results do not either. Larger chunks make
    better use of a core: each reads all the weights.
    """
    size = _LARGEST_CHUNK
    while size > _SMALLEST_CHUNK and batch_size < size * usable_cpus:
        size //= 2
    while batch_size % size:
        size //= 2
    return size


class ParallelStep(TrainStep):
    """A ``TrainStep`` whose batches are cut into chunks that several workers run.

    The result is the same to the last bit for any number of workers and whoever ran which chunk. It
    is that of one pass over the batch up to float32 rounding, but for batch norm, which sees each
    chunk by itself; its running statistics become the mean of what the chunks made of them. A batch
    that does not consist of whole chunks (the last, smaller one of an epoch), and a model that
    cannot be captured, take the plain path on one thread. Dropout and noise are functions of step,
    chunk and place (``step.chunk_random``).

    A worker that fails has its chunk run again by worker 0. One that takes longer than ``hang_s``
    is given up, with the step's chunks run again by a new team of one worker less; what it may
    still write, nobody reads.

    Args:
        model, loss_fn, optimizer, clip_norm, clip_value: as for ``compile_step``.
        x, y: a batch as later calls will give it; only shapes, strides and dtypes count.
        plan: ``parallel``, ``cpu.thread_affinity``, ``numa`` and ``step.compile`` are used.
        machine: for placing workers; probed when ``None``.
        between: see ``TrainStep``.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        optimizer: torch.optim.Optimizer,
        x: torch.Tensor,
        y: torch.Tensor,
        plan: Plan,
        *,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        machine: Machine | None = None,
        between: Between | None = None,
    ) -> None:
        super().__init__(
            model,
            loss_fn,
            optimizer,
            micro_batch_size=plan.memory.micro_batch_size,
            clip_norm=clip_norm,
            clip_value=clip_value,
            between=between,
        )
        self.config: ParallelConfig = plan.parallel
        self.num_workers = plan.parallel.num_workers or 1
        machine = machine or Machine.probe()
        self.placements = place_workers(plan, machine, self.num_workers)
        nodes = {placement.node for placement in self.placements}
        self._moves = plan.numa.allocation_policy != "default" or len(nodes) > 1
        default = default_chunk_size(len(x), machine.usable_cpus)
        self.chunk_size = plan.parallel.chunk_size or default
        self.num_chunks = len(x) // self.chunk_size
        self.faults: list[str] = []
        self._example = (x[: self.chunk_size], y[: self.chunk_size])
        self._team: Team | None = None
        self.balancer = LoadBalancer(self.num_workers, max(1, self.num_chunks))
        choice = choose_path(model, x, plan, chunk_size=self.chunk_size)
        self.reason, self.precision_reason = choice.reason, choice.precision_reason
        if choice.path == "plain":
            return
        try:
            self._team = self._new_team()
            of_each = f"chunks of {self.chunk_size} on {self.num_workers} workers"
            self.reason = f"{of_each}, one copy of the weights"
        except (NotCapturable, RunError) as verdict:
            self.reason = str(verdict)

    @property
    def path(self) -> str:
        """``"parallel"`` or ``"plain"``."""
        return "plain" if self._team is None else "parallel"

    @property
    def makes_many(self) -> bool:
        """Whether ``many`` works on batches of the captured shape."""
        return self._team is not None and self._team.whole and not self._partial

    @property
    def workers(self) -> list[WorkerStats]:
        """What each worker did so far."""
        return self.balancer.workers if self._team is not None else []

    def operations(self) -> list[Operation]:
        """None: chunks on several workers overlap."""
        return []

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Train on one batch; see ``TrainStep``."""
        losses = self._on_team(x, y, 1, None)
        if losses is None:
            with num_threads(1):
                return super().__call__(x, y)
        return losses[0]

    def many(
        self, x: torch.Tensor, y: torch.Tensor, steps: int, rates: list[list[float]] | None = None
    ) -> torch.Tensor | None:
        """Several steps in one call; see ``TrainStep``."""
        return self._on_team(x, y, steps, rates) if self.makes_many else None

    def resize(self, num_chunks: int) -> None:
        """Batches have so many chunks from now on."""
        if num_chunks == self.num_chunks or self._team is None:
            return
        self.num_chunks = num_chunks
        self.balancer = LoadBalancer(self.num_workers, num_chunks)
        self._team.resize(num_chunks)

    def close(self) -> None:
        """End the workers; batches take the plain path from then on."""
        if self._team is not None:
            self._team.close()
            self._team = None
            self.reason = "the workers were ended"

    @property
    def _partial(self) -> bool:
        """Whether something comes between the gradients and the update."""
        return (self.clip_norm, self.clip_value, self.between) != (None, None, None)

    def _new_team(self) -> Team:
        kind: Callable[..., Team] = Team
        if self.config.executor == "processes":
            kind = functools.partial(ProcessTeam, max_restarts=self.config.max_restarts)
        return kind(
            self.model,
            self.loss_fn,
            self.optimizer,
            *self._example,
            num_chunks=self.num_chunks,
            num_workers=self.num_workers,
            placements=self.placements[: self.num_workers],
            moves=self._moves,
            whole=not self._partial,
            hang_s=self.config.hang_s,
            steal_threshold=self.config.steal_threshold,
        )

    def _on_team(
        self, x: torch.Tensor, y: torch.Tensor, steps: int, rates: list[list[float]] | None
    ) -> torch.Tensor | None:
        size = self.chunk_size * self.num_chunks
        if (
            self._team is None
            or len(x) != size * steps
            or not self._team.accepts(x[:size], y[:size])
        ):
            return None
        losses, done = [], 0
        # From torch's generator, which checkpoints keep, in the order of the steps.
        keys = torch.randint(-(2**63), 2**63 - 1, (steps,)) if self._team.draws else None
        began_s = time.monotonic()
        while done < steps:
            part = slice(done * size, steps * size)
            left = None if rates is None else rates[done:]
            now = None if keys is None else keys[done:]
            try:
                with placed(self.placements[0]):
                    made, stats = self._team.run(x[part], y[part], steps - done, left, now)
            except WorkerHangs as hang:
                losses.append(hang.losses[: hang.steps_done])
                done += hang.steps_done
                self._replace_team()
                continue
            losses.append(made)
            done = steps
            for worker, row in enumerate(stats):
                begun = self.balancer.workers[worker].queue * made.numel()
                self.balancer.record(worker, begun=begun, **dataclasses.asdict(row))
            self._team.balance(self.balancer.balance_load())
        if self.between is not None:
            busy_s = time.monotonic() - began_s
            losses = [self.between(losses[0][0], len(x), busy_s).reshape(1)]
        self._finish(self._team)
        return torch.cat(losses) if len(losses) > 1 else losses[0]

    def _finish(self, team: Team) -> None:
        if team.whole:
            for weight in team.weights:
                if weight.grad is not None:
                    weight.grad = None
            # What a scheduler looks at to tell that the optimizer has made its step.
            self.optimizer._opt_called = True  # type: ignore[attr-defined]
            return
        self._clip()
        self.optimizer.step()

    def _replace_team(self) -> None:
        """A worker hangs: go on without it."""
        assert self._team is not None
        self.faults.append(f"a worker took longer than {self.config.hang_s:g} s and was given up")
        _ABANDONED.append(self._team)
        self._team.close()
        if self.num_workers == 1:
            raise RunError("a worker must end its chunk in time", got=self.faults[-1])
        self.num_workers -= 1
        self._team = self._new_team()
        self.balancer = LoadBalancer(self.num_workers, self.num_chunks)
