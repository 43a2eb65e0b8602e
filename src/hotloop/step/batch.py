"""One batch of a step: its trees, the tensors in them, and what batches of one program have alike.

``x`` and ``y`` are trees (``memory.tree``). Most are two tensors, for which there is a short way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import ModelError
from ..graph.recording import extent_bytes
from ..memory import tree
from ..memory.tree import Structure


class _NoTarget:
    """There is no ``y``: the loss is made of the model's answer alone."""

    def __repr__(self) -> str:
        return "NO_TARGET"

    def __reduce__(self) -> str:
        return "NO_TARGET"  # One object, copied or sent.


NO_TARGET = _NoTarget()
_UNKNOWN = -1


class Batch:
    """``(x, y)``, or ``(x,)``, and its share in the loss of the batch that it is a part of.

    Args:
        x, y: any trees.
        share: a number that is the same for all batches of a program; or a tensor, which then is
            one of the batch's: one number, or one for each sample, alike for all of a chunk.

    Attributes:
        tensors: all of them, in order; a ``share`` that is a tensor comes last.
    """

    __slots__ = ("_count", "_key", "_structure", "share", "tensors", "x", "y")

    def __init__(self, x: Any, y: Any = NO_TARGET, share: float | torch.Tensor = 1.0) -> None:
        self.x, self.y, self.share = x, y, share
        self._structure: Structure | None = None
        self._key: Any = None
        self._count: int | None = _UNKNOWN
        if type(x) is torch.Tensor and type(y) is torch.Tensor:
            self.tensors: list[torch.Tensor] = [x, y]
        else:
            self.tensors, self._structure = tree.flatten(self.trees)
        if isinstance(share, torch.Tensor):
            self.tensors.append(share)

    @property
    def trees(self) -> tuple[Any, ...]:
        """``(x, y)``, or ``(x,)``."""
        return (self.x,) if self.y is NO_TARGET else (self.x, self.y)

    @property
    def num_samples(self) -> int | None:
        """The first size of all tensors; ``None``: they have no common one."""
        if self._count == _UNKNOWN:
            self._count = self._counted()
        return self._count

    def _counted(self) -> int | None:
        if self._structure is None:
            x, y = self.x.shape, self.y.shape  # ``len`` of a tensor takes five times as long.
            if x and y:
                return x[0] if x[0] == y[0] else None
        return tree.num_samples(*self.trees)

    @property
    def is_rows(self) -> bool:
        """Whether each tensor has the samples in its first dimension: nothing is shared by them."""
        return self.num_samples is not None and all(t.dim() for t in self.tensors)

    def part(self, begin: int, length: int) -> Batch:
        """So many samples from one on; what has no samples is in each part."""

        def rows(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.narrow(0, begin, length) if tensor.dim() else tensor

        if self._structure is None and self.y is not self.x:
            share = rows(self.share) if isinstance(self.share, torch.Tensor) else self.share
            return Batch(rows(self.x), rows(self.y), share)
        return self.mapped(rows)

    def fits(self, rows: int) -> bool:
        """Whether it is one part of so many samples."""
        count = self.num_samples
        return count is not None and count <= rows

    def cut(self, rows: int) -> list[Batch]:
        """Parts of ``rows`` samples at most, see ``tree.part_sizes``.

        Raises:
            ModelError: the tensors have no common first size.
        """
        count = self.num_samples
        if count is None:
            sizes = sorted({tuple(t.shape) for t in self.tensors})
            raise ModelError(
                "a batch that is cut into micro-batches needs the samples in the first dimension "
                "of every tensor",
                got=f"shapes {', '.join(map(str, sizes)) or 'none'}",
                next_step="leave micro_batch_size out, or keep what is no sample in the model",
            )
        lengths = tree.part_sizes(count, rows)
        begins = [sum(lengths[:number]) for number in range(len(lengths))]
        return [self.part(b, n) for b, n in zip(begins, lengths, strict=True)]

    def with_share(self, share: float | torch.Tensor) -> Batch:
        """The same batch with another share."""
        return Batch(*_both(self.trees), share=share)

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """The batch with each tensor changed, its share too; what is one tensor stays one."""
        made: dict[int, torch.Tensor] = {}

        def once(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in made:
                made[id(tensor)] = change(tensor)
            return made[id(tensor)]

        share = change(self.share) if isinstance(self.share, torch.Tensor) else self.share
        return Batch(*_both([tree.map_tensors(once, t) for t in self.trees]), share=share)

    def loss(self, loss_fn: Callable[..., Any], answer: Any) -> Any:
        """``loss_fn(answer, y)``, or ``loss_fn(answer)`` where there is no y."""
        return loss_fn(answer) if self.y is NO_TARGET else loss_fn(answer, self.y)

    def key(self) -> Any:
        """What batches of one program have alike, as it was when it was first asked for."""
        if self._key is None:
            self._key = self._made_key()
        return self._key

    def _made_key(self) -> Any:
        if self._structure is None and len(self.tensors) == 2:
            x, y = self.tensors
            if _is_usual(x) and _is_usual(y):
                return _key_of_two(x, y, self.share)
        weighted = "weighted" if isinstance(self.share, torch.Tensor) else self.share
        return key_of(self.tensors), self._structure, weighted

    def name(self, number: int) -> str:
        """What tensor ``number`` is called: ``x.mask``."""
        names = [
            name
            for root, value in zip("xy", self.trees, strict=False)
            for name, _ in tree.named_tensors(value, root)
        ]
        return names[number] if number < len(names) else "its share"


def _both(trees: Sequence[Any]) -> tuple[Any, Any]:
    return trees[0], trees[1] if len(trees) > 1 else NO_TARGET


def _is_usual(tensor: torch.Tensor) -> bool:
    return (
        tensor.layout is torch.strided
        and tensor.is_cpu
        and not tensor.requires_grad
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


def _key_of_two(x: torch.Tensor, y: torch.Tensor, share: float | torch.Tensor) -> Any:
    # Where one begins in the other, if they overlap: what views both may be a view of either.
    between = y.data_ptr() - x.data_ptr()
    overlap = -extent_bytes(y) < between < extent_bytes(x)
    # A model may ask whether they are one.
    same = "one" if y is x else between if overlap else None
    return (x.shape, x.stride(), x.dtype, y.shape, y.stride(), y.dtype, share, same)


def key_of(tensors: Sequence[torch.Tensor]) -> Any:
    """What tensors of one program have alike: how each lies in memory, and where they share it."""
    return tuple([_look(t) for t in tensors]), _overlaps(tensors) if len(tensors) > 1 else ()


def _look(tensor: torch.Tensor) -> Any:
    """All but the values of a tensor."""
    kind = type(tensor).__qualname__
    if tensor.layout is not torch.strided or tensor.is_nested:
        return kind, str(tensor.layout), tensor.dtype, tensor.device.type
    flags = tensor.requires_grad, tensor.is_conj(), tensor.is_neg()
    return kind, tensor.shape, tensor.stride(), tensor.dtype, tensor.device.type, *flags


def _overlaps(tensors: Sequence[torch.Tensor]) -> tuple[tuple[int, int, int], ...]:
    """Which tensors lie in memory that another one lies in, and how far from the first of those.

    With each goes the number of the first place where the same object is given.
    """
    first = {id(t): number for number, t in reversed(list(enumerate(tensors)))}
    spans = sorted(
        (t.data_ptr(), t.data_ptr() + extent_bytes(t), number)
        for number, t in enumerate(tensors)
        if t.layout is torch.strided and not t.is_nested and t.numel()
    )
    found: list[tuple[int, int, int]] = []
    group: list[tuple[int, int, int]] = []
    origin = end = 0
    for begin, its_end, number in spans:
        if group and begin < end:
            group.append((number, begin - origin, first[id(tensors[number])]))
            end = max(end, its_end)
            continue
        found += group if len(group) > 1 else []
        group, origin, end = [(number, 0, first[id(tensors[number])])], begin, its_end
    found += group if len(group) > 1 else []
    return tuple(found)


def refusal_of(batch: Batch) -> str | None:
    """Why a batch cannot be that of a program, in words for the report."""
    for number, tensor in enumerate(batch.tensors):
        if tensor.requires_grad:
            return f"{batch.name(number)} needs a gradient of its own"
        if tensor.layout is not torch.strided or tensor.is_nested or not tensor.is_cpu:
            kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
            return f"{batch.name(number)} is not dense on the CPU: {kind} on {tensor.device}"
        if tensor.is_conj() or tensor.is_neg():
            return f"{batch.name(number)} is a conjugate or negative view of other memory"
    for root, value in zip("xy", batch.trees, strict=False):
        for name in tree.opaque_names(value, root):
            return f"{name} is neither a tensor nor a plain value, so a change of it is not seen"
    return None
