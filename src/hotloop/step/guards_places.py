"""Watches of single things: a module's dicts, a container, a tensor, an optimizer."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import nn

from . import guards_memory as memory
from .guards_watch import MISSING, Label, NamedWatch, Say, Watch, difference

# Of larger containers only the length counts, and nothing of larger arrays.
_MOST_ITEMS = 10_000
_MOST_BYTES = 4096

_HOOKS = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
}
_WITH_GLOBAL_HOOKS = {
    "torch.nn.modules.module": "all modules",
    "torch.optim.optimizer": "all optimizers",
}
_MEMBERS = ("_parameters", "_buffers", "_modules")
# Of a module's attributes these do not count for a step: they say how a checkpoint is made.
_NOT_IN_STEP = frozenset(
    {
        "_non_persistent_buffers_set",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks_with_kwargs",
        "_compiled_call_impl",
    }
)


def module_name(module: nn.Module, name: str) -> str:
    """What a message calls a module. ``name``: as in ``named_modules``."""
    kind = type(module).__name__
    return f"module {name} ({kind})" if name else f"the model ({kind})"


def module_watches(module: nn.Module, name: str) -> Iterator[Watch]:
    """A module's attributes, then its parameters, buffers, submodules and hooks."""
    what, dotted = module_name(module, name), f"{name}." if name else ""
    attributes = module.__dict__

    def read() -> dict[str, Any]:
        found = {k: v for k, v in module.__dict__.items() if k not in _NOT_IN_STEP}
        return {"__class__": type(module), **found}

    members = [key for key in (*_MEMBERS, *_HOOKS) if isinstance(attributes.get(key), dict)]
    yield Watch(
        what,
        read,
        lambda key, old, new: difference(f"attribute {key} of {what}", old, new),
        lambda: memory.attribute_words(module),
        alive=(module, attributes),
        expanded=set(members),
    )

    def say_member(kind: str) -> Say:
        return lambda key, old, new: difference(f"{kind} {dotted}{key}", old, new)

    for key in members:
        if key in _HOOKS:
            yield hook_watch(attributes[key], _HOOKS[key], what)
        else:
            kind = key.removeprefix("_")
            say = say_member(kind.removesuffix("s"))
            yield dict_watch(attributes[key], f"{kind} of {what}", say)


def hook_watch(hooks: dict[Any, Any], kind: str, what: str) -> Watch:
    """Functions that run when something happens to ``what``."""

    def say(key: Any, old: Any, new: Any) -> str:
        if old is MISSING:
            return f"a {kind} was added to {what}"
        return f"a {kind} of {what} was {'removed' if new is MISSING else 'replaced'}"

    return dict_watch(hooks, f"{kind}s of {what}", say)


def dict_watch(values: dict[Any, Any], key: str, say: Say) -> Watch:
    """All that is in a dict, and its order."""
    return Watch(
        key,
        lambda: dict(values),
        say,
        lambda: memory.dict_words(values),
        ordered=True,
        alive=(values,),
    )


# ---- Containers ----------------------------------------------------------------------------------


def pieces_of(value: Any) -> dict[Any, Any]:
    """The items of a container by key or index; of a set and of bytes: all in one."""
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, list | deque):
        return dict(enumerate(list(value)))
    if isinstance(value, set):
        return {"": frozenset(value)}
    return {"": bytes(value)}


def container_watch(value: Any, label: Label) -> Watch | None:
    """What is in a list, dict, set or small array; ``None``: it is none of them."""

    def say(name: Any, old: Any, new: Any) -> str:
        return difference(label.item(name) if name != "" else label, old, new)

    key = f"contents of {label}"
    if isinstance(value, numpy.ndarray):
        return _array_watch(value, key, say)
    if not isinstance(value, list | dict | set | deque | bytearray):
        return None
    if len(value) > _MOST_ITEMS:
        return Watch(
            key,
            lambda: {"": len(value)},
            lambda _, old, new: difference(f"length of {label}", old, new),
            lambda: None,
            alive=(value,),
        )
    if isinstance(value, dict):
        return dict_watch(value, key, say)

    def words() -> list[memory.Word] | None:
        if isinstance(value, list):
            return memory.list_words(value)
        return memory.set_words(value) if isinstance(value, set) else None

    return Watch(key, lambda: pieces_of(value), say, words, alive=(value,))


def _array_watch(value: numpy.ndarray[Any, Any], key: str, say: Say) -> Watch | None:
    if value.nbytes > _MOST_BYTES or value.dtype.hasobject:
        return None

    def words() -> list[memory.Word] | None:
        return memory.array_words(value)

    return Watch(
        key,
        lambda: {"": (value.shape, value.dtype.str, value.tobytes())},
        lambda *_: say("", MISSING, MISSING).replace("was replaced", "was changed in place"),
        words,
        alive=(value,),
    )


def slots_of(value: Any) -> list[str]:
    """Names of an object's ``__slots__``."""
    found: list[str] = []
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        names = [slots] if isinstance(slots, str) else list(slots)
        found += [name for name in names if name not in ("__dict__", "__weakref__")]
    return found


# ---- Tensors -------------------------------------------------------------------------------------


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
            "shape": tuple(tensor.shape),
            "memory": data_pointer(tensor),
            "stride": tensor.stride() if tensor.layout == torch.strided else None,
            "gradient hook": _hooks(tensor, "_backward_hooks"),
            "hook after its gradient": _hooks(tensor, "_post_accumulate_grad_hooks"),
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
        found = memory.tensor_words(tensor)
        if found is None:
            return None
        for name in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            hooks = getattr(tensor, name, None)
            if isinstance(hooks, dict):
                version = memory.dict_words(hooks)
                if version is None:
                    return None
                found = found + version
        return found

    return TensorWatch(f"tensor {what}", read, say, words, alive=(tensor,), tensor=tensor)


def data_pointer(tensor: torch.Tensor) -> int | None:
    """Where the elements are; ``None``: in no memory of their own."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return None


def version_of(tensor: torch.Tensor) -> int | None:
    """How often a tensor was changed in place; ``None``: torch does not count."""
    try:
        return tensor._version
    except RuntimeError:
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
