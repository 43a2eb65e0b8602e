"""First stage of a run: its hosts, its checkpoint, and the plan for this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..data.batches import DEFAULT_BATCH_SIZE
from ..errors import CheckpointError, InputError
from ..parallel import Hosts
from ..plan import AUTO, Plan
from ..step.path_choice import resumed_plan
from .checkpoint import Checkpoint, CheckpointStore
from .hosts import newest_of, plan_of
from .request import FitRequest


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """What a run is before its data is opened.

    Attributes:
        plan: every knob has a value. hosts: all that take part; ``None``: this one alone.
        store: where checkpoints go, if anywhere. found: the checkpoint that is gone on from.
        tuned: knobs taken over from ``hotloop tune``; ``None``: none. notes: for the report.
    """

    plan: Plan
    hosts: Hosts | None
    store: CheckpointStore | None
    found: Checkpoint | None
    tuned: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()

    @property
    def shares(self) -> list[str]:
        """A line on this host's part of the work, where there are several."""
        hosts = self.hosts
        if hosts is None:
            return []
        return [f"host {hosts.rank} of {hosts.count}; chunks of each: {hosts.shares}"]


def resolve(request: FitRequest, hosts: Hosts | None) -> Resolved:
    """Agree with the other hosts, find the checkpoint, and give every knob a value."""
    if hosts is not None:
        hosts.agree(**request.agreed())
    store, found = _open_store(request, hosts)
    plan = _resolved_plan(request, found)
    if hosts is not None:
        plan = plan_of(hosts, plan, request.batch_size or DEFAULT_BATCH_SIZE, request.machine)
    notes = found.skipped if found else ()
    return Resolved(plan=plan, hosts=hosts, store=store, found=found, notes=notes)


def _open_store(
    request: FitRequest, hosts: Hosts | None
) -> tuple[CheckpointStore | None, Checkpoint | None]:
    folder = request.checkpoint_dir
    if folder is None:
        if request.resume:
            raise InputError("resume needs checkpoint_dir", next_step="pass checkpoint_dir=...")
        return None, None
    store = CheckpointStore(folder, keep_last=request.asked.checkpoint.keep_last)

    def latest() -> Checkpoint | None:
        found = store.latest()
        if found is not None and not request.resume:
            raise CheckpointError(
                f"{folder} already holds a run, at step {found.step}",
                next_step="resume it, or choose another folder",
            )
        return found

    if hosts is None:
        return store, latest()
    return store if hosts.rank == 0 else None, newest_of(hosts, store, latest)


def _resolved_plan(request: FitRequest, found: Checkpoint | None) -> Plan:
    """A resumed run keeps its threads, path and precision unless it is told otherwise."""
    plan = request.asked
    if found is not None:
        if plan.cpu.num_threads == AUTO:
            # Another number of threads adds in another order: the last bits would differ.
            plan = plan.replace({"cpu.num_threads": int(found.document["num_threads"])})
        # A run that records its steps may have had no program yet.
        records = found.document.get("programs") is not None
        path = "compiled" if records else found.document.get("path")
        plan = resumed_plan(plan, path, found.document.get("precision", "float32"))
    return plan.resolve(request.machine, request.ceilings)
