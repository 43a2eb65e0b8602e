"""Levels of the kernels that this machine can run."""

from hotloop.kernels import LEVELS, Level, loader


def usable_levels() -> list[Level]:
    """The best one first; a processor that runs one runs those below it. Empty: it runs none."""
    best = loader.choice_below("/").level
    if best is None:
        return []
    levels = [level for level in LEVELS if level.architecture == best.architecture]
    return levels[levels.index(best) :]
