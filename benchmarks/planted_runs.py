"""The runs of ``planted.py``: each a function ``(variant, plan) -> monitor, rate``.

Variants are ``healthy``, ``planted`` and, where the suggestion is a line of the script, ``fixed``.
``plan`` holds knobs by dotted name that the suggestion changes; it is empty otherwise.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import hotloop
from hotloop.monitor import PerformanceMonitor
from hotloop.train.zoo import build_model

CPUS = 2


@dataclass
class Outcome:
    """What a run gave: its report and suggestions, samples a second in the steady state."""

    monitor: PerformanceMonitor
    samples_per_s: float
    peak_resident_bytes: int | None


Run = Callable[[str, dict[str, Any]], Outcome]


def images(count: int, channels: int = 1, side: int = 28) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(count, channels, side, side, generator=generator)
    return x, torch.randint(0, 10, (count,), generator=generator)


def trained(
    model: nn.Module,
    data: tuple[torch.Tensor, torch.Tensor],
    plan: dict[str, Any],
    *,
    batch_size: int = 64,
    epochs: int,
    **options: Any,
) -> Outcome:
    """A ``Trainer`` on ``data``; the rate is the median epoch's, the first left out."""
    optimizer = torch.optim.Adam(model.parameters())
    base = {"cpu.num_threads": CPUS, "checkpoint.every_s": 0}
    monitor = PerformanceMonitor()
    trainer = hotloop.Trainer(
        model, F.cross_entropy, optimizer, hotloop.Plan().replace({**base, **plan})
    )
    report = trainer.fit(data, batch_size, epochs, monitor=monitor, **options)
    rates = sorted(e.samples_per_s for e in report.history[1:])
    rate = rates[len(rates) // 2] if rates else report.samples_per_s or 0.0
    return Outcome(monitor, rate, report.peak_resident_bytes)


def looped(
    model: nn.Module,
    loader: Any,
    *,
    epochs: int,
    prepare: Callable[..., Any] = lambda x: x,
    micro_batch: int | None = None,
    **facts: Any,
) -> Outcome:
    """The loop people write, with a monitor around it."""
    optimizer = torch.optim.Adam(model.parameters())
    monitor = PerformanceMonitor()
    monitor.describe(num_threads=torch.get_num_threads(), **facts)
    rates = []
    with monitor:
        for _ in range(epochs):
            began_s, count = time.perf_counter(), 0
            for x, y in monitor.watch(loader):
                x = prepare(x)
                optimizer.zero_grad()
                for part, target in parts(x, y, micro_batch):
                    share = len(part) / len(x)
                    (F.cross_entropy(model(part), target) * share).backward()
                monitor.lap("compute")
                optimizer.step()
                monitor.lap("update")
                count += len(x)
            rates.append(count / (time.perf_counter() - began_s))
    rates = sorted(rates[1:] or rates)
    return Outcome(monitor, rates[len(rates) // 2], hotloop.monitor.peak_resident_bytes())


def parts(x: torch.Tensor, y: torch.Tensor, size: int | None) -> Any:
    """The batch, or micro-batches of it."""
    if size is None:
        return ((x, y),)
    return zip(x.split(size), y.split(size), strict=True)


# The planted problems.


def oversubscription(variant: str, plan: dict[str, Any]) -> Outcome:
    """16 threads inside each operation, on two CPUs."""
    threads = {"planted": 16}.get(variant, CPUS)
    base = {"cpu.num_threads": threads, "step.compile": "off", **plan}
    return trained(build_model("small"), images(6400), base, epochs=6)


def quota(variant: str, plan: dict[str, Any]) -> Outcome:
    """16 threads in a control group that may use 1.5 CPUs."""
    return oversubscription(variant, plan)


def page_faults(variant: str, plan: dict[str, Any]) -> Outcome:
    """Gradients of 37 MB from the system's allocator, which gives them back each step."""
    arena = {"planted": "never"}.get(variant, "try")
    base = {"memory.tensor_arena": arena, "step.compile": "off", **plan}
    return trained(build_model("big"), images(1280), base, epochs=4)


def loader_workers(variant: str, plan: dict[str, Any]) -> Outcome:
    """A DataLoader with 16 workers beside a step that needs both CPUs."""
    torch.set_num_threads(CPUS)
    workers = 16 if variant == "planted" else 0
    data = TensorDataset(*images(6400))
    loader = DataLoader(data, batch_size=64, shuffle=True, num_workers=workers)
    return looped(build_model("small"), loader, epochs=6, batch_size=64, loader_workers=workers)


def noisy_neighbour(variant: str, plan: dict[str, Any]) -> Outcome:
    """A loop with two threads; somebody else computes on CPU 1."""
    torch.set_num_threads(CPUS)
    x, y = images(6400)
    batches = list(zip(x.split(64), y.split(64), strict=True))
    return looped(build_model("small"), batches, epochs=40, batch_size=64)


def swap(variant: str, plan: dict[str, Any]) -> Outcome:
    """Activations of a batch of 1024 above the memory limit; healthy: in micro-batches."""
    torch.set_num_threads(CPUS)
    layers: list[nn.Module] = [nn.Conv2d(1, 32, 3, padding=1)]
    for _ in range(4):
        layers += [nn.Tanh(), nn.Conv2d(32, 32, 1)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    x, y = images(4096)
    batches = list(zip(x.split(1024), y.split(1024), strict=True))
    micro = None if variant == "planted" else 64
    return looped(model, batches, epochs=3, batch_size=1024, micro_batch=micro)


def tiny_batches(variant: str, plan: dict[str, Any]) -> Outcome:
    """Batches of 4 samples."""
    size = {"planted": 4}.get(variant, 64)
    base = {"step.compile": "off", **plan}
    epochs = 2 if variant == "planted" else 12
    return trained(build_model("small"), images(6400), base, batch_size=size, epochs=epochs)


def huge_queue(variant: str, plan: dict[str, Any]) -> Outcome:
    """128 batches of 8 MiB prepared ahead."""
    queue = {"planted": 128}.get(variant, 4)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(16_384, 8192, generator=generator)
    y = torch.randint(0, 10, (16_384,), generator=generator)
    model = nn.Sequential(nn.Linear(8192, 256), nn.ReLU(), nn.Linear(256, 10))
    base = {"cpu.queue_size": queue, "step.compile": "always", **plan}
    return trained(model, (x, y), base, batch_size=256, epochs=6)


def large_kernels() -> nn.Module:
    """Depthwise 7x7 convolutions with normalization and 1x1 convolutions, as ConvNeXt has them."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 4, padding=2), nn.GELU(),
        nn.Conv2d(64, 64, 7, padding=3, groups=64), nn.GroupNorm(1, 64),
        nn.Conv2d(64, 128, 1), nn.GELU(), nn.Conv2d(128, 64, 1),
        nn.Conv2d(64, 64, 7, padding=3, groups=64),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def wrong_layout(variant: str, plan: dict[str, Any]) -> Outcome:
    """Convolutions on images with channels apart."""
    torch.set_num_threads(CPUS)
    model, last = large_kernels(), variant != "planted"
    x, y = images(512, 3, 32)
    if last:
        model = model.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
    batches = list(zip(x.split(64), y.split(64), strict=True))
    layout = "channels_last" if last else "contiguous"
    with hotloop.TensorArena():  # Else page faults are planted along.
        return looped(
            model, batches, epochs=5, batch_size=64, has_convolutions=True, memory_format=layout
        )


def checkpoint_each_step(variant: str, plan: dict[str, Any]) -> Outcome:
    """A checkpoint after each step."""
    every = {"planted": 1}.get(variant)
    base = {"checkpoint.every_steps": every, "step.compile": "off", **plan}
    with tempfile.TemporaryDirectory() as folder:
        out = trained(build_model("small"), images(6400), base, epochs=3, checkpoint_dir=folder)
    # An epoch's rate leaves checkpoints out; what a user waits for does not.
    step = out.monitor.collect_metrics().step
    return Outcome(
        out.monitor, step.samples / (step.train_s + step.checkpoint_s), out.peak_resident_bytes
    )


def slow_worker(variant: str, plan: dict[str, Any]) -> Outcome:
    """Two workers with a chunk each, pinned; somebody else computes on worker 1's CPU."""
    base = {
        "parallel.num_workers": CPUS,
        "parallel.chunk_size": 32,
        "cpu.thread_affinity": "compact",
        **plan,
    }
    return trained(build_model("small"), images(6400), base, epochs=40)


class Pixels(Dataset):
    """Images normalized one pixel after the other, in Python."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randint(0, 256, (count, 28 * 28), generator=generator, dtype=torch.uint8)
        self.y = torch.randint(0, 10, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def normalized(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 [784] -> float32 [1, 28, 28]."""
        pixels = [(value / 255.0 - 0.1307) / 0.3081 for value in image.tolist()]
        return torch.tensor(pixels).view(1, 28, 28)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.normalized(self.x[index]), self.y[index]


def python_transform(variant: str, plan: dict[str, Any]) -> Outcome:
    """A transform in Python, sample by sample."""
    torch.set_num_threads(CPUS)
    data = Pixels(3200)
    facts = {"batch_size": 64, "loader_workers": 0}
    if variant == "planted":
        return looped(build_model("small"), DataLoader(data, batch_size=64), epochs=4, **facts)
    if variant == "healthy":  # As if there were no transform at all.
        x = (data.x.float() / 255.0 - 0.1307) / 0.3081
        batches = list(zip(x.view(-1, 1, 28, 28).split(64), data.y.split(64), strict=True))
        return looped(build_model("small"), batches, epochs=40, **facts)
    # The same arithmetic on the whole batch, inside the loop.
    batches = list(zip(data.x.view(-1, 1, 28, 28).split(64), data.y.split(64), strict=True))
    return looped(
        build_model("small"), batches, epochs=40,
        prepare=lambda x: x.float().div_(255.0).sub_(0.1307).div_(0.3081), **facts,
    )  # fmt: skip


@dataclass(frozen=True)
class Planted:
    """A problem, the rule that names it, and how it is planted around the process.

    Attributes:
        neighbour: whether another process computes on CPU 1. quota: CPUs of a control group.
        limit_bytes: memory of a control group, of the planted and the fixed run, with swap.
        in_memory: whether what is lost is memory, not time.
    """

    run: Run
    rule: str
    neighbour: bool = False
    quota: float | None = None
    limit_bytes: int | None = None
    in_memory: bool = False


PLANTED: dict[str, Planted] = {
    "thread oversubscription": Planted(oversubscription, "oversubscription"),
    "quota 1.5 with 16 threads": Planted(quota, "quota", quota=1.5),
    "page-fault storm": Planted(page_faults, "page-faults"),
    "DataLoader with too many workers": Planted(loader_workers, "loader-workers"),
    "swap": Planted(swap, "swap", limit_bytes=700 * 2**20),
    "noisy neighbour on one core": Planted(noisy_neighbour, "noisy-neighbour", neighbour=True),
    "tiny batches": Planted(tiny_batches, "batch-size"),
    "huge queue": Planted(huge_queue, "queue-size", in_memory=True),
    "wrong layout": Planted(wrong_layout, "memory-layout"),
    "checkpoint each step": Planted(checkpoint_each_step, "checkpoints"),
    "one slow worker": Planted(slow_worker, "slow-worker", neighbour=True),
    "hot Python transform": Planted(python_transform, "python-transform"),
}


# Runs with nothing wrong: nothing proven may come out of them.


def healthy_small(variant: str, plan: dict[str, Any]) -> Outcome:
    """small, compiled, two threads."""
    return trained(build_model("small"), images(6400), {"step.compile": "always", **plan},
                   epochs=40)  # fmt: skip


def healthy_workers(variant: str, plan: dict[str, Any]) -> Outcome:
    """small on two workers."""
    base = {"parallel.num_workers": CPUS, **plan}
    return trained(build_model("small"), images(6400), base, epochs=40)


def healthy_cnn(variant: str, plan: dict[str, Any]) -> Outcome:
    """cnn on two workers."""
    base = {"parallel.num_workers": CPUS, **plan}
    return trained(build_model("cnn"), images(3200), base, epochs=4)


def healthy_big(variant: str, plan: dict[str, Any]) -> Outcome:
    """big, compiled, two threads."""
    return trained(build_model("big"), images(3200), {"step.compile": "always", **plan}, epochs=5)


def healthy_loop(variant: str, plan: dict[str, Any]) -> Outcome:
    """A plain loop on batches in memory, tensors from the arena."""
    torch.set_num_threads(plan.get("cpu.num_threads", CPUS))
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 512), nn.Tanh(), nn.Linear(512, 10))
    x, y = images(12_800)
    batches = list(zip(x.split(256), y.split(256), strict=True))
    with hotloop.TensorArena():
        return looped(model, batches, epochs=20, batch_size=256)


HEALTHY: dict[str, Run] = {
    "small, compiled": healthy_small,
    "small, two workers": healthy_workers,
    "cnn, two workers": healthy_cnn,
    "big, compiled": healthy_big,
    "plain loop": healthy_loop,
}
