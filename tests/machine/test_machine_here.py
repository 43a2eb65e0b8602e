"""Probing this very machine, thread counts, and the command."""

import argparse
import json
import os
import subprocess
import sys

import pytest

from hotloop.cli import machine as command
from hotloop.errors import InputError, PlanError
from hotloop.machine import (
    BandwidthCeiling,
    Ceilings,
    Machine,
    MatmulCeiling,
    Measurement,
    num_threads,
)

on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args([command.NAME, *words])
    return args.run(args)


@on_linux
def test_this_machine_agrees_with_python():
    machine = Machine.probe()
    assert machine.cpu_ids == tuple(sorted(os.sched_getaffinity(0)))
    assert 1 <= machine.usable_cpus <= len(os.sched_getaffinity(0))
    assert machine.architecture == os.uname().machine
    assert machine.kernel == os.uname().release
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert machine.memory.total_bytes == pytest.approx(pages, rel=0.05)
    assert machine.allocator is not None
    assert machine.tee is not None
    assert json.loads(json.dumps(machine.to_dict())) == machine.to_dict()
    assert machine.fingerprint() == Machine.probe().fingerprint()


def test_probe_and_command_load_no_torch():
    code = (
        "import sys, argparse\n"
        "from hotloop.machine import Machine, ThreadAffinity, numa\n"
        "machine = Machine.probe()\n"
        "ThreadAffinity.parse('compact').cpus(machine, 1)\n"
        "numa.configure((), 'default', machine).restore()\n"
        "from hotloop.cli import machine as command\n"
        "parser = argparse.ArgumentParser()\n"
        "command.add_parser(parser.add_subparsers())\n"
        "args = parser.parse_args(['machine'])\n"
        "assert args.run(args) == 0\n"
        "heavy = {'torch', 'numpy', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usable" in done.stdout


def test_num_threads_sets_and_restores():
    import torch

    before = torch.get_num_threads()
    with num_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        with pytest.raises(KeyError), num_threads(1):
            raise KeyError
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with pytest.raises(PlanError, match="num_threads must be at least 1"), num_threads(0):
        pytest.fail("entered")


def test_json_is_sorted_and_complete(captured, capsys):
    assert run("--json", "--root", str(captured("xeon"))) == 0
    text = capsys.readouterr().out
    document = json.loads(text)
    assert text == json.dumps(document, indent=2, sort_keys=True) + "\n"
    level = {"level": "x86-64-v4-bf16", "reason": "the highest level there is"}
    assert document.pop("kernels") == {**level, "unavailable": None}
    assert document == Machine.probe(captured("xeon")).to_dict()


def test_text_tells_the_story_of_a_xeon_in_a_container(write_tree, capsys):
    groups = {
        "proc/self/mountinfo": "30 22 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/cpu.max": "350000 100000\n",
        "sys/fs/cgroup/memory.max": f"{8 * 1024**3}\n",
    }
    assert run("--root", str(write_tree("xeon", groups))) == 0
    lines = capsys.readouterr().out.splitlines()
    text = "\n".join(lines)
    assert "2 sockets, 8 cores, 16 logical CPUs" in text
    assert "3 threads at once; 16 CPUs allowed: 0-15; quota of 3.5 CPUs" in text
    assert "L3  2 x 60.0 MiB, each shared by 8 CPUs, lines of 64 B" in text
    assert "1: CPUs 4-7,12-15, 128 GiB, distances 21 10" in text
    assert "limited to 8.00 GiB, unknown of it used" in text
    assert "reserved: 16 of 2.00 MiB, 4 free" in text
    assert "not inside one; can start sgx" in text
    starts = {line.index(line[14:].lstrip()[0], 13) for line in lines if line.strip()}
    assert len(starts) == 1, "the second column is aligned"
    assert max(map(len, lines)) <= 100


def test_text_of_a_hybrid_laptop_and_of_nothing(captured, tmp_path, capsys):
    assert run("--root", str(captured("laptop"))) == 0
    assert "(4 performance and 4 efficiency cores)" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert run("--root", str(tmp_path / "empty")) == 0
    text = capsys.readouterr().out
    assert "processor     unknown" in text
    assert "unknown sockets, unknown cores, unknown logical CPUs" in text
    assert "None" not in text


def test_accelerators_are_counted(write_tree, capsys):
    gpus = {
        f"proc/driver/nvidia/gpus/0000:{i}0:00.0/information": "Model: NVIDIA H100\n"
        for i in range(4)
    }
    assert run("--root", str(write_tree("plain", gpus))) == 0
    assert "4 x NVIDIA H100" in capsys.readouterr().out


@pytest.fixture
def figures(monkeypatch):
    calls = []
    rate = Measurement(1.84e11, 1.67e11, 1.94e11, 8)
    made = Ceilings(
        matmul=(MatmulCeiling("float32", "mkl", "torch.mm", 2, 2048, rate),),
        bandwidth=(BandwidthCeiling("copy", 1, 1 << 27, Measurement(3e10, 2e9, 4e12, 8)),),
        fingerprint="f",
        torch_version="2.13.0",
        measured_at_s=0.0,
        wall_s=11.0,
    )
    monkeypatch.setattr(Machine, "ceilings", lambda self, **how: calls.append(how) or made)
    return calls


def test_ceilings_in_text_and_json(figures, capsys):
    assert run("--ceilings") == 0
    text = capsys.readouterr().out
    assert "184 GFLOP/s  167 to 194 GFLOP/s" in text
    assert "mkl (torch.mm), 2048 x 2048" in text
    assert "30.0 GB/s  2.00 GB/s to 4.00 TB/s" in text
    assert "arrays of 128 MiB" in text
    assert run("--ceilings", "--json", "--remeasure") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ceilings"]["matmul"][0]["flop_per_s"]["median"] == 1.84e11
    assert figures == [{"use_cache": True}, {"use_cache": False}]


def test_wrong_arguments_are_one_line(tmp_path, figures):
    with pytest.raises(InputError, match="--root must be a folder"):
        run("--root", str(tmp_path / "missing"))
    with pytest.raises(InputError, match="--ceilings measures the machine it runs on"):
        run("--root", str(tmp_path), "--ceilings")
    assert figures == []
