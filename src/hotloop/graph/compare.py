"""Whether two recordings are the same step on other batches."""

from __future__ import annotations

import torch

from .recording import Entry, Recording

# A larger tensor made anew in each step is no constant of the code.
_MOST_ELEMENTS = 4096


def difference(one: Recording, other: Recording) -> str | None:
    """How two recordings differ in more than the batch's values; ``None``: they do not."""
    for number, (a, b) in enumerate(zip(one.entries, other.entries, strict=False)):
        if a != b:
            return _told(a, b, number)
    if len(one.entries) != len(other.entries):
        longer = max(one.entries, other.entries, key=len)
        extra = longer[min(len(one.entries), len(other.entries))]
        return f"{_where(extra)}{extra.op} is called in one step and not in the next"
    if (one.gradients, one.loss, one.inputs) != (other.gradients, other.loss, other.inputs):
        return "the gradients of one step are made in another way than those of the next"
    if (one.outputs, one.facts) != (other.outputs, other.facts):
        return "one step gives other results, or leaves other gradients, than the next"
    for storage, (tensor, version) in one.constants.items():
        again, version_again = other.constants.get(storage, (None, 0))
        if again is None:
            return "a tensor of one step is not there in the next"
        same = tensor is again and version == version_again
        if not same and not _same_values(tensor, again):
            where = next((_where(e) for e in one.entries if _uses(e, storage)), "")
            return f"{where}a tensor that no operation of the step made differs from step to step"
    return None


def _same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one is other or one.numel() > _MOST_ELEMENTS or one.shape != other.shape:
        return False
    if one.dtype != other.dtype or one.is_sparse or other.is_sparse:
        return False
    return one.detach().cpu().numpy().tobytes() == other.detach().cpu().numpy().tobytes()


def _uses(entry: Entry, storage: int) -> bool:
    return any(getattr(part, "storage", None) == storage for part in entry.args)


def _where(entry: Entry) -> str:
    return f"{entry.line}: " if entry.line else ""


def _told(a: Entry, b: Entry, number: int) -> str:
    if a.op != b.op:
        return f"{_where(a)}call {number} of the step is {a.op} in one step and {b.op} in the next"
    for one, other in zip(a.args, b.args, strict=False):
        if one != other and not hasattr(one, "storage"):
            return f"{_where(a)}{a.op} gets {one} in one step and {other} in the next"
    return f"{_where(a)}{a.op} gets other tensors in one step than in the next"
