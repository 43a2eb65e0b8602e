"""What is known of libraries that models come from."""

from __future__ import annotations

import sys
from pathlib import Path

from ..graph import tracing
from .guards_code import take_for_constant

# Guards look at what a model's own code reads, in the library's ``models``. What the code around
# them reads (loading, hubs, generation: thousands of names) is the same in each step.
_AROUND_MODELS = {"transformers": ("models",), "huggingface_hub": (), "accelerate": ()}
_known: set[str] = set()


def learn() -> None:
    """Look at what is imported by now; before guards are made."""
    tracing.answer_for_libraries()
    for name, followed in _AROUND_MODELS.items():
        path = getattr(sys.modules.get(name), "__file__", None)
        if path is None or name in _known:
            continue
        _known.add(name)
        for part in Path(path).parent.iterdir():
            if part.name not in followed:
                take_for_constant(str(part))
