"""Peers in processes of their own that take turns: the coordinator of every race.

A peer's process answers one line when it is ready and one line for each turn. One of them works at
a time, so a noisy neighbour hits all alike.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RunError
from ..machine import Machine
from ..measure import Turns, rotating

if TYPE_CHECKING:
    from ..train.child import Child


@dataclass
class Answers:
    """What one peer answered.

    Attributes:
        ready: the answer when it was prepared.
        answers: of each turn, the warm-up first.
        missing: why it did not run or did not go on; ``None``: it did.
    """

    ready: dict[str, Any] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    missing: str | None = None


def take_turns(
    peers: Sequence[str],
    start: Callable[[str], Child],
    rounds: int,
    *,
    prepare_s: float,
    turn_s: float,
    say: Callable[[str], None],
) -> dict[str, Answers]:
    """Start each peer, let it warm up alone, then give each a turn in each round.

    The order of a round is that of the one before, begun one peer later (``measure.rotating``).

    Args:
        start: starts a peer's process; a ``RunError`` says why it cannot run.
        rounds: turns of each peer after the warm-up.
        prepare_s: what starting may take. turn_s: what a turn may take.
        say: told what is going on.
    """
    told = {peer: Answers() for peer in peers}
    running: dict[str, Child] = {}

    def prepare(peer: str) -> None:
        running[peer] = start(peer)
        told[peer].ready = running[peer].answer(prepare_s)
        turn(peer)

    def turn(peer: str) -> None:
        running[peer].tell(turn=len(told[peer].answers))
        told[peer].answers.append(running[peer].answer(turn_s))

    def closing(peer: str, part: Callable[[str], None]) -> None:
        try:
            part(peer)
        except RunError as error:
            told[peer].missing = str(error)
            if peer in running:
                running.pop(peer).close()
            raise

    try:
        first = Turns(
            {peer: partial(closing, peer, prepare) for peer in peers}, forgive=(RunError,),
            before=lambda peer: say(f"preparing {peer}"),
        )  # fmt: skip
        first.play(0)
        turns = Turns(
            {peer: partial(closing, peer, turn) for peer in first.racing}, rounds=rounds,
            order=rotating, forgive=(RunError,),
            before=lambda peer: say(f"round {turns.played + 1} of {rounds}, {peer}"),
        )  # fmt: skip
        for _ in turns:
            pass
    finally:
        for child in running.values():
            child.close()
    return told


def start_peer(module: str, peer: str, setup: dict[str, Any]) -> Child:
    """``python -m MODULE SETUP.json``; the setup is written into its ``folder``.

    Args:
        setup: has ``folder`` and ``threads``, and ``environment`` if variables are to be set;
            ``peer`` is added.
    """
    from ..train.child import Child  # Brings torch, which not every peer's process has.

    path = Path(setup["folder"]) / f"{peer}.json"
    path.write_text(json.dumps({**setup, "peer": peer}))
    threads = str(setup["threads"])
    environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    environment |= setup.get("environment", {})
    return Child(peer, module, [str(path)], environment=environment)


def need(*libraries: str, extra: str = "peers") -> None:
    """Say which library is missing.

    Raises:
        RunError: one of them is not installed.
    """
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    if missing:
        raise RunError(f"not installed: pip install 'hotloop[{extra}]' (or {' '.join(missing)})")


def summary(values: Sequence[float]) -> dict[str, float | int]:
    """Median, least, greatest and number of at least one value."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def about(machine: Machine, libraries: Sequence[str]) -> dict[str, Any]:
    """Machine and versions, for the record of a race."""
    versions = {"python": platform.python_version()}
    for name in libraries:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "machine": machine.to_dict()["cpu_model"],
        "fingerprint": machine.fingerprint(),
        "versions": versions,
    }
