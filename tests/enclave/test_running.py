"""Commands in a real sandbox: what they cannot reach, and that the limit is one."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from hotloop.cli.main import main
from hotloop.enclave.limits import memory_limit
from hotloop.enclave.running import run_in_sandbox
from hotloop.enclave.sandbox import PROGRAMS, Sandbox
from hotloop.errors import InputError
from hotloop.units import MIB

LOOK = """
import ctypes, json, os, socket, sys
found = {"tmp": os.listdir("/tmp"), "home": os.environ.get("HOME"), "names": sorted(os.environ)}
def tried(action):
    try:
        action()
    except OSError as error:
        return error.errno
    return 0
found["system"] = tried(lambda: open("/usr/planted", "w"))
found["input"] = tried(lambda: open(sys.argv[1], "a"))
found["secret"] = tried(lambda: open(sys.argv[2]))
found["network"] = tried(lambda: socket.create_connection(("192.0.2.1", 80), 5))
found["read"] = open(sys.argv[1]).read()
open(os.path.join(sys.argv[3], "found.json"), "w").write(json.dumps(found))
"""


def is_there(kind):
    name, package = PROGRAMS[kind]
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed: apt-get install {package}")


@pytest.fixture(params=PROGRAMS)
def kind(request, tmp_path):
    is_there(request.param)
    sandbox = Sandbox(kind=request.param, outputs=(tmp_path,))
    probe = run_in_sandbox(sandbox, ["/bin/sh", "-c", "exit 7"], 512 * MIB)
    if probe.exit_code != 7:
        pytest.skip(f"{request.param} does not start here: exit code {probe.exit_code}")
    return request.param


def test_what_a_command_can_reach(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("PASSWORD", "of the host")
    data, secret, out = tmp_path / "data", tmp_path / "secret", tmp_path / "out"
    data.write_text("samples")
    secret.write_text("not for it")
    out.mkdir()
    sandbox = Sandbox(kind=kind, inputs=(data,), outputs=(out,), environment={"GIVEN": "1"})
    words = [os.path.abspath(sys.executable), "-c", LOOK, str(data), str(secret), str(out)]
    assert run_in_sandbox(sandbox, words, 512 * MIB).exit_code == 0
    found = json.loads((out / "found.json").read_text())
    assert found["read"] == "samples"
    assert found["secret"] == 2  # ENOENT: it is not there at all.
    assert found["system"] == 30  # EROFS
    assert found["input"] == 30
    assert found["network"] != 0
    assert "PASSWORD" not in found["names"]
    assert "GIVEN" in found["names"]
    assert not Path("/usr/planted").exists()


def test_system_calls_are_filtered(tmp_path):
    is_there("sandbox")
    code = (
        "import ctypes, sys; c = ctypes.CDLL(None, use_errno=True); "
        "sys.exit(ctypes.get_errno() if c.unshare(0x10000000) else 0)"
    )
    words = [os.path.abspath(sys.executable), "-c", code]
    assert run_in_sandbox(Sandbox(), words, 512 * MIB).exit_code == 38  # ENOSYS


HOLD = "import sys; held = bytearray(int(sys.argv[1]) << 20); held[::4096] = held[1::4096]"


def test_the_limit_is_hard_and_its_end_is_told(kind):
    words = [os.path.abspath(sys.executable), "-c", HOLD]
    with memory_limit(MIB) as limit:
        if limit.folder is None:
            pytest.skip(f"no control group may be made here: {limit.reason}")
    inside = run_in_sandbox(Sandbox(kind=kind), [*words, "100"], 400 * MIB)
    assert inside.exit_code == 0
    assert inside.out_of_memory is False
    assert 100 * MIB < inside.taken_bytes < 400 * MIB
    above = run_in_sandbox(Sandbox(kind=kind), [*words, "600"], 400 * MIB)
    assert above.exit_code != 0
    assert above.out_of_memory is True


def test_a_group_is_removed_and_the_other_way_is_told(monkeypatch):
    with memory_limit(5000) as limit:
        folder = limit.folder
        assert limit.limit_bytes == 8192  # Whole pages.
    assert folder is None or not folder.exists()
    monkeypatch.setattr("hotloop.enclave.limits._group_folder", lambda kind, controller: None)
    with memory_limit(64 * MIB) as limit:
        assert limit.kind == "RLIMIT_DATA"
        assert limit.reason == "cgroup v2: no memory controller; cgroup v1: no memory controller"
        assert limit.was_hit() is None
        words = limit.command([sys.executable, "-c", HOLD, "100"])
    assert os.spawnv(os.P_WAIT, words[0], words) != 0


def test_a_missing_program_is_named_with_its_package(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match="apt-get install bubblewrap"):
        Sandbox().program()


def run(capsys, *argv):
    code = main(["enclave", *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_size_that_is_too_small_is_refused_before_anything_runs(capsys, tmp_path, monkeypatch):
    is_there("sandbox")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "src"))
    out, data = tmp_path / "out", tmp_path / "samples.npz"
    np.savez(data, x=np.zeros((80, 1, 28, 28), np.float32), y=np.zeros(80, np.int64))
    code, _, err = run(
        capsys, "run", "--memory", "64MiB", "--", "train", "--model", "small", "--data", data,
        "--out", out,
    )  # fmt: skip
    assert code == 2
    assert "the command must fit 64.0 MiB" in err
    assert not out.exists()
    code, _, err = run(capsys, "run", "--", "python", "-c", "pass")
    assert code == 2
    assert "pass --memory" in err


def test_a_command_by_the_command_line(capsys, tmp_path):
    is_there("sandbox")
    (tmp_path / "in").write_text("x")
    code, out, _ = run(
        capsys, "run", "--json", "--memory", "300MiB", "--write", tmp_path / "out", "--",
        "python", "-c", "import sys, shutil; shutil.copy(sys.argv[1], sys.argv[2])",
        tmp_path / "in", tmp_path / "out" / "copy",
    )  # fmt: skip
    assert code == 0
    assert (tmp_path / "out" / "copy").read_text() == "x"
    assert json.loads(out)["exit_code"] == 0


def test_sizes_by_the_command_line(capsys):
    code, out, _ = run(capsys, "size", "small", "--kind", "tdx", "--json", "--fits", "64GiB")
    assert code == 0
    assert json.loads(out)["largest_batch_size"] == 64
    code, _, err = run(capsys, "size", "small", "--fits", "64MiB")
    assert code == 2
    assert "must fit 64.0 MiB" in err
    code, _, err = run(capsys, "size", "nothing:here")
    assert code == 2
    assert "pass --data" in err
