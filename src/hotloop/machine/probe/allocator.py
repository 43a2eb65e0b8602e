"""Which memory allocator this process uses, from the libraries it has mapped."""

from __future__ import annotations

import re

from .tree import Tree

# A preloaded allocator takes the place of the C library's, so it is looked for first.
_LIBRARIES = (
    ("jemalloc", re.compile(r"/libjemalloc[^/]*\.so")),
    ("tcmalloc", re.compile(r"/libtcmalloc[^/]*\.so")),
    ("mimalloc", re.compile(r"/libmimalloc[^/]*\.so")),
    ("musl", re.compile(r"/(ld-musl-|libc\.musl-)[^/]*\.so")),
    ("glibc", re.compile(r"/libc(\.so\.6|-2\.\d+\.so)")),
)


def read_allocator(tree: Tree) -> str | None:
    """``"jemalloc"``, ``"tcmalloc"``, ``"mimalloc"``, ``"musl"`` or ``"glibc"``, else ``None``.

    An allocator linked into the interpreter itself leaves no trace here and is reported as the C
    library's.
    """
    maps = tree.text("/proc/self/maps") or ""
    return next((name for name, pattern in _LIBRARIES if pattern.search(maps)), None)
