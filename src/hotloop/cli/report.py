"""``hotloop report``: what a run did, as tables and as one HTML page to hand on."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import write_text_atomically
from ..machine import Machine
from ..report.document import Document
from .report_text import print_report

NAME = "report"
# Of ``train.report``, which would load torch.
FORMAT = 1
_FILE = "report.json"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to ``hotloop``."""
    parser = subparsers.add_parser(
        NAME,
        help="show what a run did",
        description="Show the report of a run: time, step, memory, machine, suggestions.",
    )
    parser.add_argument(
        "file", type=Path, metavar="FILE", help=f"a {_FILE}, or the folder of a run"
    )
    parser.add_argument(
        "--html", type=Path, metavar="OUT", help="write one page that needs no network, too"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, without the curve")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report and write its page; returns the exit code.

    Raises:
        InputError: there is no report, it is not one, or the page cannot be there.
    """
    path: Path = args.file / _FILE if args.file.is_dir() else args.file
    report = load(path)
    report["machine"] = machine = described(report)
    if args.html is not None:
        _write_page(args.html, path, report)
    if args.json:
        del report["machine"]
        document = {key: value for key, value in report.items() if key != "curve"}
        html = None if args.html is None else str(args.html)
        print(json.dumps({**document, "machine": machine, "report": str(path), "html": html},
                         indent=2))  # fmt: skip
        return 0
    files = [("report", str(path))]
    if args.html is not None:
        files.append(("page", str(args.html)))
    print_report(Document(report), Document(machine), files)
    return 0


def load(path: Path) -> dict[str, Any]:
    """The document of a report.

    Raises:
        InputError: it cannot be read, or is not a report that this version knows.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"a report must be a {_FILE} or the folder of a run",
            got=f"{path}: {error.strerror}",
            next_step="hotloop train writes one into the folder it names",
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} must hold a report as JSON", got=error) from None
    if not isinstance(report, dict) or "format" not in report:
        kind = "no format" if isinstance(report, dict) else f"a {type(report).__name__}"
        raise InputError(
            f"{path} must hold a report of hotloop train",
            got=kind,
            next_step=f"name its {_FILE} or its folder",
        )
    if report["format"] != FORMAT:
        raise InputError(
            f"{path} must be a report of format {FORMAT}",
            got=report["format"],
            next_step="read it with the version of hotloop that wrote it",
        )
    return report


def described(report: dict[str, Any]) -> dict[str, Any]:
    """The machine of a report, with what is known of it here where it is this machine.

    A report that was made without topology or ceilings gets those of this machine if both have
    the same fingerprint; nothing is measured.
    """
    machine = report.get("machine")
    machine = machine if isinstance(machine, dict) else {}
    if machine.get("cores") and machine.get("ceilings"):
        return machine
    here = Machine.probe()
    if machine.get("fingerprint") != here.fingerprint():
        return machine
    ceilings = machine.get("ceilings")
    if ceilings is None and (known := here.cached_ceilings()) is not None:
        ceilings = known.to_dict()
    return {**here.to_dict(), **machine, "ceilings": ceilings}


def _write_page(out: Path, path: Path, report: dict[str, Any]) -> None:
    from ..report import render_page

    if out.is_dir() or (out.exists() and out.samefile(path)):
        raise InputError(
            "--html must be a file of its own", got=out, next_step="pass --html report.html"
        )
    write_text_atomically(out, render_page(report))
