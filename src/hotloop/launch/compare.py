"""A script with and without hotloop, in turn, and what the pairs say: the gain and the results."""

from __future__ import annotations

import math
import os
import re
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import RunError
from ..measure import Turns, always_valid_interval, there_and_back, timed
from ..monitor.record import Record

CONFIDENCE = 0.95
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?(?:nan|inf)", re.IGNORECASE)


@dataclass(frozen=True)
class Outcome:
    """One run of a command. seconds: of the whole process. output: its standard output."""

    seconds: float
    output: str


@dataclass(frozen=True, kw_only=True)
class Comparison(Record):
    """Pairs of runs without and with hotloop.

    Attributes:
        plain_s, with_s: seconds of each pair.
        gain: median of plain over with; above 1: hotloop is faster.
        low, high: interval of the mean ratio (``measure.interval``, of logarithms); ``None``: too
            few pairs for one.
        confidence: such as 0.95.
        numbers: numbers in the output that all plain runs print alike.
        greatest_difference: of these with hotloop, the greatest relative one; ``None``: the outputs
            have different words, or no such numbers.
    """

    plain_s: tuple[float, ...]
    with_s: tuple[float, ...]
    gain: float
    low: float | None
    high: float | None
    numbers: int
    greatest_difference: float | None
    confidence: float = CONFIDENCE

    @property
    def n(self) -> int:
        """Number of pairs."""
        return len(self.plain_s)


def interleave(
    plain: Callable[[], Outcome],
    changed: Callable[[], Outcome],
    rounds: int,
    say: Callable[[str], Any] = lambda text: None,
) -> tuple[list[Outcome], list[Outcome]]:
    """Run both ``rounds`` times in turn, each first in every second pair.

    Args:
        say: told how far it is.
    """
    results: tuple[list[Outcome], list[Outcome]] = ([], [])
    turns = Turns({0: plain, 1: changed}, rounds=rounds, order=there_and_back)
    for pair in turns:
        for which, turn in pair.items():
            results[which].append(turn.answer)
        without, changed_s = (outcomes[-1].seconds for outcomes in results)
        say(f"pair {turns.played} of {rounds}: {without:.2f} s without, {changed_s:.2f} s with")
    return results


def run_once(arguments: Sequence[str], environ: Mapping[str, str]) -> Outcome:
    """Run a command to its end, its input empty, its output kept.

    Raises:
        RunError: it failed; with the end of what it said.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        seconds, done = timed(
            lambda: subprocess.run(
                list(arguments), env=dict(environ), stdin=subprocess.DEVNULL, stdout=out,
                stderr=err, check=False,
            )
        )  # fmt: skip
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    if done.returncode != 0:
        last = (texts[1].strip().splitlines() or ["nothing on stderr"])[-1]
        raise RunError(
            "the script must end with exit code 0 to be compared",
            got=f"{done.returncode}: {last}",
            next_step="run it without --compare",
        )
    return Outcome(seconds, texts[0])


def compare(plain: Sequence[Outcome], changed: Sequence[Outcome]) -> Comparison:
    """What pairs of runs say."""
    ratios = [p.seconds / c.seconds for p, c in zip(plain, changed, strict=True)]
    low, high = _interval([math.log(ratio) for ratio in ratios])
    numbers, difference = compare_outputs([p.output for p in plain], [c.output for c in changed])
    return Comparison(
        plain_s=tuple(p.seconds for p in plain),
        with_s=tuple(c.seconds for c in changed),
        gain=statistics.median(ratios),
        low=low,
        high=high,
        numbers=numbers,
        greatest_difference=difference,
    )


def _interval(logs: Sequence[float]) -> tuple[float | None, float | None]:
    _, low, high = always_valid_interval(logs, CONFIDENCE)
    return (math.exp(low), math.exp(high)) if math.isfinite(high) else (None, None)


def compare_outputs(plain: Sequence[str], changed: Sequence[str]) -> tuple[int, float | None]:
    """How the numbers differ that a program prints alike each time it is run without hotloop.

    Times differ from run to run and are left out by that; with one plain run nothing tells which
    they are, so nothing is compared.

    Returns:
        how many numbers, and the greatest relative difference to the plain ones (absolute where
        these are 0); ``None`` where the words around the numbers differ.
    """
    if len(plain) < 2:
        return 0, None
    words = {tuple(_NUMBER.split(text)) for text in (*plain, *changed)}
    if len(words) > 1:
        return 0, None
    columns = list(zip(*(_NUMBER.findall(text) for text in plain), strict=True))
    alike = [at for at, column in enumerate(columns) if len(set(column)) == 1]
    if not alike:
        return 0, None
    greatest = 0.0
    for text in changed:
        found = _NUMBER.findall(text)
        for at in alike:
            a, b = float(columns[at][0]), float(found[at])
            if a == b or (math.isnan(a) and math.isnan(b)):
                continue
            difference = abs(a - b) / (abs(a) or 1.0)
            greatest = math.inf if math.isnan(difference) else max(greatest, difference)
    return len(alike), greatest


def comparison_text(comparison: Comparison) -> str:
    """One paragraph for a terminal."""
    c = comparison
    plain, changed = statistics.median(c.plain_s), statistics.median(c.with_s)
    lines = [
        f"without hotloop  {plain:.2f} s ({min(c.plain_s):.2f} to {max(c.plain_s):.2f})",
        f"with hotloop     {changed:.2f} s ({min(c.with_s):.2f} to {max(c.with_s):.2f})",
    ]
    interval = ""
    if c.low is not None and c.high is not None:
        interval = f", {c.confidence:.0%} interval {c.low:.2f} to {c.high:.2f}"
        if c.low <= 1 <= c.high:
            interval += ": not clear"
    lines.append(f"gain             {c.gain:.2f} times{interval}, n={c.n} pairs")
    if c.greatest_difference is not None:
        lines.append(
            f"results          {c.numbers} numbers that do not change from run to run differ by "
            f"{c.greatest_difference:.1e} at most"
        )
    elif c.n > 1:
        lines.append("results          the outputs have no numbers in common to compare")
    return "\n".join(lines)


def base_environment() -> dict[str, str]:
    """The environment, without what a launch around this one put there."""
    from .settings import VARIABLE

    return {name: value for name, value in os.environ.items() if name != VARIABLE}
