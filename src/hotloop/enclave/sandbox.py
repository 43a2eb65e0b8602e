"""Command lines of a sandbox: bubblewrap with a filter of system calls, or gVisor's ``runsc``."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError

# Programs by kind: what starts it, and the Debian package that has it.
PROGRAMS = {"sandbox": ("bwrap", "bubblewrap"), "gvisor": ("runsc", "runsc")}
# What programs need of the system. Users, hosts and keys of the machine are not among them.
_SYSTEM = ("/usr", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/localtime")
_LINKS = ("/bin", "/lib", "/lib32", "/lib64", "/sbin")
# Where this hotloop is imported from.
SOURCE = str(Path(__file__).resolve().parents[2])
HOME = "/tmp"  # A file system in memory, empty at the start.
# What a process in the sandbox finds in its environment; the rest is the caller's ``--env``.
ENVIRONMENT = {
    "HOME": HOME,
    "LANG": "C.UTF-8",
    "PATH": "/usr/bin:/bin",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONPATH": SOURCE,
}


@dataclass(frozen=True, kw_only=True)
class Sandbox:
    """What a command may see and write.

    Attributes:
        kind: ``"sandbox"`` or ``"gvisor"``.
        inputs: files and folders that it reads, at their own paths.
        outputs: folders that it writes, at their own paths.
        environment: variables beside ``ENVIRONMENT``.
        tmp_bytes: size of ``/tmp``, which lies in memory.
        folder: where it starts.
        seccomp: whether system calls are filtered (``sandbox``; gVisor has its own).
    """

    kind: str = "sandbox"
    inputs: tuple[Path, ...] = ()
    outputs: tuple[Path, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    tmp_bytes: int = 64 * 1024**2
    folder: Path = Path(HOME)
    seccomp: bool = True

    def program(self) -> str:
        """Path of what starts it.

        Raises:
            InputError: it is not installed.
        """
        name, package = PROGRAMS[self.kind]
        found = shutil.which(name)
        if found is None:
            raise InputError(
                f"--kind {self.kind} needs {name}, which is not installed",
                next_step=f"apt-get install {package}",
            )
        return found

    def command(self, words: list[str], filter_fd: int | None = None) -> list[str]:
        """The command of bubblewrap that runs ``words`` in it.

        Args:
            words: program and arguments, as seen from inside.
            filter_fd: descriptor that bubblewrap reads the filter from.

        Raises:
            InputError: the program of this kind is not installed.
        """
        seccomp = [] if filter_fd is None else ["--seccomp", str(filter_fd)]
        return [self.program(), *self._isolation(), *self._mounts(), *seccomp, "--", *words]

    def _isolation(self) -> list[str]:
        words = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
        words += ["--hostname", "hotloop", "--clearenv"]
        for name, value in {**ENVIRONMENT, **self.environment}.items():
            words += ["--setenv", name, value]
        return words

    def _mounts(self) -> list[str]:
        words: list[str] = []
        for path in _SYSTEM:
            words += ["--ro-bind-try", path, path]
        for path in _LINKS:
            if os.path.islink(path):
                words += ["--symlink", os.readlink(path), path]
            elif os.path.isdir(path):
                words += ["--ro-bind", path, path]
        words += ["--proc", "/proc", "--dev", "/dev"]
        words += ["--size", str(self.tmp_bytes), "--tmpfs", "/tmp"]
        for path in (*python_folders(), *(str(path) for path in self.inputs)):
            words += ["--ro-bind", path, path]
        for path in map(str, self.outputs):
            words += ["--bind", path, path]
        return [*words, "--chdir", str(self.folder)]

    def bundle(self, words: list[str]) -> dict[str, Any]:
        """``config.json`` of an OCI bundle for ``runsc run`` (OCI runtime specification 1.0)."""
        environment = {**ENVIRONMENT, **self.environment}
        reads = [path for path in (*_SYSTEM, *_LINKS) if os.path.exists(path)]
        reads += [*python_folders(), *(str(path) for path in self.inputs)]
        writes = [str(path) for path in self.outputs]
        mounts: list[dict[str, Any]] = [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {
                "destination": "/tmp", "type": "tmpfs", "source": "tmpfs",
                "options": [f"size={self.tmp_bytes}", "nosuid", "nodev"],
            },
        ]  # fmt: skip
        for paths, mode in ((reads, "ro"), (writes, "rw")):
            mounts += [
                {
                    "destination": path, "type": "bind", "source": os.path.realpath(path),
                    "options": ["rbind", mode],
                }
                for path in paths
            ]  # fmt: skip
        return {
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": 0, "gid": 0},  # Of the sandbox's own kernel.
                "args": words,
                "env": [f"{name}={value}" for name, value in environment.items()],
                "cwd": str(self.folder),
                "capabilities": {},
                "noNewPrivileges": True,
            },
            "root": {"path": "rootfs", "readonly": True},
            "hostname": "hotloop",
            "mounts": mounts,
            "linux": {
                "namespaces": [{"type": t} for t in ("pid", "network", "ipc", "uts", "mount")]
            },
        }

    def runsc_command(self, folder: Path) -> list[str]:
        """The command that runs the bundle in ``folder``; the control group is the caller's.

        Raises:
            InputError: ``runsc`` is not installed.
        """
        words = [self.program(), f"--root={folder / 'state'}", "--network=none"]
        if os.geteuid() != 0:
            words.append("--rootless")
        return [*words, "--ignore-cgroups", "run", "--bundle", str(folder), f"h{os.getpid()}"]


def python_folders() -> tuple[str, ...]:
    """Folders of the interpreter, its standard library, its packages and hotloop; none in another.

    What lies below ``/usr`` is there already.
    """
    candidates = [sys.base_prefix, sys.prefix, sysconfig.get_paths()["purelib"], SOURCE]
    candidates += [os.path.dirname(os.path.realpath(sys.executable))]
    roots: list[str] = ["/usr"]
    for path in sorted({os.path.abspath(path) for path in candidates}, key=len):
        if path != os.sep and not any(Path(path).is_relative_to(root) for root in roots):
            roots.append(path)
    return tuple(roots[1:])
