"""What a batch is: ``(x, y)``, or ``(x,)`` where the loss is in what the model answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from ..memory.tree import flatten, num_samples

Batch = tuple[Any, ...]
# What a loader gives -> (x, y) or (x,).
ToBatch = Callable[[Any], Any]


def as_batch(value: Any) -> Batch:
    """``(x, y)`` of two parts; ``(x,)`` of anything else: one tensor, a dict, three parts.

    Args:
        value: what a loader gives for a batch: a tuple or list of two parts is samples and targets.
    """
    if isinstance(value, tuple | list) and not isinstance(value, PackedSequence):
        if len(value) == 2:
            return value[0], value[1]
        if len(value) == 1:
            return (value[0],)
    return (value,)


def batch_of(value: Any, to_batch: ToBatch | None) -> Batch:
    """The batch of what a loader gives, by the user's rule where there is one."""
    return as_batch(value if to_batch is None else to_batch(value))


def size_of(batch: Batch, default: int = 1) -> int:
    """Samples in a batch: the first size that all tensors of x have, or those of x and y."""
    return num_samples(batch[0]) or num_samples(*batch) or _list_length(batch) or default


def _list_length(batch: Batch) -> int | None:
    """Of targets that are a list with an entry for each sample, or of x where it is one."""
    lengths = [len(part) for part in reversed(batch) if isinstance(part, list)]
    return lengths[0] if lengths else None


def alike(a: Any, b: Any) -> bool:
    """Whether two trees are the same to the last bit."""
    tensors_a, structure_a = flatten(a)
    tensors_b, structure_b = flatten(b)
    return structure_a == structure_b and all(map(_same_bits, tensors_a, tensors_b))


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or a.layout != b.layout:
        return False
    if a.layout != torch.strided or a.device.type != "cpu":
        return False  # Not known.
    if not a.numel():
        return True
    return torch.equal(*(t.detach().contiguous().view(-1).view(torch.uint8) for t in (a, b)))


def describe(tree: Any, name: str) -> list[str]:
    """Each tensor of a tree as ``name: dtype [shape]``."""
    if isinstance(tree, torch.Tensor):
        dtype = str(tree.dtype).removeprefix("torch.")
        return [f"{name}: {dtype} {list(tree.shape)}"]
    if isinstance(tree, dict):
        return [line for key, part in tree.items() for line in describe(part, f"{name}[{key!r}]")]
    if isinstance(tree, tuple | list):
        parts = enumerate(tree)
        return [line for place, part in parts for line in describe(part, f"{name}[{place}]")]
    tensors = flatten(tree)[0]
    if not tensors:
        return [f"{name}: {type(tree).__name__}"]
    return [line for t in tensors for line in describe(t, f"{name} ({type(tree).__name__})")]
