"""The trainer and its monitor: what is recorded is what ran, and nothing of the result changes."""

import json

import pytest
import torch
from torch import nn

import hotloop
from hotloop import kernels
from hotloop.monitor import PerformanceMonitor, PerformanceReport


def data(count=150):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 32, generator=generator)
    return x, (x.sum(1) > 0).long()


def fit(monitor, *, plan=None, epochs=3, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 2))
    knobs = {"cpu.num_threads": 1, "step.compile": "off", "checkpoint.every_s": 0, **(plan or {})}
    trainer = hotloop.Trainer(
        model,
        nn.functional.cross_entropy,
        torch.optim.Adam(model.parameters()),
        hotloop.Plan().replace(knobs),
    )
    report = trainer.fit(data(), 16, epochs, validation=data(40), monitor=monitor, **options)
    return report, model.state_dict()


def test_a_run_that_is_looked_at_gives_the_same_bits():
    without, plain = fit(False)
    looked, watched = fit(True)
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert (without.performance, without.optimizations) == (None, ())
    assert looked.performance is not None


def test_what_is_recorded_is_what_ran(tmp_path):
    report, _ = fit(True, plan={"checkpoint.every_steps": 4}, checkpoint_dir=tmp_path / "run")
    seen = report.performance
    assert (seen.step.steps, seen.step.calls, seen.step.samples) == (30, 30, 450)
    assert seen.step.data_wait_s + seen.step.compute_s == pytest.approx(report.train_s, rel=1e-6)
    assert seen.step.checkpoint_s == pytest.approx(report.time_s["checkpoint"], rel=1e-6)
    assert seen.step.checkpoints >= 7
    assert seen.step.other_s == pytest.approx(report.time_s["evaluate"], rel=1e-6)
    assert (seen.work.batch_size, seen.work.path, seen.work.num_samples) == (16, "plain", 150)
    assert seen.work.parameter_bytes == 4 * (32 * 16 + 16 + 16 * 2 + 2)
    assert seen.plan == report.plan
    assert seen.memory.pool_high_water <= seen.memory.pool_buffers
    assert seen.memory.pool_hits >= 30
    path = report.save(tmp_path / "report.json")
    document = json.loads(path.read_text())
    assert PerformanceReport.from_dict(document["performance"]) == seen
    assert [o["name"] for o in document["optimizations"]] == [o.name for o in report.optimizations]


def test_workers_are_told_apart():
    if not kernels.is_available():
        pytest.skip(kernels.unavailable_reason())
    report, _ = fit(True, plan={"parallel.num_workers": 2, "step.compile": "always"})
    seen = report.performance
    assert seen.work.path == "parallel"
    assert [w.worker for w in seen.workers] == [0, 1]
    # 9 whole batches an epoch, of which the first two are recorded; the last, smaller one of an
    # epoch takes the plain path, and so does the audit after 16 steps.
    chunk = seen.plan["parallel"]["chunk_size"]
    assert sum(w.chunks for w in seen.workers) == (3 * 9 - 2 - 1) * 16 // chunk
    assert seen.step.synchronize_s >= 0


def test_a_monitor_that_runs_already_goes_on():
    with PerformanceMonitor() as monitor:
        fit(monitor)
        assert monitor.is_running
        fit(monitor)
    assert monitor.collect_metrics().step.steps == 60


def test_a_run_that_fails_ends_its_monitor():
    monitor = PerformanceMonitor()

    def loss(output, target):
        return nn.functional.cross_entropy(output, target) * float("nan")

    model = nn.Linear(32, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = hotloop.Trainer(model, loss, optimizer, hotloop.Plan())
    with pytest.raises(hotloop.DivergedError):
        trainer.fit(data(), 16, monitor=monitor)
    assert not monitor.is_running
    assert monitor.has_report
