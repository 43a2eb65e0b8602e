"""The parts of a plan: processors, memory, checkpoints, the step, workers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..errors import PlanError
from ..machine import Machine, numa
from ..machine.affinity import ThreadAffinity
from ..units import MIB, parse_bytes
from .knob import (
    AUTO,
    knob,
    parse_float,
    parse_int,
    parse_ints,
    parse_threads,
    require_choice,
    require_int,
)


def default_num_threads() -> int:
    """Usable CPUs - 1, at least 1: one CPU is left to the operating system and the data queue."""
    return max(1, Machine.probe().usable_cpus - 1)


@dataclass(frozen=True)
class CpuConfig:
    """Threads of the step, where they run, and how far the data queue may run ahead.

    Attributes:
        num_threads: threads inside each operation. Default: usable CPUs - 1, at least 1.
            ``"auto"``: the count with the best measured rate, see ``Plan.resolve``.
        thread_affinity: ``none``, ``compact``, ``spread`` or a list of CPUs such as ``0,2,4-6``.
        queue_size: batches prepared ahead of the step, at least 1.

    Raises:
        PlanError: a value breaks its rule.
    """

    num_threads: int | Literal["auto"] = knob(
        factory=default_num_threads,
        help="threads inside each operation, or auto (default: usable CPUs - 1)",
        parse=parse_threads,
        metavar="N",
    )
    thread_affinity: ThreadAffinity = knob(
        factory=lambda: ThreadAffinity.parse("none"),
        help="where threads run: none, compact, spread, or CPUs such as 0,2,4-6",
        parse=ThreadAffinity.parse,
        metavar="WHERE",
    )
    queue_size: int = knob(4, help="batches prepared ahead", parse=parse_int, metavar="N")

    def __post_init__(self) -> None:
        if self.num_threads != AUTO:
            require_int("num_threads", self.num_threads, at_least=1, flag="--num-threads")
        if isinstance(self.thread_affinity, str):
            object.__setattr__(self, "thread_affinity", ThreadAffinity.parse(self.thread_affinity))
        elif not isinstance(self.thread_affinity, ThreadAffinity):
            raise PlanError(
                "thread_affinity must be none, compact, spread or a list of CPUs",
                got=repr(self.thread_affinity),
                next_step="use 'none'",
            )
        require_int("queue_size", self.queue_size, at_least=1, flag="--queue-size")


@dataclass(frozen=True)
class NumaConfig:
    """Which NUMA node each worker thread runs on, and where its memory is taken from.

    Attributes:
        node_assignments: node number for worker 0, 1, ...; empty: the kernel decides.
        allocation_policy: ``default``, ``local``, ``bind`` (only the assigned nodes) or
            ``interleave`` (pages in turn over the assigned nodes).

    Raises:
        PlanError: a value breaks its rule.
    """

    node_assignments: tuple[int, ...] = knob(
        (),
        help="NUMA node of each worker, such as 0,0,1,1",
        parse=parse_ints,
        flag="--numa-nodes",
        metavar="NODES",
    )
    allocation_policy: str = knob(
        "default",
        help=f"memory policy: {', '.join(numa.ALLOCATION_POLICIES)}",
        parse=str,
        flag="--numa-policy",
        metavar="POLICY",
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "node_assignments", tuple(self.node_assignments))
        for node in self.node_assignments:
            require_int("each of node_assignments", node, at_least=0, flag="--numa-nodes")
        require_choice("allocation_policy", self.allocation_policy, numa.ALLOCATION_POLICIES)

    def configure_affinity(self, machine: Machine | None = None) -> numa.NumaBinding:
        """Pin this process's threads to the assigned nodes and set the memory policy.

        A context manager: on leaving, affinity and policy are what they were before.

        Args:
            machine: where to look the nodes up; this machine when ``None``.

        Raises:
            PlanError: a node does not exist, or the kernel refuses the policy.
        """
        return numa.configure(
            self.node_assignments, self.allocation_policy, machine or Machine.probe()
        )


@dataclass(frozen=True)
class MemoryConfig:
    """The memory a run may take and how it is laid out.

    Attributes:
        limit_bytes: refuse a run predicted to need more. ``None``: the limit of the control
            group or the memory of the machine, whichever is less.
        micro_batch_size: samples per forward and backward pass; gradients of the micro-batches
            are accumulated to the full batch. ``None``: the whole batch at once.
        tensor_arena: take large tensors from an arena of hotloop's own, whose size is known before
            the run and whose pages are not given back between steps: ``try`` or ``never``.
        huge_pages: back the batch pool and the arena with huge pages: ``never``, ``try``, or
            ``require`` (the pool; the arena tries).
        mmap_above_bytes: packed samples larger than this stay in a file that is mapped, so
            that resident memory does not grow with the data.
        line_bytes: alignment of batch rows; ``None``: the cache line of the machine, else 64.
        enclave_overhead_bytes: counted in the budget; ``None``: 256 MiB inside an enclave
            (the guide's figure), 0 outside.

    Raises:
        PlanError: a value breaks its rule.
    """

    limit_bytes: int | None = knob(
        None,
        help="refuse a run predicted to need more, such as 2GiB",
        parse=parse_bytes,
        flag="--memory-limit",
        metavar="SIZE",
    )
    micro_batch_size: int | None = knob(
        None,
        help="samples per pass; gradients are accumulated to the batch",
        parse=parse_int,
        metavar="N",
    )
    tensor_arena: str = knob(
        "try", help="tensors from an arena of known size: try, never", parse=str, metavar="WHEN"
    )
    huge_pages: Literal["never", "try", "require"] = knob(
        "never",
        help="huge pages for batches and arena: never, try, require",
        parse=str,
        metavar="WHEN",
    )
    mmap_above_bytes: int = knob(
        16 * MIB,
        help="samples larger than this stay in a mapped file",
        parse=parse_bytes,
        flag="--mmap-above",
        metavar="SIZE",
    )
    line_bytes: int | None = knob(
        None, help="alignment of batch rows in bytes", parse=parse_int, metavar="N"
    )
    enclave_overhead_bytes: int | None = knob(
        None,
        help="enclave overhead counted in the budget",
        parse=parse_bytes,
        flag="--enclave-overhead",
        metavar="SIZE",
    )

    def __post_init__(self) -> None:
        if self.limit_bytes is not None:
            require_int("limit_bytes", self.limit_bytes, at_least=1, flag="--memory-limit")
        if self.micro_batch_size is not None:
            require_int(
                "micro_batch_size", self.micro_batch_size, at_least=1, flag="--micro-batch-size"
            )
        require_choice("tensor_arena", self.tensor_arena, ("try", "never"))
        require_choice("huge_pages", self.huge_pages, ("never", "try", "require"))
        require_int("mmap_above_bytes", self.mmap_above_bytes, at_least=0, flag="--mmap-above")
        if self.line_bytes is not None:
            require_int("line_bytes", self.line_bytes, at_least=16, flag="--line-bytes")
            if self.line_bytes & (self.line_bytes - 1):
                raise PlanError(
                    "line_bytes must be a power of two",
                    got=self.line_bytes,
                    next_step="set line_bytes = 64",
                )
        if self.enclave_overhead_bytes is not None:
            require_int(
                "enclave_overhead_bytes",
                self.enclave_overhead_bytes,
                at_least=0,
                flag="--enclave-overhead",
            )


@dataclass(frozen=True)
class CheckpointConfig:
    """When a run is saved. It is always saved at the end of each epoch.

    Attributes:
        every_steps: also after this many steps; ``None``: not by count.
        every_s: also when this many seconds have passed since the last; 0: not by time. (A file
            has no null to switch a default off with.)
        keep_last: checkpoints kept, at least 1.

    Raises:
        PlanError: a value breaks its rule.
    """

    every_steps: int | None = knob(
        None, help="save every N steps too", parse=parse_int,
        flag="--checkpoint-every-steps", metavar="N",
    )  # fmt: skip
    every_s: float = knob(
        60.0, help="save when this many seconds have passed too; 0: do not", parse=parse_float,
        flag="--checkpoint-every-s", metavar="S",
    )  # fmt: skip
    keep_last: int = knob(
        3, help="checkpoints kept", parse=parse_int, flag="--keep-last", metavar="K"
    )

    def __post_init__(self) -> None:
        if self.every_steps is not None:
            require_int(
                "every_steps", self.every_steps, at_least=1, flag="--checkpoint-every-steps"
            )
        numeric = isinstance(self.every_s, int | float) and not isinstance(self.every_s, bool)
        if not numeric or not math.isfinite(self.every_s) or self.every_s < 0:
            raise PlanError(
                "every_s must be a number of seconds, or 0 for never",
                got=repr(self.every_s),
                next_step="set every_s = 60 (--checkpoint-every-s)",
            )
        require_int("keep_last", self.keep_last, at_least=1, flag="--keep-last")


@dataclass(frozen=True)
class StepConfig:
    """How the train step is computed.

    Attributes:
        compile: ``"off"``: as PyTorch runs it. ``"auto"`` and ``"always"``: recorded, then run as a
            program; on a GPU as a CUDA graph, which with ``"always"`` the compiler fuses.
        precision: ``"float32"``: exact. ``"bfloat16"``: forward and backward in bfloat16 where
            autocast says so (in perceptrons: the factors of products), weights and optimizer in
            float32. ``"auto"``: bfloat16 where copies
            of the model, trained for 32 steps in both, lose alike (mean losses of 8 steps within
            2 %) and bfloat16 is faster; the step's reason says what was found.

    Raises:
        PlanError: a value breaks its rule.
    """

    compile: Literal["auto", "always", "off"] = knob(
        "auto",
        help="the train step as a program: auto, always; off: as PyTorch runs it",
        parse=str,
        metavar="WHEN",
    )
    precision: Literal["float32", "bfloat16", "auto"] = knob(
        "float32", help="of the train step: float32, bfloat16, auto", parse=str, metavar="TYPE"
    )

    def __post_init__(self) -> None:
        require_choice("compile", self.compile, ("auto", "always", "off"))
        require_choice("precision", self.precision, ("float32", "bfloat16", "auto"))


@dataclass(frozen=True)
class ParallelConfig:
    """Data-parallel training: how a batch is cut, and who runs the parts.

    Attributes:
        num_workers: threads of one core each that share a batch and one copy of the weights;
            ``None``: none, one step with ``cpu.num_threads`` threads inside each operation. Results
            are the same to the last bit for any number of workers.
        chunk_size: samples of a part; another size adds in another order. ``None``: one part for
            each usable CPU, but 4 to 32 samples, halved until it divides the batch.
        executor: ``"threads"``, or ``"processes"``: slower, but a worker that crashes is started
            anew and the run goes on.
        max_restarts: of such processes in a run, before it is given up.
        steal_threshold: chunks a worker must have left for an idle one to take one of them.
        hang_s: a worker that runs a chunk for longer is given up; 0: never.
        host_shares: of several hosts: ``"measured"``: by the rates they show, so that the last bits
            depend on them; ``"cpus"``: by their CPUs, the same in every run.
        host_timeout_s: a host that does not answer for so long ends the run on all hosts.

    Raises:
        PlanError: a value breaks its rule.
    """

    num_workers: int | None = knob(
        None, help="workers that share each batch (default: none)", parse=parse_int, metavar="N"
    )
    chunk_size: int | None = knob(
        None, help="samples that a worker runs at a time", parse=parse_int, metavar="N"
    )
    executor: Literal["threads", "processes"] = knob(
        "threads", help="workers are threads or processes", parse=str, metavar="KIND"
    )
    max_restarts: int = knob(
        10, help="restarts of worker processes in a run", parse=parse_int, metavar="N"
    )
    steal_threshold: int = knob(
        1, help="chunks left from which an idle worker takes one", parse=parse_int, metavar="N"
    )
    hang_s: float = knob(
        5.0, help="give a worker up after so many seconds; 0: never", parse=parse_float, metavar="S"
    )
    host_shares: Literal["measured", "cpus"] = knob(
        "measured", help="parts of hosts by: measured, cpus", parse=str, metavar="RULE"
    )
    host_timeout_s: float = knob(
        300.0, help="give the run up when a host is silent for so long", parse=parse_float,
        metavar="S",
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("num_workers", "chunk_size", "steal_threshold"):
            value = getattr(self, name)
            if value is not None or name == "steal_threshold":
                require_int(name, value, at_least=1, flag=f"--{name.replace('_', '-')}")
        require_int("max_restarts", self.max_restarts, at_least=0, flag="--max-restarts")
        require_choice("executor", self.executor, ("threads", "processes"))
        numeric = isinstance(self.hang_s, int | float) and not isinstance(self.hang_s, bool)
        if not numeric or not math.isfinite(self.hang_s) or self.hang_s < 0:
            raise PlanError(
                "hang_s must be a number of seconds, or 0 for never",
                got=repr(self.hang_s),
                next_step="set hang_s = 5 (--hang-s)",
            )
        require_choice("host_shares", self.host_shares, ("measured", "cpus"))
        timeout = self.host_timeout_s
        numeric = isinstance(timeout, int | float) and not isinstance(timeout, bool)
        if not numeric or not math.isfinite(timeout) or timeout <= 0:
            raise PlanError(
                "host_timeout_s must be a number of seconds above 0",
                got=repr(timeout),
                next_step="set host_timeout_s = 300 (--host-timeout-s)",
            )


PARTS: dict[str, type] = {
    "cpu": CpuConfig,
    "numa": NumaConfig,
    "memory": MemoryConfig,
    "checkpoint": CheckpointConfig,
    "step": StepConfig,
    "parallel": ParallelConfig,
}
