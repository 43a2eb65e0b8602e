"""Tells when a program changes how torch multiplies float32 matrices.

torch's stable C interface does not say what ``torch.set_float32_matmul_precision``,
``torch.backends.mkldnn`` and ``torch.use_deterministic_algorithms`` were set to, and asking from
Python at each product costs more than a small product. So the functions that set them are wrapped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

# Of torch._C; every public way to change the settings ends in one of them.
_SETTERS = (
    "_set_deterministic_algorithms",
    "_set_float32_matmul_precision",
    "_set_fp32_precision_setter",
    "_set_mkldnn_enabled",
    "_set_onednn_allow_tf32",
)


def are_products_exact() -> bool:
    """Whether torch multiplies float32 matrices in float32, and oneDNN is not switched off."""
    backend: Any = torch.backends.mkldnn
    return bool(backend.enabled) and backend.matmul.fp32_precision in ("none", "ieee")


class SettingsWatch:
    """Calls ``changed`` after each change, from ``install`` to ``remove``."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._wrapped: dict[str, tuple[Any, Any]] = {}

    def install(self) -> None:
        """Begin; nothing happens where it has begun."""
        if self._wrapped:
            return
        for name in _SETTERS:
            plain = getattr(torch._C, name, None)
            if plain is not None:
                self._wrapped[name] = plain, self._wrap(plain)
        for name, (plain, wrapper) in self._wrapped.items():
            _exchange(name, plain, wrapper)

    def remove(self) -> None:
        """End; a setter that someone else has wrapped since keeps this wrapper inside."""
        for name, (plain, wrapper) in self._wrapped.items():
            _exchange(name, wrapper, plain)
        self._wrapped = {}

    def _wrap(self, plain: Any) -> Any:
        @functools.wraps(plain)
        def setter(*args: Any, **options: Any) -> Any:
            result = plain(*args, **options)
            if self._wrapped:
                self._changed()
            return result

        return setter


def _exchange(name: str, found: Any, wanted: Any) -> None:
    if getattr(torch._C, name) is found:
        setattr(torch._C, name, wanted)
    # Properties of torch.backends.mkldnn keep the function that they call.
    for prop in vars(type(torch.backends.mkldnn)).values():
        if getattr(prop, "setter", None) is found:
            prop.setter = wanted
