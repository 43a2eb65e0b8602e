"""Any number of workers gives the same bits, and those of PyTorch up to rounding."""

import asyncio
import copy
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hotloop import DataParallelTrainer, InputError, Plan, RunError, Trainer, kernels
from hotloop.parallel import ParallelStep
from hotloop.parallel.step import default_chunk_size
from support import THOROUGH

if not kernels.is_available():
    pytest.skip(kernels.unavailable_reason(), allow_module_level=True)

BATCH, CHUNK, STEPS = 28, 4, 12
# Steps that run plain and are recorded, before workers run any.
RECORDED = 2
CROSS = nn.functional.cross_entropy


ROWS = [slice(n * BATCH, (n + 1) * BATCH) for n in range(STEPS)]


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 5))


def with_norm_and_dropout() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Dropout(0.2), nn.Linear(54, 5),
    )  # fmt: skip


class Recurrent(nn.Module):
    """Operations that hotloop has no kernels for, and whose memory is their own."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(8, 12, batch_first=True), nn.Linear(12, 5)
        self.register_buffer("offset", torch.linspace(0, 1, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x.flatten(1, 2))[0].cumsum(1)[:, -1] + self.offset)


class Caching(nn.Module):
    """Makes something in its first call that later ones find."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(64, 5), None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.scale is None:
            self.scale = torch.arange(5).add(1).float()
        return self.linear(x.flatten(1)) * self.scale


def data(steps: int = STEPS) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    y = torch.randint(0, 5, (steps * BATCH,), generator=draw)
    return torch.randn(len(y), 1, 8, 8, generator=draw) + y.view(-1, 1, 1, 1), y


def plan(workers: int, **more: Any) -> Plan:
    values = {"parallel.num_workers": workers, "parallel.chunk_size": CHUNK}
    return Plan().replace(values | {f"parallel.{name}": value for name, value in more.items()})


def built(make: Callable[[], nn.Module], kind: Any = torch.optim.Adam) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = make().train()
    return model, kind(model.parameters(), lr=1e-2)


def trained(
    make: Callable[[], nn.Module],
    workers: int,
    kind: Any = torch.optim.Adam,
    loss_fn: Any = CROSS,
    **options: Any,
) -> tuple[list[float], dict[str, Any], Any, ParallelStep]:
    model, optimizer = built(make, kind)
    x, y = data()
    torch.manual_seed(1)
    limits = {n: options.pop(n) for n in ("clip_norm", "clip_value") if n in options}
    step = ParallelStep(model, loss_fn, optimizer, (x[:BATCH], y[:BATCH]),
                        plan(workers, **options), **limits)  # fmt: skip
    losses = []
    for number in range(STEPS):
        rows = slice(number * BATCH, (number + 1) * BATCH)
        losses.append(step(x[rows], y[rows]).item())
    return losses, copy.deepcopy(model.state_dict()), optimizer.state_dict()["state"], step


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    return bool(one == other)


CASES = {
    "adam": (perceptron, torch.optim.Adam, {}),
    "momentum": (
        perceptron, lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=1e-3), {}
    ),
    "an optimizer of its own": (perceptron, torch.optim.ASGD, {}),
    "clipping": (perceptron, torch.optim.Adam, {"clip_norm": 0.1, "clip_value": 0.05}),
    "batch norm and dropout": (with_norm_and_dropout, torch.optim.Adam, {}),
    "operations of ATen": (Recurrent, torch.optim.Adam, {}),
    "a sum as the loss": (
        perceptron, lambda p, lr: torch.optim.SGD(p, lr / BATCH),
        {"loss_fn": nn.CrossEntropyLoss(reduction="sum")},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_same_bits_for_any_number_of_workers(case: str) -> None:
    make, kind, limits = CASES[case]
    alone = trained(make, 1, kind, **limits)
    assert alone[3].path == "parallel", alone[3].reason
    for workers in (2, 3, 4, 7) if THOROUGH else (3,):
        many = trained(make, workers, kind, steal_threshold=1 + workers % 3, **limits)
        assert many[0] == alone[0]
        assert same(many[1], alone[1])
        assert same(many[2], alone[2])
        ran = [worker.chunks for worker in many[3].workers]
        known = many[3].workers
        assert sum(worker.stolen for worker in known) == sum(worker.lost for worker in known)
        assert all(0 <= (worker.cpu_share or 0) <= 1 for worker in known)
        assert sum(ran) == (STEPS - RECORDED) * BATCH // CHUNK
        many[3].close()
    alone[3].close()


def test_weights_larger_than_their_factors_are_handed_over_as_factors() -> None:
    _, _, _, step = trained(perceptron, 2)
    assert step._team is not None
    shapes = [part.shapes for part in step._team.chunk.parts]
    assert shapes == [((CHUNK, 48), (CHUNK, 64)), ((48,),), ((CHUNK, 5), (CHUNK, 48)), ((5,),)]
    step.close()


def test_gradients_that_a_plain_step_dropped_are_made_anew() -> None:
    """A smaller batch takes the plain path, which frees the gradients that workers wrote to."""
    model, optimizer = built(perceptron)
    plain, its_optimizer = built(perceptron)
    x, y = data()
    step = ParallelStep(model, CROSS, optimizer, (x[:BATCH], y[:BATCH]), plan(2), clip_norm=0.1)
    batches = [slice(n * BATCH, (n + 1) * BATCH) for n in range(6)]
    for rows in (*batches[:4], slice(BATCH, BATCH + 3), *batches[4:]):
        step(x[rows], y[rows])
        its_optimizer.zero_grad()
        CROSS(plain(x[rows]), y[rows]).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        its_optimizer.step()
        for mine, expected in zip(model.parameters(), plain.parameters(), strict=True):
            assert mine.grad is not None
            assert expected.grad is not None
            assert torch.allclose(mine.grad, expected.grad, rtol=1e-4, atol=1e-6)
    assert step.path == "parallel", step.reason
    step.close()


@pytest.mark.parametrize("case", [name for name in CASES if "dropout" not in name])
def test_it_trains_as_pytorch_does(case: str) -> None:
    make, kind, limits = CASES[case]
    losses, weights, _, step = trained(make, 3, kind, **limits)
    loss_fn = limits.get("loss_fn", CROSS)
    model, optimizer = built(make, kind)
    x, y = data()
    for rows, loss in zip(ROWS, losses, strict=True):
        optimizer.zero_grad()
        expected = loss_fn(model(x[rows]), y[rows])
        expected.backward()
        if "clip_value" in limits:
            nn.utils.clip_grad_value_(model.parameters(), limits["clip_value"])
            nn.utils.clip_grad_norm_(model.parameters(), limits["clip_norm"])
        optimizer.step()
        assert loss == pytest.approx(expected.item(), rel=1e-4)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)
    step.close()


def test_batch_norm_sees_chunks_and_keeps_their_mean() -> None:
    """While chunks are recorded, and on workers."""
    model, optimizer = built(with_norm_and_dropout)
    x, y = data(1)
    step = ParallelStep(model, CROSS, optimizer, (x, y), plan(2))
    for number in range(1, 5):
        copies = [copy.deepcopy(model) for _ in range(BATCH // CHUNK)]
        step(x, y)
        for twin, part in zip(copies, x.split(CHUNK), strict=True):
            twin(part)
        for name in ("running_mean", "running_var"):
            kept = torch.stack([getattr(twin[1], name) for twin in copies]).mean(0)
            torch.testing.assert_close(getattr(model[1], name), kept)
        assert model[1].num_batches_tracked == number
        assert step.path == ("plain" if number < RECORDED else "parallel"), step.reason
    step.close()


def test_what_changes_between_steps_is_recorded_again() -> None:
    expected = trained(perceptron, 1)
    assert expected[3].path == "parallel"
    results = []
    for workers in (1, 3):
        model, optimizer = built(with_norm_and_dropout)
        x, y = data()
        torch.manual_seed(1)
        step = ParallelStep(model, CROSS, optimizer, (x[:BATCH], y[:BATCH]), plan(workers))
        paths, losses = [], []
        for number in range(STEPS):
            if number == 5:
                model[5].p = 0.5
            rows = slice(number * BATCH, (number + 1) * BATCH)
            losses.append(step(x[rows], y[rows]).item())
            paths.append("chunks of 4" in step.reason)
        assert paths == [False] * 2 + [True] * 3 + [False] * 2 + [True] * 5
        results.append((losses, copy.deepcopy(model.state_dict())))
        step.close()
    assert results[0][0] == results[1][0]
    assert same(results[0][1], results[1][1])


class Centred(nn.Module):
    """Writes into its own weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.linear.weight.clamp_(-0.1, 0.1)
        return self.linear(x.flatten(1))


def test_what_chunks_cannot_share_takes_the_plain_path() -> None:
    _, _, _, step = trained(Centred, 2)
    assert step.path == "plain"
    assert "writes into a weight of all chunks" in step.reason


def test_a_failing_chunk_is_run_again() -> None:
    expected = trained(perceptron, 1)
    model, optimizer = built(perceptron)
    x, y = data()
    step = ParallelStep(model, CROSS, optimizer, (x[:BATCH], y[:BATCH]), plan(3))
    losses = []
    for number in range(STEPS):
        if number > RECORDED:
            assert step._team is not None
            step._team.inject_fault(number % 3)
        rows = slice(number * BATCH, (number + 1) * BATCH)
        losses.append(step(x[rows], y[rows]).item())
    assert losses == expected[0]
    assert same(dict(model.state_dict()), dict(expected[1]))
    step.close()


@pytest.mark.parametrize("make", [perceptron, with_norm_and_dropout])
def test_a_worker_that_hangs_is_given_up(make: Callable[[], nn.Module]) -> None:
    expected = trained(make, 1)
    model, optimizer = built(make)
    x, y = data()
    torch.manual_seed(1)
    step = ParallelStep(model, CROSS, optimizer, (x[:BATCH], y[:BATCH]),
                        plan(2, hang_s=0.2, steal_threshold=50))  # fmt: skip
    begun = [step(x[rows], y[rows]).item() for rows in ROWS[: RECORDED + 1]]
    assert step._team is not None
    half = step._team.num_chunks // 2  # Whoever was late in the first step may have none else.
    step._team.balance([step._team.num_chunks - half, half])
    step._team.inject_fault(1, sleep_s=3.0)
    at = len(begun) * BATCH
    losses = step.many(x[at:], y[at:], STEPS - len(begun))
    assert losses is not None
    assert begun + losses.tolist() == expected[0]
    assert same(dict(model.state_dict()), dict(expected[1]))
    assert step.num_workers == 1
    assert "was given up" in step.faults[0]
    step.close()


def test_the_last_worker_cannot_be_given_up() -> None:
    model, optimizer = built(perceptron)
    x, y = data(1)
    step = ParallelStep(model, CROSS, optimizer, (x, y), plan(2, hang_s=0.2, steal_threshold=50))
    for _ in range(RECORDED + 1):
        step(x, y)
    before = copy.deepcopy(model.state_dict())
    assert step._team is not None
    half = step._team.num_chunks // 2  # Whoever was late in the first step may have none else.
    step._team.balance([step._team.num_chunks - half, half])
    step._team.inject_fault(1, sleep_s=3.0)
    step.num_workers = 1
    with pytest.raises(RunError, match="must end its chunk in time"):
        step(x, y)
    assert same(dict(model.state_dict()), dict(before))


@pytest.mark.parametrize(
    ("workers", "make"), [(1, perceptron), (3, Recurrent), (3, with_norm_and_dropout), (2, Caching)]
)
def test_a_trainer_with_workers_resumes_with_any_number(
    workers: int, make: Callable[[], nn.Module], tmp_path: pathlib.Path
) -> None:
    """An uneven last batch, an epoch's end and a checkpoint in between; the same bits."""
    x, y = data()
    x, y = x[:-5], y[:-5]

    def fit(count: int, **options: Any) -> nn.Module:
        model, optimizer = built(make)
        trainer = Trainer(model, CROSS, optimizer, plan(count).replace({"cpu.num_threads": 1}))
        report = trainer.fit((x, y), batch_size=BATCH, epochs=3, **options)
        assert report.path == "parallel", report.path_reason
        return model

    straight = fit(2)
    fit(workers, checkpoint_dir=tmp_path, max_steps=17)
    resumed = fit(2, checkpoint_dir=tmp_path, resume=True)
    assert same(dict(straight.state_dict()), dict(resumed.state_dict()))


def test_batches_one_after_the_other_from_a_coroutine() -> None:
    expected = trained(perceptron, 1)
    model, optimizer = built(perceptron)
    x, y = data()

    async def run(trainer: DataParallelTrainer) -> list[float]:
        calls = [trainer.process_batch(b) for b in zip(x.split(BATCH), y.split(BATCH), strict=True)]
        return [loss.item() for loss in await asyncio.gather(*calls)]

    with DataParallelTrainer(model, CROSS, optimizer, plan(2)) as trainer:
        assert trainer.path is None
        losses = asyncio.run(run(trainer))
        assert trainer.path == "parallel", trainer.reason
        ran = sum(worker.chunks for worker in trainer.workers)
        assert ran == (STEPS - RECORDED) * BATCH // CHUNK
        with pytest.raises(InputError, match=r"a batch must be \(x, y\)"):
            asyncio.run(trainer.process_batch((x, y[:3])))
    assert losses == expected[0]
    assert same(dict(model.state_dict()), dict(expected[1]))


def test_what_cannot_be_cut_takes_the_plain_path() -> None:
    model, optimizer = built(perceptron)
    x, y = data(1)
    step = ParallelStep(model, CROSS, optimizer, (x[:27], y[:27]), plan(2))
    assert (step.path, step.reason) == ("plain", "batches of 27 are not whole chunks of 4")
    assert step(x[:27], y[:27]).item() > 0
    off = plan(2).replace({"step.compile": "off"})
    assert ParallelStep(model, CROSS, optimizer, (x, y), off).reason == "compile is off in the plan"


@pytest.mark.parametrize(
    ("batch", "cpus", "size"), [(64, 2, 32), (64, 8, 8), (64, 64, 4), (4096, 8, 32), (27, 2, 1)]
)
def test_the_default_chunk(batch: int, cpus: int, size: int) -> None:
    assert default_chunk_size(batch, cpus) == size


def test_calls_of_different_lengths_one_after_the_other() -> None:
    """A worker that leaves a call late must not take the next call's length for its own."""
    x, y = data()
    results = []
    for workers in (1, 3):
        model, optimizer = built(perceptron)
        step = ParallelStep(model, CROSS, optimizer, (x[:BATCH], y[:BATCH]), plan(workers))
        losses = []
        for number in range(400 if THOROUGH else 60):
            steps = 1 + number % 5
            made = step.many(x[: steps * BATCH], y[: steps * BATCH], steps)
            assert made is not None
            losses += made.tolist()
        results.append((losses, dict(model.state_dict())))
        step.close()
    assert results[0][0] == results[1][0]
    assert same(*(weights for _, weights in results))
