"""Workers that are processes: the same bits as threads, whoever is killed and when."""

import copy
import os
import random
import signal
import threading
import time
from typing import Any

import pytest
import torch
from torch import nn

from hotloop import Plan, RunError, Trainer, kernels
from hotloop.parallel import ParallelStep
from hotloop.parallel.processes import ProcessTeam

if not kernels.is_available():
    pytest.skip(kernels.unavailable_reason(), allow_module_level=True)

BATCH, CHUNK, STEPS = 28, 4, 30
# Two steps are recorded, and one after 16 steps of workers.
PLAIN = 3
CROSS = nn.functional.cross_entropy


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Dropout(0.2), nn.Linear(54, 40), nn.GELU(), nn.Linear(40, 5),
    ).train()  # fmt: skip


def data() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    y = torch.randint(0, 5, (STEPS * BATCH,), generator=draw)
    return torch.randn(len(y), 1, 8, 8, generator=draw) + y.view(-1, 1, 1, 1), y


def made(workers: int, executor: str = "processes", **more: Any) -> ParallelStep:
    model = net()
    x, y = data()
    values = {"num_workers": workers, "chunk_size": CHUNK, "executor": executor, **more}
    plan = Plan().replace({f"parallel.{name}": value for name, value in values.items()})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    return ParallelStep(model, CROSS, optimizer, (x[:BATCH], y[:BATCH]), plan)


def team(step: ParallelStep) -> ProcessTeam:
    assert isinstance(step._team, ProcessTeam), step.reason
    return step._team


def trained(step: ParallelStep, start: int = 0, end: int = STEPS) -> list[float]:
    x, y = data()
    rows = [slice(n * BATCH, (n + 1) * BATCH) for n in range(start, end)]
    return [step(x[r], y[r]).item() for r in rows]


@pytest.fixture(scope="module")
def expected() -> tuple[list[float], dict[str, torch.Tensor]]:
    step = made(1, "threads")
    losses = trained(step)
    step.close()
    return losses, dict(step.model.state_dict())


def check(step: ParallelStep, losses: list[float], expected: Any) -> None:
    assert losses == expected[0]
    state = step.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected[1].items())


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_same_bits_as_threads(workers: int, expected: Any) -> None:
    step = made(workers)
    check(step, trained(step), expected)
    assert sum(worker.chunks for worker in step.workers) == (STEPS - PLAIN) * BATCH // CHUNK
    assert sum(worker.stolen - worker.lost for worker in step.workers) == 0
    assert all(0 < (worker.cpu_share or 0) <= 1 for worker in step.workers if worker.chunks)
    pids = team(step).pids()
    step.close()
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    # What was trained is the user's, and stays usable without the workers.
    step.model(data()[0][:2])


@pytest.mark.full
def test_workers_killed_at_random_moments(expected: Any) -> None:
    step = made(2, max_restarts=10_000)
    trained_losses, killed, stop = [], 0, threading.Event()
    losses = trained(step, 0, 3)  # Workers are there.

    def kill() -> None:
        nonlocal killed
        draw = random.Random(0)
        while not stop.is_set() and killed < 30:
            time.sleep(draw.uniform(0.0, 0.02))
            for pid in draw.sample(team(step).pids(), 1):
                try:
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
                except ProcessLookupError:
                    pass

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        trained_losses = losses + trained(step, 3)
    finally:
        stop.set()
        killer.join()
    check(step, trained_losses, expected)
    assert killed >= 5
    assert team(step).restarts >= 3
    step.close()


def test_a_worker_that_hangs_is_started_anew(expected: Any) -> None:
    step = made(2, hang_s=0.5)
    losses = trained(step, 0, 3)
    before = team(step).pids()
    half = team(step).num_chunks // 2  # Whoever was late before may have none else.
    team(step).balance([team(step).num_chunks - half, half])
    team(step).inject_fault(1, sleep_s=60)
    losses += trained(step, 3)
    check(step, losses, expected)
    assert team(step).restarts == 1
    assert team(step).pids()[0] == before[0]
    assert team(step).pids()[1] != before[1]
    step.close()


def test_the_limit_of_restarts() -> None:
    step = made(1, max_restarts=2)
    trained(step, 0, 3)
    for number in range(2):
        team(step).inject_fault(0)
        trained(step, number, number + 1)
    before = copy.deepcopy(step.model.state_dict())
    team(step).inject_fault(0)
    with pytest.raises(RunError, match="must not need more than 2 restarts"):
        trained(step, 3, 4)
    # The step that could not be finished has changed nothing.
    assert all(torch.equal(before[n], t) for n, t in step.model.state_dict().items())
    step.close()


def test_a_parameter_that_was_moved_is_found_again() -> None:
    results = []
    for executor in ("threads", "processes"):
        step = made(2, executor)
        losses = trained(step, 0, 10)
        with torch.no_grad():
            for parameter in step.model.parameters():
                parameter.data = parameter.data.clone()
        losses += trained(step, 10)
        assert step.path == "parallel", step.reason
        results.append((losses, dict(step.model.state_dict())))
        step.close()
    check(step, results[0][0], results[1])


def test_a_trainer_with_processes() -> None:
    results = []
    for executor in ("threads", "processes"):
        model = net()
        plan = Plan().replace(
            {
                "parallel.num_workers": 2,
                "parallel.chunk_size": CHUNK,
                "parallel.executor": executor,
                "cpu.num_threads": 1,
            }
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        report = Trainer(model, CROSS, optimizer, plan).fit(data(), batch_size=BATCH, epochs=2)
        assert report.path == "parallel", report.path_reason
        results.append((report.train_loss, model.state_dict()))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][n], t) for n, t in results[1][1].items())
