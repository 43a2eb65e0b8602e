"""Whether a loss of a batch is what its parts' losses make, tried on answers that are there.

The model is not called again. The loss function is, on copies; torch's, Python's and NumPy's random
numbers, and a loss module's buffers, stay as they are.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import nn

from ..graph.recording import Entry, Recording, TensorRef
from ..memory import tree
from .batch import Batch

# Relative, of losses in float64; and where a loss takes no float64.
_BOUND, _LOOSE_BOUND = 1e-6, 1e-4
_MEAN = 1
# Of a loss module: each trial works on a copy.
_MOST_ELEMENTS = 2**20
_NO_SAMPLES = "the model's answer has no samples in its first dimension"
_aten = torch.ops.aten


@dataclass(frozen=True)
class Compared:
    """The loss of a batch, and what its parts make of it.

    Attributes:
        unknown: why nothing can be said.
    """

    whole: float = 0.0
    of_parts: float = 0.0
    is_alike: bool = False
    unknown: str | None = None


def compared(loss_fn: Callable[..., Any], parts: Sequence[tuple[Any, Batch]]) -> Compared:
    """The loss of answers and targets put together, beside those of the parts by their shares.

    Args:
        parts: the model's answer to each part, and the part with its share; two or more.
    """
    last = Compared(unknown=_NO_SAMPLES)
    if len(parts) < 2:
        return last
    if isinstance(loss_fn, nn.Module):
        tensors = [*loss_fn.parameters(), *loss_fn.buffers()]
        if sum(t.numel() for t in tensors) > _MOST_ELEMENTS:
            return Compared(unknown="the loss module is too large to be tried on a copy")
    for dim in (0, 1):
        joined = _joined(parts, dim)
        if joined is None:
            continue
        for to, bound in ((torch.float64, _BOUND), (None, _LOOSE_BOUND)):
            try:
                last = _evaluated(loss_fn, joined, parts, to, bound)
            except Exception as error:  # A loss may take no copies, no float64, no no_grad.
                last = Compared(unknown=f"the loss function fails on them: {error}".split("\n")[0])
                continue
            break
        if last.is_alike:
            break
    return last


def _evaluated(
    loss_fn: Callable[..., Any],
    joined: tuple[Any, Batch],
    parts: Sequence[tuple[Any, Batch]],
    to: torch.dtype | None,
    bound: float,
) -> Compared:
    devices = [t.device for t in joined[1].tensors if t.device.type != "cpu"]
    with torch.no_grad(), _undisturbed(devices) as draws:

        def loss_of(answer: Any, batch: Batch) -> float:
            called: Any = copy.deepcopy(loss_fn) if isinstance(loss_fn, nn.Module) else loss_fn
            if to is not None and isinstance(called, nn.Module):
                called = called.to(to)
            answer = tree.map_tensors(lambda t: _as(t, to), answer)
            # Copies: a loss may write into what it gets.
            return float(batch.mapped(lambda t: _as(t, to)).loss(called, answer))

        whole = loss_of(*joined)
        of_parts = size = 0.0
        for answer, batch in parts:
            share = float(batch.share)
            loss = share * loss_of(answer, batch) if share else 0.0
            of_parts, size = of_parts + loss, size + abs(loss)
        if draws():
            return Compared(unknown="the loss draws random numbers")
    is_alike = abs(whole - of_parts) <= bound * max(abs(whole), size) or whole != whole != of_parts
    return Compared(whole, of_parts, is_alike)


def _as(tensor: torch.Tensor, to: torch.dtype | None) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.to(to) if to is not None and tensor.is_floating_point() else tensor.clone()


@contextmanager
def _undisturbed(devices: Sequence[torch.device]) -> Iterator[Callable[[], bool]]:
    """Random numbers are as they were afterwards; tells whether any were drawn."""
    ours, numpys = random.getstate(), numpy.random.get_state(legacy=False)
    with torch.random.fork_rng(devices=set(devices)):
        before = torch.get_rng_state()
        try:
            yield (
                lambda: (
                    not torch.equal(before, torch.get_rng_state()) or (random.getstate() != ours)
                )
            )
        finally:
            random.setstate(ours)
            numpy.random.set_state(numpys)


def pieces(answer: Any, batch: Batch, rows: int) -> list[tuple[Any, Batch]]:
    """An answer and its batch cut into parts; none where that cannot be."""
    count = batch.num_samples or 0
    tensors, structure = tree.flatten(answer)
    if count < 2 or any(t.dim() == 0 or len(t) % count for t in tensors):
        return []
    made, begin = [], 0
    for part in batch.cut(min(rows, count - 1)):
        end = begin + (part.num_samples or 0)
        of_part = [_rows(t, begin, end, len(t) // count) for t in tensors]
        made.append((structure.unflatten(of_part), part))
        begin = end
    return made


def _rows(tensor: torch.Tensor, begin: int, end: int, each: int) -> torch.Tensor:
    return tensor[begin * each : end * each]


def _joined(parts: Sequence[tuple[Any, Batch]], dim: int) -> tuple[Any, Batch] | None:
    """Answers one behind the other in a dimension, and the batch; ``None``: they do not fit."""
    sizes = [batch.num_samples or 0 for _, batch in parts]
    answer = _one([answer for answer, _ in parts], sizes, dim, may_be_shared=False)
    trees = [
        _one([batch.trees[number] for _, batch in parts], sizes, 0, may_be_shared=True)
        for number in range(len(parts[0][1].trees))
    ]
    values = [found[0] for found in trees if found is not None]
    if answer is None or len(values) < len(trees):
        return None
    return answer[0], Batch(*values)


def _one(
    trees: Sequence[Any], sizes: Sequence[int], dim: int, *, may_be_shared: bool
) -> tuple[Any] | None:
    flat = [tree.flatten(value) for value in trees]
    if any(structure != flat[0][1] for _, structure in flat):
        return None
    made = []
    for same in zip(*(tensors for tensors, _ in flat), strict=True):
        if may_be_shared and same[0].dim() == 0:
            made.append(same[0])
            continue
        if any(t.dim() <= dim for t in same):
            return None
        each = same[0].shape[dim] // max(1, sizes[0])
        if any(t.shape[dim] != each * size for t, size in zip(same, sizes, strict=True)):
            return None
        made.append(torch.cat([t.detach() for t in same], dim))
    return (flat[0][1].unflatten(made),)


@dataclass
class Divisions:
    """Whether what a step divides by depends on its batch: a mean for one, and not for the next.

    Attributes:
        refusal: where it does; ``None``: nowhere.
        labels: number of a tensor of the batch, and the label in it that cross entropy leaves out.
            Where no such label is there, nothing depends on the batch.
    """

    refusal: str | None = None
    labels: set[tuple[int, int]] = field(default_factory=set)


def divisions(recording: Recording) -> Divisions:
    """What the step of a recording divides by."""
    found = Divisions()
    batch = {ref.storage: n for ref, (kind, n) in recording.inputs.items() if kind == "batch"}
    of_batch, same = set(batch), dict(batch)  # Made of the batch, and of its values alone.
    masks = _Masks(same)
    for entry in recording.entries:
        refs = list(_refs((entry.args, tuple(value for _, value in entry.kwargs))))
        results = [ref.storage for ref in _refs((entry.results,))]
        if not of_batch.isdisjoint(ref.storage for ref in refs):
            of_batch.update(results)
        if entry.op in _COPIES and refs[0].storage in same:
            same[results[0]] = same[refs[0].storage]
        for target in entry.targets:
            same.pop(target.storage, None)
        masks.follow(entry)
        where = f"{entry.line}: " if entry.line else ""
        if entry.op in _LABELS and entry.args[3] == _MEAN:
            target, weight, ignored = entry.args[1], entry.args[2], entry.args[4]
            if weight is None and target.storage in same:
                found.labels.add((same[target.storage], ignored))
            else:
                found.refusal = f"{where}cross entropy in a function of your own may weigh labels"
        by = entry.args[1] if entry.op in _DIVISIONS else None
        if isinstance(by, TensorRef) and by.size == () and by.storage in of_batch:
            label = masks.counts.get(by.storage)
            if label is not None:
                found.labels.add(label)
            else:
                found.refusal = f"{where}the loss divides by a number that depends on the batch"
    return found


class _Masks:
    """Which results tell the labels that are not a given one, and which count them.

    Label smoothing divides by such a count: ``(~(target == ignore_index)).sum()``.

    Attributes:
        counts: of a count's storage, the number of the tensor in the batch, and the label left out.
    """

    def __init__(self, same: dict[int, int]) -> None:
        self.counts: dict[int, tuple[int, int]] = {}
        self._same = same
        self._equal: dict[int, tuple[int, int]] = {}
        self._other: dict[int, tuple[int, int]] = {}

    def follow(self, entry: Entry) -> None:
        """Take the next operation of a recording."""
        for target in entry.targets:
            for known in (self._equal, self._other, self.counts):
                known.pop(target.storage, None)
        tensor = entry.args[0] if entry.args else None
        if not isinstance(tensor, TensorRef) or not isinstance(entry.results, TensorRef):
            return
        source, result = tensor.storage, entry.results.storage
        if entry.op in (_aten.eq.Scalar, _aten.ne.Scalar) and source in self._same:
            mask = self._equal if entry.op == _aten.eq.Scalar else self._other
            mask[result] = self._same[source], entry.args[1]
        elif entry.op in (_aten.bitwise_not.default, _aten.logical_not.default):
            for mask, inverse in ((self._equal, self._other), (self._other, self._equal)):
                if source in mask:
                    inverse[result] = mask[source]
        elif entry.op in _COPIES:
            for known in (self._other, self.counts):
                if source in known:
                    known[result] = known[source]
        elif entry.op == _aten.sum.default and source in self._other:
            self.counts[result] = self._other[source]


_COPIES = (_aten.clone.default, _aten._to_copy.default)
_LABELS = (_aten.nll_loss_forward.default, _aten.nll_loss2d_forward.default)
_DIVISIONS = (_aten.div.Tensor, _aten.div_.Tensor, _aten.true_divide.Tensor)


def _refs(values: tuple[Any, ...]) -> Iterator[TensorRef]:
    for value in values:
        if isinstance(value, TensorRef):
            yield value
        elif isinstance(value, tuple):
            yield from _refs(value)
