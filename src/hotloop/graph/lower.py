"""A graph as instructions on memory: hotloop's kernels where there is one, else ATen.

What an instruction reads and writes is fixed when it is made: weights and states where they lie,
temporaries in one block (``memory_plan``). An operation of ATen that cannot write where it is told
gives a tensor of its own, which lives until its last reader has run.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..kernels import calls
from ..kernels.calls import Call
from .aten import EMPTY, FILLED, WRITTEN_HERE, out_names, out_variant, python_function, writes
from .late import Instruction, Late, Pendings, aten_instruction, has_late
from .memory_plan import Block, Lifetime, plan_offsets
from .native import (
    NATIVE,
    concatenate,
    concatenate_targets,
    draw,
    is_update,
    update_call,
    version,
)
from .nodes import parts
from .operators import PRODUCT_UPDATES, aliases, readers
from .recording import extent_bytes


@dataclass
class Lowered:
    """Instructions, in order, and what they work on.

    Attributes:
        instructions: native ones are ``Call``.
        updates: place of an instruction that updates weights -> row of the control table.
        batch: where the batch is copied to before a step, in the order of the graph's inputs.
        outputs: the loss and the gradients: tensors, or ``Late``.
        late: values of ``Late``, filled by the instructions.
        arena_bytes: of the temporaries and the batch.
        draws: places of instructions that draw random numbers, from ``random_state``.
        random_state: as torch's generator gives it; ``None``: nothing is drawn.
        of_torch: nodes whose instructions are torch's.
        unread: results that an instruction writes and nobody reads.
    """

    instructions: list[Instruction] = field(default_factory=list)
    updates: dict[int, int] = field(default_factory=dict)
    batch: list[torch.Tensor] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    loss_dtype: torch.dtype = torch.float32
    late: list[Any] = field(default_factory=list)
    arena_bytes: int = 0
    draws: set[int] = field(default_factory=set)
    random_state: torch.Tensor | None = None
    of_torch: list[Any] = field(default_factory=list)
    unread: list[torch.Tensor] = field(default_factory=list)


class _Lowering:
    def __init__(
        self,
        graph: fx.Graph,
        inputs: Sequence[torch.Tensor | None],
        num_threads: int,
        block: Block,
    ) -> None:
        self.nodes: list[Any] = list(graph.nodes)
        self.block = block
        self.inputs = inputs
        self.num_threads = num_threads
        self.lowered = Lowered()
        self._value: dict[Any, Any] = {}
        # Node -> the node whose memory it is a part of.
        self._root: dict[Any, Any] = {}
        self._late: dict[Any, int] = {}
        # Part of a concatenation that is made where it belongs -> that one, and its number in it.
        self._parts: dict[Any, tuple[Any, int]] = {}
        # Node -> the values that it is the last to read.
        self._deaths: dict[Any, list[Any]] = {}

    def lower(self) -> Lowered:
        self._find_parts()
        self._find_roots()
        self._find_deaths()
        self._place()
        with torch.no_grad():
            for node in self.nodes:
                if node.op == "call_function":
                    self._lower(node)
        (output,) = (n for n in self.nodes if n.op == "output")
        self.lowered.outputs = [self._filled(value) for value in output.args[0]]
        if output.args[0]:
            self.lowered.loss_dtype = output.args[0][0].meta["val"].dtype
        return self.lowered

    def _find_parts(self) -> None:
        """Parts that one concatenation alone has, and that lie in it as they would alone."""
        for node in self.nodes:
            if node.target is not concatenate:
                continue
            targets = concatenate_targets(node.args, node.meta["val"])
            for number, part in enumerate(node.args[0]):
                made = part.op == "call_function" and part.target is not operator.getitem
                if not made or part in self._parts or _out_of(part) is None:
                    continue
                alike = part.meta["val"].stride() == targets[number].stride()
                alone = node.args[0].count(part) == 1 and not any(map(writes, readers(part)))
                if alike and alone:
                    self._parts[part] = node, number

    def _find_roots(self) -> None:
        for node in self.nodes:
            if node in self._parts:
                whole = node
                while whole in self._parts:
                    whole = self._parts[whole][0]
                self._root[node] = whole
            elif node.op != "call_function":
                self._root[node] = node
            elif node.target is operator.getitem:
                self._root[node] = node if _out_of(node.args[0]) else self._root[node.args[0]]
            elif aliases(node):
                self._root[node] = self._root[_first_tensor(node)]
            else:
                self._root[node] = node

    def _place(self) -> None:
        """Give each temporary that an instruction may write a place."""
        order = {node: number for number, node in enumerate(self.nodes)}
        first = dict(order)
        for part, (whole, _) in self._parts.items():  # Its own parts come before it.
            first[whole] = min(first[whole], first[part])
        last: dict[Any, int] = {}
        for node in self.nodes:
            for used in (node, *node.all_input_nodes):
                root = self._root[used]
                last[root] = max(last.get(root, 0), order[node])
        placeholders = [n for n in self.nodes if n.op == "placeholder"]
        batch = [n for n, t in zip(placeholders, self.inputs, strict=True) if t is None]
        static = [n for n in self.nodes if self._root[n] is n and self._is_static(n)]
        lifetimes = []
        for node in static:
            born = node.args[0] if node.target is operator.getitem else node
            end = max(last[node], last.get(born, 0))
            lifetimes.append(Lifetime(extent_bytes(node.meta["val"]), first[born], end))
        # Copied there before the first instruction.
        lifetimes += [Lifetime(extent_bytes(n.meta["val"]), 0, last[n]) for n in batch]
        static += batch
        offsets, total = plan_offsets(lifetimes)
        memory = self.block.reserve(total)
        for node, offset in zip(static, offsets, strict=True):
            self._value[node] = _laid_out(memory, offset, node.meta["val"])
        self.lowered.arena_bytes = total
        for part, (whole, number) in reversed(self._parts.items()):
            self._value[part] = concatenate_targets(whole.args, self._value[whole])[number]
        for node, tensor in zip(placeholders, self.inputs, strict=True):
            if tensor is None:
                self.lowered.batch.append(self._value[node])
            else:
                self._value[node] = tensor

    def _is_static(self, node: Any) -> bool:
        if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
            return False
        made_by = node.args[0] if node.target is operator.getitem else node
        return made_by.target not in FILLED and _out_of(made_by) is not None

    def _lower(self, node: Any) -> None:
        if node.target is operator.getitem:
            self._lower_part(node)
        elif node.target is version:
            self._value[node] = self._value[node.args[0]]
        elif aliases(node) and not writes(node) and self._all_static(node):
            args, kwargs = self._filled(node.args), self._filled(node.kwargs)
            self._value[node] = node.target(*args, **kwargs)
        elif node.target in EMPTY:
            pass  # Memory alone.
        elif is_update(node):
            self._lower_update(node)
        elif node.target in FILLED and _is_small(node) and not any(map(writes, readers(node))):
            # The same in each step, whatever the values of its arguments.
            args, kwargs = _stand_ins((node.args, node.kwargs))
            self._value[node] = node.target(*args, **kwargs)
        elif node.target in NATIVE or node.target is draw:
            self._lower_native(node)
        else:
            self._lower_aten(node)

    def _lower_native(self, node: Any) -> None:
        pending = Pendings(node)
        args = pending.instead_of_late(self._filled(node.args), node.args)
        if node.target is draw:
            probability, value = args
            self._lower_draw(probability, value, self._outs(node)[0])
            return
        made = NATIVE[node.target](args, self._outs(node), self.num_threads)
        for call in made if isinstance(made, list) else [made]:
            self._add_native(call, pending)
        self._forget_after(node)

    def _lower_draw(self, probability: float, value: float, out: torch.Tensor) -> None:
        lowered = self.lowered
        if lowered.random_state is None:
            lowered.random_state = torch.empty_like(torch.default_generator.get_state())
        lowered.draws.add(len(lowered.instructions))
        self._add(calls.draw(out, lowered.random_state, probability, value))

    def _lower_part(self, node: Any) -> None:
        made_by, number = node.args
        if node in self._value:
            return
        value = self._value.get(made_by)
        if isinstance(value, (list, tuple)):  # Views.
            self._value[node] = value[number]
            return
        late, whole = self.lowered.late, self._late[made_by]
        place = self._new_late(node)

        def take() -> None:
            late[place] = late[whole][number]

        self._add(take)

    def _lower_update(self, node: Any) -> None:
        pending = Pendings(node)
        if node.target in PRODUCT_UPDATES:
            *given, _, group = node.args
            scale = None
        else:
            *given, _, scale, group = node.args
            scale = self._filled(scale)
        args = pending.instead_of_late(self._filled(given), given)
        call = update_call(node.target, args, self.num_threads)
        if scale is not None:
            late = self.lowered.late

            def set_scale() -> None:
                factor = late[scale.place] if isinstance(scale, Late) else scale
                call.arguments.scale = float(factor)

            self._add(set_scale)
        self._add_native(call, pending)
        self.lowered.updates[len(self.lowered.instructions) - 1] = group
        self._forget_after(node)

    def _add_native(self, call: Call, pending: Pendings) -> None:
        """A call, after what sets the addresses of values that have none yet."""
        words = pending.found_in(call)
        if words:
            late = self.lowered.late

            def set_addresses() -> None:
                for word, place in words:
                    word.value = late[place].data_ptr()

            self._add(set_addresses)
        self._add(call)

    def _lower_torch_product(self, node: Any) -> bool:
        """A product of torch's as an instruction of a block; False: it is no such product."""
        if node.target not in _TORCH_PRODUCTS or node.kwargs or not self._all_static(node):
            return False
        *bias, a, b = self._filled(node.args)
        by_onednn = node.target is _own.onednn.default
        if by_onednn:
            a, b, last = self._filled(node.args)
            bias = [] if last is None else [last]
        if any(t.dtype != torch.float32 for t in (a, b)) or (bias and bias[0].dim() != 1):
            return False
        out = self._value[node]
        self._add(calls.torch_product(a, b, out, *bias, by_onednn=by_onednn))
        self._forget_after(node)
        return True

    def _lower_aten(self, node: Any) -> None:
        self.lowered.of_torch.append(node)
        if self._lower_torch_product(node):
            return
        out_op = _out_of(node)
        args, kwargs = self._filled(node.args), self._filled(node.kwargs)
        if out_op is not None:
            names = ["out"] if node.target in WRITTEN_HERE else out_names(out_op)
            kwargs = kwargs | dict(zip(names, self._outs(node), strict=True))
            target = out_op
        else:
            target = node.target
        in_place = out_op is None and writes(node) and aliases(node)
        if in_place and self._all_static(node):
            self._value[node] = self._filled(_first_tensor(node))
        place = None if out_op is not None or node in self._value else self._new_late(node)
        if not has_late((args, kwargs)):
            target = python_function(target, args, kwargs)
        self._add(aten_instruction(target, args, kwargs, self.lowered.late, place))
        self._forget_after(node)

    def _forget_after(self, node: Any) -> None:
        """Late values whose last reader this is."""
        dead = [self._late[n] for n in self._deaths.get(node, ()) if n in self._late]
        if not dead:
            return
        late = self.lowered.late

        def forget() -> None:
            for place in dead:
                late[place] = None

        self._add(forget)

    def _find_deaths(self) -> None:
        order = {node: number for number, node in enumerate(self.nodes)}
        for node in self.nodes:
            if node.users:
                reader = max(node.users, key=lambda n: order[n])
                if reader.op != "output":
                    self._deaths.setdefault(reader, []).append(node)

    def _outs(self, node: Any) -> list[torch.Tensor]:
        if isinstance(node.meta["val"], torch.Tensor):
            return [self._value[node]]
        read = parts(node)
        outs = []
        for number, val in enumerate(node.meta["val"]):
            if number in read:
                outs.append(self._value[read[number]])
            else:  # Nobody reads it.
                self.lowered.unread.append(
                    torch.empty_strided(val.shape, val.stride(), dtype=val.dtype)
                )
                outs.append(self.lowered.unread[-1])
        return outs

    def _new_late(self, node: Any) -> int:
        self.lowered.late.append(None)
        place = self._late[node] = len(self.lowered.late) - 1
        self._value[node] = Late(place)
        return place

    def _all_static(self, node: Any) -> bool:
        return not any(isinstance(self._value.get(n), Late) for n in node.all_input_nodes)

    def _filled(self, tree: Any) -> Any:
        if isinstance(tree, fx.Node):
            return self._value[tree]
        if isinstance(tree, (list, tuple)):
            return [self._filled(part) for part in tree]
        if isinstance(tree, dict):
            return {name: self._filled(part) for name, part in tree.items()}
        return tree

    def _add(self, instruction: Instruction) -> None:
        self.lowered.instructions.append(instruction)


def lower(
    graph: fx.GraphModule,
    inputs: Sequence[torch.Tensor | None],
    num_threads: int,
    block: Block | None = None,
) -> Lowered:
    """Instructions of a graph.

    Args:
        graph: its nodes have ``meta["val"]``, a meta tensor or a tuple of them.
        inputs: a tensor for each placeholder; ``None``: part of the batch.
        num_threads: threads inside each of hotloop's kernels.
        block: where temporaries and the batch lie; ``None``: in memory of their own.
    """
    return _Lowering(graph.graph, inputs, num_threads, block or Block()).lower()


_own: Any = torch.ops.hotloop
_aten: Any = torch.ops.aten
_TORCH_PRODUCTS = (
    _aten.mm.default,
    _aten.bmm.default,
    _aten.addmm.default,
    _own.onednn.default,
)
_MOST_FILLED = 64 * 1024


def _stand_ins(tree: Any) -> Any:
    if isinstance(tree, fx.Node):
        val = tree.meta["val"]
        return torch.empty_strided(val.shape, val.stride(), dtype=val.dtype)
    if isinstance(tree, (list, tuple)):
        return [_stand_ins(part) for part in tree]
    if isinstance(tree, dict):
        return {name: _stand_ins(part) for name, part in tree.items()}
    return tree


def _is_small(node: Any) -> bool:
    return bool(node.meta["val"].numel() <= _MOST_FILLED)


def _first_tensor(node: Any) -> Any:
    return node.all_input_nodes[0]


def _laid_out(memory: memoryview, at: int, val: torch.Tensor) -> torch.Tensor:
    """A tensor of so much memory and no more: an operation that would resize it is refused."""
    if val.numel() == 0:
        return torch.empty_strided(val.shape, val.stride(), dtype=val.dtype)
    count = extent_bytes(val) // val.element_size()
    flat = torch.frombuffer(memory, dtype=val.dtype, count=count, offset=at)
    return flat.as_strided(val.shape, val.stride())


def _out_of(node: Any) -> Any:
    """What writes a node's results where it is told; ``None``: it gives tensors of its own."""
    if node.op != "call_function":
        return None
    if node.target in NATIVE or node.target in EMPTY or node.target is draw:
        return node.target
    if node.target in FILLED or aliases(node) or writes(node) or math.prod(_sizes(node)) == 0:
        return None
    return out_variant(node.target)


def _sizes(node: Any) -> tuple[int, ...]:
    val = node.meta.get("val")
    return tuple(val.shape) if isinstance(val, torch.Tensor) else ()


__all__ = ["Call", "Lowered", "lower"]
