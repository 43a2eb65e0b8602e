"""``ParallelStep``: one optimizer step a call, on a team of workers."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import ModelError, RunError
from ..machine import Machine
from ..machine.threads import num_threads
from ..plan import ParallelConfig, Plan
from ..step.batch import NO_TARGET, Batch
from ..step.check import LossFn
from ..step.chunk import Chunk
from ..step.operations import Operation
from ..step.path_choice import choose_path
from ..step.recorded_chunk import RecordedChunk
from ..step.step import LEFT_OUT, Between, TrainStep
from .balance import LoadBalancer, WorkerStats
from .placement import place_workers, placed
from .plain_chunks import PlainChunks
from .processes import ProcessTeam
from .team import Team, UpdateRefused, WorkerHangs

_LARGEST_CHUNK, _SMALLEST_CHUNK = 32, 4
# A team that was given up: a thread that hangs may still write there.
_ABANDONED: list[Team] = []
_WITHOUT_HOSTS = "train on one host, or pass the loss of torch.nn itself"


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

    The first two steps run chunk by chunk as PyTorch makes them, and are recorded (``step.
    RecordedChunk``); from the third on workers run the chunks. The result is the same to the last
    bit for any number of workers and whoever ran which chunk. It is that of one pass over the batch
    up to float32 rounding, but for batch norm, which sees each chunk by itself; its running
    statistics become the mean of what the chunks made of them. A batch that does not consist of
    whole chunks (the last, smaller one of an epoch), a model that cannot become a program, and a
    loss that parts of a batch do not make (``step.loss_weight``) take the plain path on one thread.
    On workers, dropout and noise are functions of step, chunk and place (``graph.drawing``).

    A worker that fails has its chunk run again by worker 0. One that takes longer than ``hang_s``
    is given up, with the step's chunks run again by a new team of one worker less; what it may
    still write, nobody reads.

    Args:
        model, loss_fn, optimizer, clip_norm, clip_value: as for ``compile_step``.
        example: ``(x, y)`` or ``(x,)``, a batch as later calls will give it; only the number of
            samples counts.
        plan: ``parallel``, ``cpu.thread_affinity``, ``numa`` and ``step.compile`` are used.
        machine: for placing workers; probed when ``None``.
        between: see ``TrainStep``.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        optimizer: torch.optim.Optimizer,
        example: Sequence[Any],
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
        batch = Batch(*example)
        count = batch.num_samples or 1
        default = default_chunk_size(count, machine.usable_cpus)
        self.chunk_size = plan.parallel.chunk_size or default
        self.num_chunks = count // self.chunk_size
        self.faults: list[str] = []
        self._team: Team | None = None
        self._chunks: RecordedChunk | None = None
        self._last_shared: tuple[Batch | None, Batch] = None, batch  # Asked twice in a call.
        self.balancer = LoadBalancer(self.num_workers, max(1, self.num_chunks))
        choice = choose_path(
            model, batch.trees, plan, optimizer=optimizer, chunk_size=self.chunk_size
        )
        self.reason, self.precision_reason = choice.reason, choice.precision_reason
        if choice.path != "plain":
            self._chunks = RecordedChunk(model, loss_fn, optimizer, whole=not self._partial)
            if self.loss_weight.kind == "unknown":
                self._chunks.judge = self.loss_weight.judge
            self.use(self._chunks)

    @property
    def path(self) -> str:
        """``"parallel"`` once workers run chunks; ``"plain"``."""
        return "plain" if self._chunks is None or not self._chunks.has_program else "parallel"

    @property
    def workers(self) -> list[WorkerStats]:
        """What each worker did so far."""
        return self.balancer.workers if self._team is not None else []

    def operations(self) -> list[Operation]:
        """None: chunks on several workers overlap."""
        return []

    def __call__(self, x: Any, y: Any = NO_TARGET) -> torch.Tensor:
        """Train on one batch; see ``TrainStep``."""
        with num_threads(1):
            return super().__call__(x, y)

    def many(
        self, x: Any, y: Any, steps: int, rates: list[list[float]] | None = None
    ) -> torch.Tensor | None:
        """Several steps in one call; see ``TrainStep``."""
        if Batch(x, y).num_samples != self._batch_size * steps:
            return None
        with num_threads(1):
            return super().many(x, y, steps, rates)

    def resize(self, num_chunks: int) -> None:
        """Batches have so many chunks from now on."""
        if num_chunks == self.num_chunks or self._chunks is None:
            return
        self.num_chunks = num_chunks
        self.balancer = LoadBalancer(self.num_workers, num_chunks)
        self._end_team()

    def close(self) -> None:
        """End the workers; batches take the plain path from then on."""
        self._stay_plain("the workers were ended")

    def _stay_plain(self, reason: str) -> None:
        """End the workers, and say why."""
        if self._chunks is not None:
            self._end_team()
            self._chunks = self._recorded = None
            self._one_by_one = True
            self.reason = reason

    def _end_team(self) -> None:
        team, self._team = self._team, None
        if team is not None:
            team.close()

    @property
    def _batch_size(self) -> int:
        return self.chunk_size * self.num_chunks

    @property
    def _partial(self) -> bool:
        """Whether something comes between the gradients and the update."""
        return (self.clip_norm, self.clip_value, self.between) != (None, None, None)

    def _key(self, batch: Batch) -> Any:
        """Of the chunks of a batch."""
        return batch.part(0, self.chunk_size).key()

    def _shared(self, batch: Batch) -> Batch:
        """The batch with the shares of its chunks, where these are not all the same."""
        of, found = self._last_shared
        if of is not batch:
            share = self.loss_weight.of_chunks(batch.y, self.chunk_size, self.num_chunks)
            found = batch if share is None else batch.with_share(share)
            self._last_shared = batch, found
        return found

    def _is_whole(self, batch: Batch, steps: int = 1) -> bool:
        """Whether there are so many batches of whole chunks."""
        return batch.is_rows and batch.num_samples == self._batch_size * steps

    def _steps_at_once(self, batch: Batch, rows: int, steps: int) -> int:
        if self._chunks is None:
            return 0
        return self._chunks.ready(self._key(self._shared(batch)), steps)

    def _fast_steps(
        self, batch: Batch, steps: int, rates: list[list[float]] | None
    ) -> torch.Tensor | None:
        """``steps`` steps on the team; ``None``: it does not take them."""
        chunks = self._chunks
        if chunks is None or not self._is_whole(batch, steps) or self.loss_weight.leaves_out(batch):
            return None
        batch = self._shared(batch)
        key = self._key(batch)
        if chunks.waits_for(key):
            first = self._placed(batch.part(0, self.chunk_size))
            chunks.rehearse(key, first, lambda low: self._backward(first, low))
        if chunks.ready(key, steps) < steps:
            return None
        began_s = time.monotonic()
        try:
            losses = self._on_team(key, self._placed(batch), steps, rates)
        except UpdateRefused as verdict:
            chunks.refuse(key, str(verdict))
            return None
        if self.between is not None:
            busy_s = time.monotonic() - began_s
            losses = self._of_hosts(losses[0], batch, busy_s).reshape(1)
        of_each = f"chunks of {self.chunk_size} on {self.num_workers} workers"
        chunks.note_steps(key, steps, f"{of_each}, one copy of the weights")
        self._finish()
        return losses

    def _on_team(
        self, key: Any, batch: Batch, steps: int, rates: list[list[float]] | None
    ) -> torch.Tensor:
        team = self._team_of(key)
        parts = [batch.tensors[number] for number in team.chunk.batch_parts]
        # From torch's generator, which checkpoints keep, in the order of the steps.
        keys = torch.randint(-(2**63), 2**63 - 1, (steps,)) if team.chunk.draws else None
        losses, done = [], 0
        while done < steps:
            left = [part[done * self._batch_size :] for part in parts]
            its_rates = None if rates is None else rates[done:]
            its_keys = None if keys is None else keys[done:]
            try:
                with placed(self.placements[0]):
                    made, stats = team.run(left, steps - done, its_rates, its_keys)
            except WorkerHangs as hang:
                losses.append(hang.losses[: hang.steps_done])
                done += hang.steps_done
                self._give_up(team)
                team = self._team_of(key)
                continue
            losses.append(made)
            done = steps
            for worker, row in enumerate(stats):
                begun = self.balancer.workers[worker].queue * made.numel()
                self.balancer.record(worker, begun=begun, **dataclasses.asdict(row))
            team.balance(self.balancer.balance_load())
        return torch.cat(losses) if len(losses) > 1 else losses[0]

    def _finish(self) -> None:
        assert self._chunks is not None
        if self._chunks.whole:
            self._forget_gradients()
            # What a scheduler looks at to tell that the optimizer has made its step.
            self.optimizer._opt_called = True  # type: ignore[attr-defined]
            return
        self._clip()
        self.optimizer.step()

    def _slow_step(self, batch: Batch) -> torch.Tensor:
        """Chunk by chunk where that may become a program, else as one batch."""
        chunks = self._chunks
        if chunks is None or not self._is_whole(batch):
            return super()._slow_step(batch)
        if self.loss_weight.leaves_out(batch):
            if self.between is not None:
                raise ModelError(
                    "hosts cannot weigh the labels that a loss of your own leaves out",
                    next_step=_WITHOUT_HOSTS,
                )
            chunks.reason = LEFT_OUT
            return super()._slow_step(batch)
        shared = self._shared(batch)
        if chunks.is_refused(self._key(shared)):
            return super()._slow_step(batch)
        self.optimizer.zero_grad(set_to_none=True)
        began_s = time.monotonic()
        loss = self._by_chunks(chunks, shared)
        if loss is None:
            return super()._slow_step(batch)
        if self.between is not None:
            loss = self._of_hosts(loss, batch, time.monotonic() - began_s)
        self._clip()
        self.optimizer.step()
        chunks.build()
        return loss

    def _by_chunks(self, chunks: RecordedChunk, batch: Batch) -> torch.Tensor | None:
        """Gradients and loss of a batch as PyTorch makes them, one chunk of it recorded.

        ``None``: chunks do not make this loss.
        """
        key = self._key(batch)
        # Another one in the second step: what changes from call to call shows.
        recorded = 0 if chunks.recordings_of(key) % 2 == 0 else self.num_chunks - 1
        batch = self._placed(batch)
        sums = PlainChunks(self.model, self.loss_fn, self._scale)
        self._answers = None if self.loss_weight.is_settled else []
        for number in range(self.num_chunks):
            part = batch.part(number * self.chunk_size, self.chunk_size)
            plain = functools.partial(self._backward, part)
            with sums.chunk() as add_loss:
                if number == recorded:
                    add_loss(chunks.record(key, part, plain))
                else:
                    add_loss(plain(False))
        answers, self._answers = self._answers, None
        if answers is not None and not self._chunks_make_the_loss(answers):
            sums.abandon()
            return None
        return sums.finish()

    def _chunks_make_the_loss(self, answers: list[tuple[Any, Batch]]) -> bool:
        """Whether this may be trained in chunks; if not, workers are given up.

        Raises:
            ModelError: there are other hosts, which have parts of the batch in any case.
        """
        try:
            half = (self.chunk_size + 1) // 2
            if self.loss_weight.check(answers, _WITHOUT_HOSTS, half):
                return True
            reason = self.loss_weight.note or ""
            if self.between is None:
                self.loss_weight.note = None  # It is one batch from now on.
        except ModelError as error:
            if self.between is not None:
                raise
            reason = f"{error.rule}; got {error.got}"
        if self.between is None:
            self._stay_plain(reason)
        return self.between is not None

    def _part(self, batch: Batch, *, first: bool) -> torch.Tensor:
        """A part of a batch that is not cut into chunks: plain."""
        return self._backward(self._placed(batch), False)

    @property
    def _scale(self) -> float:
        """Share of a chunk's loss in that of its batch."""
        return 1.0 if self.loss_weight.kind == "sum" else 1.0 / self.num_chunks

    def _team_of(self, key: Any) -> Team:
        """The team for a kind of chunk, made anew where the last one ran another kind."""
        assert self._chunks is not None
        chunk = self._chunks.chunk(key)
        if self._team is None or self._team.chunk is not chunk:
            self._end_team()
            self._team = self._new_team(chunk)
            self._team.balance(self.balancer.balance_load())
        return self._team

    def _new_team(self, chunk: Chunk) -> Team:
        assert self._chunks is not None
        kind: Callable[..., Team] = Team
        if self.config.executor == "processes":
            kind = functools.partial(ProcessTeam, max_restarts=self.config.max_restarts)
        return kind(
            chunk,
            self.optimizer,
            num_chunks=self.num_chunks,
            num_workers=self.num_workers,
            sums=self.loss_weight.kind == "sum",
            placements=self.placements[: self.num_workers],
            moves=self._moves,
            whole=self._chunks.whole,
            hang_s=self.config.hang_s,
            steal_threshold=self.config.steal_threshold,
        )

    def _give_up(self, team: Team) -> None:
        """A worker hangs: go on without it."""
        self.faults.append(f"a worker took longer than {self.config.hang_s:g} s and was given up")
        _ABANDONED.append(team)
        self._end_team()
        if self.num_workers == 1:
            raise RunError("a worker must end its chunk in time", got=self.faults[-1])
        self.num_workers -= 1
        self.balancer = LoadBalancer(self.num_workers, self.num_chunks)
