"""Watches of tensors, of an optimizer, and of the hooks that torch runs for all of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from . import guards_memory as memory
from .guards_places import hook_watch
from .guards_watch import MISSING, PLAIN, NamedWatch, Say, Watch, difference

_WITH_GLOBAL_HOOKS = {
    "torch.nn.modules.module": "all modules",
    "torch.optim.optimizer": "all optimizers",
}


@dataclass(eq=False)
class TensorWatch(Watch):
    """The tensor of a watch that ``tensor_watch`` makes."""

    tensor: torch.Tensor = field(default_factory=lambda: torch.empty(0))


def tensor_watch(tensor: torch.Tensor, what: str, *, is_constant: bool) -> TensorWatch:
    """Watch a tensor. ``is_constant``: the program does not read its values again."""

    def read() -> dict[str, Any]:
        now = {
            "class": type(tensor),
            "requires_grad": tensor.requires_grad,
            "dtype": tensor.dtype,
            "shape": None if nn.parameter.is_lazy(tensor) else tuple(tensor.shape),
            "memory": data_pointer(tensor),
            "stride": stride_of(tensor),
            "gradient hook": _hooks(tensor, "_backward_hooks"),
            "hook after its gradient": _hooks(tensor, "_post_accumulate_grad_hooks"),
            "attributes": tuple((k, v) for k, v in vars(tensor).items() if isinstance(v, PLAIN)),
        }
        return {**now, "version": version_of(tensor)} if is_constant else now

    def say(name: str, old: Any, new: Any) -> str:
        if name == "requires_grad":
            return f"{what} became {'trainable' if new else 'frozen'}"
        if name == "memory":
            return f"{what} moved to other memory"
        if name == "version":
            return f"{what} was changed in place"
        if "hook" in name:
            done = "added to" if len(new) > len(old) else "taken from"
            return f"a {name} was {done} {what}"
        return difference(f"{name} of {what}", old, new)

    def words() -> list[memory.Word] | None:
        found = None if nn.parameter.is_lazy(tensor) else memory.tensor_words(tensor)
        if found is None:
            return None
        for name in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            hooks = getattr(tensor, name, None)
            if isinstance(hooks, dict):
                version = memory.dict_words(hooks)
                if version is None:
                    return None
                found = found + version
        attributes = memory.dict_words(vars(tensor))
        return None if attributes is None else found + attributes

    return TensorWatch(f"tensor {what}", read, say, words, alive=(tensor,), tensor=tensor)


def stride_of(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """How the elements lie; ``None``: in no order of this kind."""
    if tensor.layout != torch.strided or nn.parameter.is_lazy(tensor):
        return None
    return tensor.stride()


def data_pointer(tensor: torch.Tensor) -> int | None:
    """Where the elements are; ``None``: in no memory of their own."""
    try:
        return tensor.data_ptr()
    except (RuntimeError, ValueError):  # Sparse; not initialized yet.
        return None


def version_of(tensor: torch.Tensor) -> int | None:
    """How often a tensor was changed in place; ``None``: torch does not count."""
    try:
        return tensor._version
    except (RuntimeError, ValueError):  # Sparse; not initialized yet.
        return None


def _hooks(tensor: torch.Tensor, name: str) -> tuple[Any, ...]:
    return tuple((getattr(tensor, name, None) or {}).values())


# ---- Optimizer -----------------------------------------------------------------------------------

_OPTIMIZER = ("param_groups", "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


def optimizer_watches(optimizer: torch.optim.Optimizer) -> Iterator[Watch]:
    """An optimizer's groups, their parameters and switches, and its hooks; no numbers."""

    def say(*_: Any) -> str:
        return "optimizer parameter groups changed"

    attributes = vars(optimizer)
    # The attributes change in each step; Guards looks at param_groups itself.
    yield Watch(
        "the optimizer",
        lambda: {name: vars(optimizer).get(name) for name in _OPTIMIZER},
        say,
        alive=(optimizer,),
        expanded=set(_OPTIMIZER[1:]),
    )
    groups = optimizer.param_groups
    yield _list_watch(groups, "groups of the optimizer", say)
    for index, group in enumerate(groups):
        yield from _group_watches(group, f"optimizer group {index}", say)
    for name in _OPTIMIZER[1:]:
        if isinstance(attributes.get(name), dict):
            kind = "step pre-hook" if "pre" in name else "step hook"
            yield hook_watch(attributes[name], kind, "the optimizer")


def own_step(optimizer: torch.optim.Optimizer) -> Any:
    """The step that an optimizer has in place of its class's; ``None``: it has that."""
    step: Any = vars(optimizer).get("step")
    while getattr(step, "_wrapped_by_lr_sched", False):  # A scheduler's, which only counts.
        step = step.__wrapped__
    return None if step is type(optimizer).step else step


def _group_watches(group: dict[str, Any], what: str, say_group: Say) -> Iterator[Watch]:
    names = [k for k, v in group.items() if k == "params" or isinstance(v, bool | str | None)]

    def say(name: str, old: Any, new: Any) -> str:
        if name == "params":
            return say_group(name, old, new)
        return difference(f"option {name} of {what}", old, new)

    yield NamedWatch(
        what,
        lambda: {name: group.get(name, MISSING) for name in names},
        say,
        lambda: memory.dict_words(group),
        alive=(group,),
        values=group,
    )
    yield _list_watch(group["params"], f"parameters of {what}", say_group)


def _list_watch(values: list[Any], key: str, say: Say) -> Watch:
    return Watch(
        key,
        lambda: dict(enumerate(list(values))),
        say,
        lambda: memory.list_words(values),
        alive=(values,),
    )


def global_watches() -> Iterator[Watch]:
    """Hooks of all modules and of all optimizers."""
    for place, everything in _WITH_GLOBAL_HOOKS.items():
        for name, hooks in vars(sys.modules[place]).items():
            if name.startswith("_global_") and name.endswith("_hooks") and isinstance(hooks, dict):
                kind = name.removesuffix("s").removeprefix("_global_").replace("_", " ")
                yield hook_watch(hooks, kind, everything)
