"""Libraries that ask whether a graph is being traced are told so while a step is recorded.

Transformers looks at a mask's values to leave out one that masks nothing, but not while a graph is
traced: then the mask is used as it is, which comes to the same up to rounding.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

_WHERE = "transformers.utils.import_utils"
_recording = threading.local()
_answered: dict[Callable[..., Any], Callable[..., Any]] = {}


def answer_for_libraries() -> None:
    """Let what is imported by now ask here; before guards look at it. Costs nothing otherwise."""
    library = sys.modules.get(_WHERE)
    asked = getattr(library, "is_tracing", None)
    if asked is None:
        return
    if asked not in _answered.values():
        _answered[asked] = _answers(asked)
        library.is_tracing = _answered[asked]  # type: ignore[union-attr]
    for name, module in list(sys.modules.items()):
        known = vars(module) if name.startswith("transformers.") else {}
        instead = _answered.get(known.get("is_tracing"))  # type: ignore[arg-type]
        if instead is not None:
            known["is_tracing"] = instead


def _answers(asked: Callable[..., Any]) -> Callable[..., Any]:
    def is_tracing(tensor: Any = None) -> Any:
        return getattr(_recording, "now", False) or asked(tensor)

    return is_tracing


@contextlib.contextmanager
def traced() -> Iterator[None]:
    """While it lasts, this thread is told that a graph is traced."""
    before, _recording.now = getattr(_recording, "now", False), True
    try:
        yield
    finally:
        _recording.now = before
