"""``hotloop enclave``: its kinds, one file each (``enclave_NAME.py``)."""

from __future__ import annotations

import argparse
import importlib

NAME = "enclave"
# Modules of this folder: each adds its command, or its group of commands, in ``add_parser``.
PARTS: tuple[str, ...] = ("train", "keys", "sealed")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to ``hotloop``."""
    parser = subparsers.add_parser(
        NAME,
        help="size, build, run and feed an enclave",
        description="Size, build, run and feed an enclave.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    kinds = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for part in PARTS:
        importlib.import_module(f".enclave_{part}", __package__).add_parser(kinds)
    for kind in kinds.choices.values():
        kind.allow_abbrev = False
        # Given before or after WHAT, they mean the same.
        kind.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS, help="print JSON"
        )
        kind.add_argument("--debug", action="store_true", default=argparse.SUPPRESS,
                          help="show the traceback when something goes wrong")  # fmt: skip
