"""What all kinds of a command take: ``hotloop bench WHAT``, ``hotloop enclave WHAT``."""

from __future__ import annotations

import argparse


def add_common_options(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``--json`` and ``--debug``; given before or after WHAT, they mean the same."""
    for kind in kinds.choices.values():
        kind.allow_abbrev = False
        kind.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS, help="print JSON"
        )
        kind.add_argument("--debug", action="store_true", default=argparse.SUPPRESS,
                          help="show the traceback when something goes wrong")  # fmt: skip
