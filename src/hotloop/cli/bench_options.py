"""What the kinds of ``hotloop bench`` share: lists and numbers of flags, progress, the document."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from ..errors import InputError


def chosen(flag: str, text: str | None, known: Sequence[str]) -> list[str]:
    """The names of ``A,B``; all that are known where the flag was not given.

    Raises:
        InputError: one of them is not known.
    """
    if text is None:
        return list(known)
    names = text.split(",")
    for name in names:
        if name not in known:
            raise InputError(
                f"{flag} must be of {', '.join(known)}", got=name, next_step=f"{flag} {known[0]}"
            )
    return names


def positive(args: argparse.Namespace, *names: str) -> None:
    """Hold numbers to their rule.

    Raises:
        InputError: one is not above 0.
    """
    for name in names:
        value = getattr(args, name)
        if value is not None and not value > 0:
            rule = "at least 1" if isinstance(value, int) else "above 0"
            raise InputError(f"--{name.replace('_', '-')} must be {rule}", got=value)


def live_line(line: str) -> None:
    """Show what is going on, where somebody watches."""
    if sys.stderr.isatty():
        print(f"\r{line:<70}", end="", file=sys.stderr, flush=True)


def write_document(args: argparse.Namespace, document: Any) -> bool:
    """Write to ``--out``; with ``--json`` print too. Whether it was printed.

    Raises:
        StorageError: the file cannot be written.
    """
    from ..files import write_text_atomically

    text = json.dumps(document, indent=1)
    if args.out is not None:
        write_text_atomically(args.out, text + "\n")
    if args.json:
        print(text)
    return bool(args.json)
