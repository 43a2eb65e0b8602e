"""``hotloop run``: an unmodified PyTorch script, faster, exactly."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
import time
from typing import TYPE_CHECKING

from ..errors import InputError
from ..machine import Machine, ThreadAffinity
from ..machine.numa import ALLOCATION_POLICIES

if TYPE_CHECKING:
    from ..launch.changes import Change, Options
    from ..launch.command import Target
    from ..launch.settings import Settings

NAME = "run"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to ``hotloop``."""
    parser = subparsers.add_parser(
        NAME,
        help="run an unmodified PyTorch script faster",
        usage="hotloop run [options] script.py [args ...]\n"
        "       hotloop run [options] -m module [args ...]",
        description="Run a Python script as it is, with threads, memory and matrix products set up "
        "for this machine. Results stay the same to float32 rounding.",
    )
    parser.add_argument(
        "--off", action="append", default=[], metavar="NAME",
        help="leave one out: threads, affinity, numa, allocator, huge-pages, matmul, optimizer, "
        "operators, data; can be given again",
    )  # fmt: skip
    parser.add_argument("--num-threads", type=int, metavar="N", help="threads of each process")
    parser.add_argument(
        "--affinity", default="none", metavar="WHERE",
        help="CPUs the script may use: none, compact, spread, or a list such as 0,2,4-6",
    )  # fmt: skip
    parser.add_argument(
        "--numa-policy", default="default", metavar="POLICY",
        help=f"memory policy: {', '.join(ALLOCATION_POLICIES)}",
    )  # fmt: skip
    parser.add_argument("--numa-nodes", default="", metavar="NODES", help="its nodes, such as 0,1")
    parser.add_argument("--huge-pages", action="store_true", help="tensors on huge pages")
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="N processes under torchrun, each on its own cores"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done")
    parser.add_argument("--quiet", action="store_true", help="say nothing")
    parser.add_argument("--report", metavar="FILE", help="write the report here, as JSON")
    parser.add_argument(
        "--compare", action="store_true", help="run with and without, in turn; print the gain"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="pairs of --compare (default 5)"
    )
    parser.add_argument("--json", action="store_true", help="--dry-run, --compare: print JSON")
    parser.add_argument(
        "-m", dest="module", nargs=argparse.REMAINDER, metavar="module",
        help="run a module, as python -m does",
    )  # fmt: skip
    # One place for both: of two, the first would take a "--" that is the script's own argument.
    script = parser.add_argument(
        "script", nargs=argparse.PARSER, help="the script and its arguments"
    )
    script.required = False
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Become the script; returns only from ``--dry-run`` and ``--compare``.

    Raises:
        InputError: no script, or an option outside its rule.
    """
    started_s = time.monotonic()
    from ..launch import command
    from ..launch.changes import decide, fresh_settings

    target = _target(args)
    target.check()
    if args.rounds < 1:
        raise InputError("--rounds must be at least 1", got=args.rounds)
    if args.json and not (args.dry_run or args.compare):
        raise InputError(
            "--json goes with --dry-run or --compare", next_step="use --report FILE for the report"
        )
    options = _options(args)
    settings = fresh_settings(
        started_s,
        report=not args.quiet,
        report_path=None if args.report is None else os.path.abspath(args.report),
    )
    settings, changes = decide(Machine.probe(), options, os.environ, settings)
    arguments = command.argv(target, options.num_ranks)
    if args.dry_run:
        settings = dataclasses.replace(settings, pid=0)  # Whoever is started with it.
        _print_dry_run(args, settings, changes, arguments)
        return 0
    if args.compare:
        return _compare(args, target)
    if not args.quiet:
        for line in settings.lines:
            print(f"hotloop: {line}", file=sys.stderr)
    command.execute(arguments, command.environment(os.environ, settings))


def _target(args: argparse.Namespace) -> Target:
    from ..launch.command import Target

    if args.module:
        name, *rest = args.module
        return Target(name, (*rest, *(args.script or ())), is_module=True)
    words: list[str] = list(args.script or ())
    if words[:1] == ["--"]:
        del words[0]
    if not words:
        raise InputError("a script or -m module must be given", next_step="hotloop run script.py")
    return Target(words[0], tuple(words[1:]))


def _options(args: argparse.Namespace) -> Options:
    from ..launch.changes import Options
    from ..machine.probe.tree import parse_cpu_list

    nodes = parse_cpu_list(args.numa_nodes) if args.numa_nodes else ()
    if nodes is None or (args.numa_nodes and not nodes):
        raise InputError("--numa-nodes must be numbers such as 0,1", got=args.numa_nodes)
    off = tuple(name for text in args.off for name in text.split(","))
    return Options(
        off=off, num_threads=args.num_threads, affinity=ThreadAffinity.parse(args.affinity),
        numa_policy=args.numa_policy, numa_nodes=tuple(nodes), huge_pages=args.huge_pages,
        num_ranks=args.nproc,
    )  # fmt: skip


def _print_dry_run(
    args: argparse.Namespace, settings: Settings, changes: list[Change], arguments: list[str]
) -> None:
    from ..launch import command

    added = {
        name: value
        for name, value in command.environment(os.environ, settings).items()
        if os.environ.get(name) != value
    }
    if args.json:
        rows = [
            {"name": c.name, "made": c.made, "text": c.text, "environment": dict(c.environment)}
            for c in changes
        ]
        print(json.dumps({"changes": rows, "environment": added, "command": arguments}, indent=1))
        return
    for change in changes:
        print(f"# {change.name}: {change.text}")
        for name, value in change.environment.items():
            print(f"#   the same without hotloop: {name}={value}")
    for name, value in added.items():
        print(f"export {name}={shlex.quote(value)}")
    print(f"exec {shlex.join(arguments)}")


def _compare(args: argparse.Namespace, target: Target) -> int:
    from ..launch import command
    from ..launch.compare import (
        base_environment,
        compare,
        comparison_text,
        interleave,
        run_once,
    )

    def say(text: str) -> None:
        if not args.quiet:
            print(f"hotloop: {text}", file=sys.stderr)

    environ = base_environment()
    own = ["-m", target.name] if target.is_module else [target.name]
    # As a user has it: with the start-up of the command.
    changed = [sys.executable, "-m", "hotloop", "run", "--quiet", *_flags(args), *own, *target.args]
    plain = command.argv(target, args.nproc)
    say("one run that is not counted: kernels are timed")
    run_once(changed, environ)
    results = interleave(
        lambda: run_once(plain, environ), lambda: run_once(changed, environ), args.rounds, say
    )
    comparison = compare(*results)
    print(json.dumps(comparison.to_dict(), indent=1) if args.json else comparison_text(comparison))
    return 0


def _flags(args: argparse.Namespace) -> list[str]:
    """The options that change how the script runs, again as words."""
    flags = [word for name in args.off for word in ("--off", name)]
    for flag, value, default in (
        ("--num-threads", args.num_threads, None),
        ("--affinity", args.affinity, "none"),
        ("--numa-policy", args.numa_policy, "default"),
        ("--numa-nodes", args.numa_nodes, ""),
        ("--nproc", args.nproc, None),
    ):
        if value != default:
            flags += [flag, str(value)]
    return flags + ["--huge-pages"] * args.huge_pages
