"""Scripts run by plain Python and by ``hotloop run``, to be compared."""

import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import hotloop

SOURCE = str(Path(hotloop.__file__).parent.parent)


def environment(tmp_path, **more):
    """The environment, with hotloop to be found and nothing of the caller's cache."""
    path = os.pathsep.join(p for p in (SOURCE, more.pop("PYTHONPATH", "")) if p)
    kept = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return {**kept, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", **more}


def write(tmp_path, text, name="script.py"):
    """A script with that text."""
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


def plain(*arguments):
    """The command of plain Python."""
    return [sys.executable, *map(str, arguments)]


def launched(*arguments, options=("--quiet",)):
    """The command of ``hotloop run``."""
    return [sys.executable, "-m", "hotloop", "run", *options, *map(str, arguments)]


def finish(command, tmp_path, stdin="", **more):
    """Exit code, standard output, standard error."""
    done = subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=300, cwd=tmp_path,
        env=environment(tmp_path, **more), check=False,
    )  # fmt: skip
    return done.returncode, *(
        re.sub("0x[0-9a-f]+", "0x", text) for text in (done.stdout, done.stderr)
    )


def both(tmp_path, *arguments, stdin="", **more):
    """What plain Python and ``hotloop run`` give for the same arguments."""
    return (
        finish(plain(*arguments), tmp_path, stdin, **more),
        finish(launched(*arguments), tmp_path, stdin, **more),
    )


def signalled(command, tmp_path, number):
    """Send a signal once the script says that it is ready; its exit code and output."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env=environment(tmp_path, PYTHONUNBUFFERED="1"),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    first = process.stdout.readline()
    assert first == "ready\n", (first, process.stderr.read())
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err.strip().splitlines()[-1:] if err else []
