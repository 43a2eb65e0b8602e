"""``hotloop train`` watched: files, a port, a picture."""

import argparse
import dataclasses
import io
import json

import pytest

from hotloop.cli.live_view import change_text, live, live_view
from hotloop.cli.main import main
from hotloop.cli.watching import watching
from hotloop.errors import InputError
from hotloop.machine import Machine
from hotloop.monitor import Change, Evidence, Optimization, PerformanceMonitor, Sample
from hotloop.train.progress import Progress


def train(tmp_path, *flags):
    return main(
        ["train", "mnist", "--no-download", "--samples", "640", "--epochs", "1", "--no-ceilings",
         "--model", "small", "--compile", "off", "--out", str(tmp_path / "run"), *flags]
    )  # fmt: skip


def test_metrics_go_to_a_file_and_the_report_suggests(tmp_path, capsys):
    assert train(tmp_path, "--metrics-file", str(tmp_path / "m.jsonl"), "--metrics-port", "0") == 0
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert lines[-1]["step"]["samples"] == 640
    shown = capsys.readouterr()
    assert "metrics at http://127.0.0.1:" in shown.err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["performance"]["step"]["samples"] == 640
    names = [o["name"] for o in report["optimizations"]]
    assert ("What would help next" in shown.out) == bool(names)


def test_nobody_looks_when_told_so(tmp_path):
    assert train(tmp_path, "--no-monitor") == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["performance"], report["optimizations"]) == (None, [])


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--no-monitor", "--metrics-port", "0"), "--no-monitor leaves nothing to watch"),
        (("--live",), "--live draws on a terminal"),
        (("--metrics-port", "99999"), "must be free"),
    ],
)
def test_what_cannot_be_watched_is_refused_in_one_line(tmp_path, capsys, flags, text):
    assert train(tmp_path, *flags) == 2
    shown = capsys.readouterr().err
    assert text in shown.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_the_picture_of_a_run():
    from rich.console import Console

    with PerformanceMonitor(look_every_s=None) as monitor:
        monitor.record(64, data_wait_s=1.0, compute_s=3.0)
    report = monitor.collect_metrics()
    report = dataclasses.replace(report, samples=(Sample(t_s=1.0, samples_per_s=1234.0),))
    progress = Progress(
        step=50, total_steps=100, epoch=0, epochs=1, epochs_done=0, loss=0.5, samples_per_s=1.0,
        remaining_s=7.0, validation_accuracy=None,
    )  # fmt: skip
    suggestion = Optimization(
        name="quota",
        title="the quota stops the run",
        evidence=Evidence(metric="m", value=1, threshold=1, threshold_source="s"),
        change=Change(plan={"cpu.num_threads": 2}),
    )
    console = Console(file=io.StringIO(), width=120)
    console.print(live_view(report, progress, [suggestion]))
    text = console.file.getvalue()
    for part in ("50 of 100", "7.00 s left", "1,234 samples/s", "25 % of the time",
                 "may help: the quota stops the run", "plan: cpu.num_threads = 2"):  # fmt: skip
        assert part in text
    console.print(live_view(report))
    assert change_text(dataclasses.replace(suggestion, change=Change(command="do it"))) == "do it"


def test_live_needs_a_terminal(monkeypatch):
    monitor = PerformanceMonitor(look_every_s=None)
    with pytest.raises(InputError, match="terminal"), live(monitor):
        pass


def test_live_draws_on_one(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monitor = PerformanceMonitor(look_every_s=0.01)
    with live(monitor), monitor:
        monitor.record(64, compute_s=0.5)
    assert monitor.collect_metrics().notes == ()
    assert "compute" in screen.getvalue()


def test_a_note_of_the_monitor_is_told(capsys):
    args = argparse.Namespace(
        live=False, metrics_port=None, metrics_file=None, tensorboard=None, monitor=True
    )
    with watching(args, Machine(), print) as (monitor, show):
        assert show is None
        monitor.every(0.0, lambda: 1 / 0)
        with monitor:
            pass
    assert "sampling ended: ZeroDivisionError" in capsys.readouterr().err
