"""All C++ of hotloop and its binding: one library for each level of instruction set.

``cpp/`` has the kernels, ``binding.py`` what crosses to Python, ``levels.py`` the levels, and
``loader.py`` chooses and loads. Nothing of that imports torch; ``router.py``, imported by itself,
takes over the matrix products of a program that has.
"""

from .levels import LEVELS, Choice, Level, choose
from .loader import (
    build_hash,
    call,
    choice_below,
    chosen,
    is_available,
    library,
    unavailable_reason,
    use_torch,
)

__all__ = [
    "LEVELS",
    "Choice",
    "Level",
    "build_hash",
    "call",
    "choice_below",
    "choose",
    "chosen",
    "is_available",
    "library",
    "unavailable_reason",
    "use_torch",
]
