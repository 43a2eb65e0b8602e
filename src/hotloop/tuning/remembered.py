"""What tuning found, kept among the winners under the machine's and the work's fingerprints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..measure import Winner, winners


def remember(machine: str, work: str, knobs: Mapping[str, Any], proof: str) -> bool:
    """Keep the knobs for runs with ``plan = "auto"``; ``False``: the cache cannot be written.

    Args:
        machine, work: fingerprints.
        knobs: by dotted name, those that were searched; only such that leave results exact.
        proof: one sentence.
    """
    answer = {"knobs": dict(knobs), "proof": proof}
    found = Winner(question=_question(work), answer=answer, versions=_versions())
    return winners.add([found], machine)


def recall(machine: str, work: str) -> tuple[dict[str, Any], str] | None:
    """``(knobs, proof)`` kept for this machine, work and torch; a damaged answer is none."""
    found = winners.recall(_question(work), _versions(), machine)
    try:
        return None if found is None else (dict(found.answer["knobs"]), str(found.answer["proof"]))
    except (ValueError, TypeError, KeyError):
        return None


def forget(machine: str, work: str) -> None:
    """Drop what was kept; nothing happens where there is nothing."""
    winners.forget(_question(work), _versions(), machine)


def _question(work: str) -> str:
    return f"plan/{work}"


def _versions() -> dict[str, str]:
    return winners.versions_of("torch")
