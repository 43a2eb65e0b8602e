"""A TPM 2.0 in software (swtpm), with tpm2-tools that speak to it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import subprocess
import time

import pytest

TOOLS = ("swtpm", "tpm2_quote", "tpm2_createak", "tpm2_pcrextend")


def missing():
    """Why there is none here; ``None``: there is."""
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"needs {', '.join(absent)} (apt-get install swtpm tpm2-tools)" if absent else None


def _free_ports():
    """Two ports, one behind the other: commands and control."""
    for _ in range(50):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            first = stack.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            second = stack.enter_context(socket.socket())
            second.bind(("127.0.0.1", port + 1))
            return port
    raise RuntimeError("no free ports")


@contextlib.contextmanager
def software_tpm(folder):
    """A fresh TPM with its state in ``folder``; gives the value of ``TPM2TOOLS_TCTI``."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    port = _free_ports()
    process = subprocess.Popen(
        ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={folder}",
         "--server", f"type=tcp,port={port},bindaddr=127.0.0.1",
         "--ctrl", f"type=tcp,port={port + 1},bindaddr=127.0.0.1",
         "--flags", "not-need-init,startup-clear"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    tcti = f"swtpm:host=127.0.0.1,port={port}"
    try:
        for _ in range(200):
            env = {**os.environ, "TPM2TOOLS_TCTI": tcti}
            done = subprocess.run(
                ["tpm2_getrandom", "1"], env=env, capture_output=True, check=False
            )
            if done.returncode == 0:
                break
            time.sleep(0.02)
        else:
            raise RuntimeError("swtpm does not answer")
        yield tcti
    finally:
        process.terminate()
        process.wait(10)


def extend(pcr, text):
    """Measure a text into a register."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    subprocess.run(["tpm2_pcrextend", f"{pcr}:sha256={digest}"], check=True)
