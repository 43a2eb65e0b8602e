"""What a run sets and gives back: threads, placement, allocator, random state, signals."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import PlanError
from ..machine import Machine
from ..machine.affinity import pinned
from ..machine.threads import num_threads
from ..memory import TensorArena
from ..plan import AUTO, Plan
from .interrupt import StopRequest


def threads_of(plan: Plan) -> int:
    """The thread count of a resolved plan."""
    threads = plan.cpu.num_threads
    if threads == AUTO:
        raise PlanError("num_threads must be resolved before a run", got=AUTO)
    return threads


@dataclass(frozen=True)
class RunContext:
    """What a run is given: ``stop`` hears signals; ``arena``, if there is one, has its tensors."""

    stop: StopRequest
    arena: TensorArena | None


@contextlib.contextmanager
def run_context(
    model: nn.Module, machine: Machine, plan: Plan, seed: int, notes: list[str]
) -> Iterator[RunContext]:
    """Threads, placement, allocator, random state and signals of a run; all restored."""
    threads = threads_of(plan)
    modes = [(module, module.training) for module in model.modules()]
    with contextlib.ExitStack() as stack:
        workers = plan.parallel.num_workers
        # Beside workers, OpenMP's threads would spin on the workers' cores.
        stack.enter_context(num_threads(threads if workers is None else 1))
        if workers is None:  # Workers place themselves.
            stack.enter_context(pinned(plan.cpu.thread_affinity.cpus(machine, threads)))
        if plan.numa.node_assignments or plan.numa.allocation_policy != "default":
            stack.enter_context(plan.numa.configure_affinity(machine))
        arena = None
        if plan.memory.tensor_arena == "try":
            arena = stack.enter_context(TensorArena(huge_pages=plan.memory.huge_pages))
            if arena.reason is not None:
                notes.append(f"tensors come from the system allocator: {arena.reason}")
                arena = None
            else:
                arena.reset_peak()
        device = next(model.parameters()).device
        on_gpu = [device] if device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=on_gpu))
        torch.manual_seed(seed)
        # Layers that the user put into eval mode stay so; a model that is in it as a whole has
        # been evaluated before.
        if not model.training:
            model.train()
        try:
            yield RunContext(stack.enter_context(StopRequest()), arena)
        finally:
            for module, mode in modes:
                module.training = mode
