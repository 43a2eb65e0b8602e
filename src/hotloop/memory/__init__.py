"""Memory: batches and tensors preallocated, aligned, reused; and its size before the run.

layout        BatchLayout: rows of one tensor at an aligned stride
arena         one anonymous mapping, aligned and touched, on huge pages when asked
pool          MemoryPool and BatchBuffer: buffers lent out and taken back across threads
tensor_arena  TensorArena: torch's CPU tensors from one range
arena_model   ArenaModel: how far that range will be used, without using it
image_layout  images with channels adjacent, as convolutions like them
trace         one step on shapes alone: every allocation in order; preserve: it leaves nothing
misfit        a model that does not fit its data, told in one line
tree          a batch is a tensor, or any tree of tensors; Arguments of a model
rehearsal     tiny layers that make kernel code resident, so that it can be counted
budget        Budget: bytes by component before the run
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .layout import BatchLayout
from .pool import BatchBuffer, BufferState, MemoryPool, PoolStats
from .tensor_arena import ArenaStats, TensorArena
from .tree import Arguments

if TYPE_CHECKING:
    from .budget import Budget, largest_micro_batch, pool_buffers

# Tracing brings 0.4 s of imports, which who only wants the arena need not pay.
_OF_BUDGET = ("Budget", "largest_micro_batch", "pool_buffers")

__all__ = [
    "ArenaStats",
    "Arguments",
    "BatchBuffer",
    "BatchLayout",
    "Budget",
    "BufferState",
    "MemoryPool",
    "PoolStats",
    "TensorArena",
    "largest_micro_batch",
    "pool_buffers",
]


def __getattr__(name: str) -> Any:
    if name not in _OF_BUDGET:
        raise AttributeError(f"module 'hotloop.memory' has no attribute {name!r}")
    return getattr(importlib.import_module(".budget", __name__), name)
