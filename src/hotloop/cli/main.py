"""The ``hotloop`` command: finds the command, and turns errors into one line and an exit code.

Exit codes: 0 done, 1 failed while running, 2 bad usage or input; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence

from ..errors import HotloopError
from ..version import VERSION
from .compiler_on_demand import import_compiler_on_demand
from .streams import write_any_character

# Modules of this folder. What ten commands import takes 0.1 s more than what one does.
COMMANDS = (
    "machine", "plan", "train", "tune", "prove", "report", "run", "export", "serve", "bench",
    "enclave",
)  # fmt: skip
INTERRUPTED = 130
# They train, or tell the memory of it: without the compiler until it is asked for.
_TRAINING = ("plan", "train", "tune", "prove")


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of one command; ``None``: of all."""
    parser = argparse.ArgumentParser(
        prog="hotloop",
        description="Train PyTorch models as fast as this machine allows, in a known memory.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"hotloop {VERSION}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS if command is None else (command,):
        importlib.import_module(f".{name}", __package__).add_parser(subparsers)
    for subparser in subparsers.choices.values():
        subparser.allow_abbrev = False
        subparser.add_argument(
            "--debug", action="store_true", help="show the traceback when something goes wrong"
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    if argv is None:  # A process of the command's own.
        write_any_character()
    words = sys.argv[1:] if argv is None else list(argv)
    command = words[0] if words and words[0] in COMMANDS else None
    args = build_parser(command).parse_args(words)
    try:
        if argv is None and args.command in _TRAINING:
            import_compiler_on_demand()
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader went away (head, less): there is nobody to tell. Python would complain when
        # it flushes at exit, so the output is pointed elsewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("hotloop: stopped", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if args.debug:
            raise
        return _fail(error, as_json=getattr(args, "json", False))


def _fail(error: Exception, *, as_json: bool) -> int:
    """Tell what went wrong in one line, and as JSON too where that was asked for."""
    if isinstance(error, HotloopError):
        text, code = str(error), error.exit_code
    else:
        first = (str(error).strip().splitlines() or [""])[0]
        text = f"{type(error).__name__}: {first}. Next: run again with --debug."
        code = 1
    print(f"hotloop: error: {text}", file=sys.stderr)
    if as_json and os.environ.get("RANK", "0") == "0":  # Of several hosts one answers.
        document = {"error": text, "kind": type(error).__name__, "exit_code": code}
        print(json.dumps(document))
    return code
