"""What the benchmarks of the server share: an exported model, and `hotloop serve` in a process."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

# Run as a program of its own, so that this process never imports torch.
_EXPORT = """
import sys
import hotloop, torch
from hotloop.bench.models import build_race_model
from hotloop.bench.shapes import SAMPLE_SHAPES
name, folder = sys.argv[1:]
x = torch.randn(32, *SAMPLE_SHAPES[name])
runner = hotloop.compile_inference(build_race_model(name), example=x, goal="throughput")
runner.save(folder)
"""

# The engine alone, as the server's instances call it: the most samples/s over batch sizes.
_ALONE = """
import json, sys, threading, time
import numpy
from hotloop.infer import load_engine
path, seconds = sys.argv[1], float(sys.argv[2])
engine = load_engine(path)
rates = {}
for rows in (1, 2, 4, 8, 16, 32, 64, 128):
    arrays = [numpy.random.default_rng(0).standard_normal(
        [rows if size is None else size for size in spec.shape]).astype(spec.dtype)
        for spec in engine.inputs]
    counts = [0] * engine.num_instances
    def call(number):
        engine.run(arrays)
        started = time.perf_counter()
        while time.perf_counter() - started < seconds:
            engine.run(arrays)
            counts[number] += 1
        counts[number] *= rows / (time.perf_counter() - started)
    threads = [threading.Thread(target=call, args=(n,)) for n in range(engine.num_instances)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    rates[rows] = sum(counts)
print(json.dumps({"engine": engine.name, "num_threads": engine.num_threads,
                  "num_instances": engine.num_instances, "samples_per_s": rates}))
"""


def export(name: str, folder: Path) -> Path:
    """The race's winner for throughput, saved; once a name."""
    path = folder / name
    if not path.exists():
        subprocess.run([sys.executable, "-c", _EXPORT, name, str(path)], check=True)
    return path


def alone(path: Path, seconds: float = 1.0) -> dict:
    """The engine's own throughput in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", _ALONE, str(path), str(seconds)],
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


class Served:
    """`hotloop serve PATH` on a free port of loopback.

    Attributes:
        address: URL. told: what the server said when it was ready. ready_s: until it said so.
    """

    def __init__(self, path: Path, *flags: str) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        started = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hotloop", "serve", str(path), "--port", "0", "--json", *flags],
            stdout=subprocess.PIPE, stderr=self._errors, text=True, start_new_session=True,
        )  # fmt: skip
        line = self.process.stdout.readline()
        self.ready_s = time.perf_counter() - started
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"the server must start; it said: {self._errors.read()[-2000:]}")
        self.told = json.loads(line)
        self.address = self.told["address"]
        parts = urlsplit(self.address)
        self.host, self.port = parts.hostname, parts.port

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def resident_bytes(self) -> int:
        """Of the server's process, now."""
        return self._status("VmRSS")

    def metrics(self) -> dict[str, float]:
        """The server's own counts: requests by status, and why some were not run."""
        with urllib.request.urlopen(f"{self.address}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        wanted = ("hotloop_serve_requests_total", "hotloop_serve_dropped_total")
        found = [line.rsplit(" ", 1) for line in lines if line.startswith(wanted)]
        return {name: float(value) for name, value in found}

    @property
    def peak_bytes(self) -> int:
        """Most so far."""
        return self._status("VmHWM")

    def _status(self, key: str) -> int:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"the server has ended with code {self.process.poll()}")

    def connect(self, timeout_s: float = 30.0) -> socket.socket:
        """A connection of one's own."""
        return socket.create_connection((self.host, self.port), timeout_s)

    def stop(self) -> int:
        """SIGTERM, and its exit code. Twice is allowed."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.stdout.close()
        self._errors.close()
        return self.process.wait()


class ResidentWatch:
    """Resident memory of a server, looked at every so often meanwhile."""

    def __init__(self, served: Served, every_s: float = 0.25) -> None:
        self.served, self.every_s = served, every_s
        self.seen: list[tuple[float, int]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        started = time.perf_counter()
        while not self._over.wait(self.every_s):
            with contextlib.suppress(RuntimeError, OSError):
                self.seen.append((time.perf_counter() - started, self.served.resident_bytes))

    def __enter__(self) -> "ResidentWatch":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def flatness(self, after_s: float) -> dict:
        """Resident memory after ``after_s``: least, most, and how far they lie apart."""
        late = [size for at, size in self.seen if at >= after_s] or [s for _, s in self.seen]
        return {
            "min_bytes": min(late), "max_bytes": max(late),
            "spread": max(late) / min(late) - 1,
            "first_bytes": late[0], "last_bytes": late[-1],
        }  # fmt: skip
