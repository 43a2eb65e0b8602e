"""Addresses of a program as places in spaces, while it is exported."""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...errors import ModelError
from ...graph.recording import extent_bytes
from ...kernels.calls import Call
from .instructions import Place, to_values

_LINE_BYTES = 64


@dataclass
class Arena:
    """The arena of one program; grows by what an instruction writes and nobody reads."""

    address: int
    planned_bytes: int
    size_bytes: int
    unread: Sequence[torch.Tensor] = ()
    places: dict[int, int] = field(default_factory=dict)


class Places:
    """Tensors by number, and where addresses lie in them.

    Args:
        tensors: what programs find, by kind.
        states: of the optimizer: name, tensor, initial value.
        model: whose ``state_dict`` has names for them.
        like: of another batch size: numbers are those of its tensors, and constants go there.

    Attributes:
        tensors: as the document has them.
        constants: their values, by name.
    """

    def __init__(
        self,
        tensors: Mapping[str, Sequence[torch.Tensor]],
        states: Sequence[tuple[str, torch.Tensor, float]],
        *,
        model: nn.Module,
        like: Places | None = None,
    ) -> None:
        self._like = like
        names: dict[int, list[str]] = {}
        for name, value in model.state_dict(keep_vars=True).items():
            if isinstance(value, torch.Tensor):
                names.setdefault(value.data_ptr(), []).append(name)
        self.tensors: list[dict[str, Any]] = [] if like is None else like.tensors
        self.constants: dict[str, torch.Tensor] = {} if like is None else like.constants
        # Begin, end, number of the tensor; sorted. Tensors are kept, so that addresses stay theirs.
        self._ranges: list[tuple[int, int, int]] = []
        self._kept: list[torch.Tensor] = []
        self._arena = Arena(0, 0, 0)
        self._random: int | None = None if like is None else like._random
        count = 0
        for kind in ("weight", "frozen", "buffer"):
            for tensor in tensors[kind]:
                if tensor.numel():
                    found = names.get(tensor.data_ptr())
                    if found is None:
                        raise ModelError(
                            "a training export holds what is in the model's state_dict",
                            got=f"a {kind} that is not",
                        )
                    self._add(tensor, kind, found, count)
                    count += 1
        for name, tensor, initial in states:
            self._add(tensor, "state", [name], count, initial)
            count += 1

    @property
    def of_model(self) -> list[dict[str, Any]]:
        """Those that the model's ``state_dict`` has."""
        return [t for t in self.tensors if t["kind"] in ("weight", "frozen", "buffer")]

    def _add(
        self, tensor: torch.Tensor, kind: str, names: list[str], number: int, initial: float = 0.0
    ) -> None:
        described = {
            "kind": kind, "names": names, "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape), "strides": list(tensor.stride()), "initial": initial,
        }  # fmt: skip
        if self._like is None or kind in ("constant", "random"):
            self.tensors.append(described)
        elif self.tensors[number] != described:
            raise ModelError("a smaller batch must train the same tensors", got=names[0])
        self._remember(tensor, number)

    def _remember(self, tensor: torch.Tensor, number: int) -> None:
        begin = tensor.data_ptr()
        self._kept.append(tensor)
        bisect.insort(self._ranges, (begin, begin + extent_bytes(tensor), number))

    def add_random_state(self, state: torch.Tensor | None) -> None:
        """The state that a program draws from; one for all programs."""
        if state is None:
            return
        if self._random is None:
            self._random = len(self.tensors)
            self._add(state, "random", ["torch"], self._random)
        else:
            self._remember(state, self._random)

    @property
    def random(self) -> int | None:
        """Number of that state; ``None``: nothing is drawn."""
        return self._random

    @contextlib.contextmanager
    def aliases(self, tensors: Mapping[str, Sequence[torch.Tensor]]) -> Iterator[None]:
        """While it lasts, these tensors of a copy stand for those of the model."""
        before, count = list(self._ranges), 0
        for kind in ("weight", "frozen", "buffer"):
            for tensor in tensors[kind]:
                if tensor.numel():
                    self._remember(tensor, count)
                    count += 1
        try:
            yield
        finally:
            constants = [r for r in self._ranges if self.tensors[r[2]]["kind"] == "constant"]
            self._ranges = sorted({*before, *constants})

    @contextlib.contextmanager
    def arena(
        self, address: int, size_bytes: int, unread: Sequence[torch.Tensor]
    ) -> Iterator[Arena]:
        """While it lasts, temporaries lie there, and after them results that nobody reads."""
        self._arena = Arena(address, size_bytes, size_bytes, unread)
        try:
            yield self._arena
        finally:
            self._arena = Arena(0, 0, 0)

    def values(self, call: Call) -> dict[str, Any]:
        """A call as the document has it."""
        beside: list[Any] = [t for t in call.tensors if t is not None]
        return to_values(call, lambda address: self._place(address, beside))

    def laid(self, tensor: torch.Tensor) -> dict[str, Any]:
        """Where a tensor lies, and how."""
        return {
            "place": self._place(tensor.data_ptr(), [tensor]),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "strides": list(tensor.stride()),
        }

    def tensor_at(self, tensor: torch.Tensor) -> dict[str, Any] | None:
        """A tensor of the document that begins where this one does."""
        if not tensor.numel():
            return None
        found = self._found(tensor.data_ptr())
        return None if found is None or found[1] else {"tensor": found[0]}

    def _found(self, address: int) -> tuple[int, int] | None:
        """Number of a tensor, and bytes from its start."""
        at = bisect.bisect_right(self._ranges, (address, 2**63, 0)) - 1
        if at >= 0 and self._ranges[at][0] <= address < self._ranges[at][1]:
            begin, _, number = self._ranges[at]
            return number, address - begin
        return None

    def _place(self, address: int, beside: Sequence[torch.Tensor]) -> Place:
        arena = self._arena
        if arena.address <= address < arena.address + arena.planned_bytes:
            return [0, address - arena.address]
        if address in arena.places:
            return [0, arena.places[address]]
        if any(tensor.data_ptr() == address for tensor in arena.unread):
            return [0, self._room(address)]
        number, offset = self._found(address) or self._new_constant(address, beside)
        return [number + 1, offset]

    def _room(self, address: int) -> int:
        """Room after the arena for a result that nobody reads."""
        arena = self._arena
        (tensor,) = (t for t in arena.unread if t.data_ptr() == address)
        at = arena.places[address] = -(-arena.size_bytes // _LINE_BYTES) * _LINE_BYTES
        arena.size_bytes = at + extent_bytes(tensor)
        return at

    def _new_constant(self, address: int, beside: Sequence[torch.Tensor]) -> tuple[int, int]:
        """A tensor that was made for the program, with its values."""
        for tensor in beside:
            storage = tensor.untyped_storage()
            if storage.data_ptr() <= address < storage.data_ptr() + storage.nbytes():
                break
        else:
            raise ModelError("every operand of a program must lie in memory that it knows")
        count = storage.nbytes() // tensor.itemsize
        whole = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, (count,), (1,))
        number, name = len(self.tensors), f"constant.{len(self.constants)}"
        self.constants[name] = whole
        self._add(whole, "constant", [name], number)
        return number, address - storage.data_ptr()
