"""What happens inside a process that ``hotloop run`` started, before and after torch is imported.

It is the first thing in the script's interpreter, so it imports little and hides its traces.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .settings import VARIABLE, Settings

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

    from ..kernels.router import ProductRouter
    from .session import Session


def begin(text: str) -> None:
    """Set this process up.

    Args:
        text: the settings, as ``Settings.dumps`` wrote them.
    """
    settings = Settings.loads(text)
    if not settings.pid:  # Typed from --dry-run: whoever reads it first is the script.
        settings = dataclasses.replace(settings, pid=os.getpid(), started_s=time.monotonic())
        os.environ[VARIABLE] = settings.dumps()
    rank = _rank(settings)
    if rank is None and settings.num_ranks is not None and os.getpid() == settings.pid:
        return  # torchrun itself, which computes nothing.
    session: Session | None = None
    if os.getpid() == settings.pid or rank is not None:
        from .session import Session

        _place(settings, rank or 0)
        session = Session(settings, rank)
        atexit.register(session.end)
    else:  # A Python child of the script.
        _exchange_environment(settings.environment_before, settings.environment)
    for parameter, value in settings.mallopt.items():
        ctypes.CDLL(None).mallopt(int(parameter), value)
    sys.meta_path.insert(0, TorchFinder(lambda torch: _after_torch(torch, settings, session)))


def _rank(settings: Settings) -> int | None:
    """Number of this process among torchrun's on this machine; ``None``: not one of them.

    Children of a rank inherit its variables, but not its parent.
    """
    text = os.environ.get("LOCAL_RANK", "")
    if settings.num_ranks is None or not text.isdigit() or os.getppid() != settings.pid:
        return None
    return int(text) % settings.num_ranks


def _place(settings: Settings, rank: int) -> None:
    if settings.cpu_ids:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, settings.cpu_ids[rank])
    if settings.numa_policy != "default":
        from ..machine.mempolicy import MODES, MemoryPolicy, set_memory_policy

        nodes = settings.numa_nodes[rank] if settings.numa_policy != "local" else ()
        set_memory_policy(MemoryPolicy(MODES[settings.numa_policy], tuple(sorted(nodes))))


def _exchange_environment(
    found: dict[str, str] | dict[str, str | None], wanted: dict[str, str] | dict[str, str | None]
) -> None:
    """Set the variables that are still as ``found``; what the script set itself stays."""
    for name, value in wanted.items():
        if os.environ.get(name) != found[name]:
            continue
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


class TorchFinder:
    """A finder that finds nothing itself, but is told when torch has been imported."""

    def __init__(self, then: Callable[[ModuleType], None]) -> None:
        self._then = then

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of torch as the others find it, whose loader calls ``then`` when it is done."""
        if name != "torch":
            return None
        spec = None
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    break
        loader: Any = spec.loader if spec is not None else None
        if loader is None or not hasattr(loader, "exec_module"):
            return spec
        plain = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            # Nothing is left of this: neither here nor on the instance of the loader.
            with contextlib.suppress(ValueError):
                sys.meta_path.remove(self)
            del loader.exec_module
            plain(module)
            self._then(module)

        loader.exec_module = exec_module
        return spec


def _after_torch(torch: Any, settings: Settings, session: Session | None) -> None:
    try:
        torch.get_num_threads()  # OpenMP and MKL read the environment now.
        # Programs that the script starts find what they would have found.
        _exchange_environment(settings.environment, settings.environment_before)
        if settings.optimizer or session is not None:
            from . import optimizer

            optimizer.install(fuse=settings.optimizer)
            if settings.optimizer:
                _install_updates()
        if settings.operators:
            _install_operators()
        if settings.data:
            from . import loaders

            loaders.install()
        router = _route(settings, loud=session is not None) if settings.matmul else None
        if session is not None:
            session.after_torch(router)
    except Exception as error:
        print(f"hotloop: the script runs without some changes: {error}", file=sys.stderr)


def _install_updates() -> None:
    from .. import kernels

    if kernels.is_available():
        from . import updates

        updates.install()


def _install_operators() -> None:
    from .. import kernels

    if kernels.is_available():
        from . import operators

        operators.install()


def _route(settings: Settings, *, loud: bool) -> ProductRouter | None:
    from ..errors import RunError
    from . import matmul

    try:
        return matmul.route(settings.fingerprint)
    except RunError as error:
        if loud and settings.report:
            print(f"hotloop: matmul: left to torch: {error}", file=sys.stderr)
        return None
