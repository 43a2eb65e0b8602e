"""``hotloop enclave run``: a command in a sandbox, under the memory limit computed for it."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..enclave.running import SandboxRun, run_in_sandbox
from ..enclave.sandbox import Sandbox
from ..errors import BudgetError, InputError, RunError
from ..units import format_bytes, format_seconds, parse_bytes

KINDS = ("sandbox", "gvisor")
# Flags of hotloop's commands that name what is written.
_WRITES = ("--out", "--runs-dir", "--resume", "--metrics-file", "--tensorboard")
_DEFAULT_TMP = "64MiB"


def add_parser(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to ``hotloop enclave``."""
    parser = kinds.add_parser(
        "run",
        help="run a command in a sandbox, in the memory computed for it",
        description="Run train or another command of hotloop in bubblewrap or gVisor: no "
        "network, a read-only system, a filter of system calls, and a hard memory limit. "
        "Files named in the command are readable; what follows --out is writable.",
    )
    parser.add_argument(
        "words", nargs="+", metavar="COMMAND", help="after --: train ..., or python FILE ..."
    )
    parser.add_argument("--kind", choices=KINDS, default="sandbox", help="default: sandbox")
    parser.add_argument(
        "--memory", metavar="SIZE", help="the limit (default: what enclave size computes)"
    )
    parser.add_argument(
        "--no-check", dest="check", action="store_false",
        help="with --memory: do not compute whether the command fits, let the limit decide",
    )  # fmt: skip
    parser.add_argument("--read", action="append", default=[], metavar="PATH",
                        help="also readable; may be repeated")  # fmt: skip
    parser.add_argument("--write", action="append", default=[], metavar="DIR",
                        help="also writable; may be repeated")  # fmt: skip
    parser.add_argument("--env", action="append", default=[], metavar="NAME[=VALUE]",
                        help="a variable for inside; others are not passed")  # fmt: skip
    parser.add_argument("--tmp", default=_DEFAULT_TMP, metavar="SIZE",
                        help=f"size of /tmp, in memory (default: {_DEFAULT_TMP})")  # fmt: skip
    parser.add_argument("--no-seccomp", dest="seccomp", action="store_false",
                        help="do not filter system calls (told)")  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code, 1 where the limit ended it."""
    words: list[str] = args.words
    sandbox = _sandbox(args, words)
    sandbox.program()  # Before the size is computed.
    limit = _limit(args, words)
    _say(f"{args.kind}, {format_bytes(limit)}")
    if not args.seccomp and args.kind == "sandbox":
        _say("system calls are not filtered (--no-seccomp)")
    for path in sandbox.outputs:
        path.mkdir(parents=True, exist_ok=True)
    done = run_in_sandbox(sandbox, _inside(words), limit)
    if done.limit_reason is not None:
        _say(
            f"limit by RLIMIT_DATA ({done.limit_reason}): for each process, and it counts "
            "what is reserved"
        )
    _tell(args, done)
    if done.out_of_memory and done.exit_code:
        raise RunError(
            f"the command must stay within {format_bytes(done.limit_bytes)}",
            got="killed at the limit",
            next_step="leave --memory out, or give more",
        )
    return done.exit_code


def _sandbox(args: argparse.Namespace, words: list[str]) -> Sandbox:
    writes = [Path(path) for path in args.write]
    writes += [Path(b) for a, b in itertools.pairwise(words) if a in _WRITES]
    outputs = tuple(dict.fromkeys(path.absolute() for path in writes))
    reads = [Path(path) for path in args.read]
    for path in reads:
        if not path.exists():
            raise InputError("what --read names must exist", got=path)
    reads += [Path(word) for word in words[1:] if "\0" not in word and os.path.exists(word)]
    inputs = tuple(
        path
        for path in dict.fromkeys(path.absolute() for path in reads)
        if path not in outputs and path != Path("/")
    )
    environment = {}
    for text in args.env:
        name, equals, value = text.partition("=")
        environment[name] = value if equals else os.environ.get(name, "")
    return Sandbox(
        kind=args.kind, inputs=inputs, outputs=outputs, environment=environment,
        tmp_bytes=parse_bytes(args.tmp), seccomp=args.seccomp,
    )  # fmt: skip


def _inside(words: list[str]) -> list[str]:
    python = os.path.abspath(sys.executable)
    if words[0] == "python":
        return [python, *words[1:]]
    absolute = [os.path.abspath(w) if os.path.exists(w) else w for w in words[1:]]
    for i, word in enumerate(absolute[:-1]):
        if word in _WRITES:
            absolute[i + 1] = os.path.abspath(absolute[i + 1])
    if words[0] == "train" and "--no-ceilings" not in words:
        absolute.append("--no-ceilings")  # Nothing measured before is inside.
    return [python, "-m", "hotloop", words[0], *absolute]


def _limit(args: argparse.Namespace, words: list[str]) -> int:
    """The limit; what does not fit is refused.

    Raises:
        BudgetError: the command needs more than ``--memory``.
        InputError: the size of the command is not computed, and not given.
    """
    given = None if args.memory is None else parse_bytes(args.memory)
    if words[0] == "python" or not args.check:
        if given is None:
            raise InputError(
                "the size of this command is not computed", next_step="pass --memory SIZE"
            )
        return given
    # In a process of its own: what computes the size is not resident while the command runs.
    command = [sys.executable, "-m", "hotloop", "enclave", "size", "--json", "--kind", args.kind]
    done = subprocess.run([*command, "--", *words], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise InputError("the command must have a size", got=f"exit code {done.returncode}")
    size: dict[str, Any] = json.loads(done.stdout)
    needed = int(size["size_bytes"])
    if given is not None and given < needed:
        raise BudgetError(
            f"the command must fit {format_bytes(given)}", got=f"{format_bytes(needed)} predicted",
            next_step="leave --memory out, or take a smaller batch",
        )  # fmt: skip
    return given or needed


def _tell(args: argparse.Namespace, done: SandboxRun) -> None:
    if args.json:
        print(json.dumps(dataclasses.asdict(done), indent=2))
        return
    used = f", {format_bytes(done.taken_bytes)} taken" if done.taken_bytes else ""
    limit = format_bytes(done.limit_bytes)
    _say(f"{format_seconds(done.wall_s)}{used}, limit {limit} ({done.limit_kind})")


def _say(text: str) -> None:
    print(f"hotloop: {text}", file=sys.stderr)
