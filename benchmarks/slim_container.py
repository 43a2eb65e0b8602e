"""A wheel from a clean clone, in a sandbox like a slim container: what its user gets.

    python benchmarks/slim_container.py [--rounds 5] [--out FILE]

The sandbox (bubblewrap) has Python and the wheel, no compiler, a home that cannot be written, and a
/tmp that executes nothing. In it `hotloop run` trains small, in turn with the same command outside
and with HOTLOOP_KERNELS=off; `hotloop train` trains it once; and `hotloop serve` answers for an
exported cnn. Needs root (to mount /tmp noexec), bubblewrap, git, and the environment that
scripts/env.sh makes.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from about import about

from hotloop.files import write_text_atomically

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "examples" / "scripts"
MIB = 1 << 20


def build_wheel(folder: Path) -> Path:
    """From a clone of what is committed, so that nothing lying about gets in."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder / "clone")], check=True)
    tools = Path(sys.executable).parent
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
         "-w", str(folder), str(folder / "clone")],
        check=True, env=os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"},
    )  # fmt: skip
    return next(folder.glob("hotloop-*.whl"))


def make_environment(folder: Path, wheel: Path) -> Path:
    """An environment with nothing but the wheel and what it depends on; its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    constraints = str(ROOT / "constraints.txt")
    for wanted in ("torch", f"{wheel}[serve]"):
        subprocess.run(
            [str(python), "-m", "pip", "install", "-q", "-c", constraints, wanted], check=True
        )
    return python


@contextlib.contextmanager
def sandbox(folder: Path) -> Iterator[list[str]]:
    """What comes before a command to run it inside."""
    temporary, home = folder / "tmp", folder / "home"
    temporary.mkdir()
    home.mkdir()
    options = "noexec,nosuid,nodev,size=1g"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(temporary)], check=True)
    try:
        seen = [folder / "venv", Path(sys.base_prefix), *map(Path, ("/usr/lib", "/lib", "/etc"))]
        shown = [str(part) for path in seen for part in ("--ro-bind", path, path)]
        yield [
            "bwrap", "--unshare-all", "--die-with-parent", "--bind", str(temporary), "/tmp", *shown,
            "--ro-bind-try", "/lib64", "/lib64", "--proc", "/proc", "--dev", "/dev",
            "--ro-bind", "/sys", "/sys", "--ro-bind", str(home), "/home/user",
            "--ro-bind", str(SCRIPTS), "/scripts",
            "--ro-bind", str(Path(__file__).parent), "/benchmarks",
            "--clearenv", "--setenv", "HOME", "/home/user", "--chdir", "/tmp",
            "--setenv", "PATH", str(folder / "venv" / "bin"),
        ]  # fmt: skip
    finally:
        subprocess.run(["umount", str(temporary)], check=True)


def run_script(before: Sequence[str], python: Path, epochs: int) -> float:
    """Samples/s of the last epoch of examples/scripts/mlp.py (small) under ``hotloop run``."""
    scripts = Path("/scripts") if before else SCRIPTS
    done = subprocess.run(
        [*before, str(python), "-m", "hotloop", "run", str(scripts / "mlp.py"),
         "--epochs", str(epochs)],
        check=True, capture_output=True, text=True, cwd="/",
    )  # fmt: skip
    trained = [line.split() for line in done.stdout.splitlines() if line.startswith("trained")][-1]
    return int(trained[1]) / float(trained[4])


def train(before: Sequence[str], python: Path) -> dict[str, Any]:
    """The report of ``hotloop train`` on small and the shipped digits."""
    done = subprocess.run(
        [*before, str(python), "-m", "hotloop", "train", "mnist", "--no-download", "--json",
         "--quiet", "--model", "small", "--epochs", "5", "--runs-dir", "/tmp/runs"],
        check=True, capture_output=True, text=True, cwd="/",
    )  # fmt: skip
    report: dict[str, Any] = json.loads(done.stdout)
    names = ("samples_per_s", "validation_accuracy", "path", "path_reason", "notes")
    return {name: report.get(name) for name in names}


def serve_inside() -> dict[str, Any]:
    """Run in the sandbox: export cnn, serve it, ask once."""
    import time
    import urllib.request

    command = [sys.executable, "-m", "hotloop"]
    exported = [
        "export",
        "cnn",
        "--engines",
        "hotloop",
        "--quiet",
        "--no-cache",
        "--out",
        "/tmp/cnn",
    ]
    subprocess.run([*command, *exported], check=True, stdout=subprocess.DEVNULL)
    started = time.perf_counter()
    with subprocess.Popen(
        [*command, "serve", "/tmp/cnn", "--port", "0", "--json"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        address = json.loads(process.stdout.readline())["address"]
        body = json.dumps({"inputs": [[[[0.5] * 28] * 28]]}).encode()
        with urllib.request.urlopen(f"{address}/predict", body, timeout=30) as got:
            answer = json.load(got)
        first_answer_s = time.perf_counter() - started
        status = Path(f"/proc/{process.pid}/status").read_text()
        process.terminate()
    peak_kib = next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]
    return {
        "first_answer_s": round(first_answer_s, 3),
        "peak_resident_mib": round(int(peak_kib) / 1024, 1),
        "outputs": {name: len(rows[0]) for name, rows in answer["outputs"].items()},
        "has_compiler": any(shutil.which(name) for name in ("c++", "g++", "clang++", "cc")),
        "home_is_writable": os.access(os.environ["HOME"], os.W_OK),
    }


def spread(rates: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(rates)), "min": round(min(rates)),
        "max": round(max(rates)), "n": len(rates),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve-inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve_inside:
        print(json.dumps(serve_inside()))
        return 0
    if os.geteuid() != 0 or shutil.which("bwrap") is None:
        print(
            "the sandbox needs root and bubblewrap. Next: apt-get install bubblewrap",
            file=sys.stderr,
        )
        return 2
    with tempfile.TemporaryDirectory(prefix="hotloop-slim-") as name:
        folder = Path(name)
        wheel = build_wheel(folder)
        python = make_environment(folder, wheel)
        with sandbox(folder) as inside:
            off = [*inside, "--setenv", "HOTLOOP_KERNELS", "off"]
            ways = {"sandbox": inside, "sandbox_without_kernels": off, "outside": []}
            rates: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(args.rounds):
                for way, before in ways.items():
                    rates[way].append(run_script(before, python, args.epochs))
            trained = train(inside, python)
            served = subprocess.run(
                [*inside, str(python), "/benchmarks/slim_container.py", "--serve-inside"],
                check=True, capture_output=True, text=True,
            )  # fmt: skip
        document: dict[str, Any] = {
            **about(),
            "wheel": {"name": wheel.name, "mib": round(wheel.stat().st_size / MIB, 2)},
            "small_samples_per_s": {way: spread(found) for way, found in rates.items()},
            "trained": trained,
            "cnn_served": json.loads(served.stdout),
        }
    print(json.dumps(document, indent=1))
    if args.out:
        write_text_atomically(args.out, json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
