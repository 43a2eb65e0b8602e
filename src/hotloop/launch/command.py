"""The command that a launch becomes: the script's own interpreter and arguments, by ``exec``.

No parent stays behind, so signals, exit code, standard streams and terminal are the script's own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ..errors import InputError, RunError
from .settings import VARIABLE, Settings

STARTUP = Path(__file__).with_name("startup")


@dataclass(frozen=True)
class Target:
    """What is run.

    Attributes:
        name: path of a script, or name of a module. is_module: which.
        args: its arguments.
    """

    name: str
    args: tuple[str, ...] = ()
    is_module: bool = False

    def check(self) -> None:
        """Tell at once what Python would tell after torch was set up.

        Raises:
            InputError: there is no such script.
        """
        # A folder or an archive with __main__ inside can be run too.
        if not self.is_module and not os.path.exists(self.name):
            raise InputError(
                "the script must be a file", got=self.name, next_step="check its path, or use -m"
            )


def argv(target: Target, num_ranks: int | None = None) -> list[str]:
    """The arguments of the interpreter, itself first; under torchrun with ``num_ranks``."""
    module = ["-m"] if target.is_module else []
    if num_ranks is None:
        return [sys.executable, *module, target.name, *target.args]
    # Behind "--" torchrun takes nothing for an abbreviation of an option of its own.
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={num_ranks}", *module, "--", target.name, *target.args,
    ]  # fmt: skip


def environment(environ: Mapping[str, str], settings: Settings) -> dict[str, str]:
    """The environment of the script: the given one, and what ``startup/sitecustomize`` needs."""
    path = environ.get("PYTHONPATH")
    return {
        **environ,
        **settings.environment,
        "PYTHONPATH": str(STARTUP) + (os.pathsep + path if path else ""),
        VARIABLE: settings.dumps(),
    }


def execute(arguments: Sequence[str], environ: Mapping[str, str]) -> NoReturn:
    """Become this command.

    Raises:
        RunError: the system refuses.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(arguments[0], list(arguments), dict(environ))
    except OSError as error:
        raise RunError("the interpreter must start", got=error) from None
