"""Batch memory: preallocated, aligned, reused; and its size before the run.

layout   BatchLayout: rows of one tensor at an aligned stride
arena    one anonymous mapping, aligned and touched, on huge pages when asked
pool     MemoryPool and BatchBuffer: buffers lent out and taken back across threads
"""

from .layout import BatchLayout
from .pool import BatchBuffer, BufferState, MemoryPool, PoolStats

__all__ = ["BatchBuffer", "BatchLayout", "BufferState", "MemoryPool", "PoolStats"]
