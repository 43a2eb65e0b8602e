"""Several hosts: as processes here, and as network namespaces, one of which is cut off."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hotloop import InputError, Machine, Plan, RunError
from hotloop.parallel import Hosts, joined
from hotloop.train.hosts import plan_of
from support import FOLDER

SCRIPT = str(FOLDER / "host_script.py")
EXAMPLE = str(Path(__file__).parents[2] / "examples" / "hosts" / "torchrun.sh")
QUARRELS = str(FOLDER / "host_quarrels.py")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(rank: int, count: int, port: int, address: str = "127.0.0.1") -> dict[str, str]:
    return {
        **os.environ, "RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": address, "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def torchrun(*arguments: str, restarts: int = 0) -> list[str]:
    """Two processes under one ``torchrun``."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        f"--max-restarts={restarts}", *arguments,
    ]  # fmt: skip


def trained(
    folder: Path, count: int, epochs: int = 3, shares: str = "cpus", slow_s: float = 0.0
) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    port = free_port()
    arguments = [sys.executable, SCRIPT, str(folder), str(epochs), shares, str(slow_s)]
    hosts = [
        subprocess.Popen(arguments, env=environment(rank, count, port)) for rank in range(count)
    ]
    assert [host.wait(240) for host in hosts] == [0] * count
    return [torch.load(folder / f"result-{rank}.pt") for rank in range(count)]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_three_hosts_make_the_weights_of_one(tmp_path: Path) -> None:
    """520 samples in batches of 64: the last batch has 8, and one host may have none of them."""
    (alone,) = trained(tmp_path / "one", 1)
    hosts = trained(tmp_path / "three", 3)
    assert [h["path"] for h in hosts] == ["parallel"] * 3
    assert all(same(hosts[0]["model"], h["model"]) for h in hosts[1:])
    for name, weight in alone["model"].items():
        assert torch.allclose(weight, hosts[0]["model"][name], rtol=1e-3, atol=1e-4), name
    assert hosts[0]["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    assert hosts[2]["loss"] == hosts[0]["loss"]


@pytest.mark.full
def test_a_slow_host_gets_a_smaller_share(tmp_path: Path) -> None:
    results = trained(tmp_path / "slow", 2, epochs=6, shares="measured", slow_s=2e-3)
    shares = [int(s) for s in results[0]["notes"][-1].split("[")[1].rstrip("]").split(", ")]
    assert sum(shares) == 8
    assert shares[1] < shares[0]
    assert same(results[0]["model"], results[1]["model"])


@pytest.mark.full
def test_going_on_gives_the_weights_of_an_uninterrupted_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, of which each host draws its own."""
    monkeypatch.setenv("DROPOUT", "0.3")
    whole = trained(tmp_path / "whole", 2, epochs=4)
    trained(tmp_path / "parts", 2, epochs=2)
    parts = trained(tmp_path / "parts", 2, epochs=4)
    assert same(whole[0]["model"], parts[0]["model"])
    assert parts[1]["steps"] == whole[1]["steps"]


def test_what_hosts_do_not_agree_on_is_told_to_all(tmp_path: Path) -> None:
    port = free_port()
    hosts = [
        subprocess.Popen([sys.executable, QUARRELS, str(tmp_path)], env=environment(rank, 2, port))
        for rank in range(2)
    ]
    assert [host.wait(120) for host in hosts] == [0, 0]
    one, other = (json.loads((tmp_path / f"said-{rank}.json").read_text()) for rank in range(2))
    assert one == other
    expected = {
        "agree": ("InputError", "batch_size must be the same on all hosts; got 64 on host 0, 128 "),
        "shape": ("ModelError", "weight (2, 4) torch.float32 trained on host 0, weight (3, 4) "),
        "rate": ("ModelError", "'lr': 0.1"),
        "fewer": ("ModelError", "bias (2,) torch.float32 trained on host 0, SGD, group 0: 1 "),
        "first": ("MissingExtraError", "a table needs pyarrow, which is not installed"),
        "newest": ("CheckpointError", "step 7 on host 1, none on host 0"),
    }
    assert one.keys() == expected.keys()
    for name, (kind, text) in expected.items():
        assert one[name][0] == kind
        assert text in one[name][1]
    weights = [torch.load(tmp_path / f"weights-{rank}.pt") for rank in range(2)]
    assert same(*weights)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"WORLD_SIZE": "2"}, "got WORLD_SIZE=2, no RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "two", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "must be a n"),
    ],
)
def test_an_environment_that_torchrun_did_not_make(
    values: dict[str, str], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=text), joined(1.0, torch.device("cpu")):
        pass


def test_hosts_that_do_not_come_are_not_waited_for_forever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment(0, 2, free_port()).items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(RunError, match="every host must answer in time"),
        joined(1.0, torch.device("cpu")),
    ):
        pass


def test_processes_of_one_machine_place_their_workers_side_by_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine(usable_cpus=4, cpu_ids=(0, 1, 2, 3))
    hosts = Hosts(0, 1)
    monkeypatch.setattr(hosts, "gather", lambda value: [value])
    for affinity, places in (("compact", ["0-1", "2-3"]), ("3,1,0,2", ["3,1", "0,2"])):
        plan = Plan().replace({"cpu.thread_affinity": affinity})
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        for number, place in enumerate(places):
            monkeypatch.setenv("LOCAL_RANK", str(number))
            mine = plan_of(hosts, plan, 64, machine)
            assert str(mine.cpu.thread_affinity) == place
            assert mine.parallel.num_workers == 2


@pytest.mark.full
def test_torchrun_starts_all_again_when_one_is_killed(tmp_path: Path) -> None:
    """Elastic restart: they go on from the last checkpoint, to the bits of an undisturbed run."""
    whole = trained(tmp_path / "whole", 2, epochs=20)
    folder = tmp_path / "killed"
    folder.mkdir()
    values = {**os.environ, "OMP_NUM_THREADS": "1", "TIMEOUT_S": "60", "PACE_S": "0.3"}
    launcher = subprocess.Popen(
        torchrun(SCRIPT, str(folder), "20", "cpus", "0", restarts=1),
        env=values, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s and len(list((folder / "checkpoints").glob("step-*"))) < 2:
        time.sleep(0.02)
    os.kill(int((folder / "pid-1-0").read_text()), signal.SIGKILL)
    _, said = launcher.communicate(timeout=240)
    assert launcher.returncode == 0, said.decode()
    results = [torch.load(folder / f"result-{rank}.pt") for rank in range(2)]
    assert (folder / "pid-0-1").exists()  # Both were started again.
    assert any("resumed at step" in note for note in results[0]["notes"])
    for result in results:
        assert same(result["model"], whole[0]["model"])
        assert result["steps"] == whole[0]["steps"]


@pytest.mark.full
def test_the_command_under_torchrun(tmp_path: Path) -> None:
    """Host 0 alone prints and writes; the same command again goes on, and ends at once."""
    folder = tmp_path / "run"
    command = [
        "bash", EXAMPLE, "--no-download", "--samples", "640", "--epochs", "1",
        "--model", "small", "--json", "--no-ceilings",
    ]  # fmt: skip
    values = {**os.environ, "PYTHON": sys.executable, "PROCESSES": "2", "RUN": str(folder)}
    options: Any = {"capture_output": True, "text": True, "timeout": 240, "check": False}
    documents = []
    for _ in range(2):
        values["PORT"] = str(free_port())
        done = subprocess.run(command, env=values, **options)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("hotloop: 640 samples") <= 1
        documents.append(json.loads(done.stdout))  # One document.
    assert [d["steps"] for d in documents] == [10, 10]
    assert any("host 0 of 2" in note for note in documents[0]["notes"])
    assert any("resumed at step 10" in note for note in documents[1]["notes"])
    assert {p.name for p in folder.iterdir()} >= {
        "recipe.json", "plan.toml", "report.json", "checkpoints"
    }  # fmt: skip
    values |= {"PORT": str(free_port()), "RESTARTS": "0"}
    done = subprocess.run([*command, "--seed", "5"], env=values, **options)
    assert done.returncode != 0
    assert "--auto-resume must find the same run" in done.stderr
    assert "got another seed" in done.stderr


def test_batches_are_cut_without_loss() -> None:
    hosts = Hosts(0, 3)
    hosts.cut(64, 8, [4, 2, 1], measured=False)
    assert hosts.shares == [5, 2, 1]
    for rows in range(1, 65):
        assert sum(hosts.sizes(rows)) == rows
    batch = torch.arange(64)
    parts = []
    for rank in range(3):
        host = Hosts(rank, 3)
        host.cut(64, 8, [4, 2, 1], measured=False)
        parts.append(host.part(batch))
    assert torch.equal(torch.cat(parts), batch)


def test_a_batch_smaller_than_the_hosts_is_refused() -> None:
    with pytest.raises(InputError, match="one for each of 3 hosts"):
        Hosts(0, 3).cut(16, 8, [1, 1, 1], measured=True)


class Namespaces:
    """Two network namespaces joined by a cable that can be pulled."""

    def __init__(self) -> None:
        self.holders = [
            subprocess.Popen(["unshare", "-n", "sleep", "600"], start_new_session=True)
            for _ in range(2)
        ]
        time.sleep(0.5)
        b = str(self.holders[1].pid)
        self("ip", "link", "add", "hl0", "type", "veth", "peer", "name", "hl1", inside=0)
        self("ip", "link", "set", "hl1", "netns", b, inside=0)
        for number, link in enumerate(("hl0", "hl1")):
            self("ip", "address", "add", f"10.77.0.{number + 1}/24", "dev", link, inside=number)
            self("ip", "link", "set", link, "up", inside=number)
            self("ip", "link", "set", "lo", "up", inside=number)

    def command(self, inside: int) -> list[str]:
        return ["nsenter", "-t", str(self.holders[inside].pid), "-n"]

    def __call__(self, *command: str, inside: int) -> None:
        subprocess.run([*self.command(inside), *command], check=True, capture_output=True)

    def close(self) -> None:
        for holder in self.holders:
            os.killpg(holder.pid, signal.SIGKILL)
            holder.wait()


@pytest.fixture
def namespaces() -> Iterator[Namespaces]:
    if not all(map(shutil.which, ("ip", "unshare", "nsenter"))):
        pytest.skip("needs ip, unshare and nsenter")
    if subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to make network namespaces")
    made = None
    try:
        made = Namespaces()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no virtual cable here: {error.stderr.decode().strip()}")
    yield made
    made.close()


@pytest.mark.full
def test_a_host_cut_off_and_started_again(tmp_path: Path, namespaces: Namespaces) -> None:
    """The cable is pulled in mid-run and both hosts end; started again, they end with the bits of a
    run that nothing happened to."""
    whole = trained(tmp_path / "whole", 2, epochs=30)
    folder = tmp_path / "cut"
    folder.mkdir()

    def started(pace_s: float) -> list[subprocess.Popen[bytes]]:
        made = []
        for rank in range(2):
            launch = [
                *namespaces.command(rank), sys.executable, "-m", "torch.distributed.run",
                "--nnodes=2", "--nproc-per-node=1", f"--node-rank={rank}",
                "--master-addr=10.77.0.1", "--master-port=29517",
                SCRIPT, str(folder), "30", "cpus", "0",
            ]  # fmt: skip
            values = {**os.environ, "GLOO_SOCKET_IFNAME": f"hl{rank}", "OMP_NUM_THREADS": "1"}
            values |= {"TIMEOUT_S": "15", "PACE_S": str(pace_s)}
            made.append(
                subprocess.Popen(launch, env=values, stderr=subprocess.PIPE, start_new_session=True)
            )
        return made

    hosts = started(pace_s=0.4)
    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s and len(list((folder / "checkpoints").glob("step-*"))) < 2:
        time.sleep(0.05)
    namespaces("ip", "link", "set", "hl1", "down", inside=1)
    for host in hosts:
        _, said = host.communicate(timeout=120)
        assert host.returncode != 0
    assert not (folder / "result-0.pt").exists()
    namespaces("ip", "link", "set", "hl1", "up", inside=1)
    hosts = started(pace_s=0.0)
    for host in hosts:
        _, said = host.communicate(timeout=240)
        assert host.returncode == 0, said.decode()
    results = [torch.load(folder / f"result-{rank}.pt") for rank in range(2)]
    assert any("resumed at step" in note for note in results[0]["notes"])
    for result in results:
        assert same(result["model"], whole[0]["model"])
        assert result["steps"] == whole[0]["steps"]
