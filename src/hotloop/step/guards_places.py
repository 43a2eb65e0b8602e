"""Watches of single objects: a module's dicts, containers, attributes in slots, a partial."""

from __future__ import annotations

import functools
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy
from torch import nn

from . import guards_memory as memory
from .guards_watch import MISSING, Label, Say, Watch, difference

# Of larger containers only the length counts, and nothing of larger arrays.
_MOST_ITEMS = 10_000
_MOST_BYTES = 4096

_HOOKS = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
}
_MEMBERS = ("_parameters", "_buffers", "_modules")
# Of a module's attributes these do not count for a step: they say how a checkpoint is made, or
# more of hooks that are guarded themselves.
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
        "_is_full_backward_hook",
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
        lambda: held_in(values),
        say,
        lambda: memory.dict_words(values),
        ordered=True,
        alive=(values,),
    )


# ---- Containers ----------------------------------------------------------------------------------


def held_in(value: dict[Any, Any]) -> dict[Any, Any]:
    """What a dict holds, whatever its class makes of it: some import modules when they are read."""
    if type(value) is dict:
        return value.copy()
    kind = OrderedDict if isinstance(value, OrderedDict) else dict
    return dict(kind.items(value))


def pieces_of(value: Any) -> dict[Any, Any]:
    """The items of a container by key or index; of a set and of bytes: all in one."""
    if isinstance(value, dict):
        return held_in(value)
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
    length: Callable[[Any], int] = dict.__len__ if isinstance(value, dict) else len
    if length(value) > _MOST_ITEMS:
        return Watch(
            key,
            lambda: {"": length(value)},
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


def slots_watch(value: Any, names: list[str], label: Label) -> Watch:
    """What an object has in its ``__slots__``."""
    alone = not hasattr(value, "__dict__")
    return Watch(
        f"slots of {label}",
        lambda: {name: getattr(value, name, MISSING) for name in names},
        lambda name, old, new: difference(label.attribute(name), old, new),
        lambda: memory.slot_words(value) if alone else None,
        alive=(value,),
    )


def partial_watch(value: functools.partial[Any], label: Label) -> Watch:
    """The function of a ``functools.partial`` and the arguments that it has already."""
    return Watch(
        f"parts of {label}",
        lambda: {"func": value.func, "args": value.args, "keywords": value.keywords},
        lambda name, old, new: difference(label.attribute(name), old, new),
        alive=(value,),
    )
