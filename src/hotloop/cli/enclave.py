"""``hotloop enclave``: its kinds, one file each (``enclave_NAME.py``)."""

from __future__ import annotations

import argparse
import importlib

from .kinds import add_common_options

NAME = "enclave"
# Modules of this folder: each adds its command, or its group of commands, in ``add_parser``.
PARTS: tuple[str, ...] = ("size", "build", "run", "train", "sealed", "keys")


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
    add_common_options(kinds)
