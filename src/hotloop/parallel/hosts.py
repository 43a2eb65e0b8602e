"""``Hosts``: several machines that train one model, one process each, as ``torchrun`` starts them.

Each host runs its part of every batch on its own workers. Then one reduction adds everything that
hosts must agree on: gradients, float buffers, the loss, who was asked to stop, how long each took.
So all hosts make the same update, and the next decision, from the same numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from ..errors import HotloopError, InputError, ModelError, RunError
from .balance import LoadBalancer

# Shares are looked at again after so many batches; the first ones still pay for loading.
REBALANCE_STEPS = 20
_WARM_STEPS = 3
_LOSS, _ROWS, _WEIGHT, _STOP, _SECONDS = 0, 1, 2, 3, 4
T = TypeVar("T")


class Hosts:
    """The hosts of a run; this one is number ``rank`` of ``count``.

    Attributes:
        shares: chunks of a whole batch that each host runs.
        stopping: whether any host was asked to stop; the same on all hosts after each step.
        asked_to_stop: tells whether this one was.
        resize: told the chunks of this host when its share changes.
    """

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count
        self.shares: list[int] = []
        self.stopping = False
        self.asked_to_stop: Callable[[], bool] = lambda: False
        self.resize: Callable[[int], None] = lambda num_chunks: None
        self._chunk_size = 0
        self._measured = False
        self._steps = 0
        self._balancer: LoadBalancer | None = None
        self._flat = torch.empty(0)

    def first(self, make: Callable[[], T]) -> T:
        """What ``make`` gives on host 0, on all hosts; its error too.

        Raises:
            RunError: host 0 could not make it, or could not be reached.
        """
        found: list[Any] = [None, None]
        caught: HotloopError | None = None
        if self.rank == 0:
            try:
                found[0] = make()
            except HotloopError as error:
                caught = error
                found[1] = type(error), str(error)
        with answering():
            dist.broadcast_object_list(found, src=0)
        if caught is not None:
            raise caught
        if found[1] is not None:
            kind, line = found[1]
            heard: HotloopError = kind.__new__(kind)  # Some kinds take other arguments.
            HotloopError.__init__(heard, line)
            raise heard
        result: T = found[0]
        return result

    def gather(self, value: Any) -> list[Any]:
        """The value of each host."""
        found: list[Any] = [None] * self.count
        with answering():
            dist.all_gather_object(found, value)
        return found

    def agree(self, **values: Any) -> None:
        """Refuse to go on where hosts were told different things.

        Raises:
            InputError: a value differs; on all hosts.
        """
        told = self.gather(values)
        for name in values:
            each = [theirs[name] for theirs in told]
            if any(value != each[0] for value in each):
                raise InputError(
                    f"{name} must be the same on all hosts",
                    got=", ".join(f"{value} on host {host}" for host, value in enumerate(each)),
                    next_step="start the same command on every host",
                )

    def same_model(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: Any = None
    ) -> None:
        """Give every host the parameters and buffers of host 0; a loss module's too.

        Raises:
            ModelError: models or optimizers are not alike; on all hosts.
        """
        tensors = [
            pair
            for module in _modules(model, loss_fn)
            for pair in (*module.named_parameters(), *module.named_buffers())
        ]
        mine = [
            f"{name} {tuple(t.shape)} {t.dtype}{' trained' if t.requires_grad else ''}"
            for name, t in tensors
        ]
        for number, group in enumerate(optimizer.param_groups):
            rest = {name: value for name, value in group.items() if name != "params"}
            kind, count = type(optimizer).__name__, len(group["params"])
            mine.append(f"{kind}, group {number}: {count} {rest}")
        first, *others = self.gather(mine)
        for host, theirs in enumerate(others, 1):
            for one, other in zip_longest(first, theirs, fillvalue="nothing more"):
                if one != other:
                    raise ModelError(
                        "all hosts must build the same model and optimizer",
                        got=f"{one} on host 0, {other} on host {host}",
                        next_step="start the same script on every host",
                    )
        with torch.no_grad(), answering():
            for _, tensor in tensors:
                dist.broadcast(tensor, src=0)

    def cut(self, batch_size: int, chunk_size: int, cpus: list[int], *, measured: bool) -> None:
        """Cut batches: first by the CPUs of the hosts, then, if ``measured``, by their rates.

        Raises:
            InputError: not whole chunks, or fewer than hosts.
        """
        num_chunks, rest = divmod(batch_size, chunk_size)
        if rest or num_chunks < self.count:
            raise InputError(
                f"a batch must be whole chunks of {chunk_size} samples, one for each of "
                f"{self.count} hosts or more",
                got=f"batch_size {batch_size}",
                next_step="raise batch_size, or set parallel.chunk_size",
            )
        self._chunk_size, self._measured = chunk_size, measured
        self._balancer = LoadBalancer(self.count, num_chunks)
        self.shares = _one_each(
            self._balancer.adjuster.shares(num_chunks, [float(c) for c in cpus])
        )

    def sizes(self, num_rows: int) -> list[int]:
        """Samples of each host in a batch of ``num_rows``; a smaller batch in proportion."""
        total = sum(self.shares)
        ends = [num_rows * end // total for end in accumulate(self.shares)]
        return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]

    def part(self, batch: torch.Tensor) -> torch.Tensor:
        """This host's samples of a batch; may be none of a last, smaller one."""
        if len(batch) == sum(self.shares) * self._chunk_size:
            self.resize(self.shares[self.rank])
        begins = [0, *accumulate(self.sizes(len(batch)))]
        return batch[begins[self.rank] : begins[self.rank + 1]]

    def combine(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: torch.Tensor,
        num_rows: int,
        busy_s: float,
        weight: float | None,
        loss_fn: Any = None,
    ) -> torch.Tensor:
        """Make ``grad``, float buffers and the loss those of the whole batch, on every host.

        Args:
            loss: of this host's ``num_rows`` samples, which took ``busy_s``.
            weight: of the loss in that of the batch (``LossWeight.count``); ``None``: it is a sum.
            loss_fn: its buffers count, where it is a module.

        Raises:
            RunError: a host did not answer in time.
        """
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        of_all = [b for module in _modules(model, loss_fn) for b in module.buffers()]
        buffers = [b for b in of_all if b.is_floating_point()]
        head = _SECONDS + self.count
        sizes = [head + len(weights), *(t.numel() for t in (*weights, *buffers))]
        device = weights[0].device
        if self._flat.numel() != sum(sizes) or self._flat.device != device:
            wide = any(t.dtype == torch.float64 for t in weights)
            kind = torch.float64 if wide else torch.float32
            self._flat = torch.empty(sum(sizes), dtype=kind, device=device)
        fields, *views = self._flat.split(sizes)
        views = [v.view(t.shape) for v, t in zip(views, (*weights, *buffers), strict=True)]
        fields.zero_()
        scale = (1.0 if num_rows else 0.0) if weight is None else weight
        # A mean over no labels is no number; yet it counts for nothing.
        fields[_LOSS] = loss.detach() * scale if scale else 0.0
        fields[_ROWS], fields[_WEIGHT] = num_rows, scale
        fields[_STOP] = float(self.asked_to_stop())
        fields[_SECONDS + self.rank] = busy_s
        with torch.no_grad():
            for number, (parameter, view) in enumerate(zip(weights, views, strict=False)):
                fields[head + number] = float(parameter.grad is not None)
                if parameter.grad is None or not scale:
                    view.zero_()
                else:
                    torch.mul(parameter.grad, scale, out=view)
            for buffer, view in zip(buffers, views[len(weights) :], strict=True):
                torch.mul(buffer, num_rows, out=view)
            with answering():
                dist.all_reduce(self._flat)
            known = fields.tolist()
            total = known[_ROWS]
            divisor = 1.0 if weight is None else known[_WEIGHT]
            for number, (parameter, view) in enumerate(zip(weights, views, strict=False)):
                if not known[head + number]:
                    continue
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
                torch.div(view, divisor or 1.0, out=parameter.grad)
            for buffer, view in zip(buffers, views[len(weights) :], strict=True):
                torch.div(view, total, out=buffer)
        self._copy_counters(of_all, int(total))
        self.stopping = known[_STOP] > 0
        self._note(int(total), known[_SECONDS:head])
        combined: torch.Tensor = fields[_LOSS] / divisor
        return combined

    def _copy_counters(self, buffers: Sequence[torch.Tensor], total: int) -> None:
        """A host without samples did not count this batch."""
        sizes = self.sizes(total)
        if min(sizes) == 0:
            busiest = sizes.index(max(sizes))
            with answering():
                for buffer in buffers:
                    if not buffer.is_floating_point():
                        dist.broadcast(buffer, src=busiest)

    def _note(self, total: int, seconds: list[float]) -> None:
        """Rates of the hosts; from time to time, new shares."""
        if total != sum(self.shares) * self._chunk_size or self._balancer is None:
            return
        self._steps += 1
        if not self._measured or self._steps <= _WARM_STEPS:
            return
        for host, (share, busy_s) in enumerate(zip(self.shares, seconds, strict=True)):
            self._balancer.record(host, share, busy_s)
        if self._steps % REBALANCE_STEPS == 0:
            rates = [w.rate_per_s or 1.0 for w in self._balancer.workers]
            self.shares = _one_each(
                self._balancer.adjuster.shares(self._balancer.num_chunks, rates, self.shares)
            )


def _modules(model: nn.Module, loss_fn: Any) -> list[nn.Module]:
    return [model, loss_fn] if isinstance(loss_fn, nn.Module) else [model]


@contextlib.contextmanager
def answering() -> Iterator[None]:
    """Around what waits for other hosts.

    Raises:
        RunError: one did not answer.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, HotloopError):
            raise
        raise RunError(
            "every host must answer in time",
            got=str(error).splitlines()[0][:200],
            next_step="start all hosts again with resume; torchrun --max-restarts does so",
        ) from error


def _one_each(shares: list[int]) -> list[int]:
    """At least one chunk for each host, from whoever has most."""
    shares = list(shares)
    while min(shares) == 0:
        shares[shares.index(max(shares))] -= 1
        shares[shares.index(0)] += 1
    return shares
