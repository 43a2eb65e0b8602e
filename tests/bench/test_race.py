"""The race: its figures, its table, and one real race of two peers."""

import importlib.util
import json

import pytest

from hotloop.bench import Race, Timing, race_training
from hotloop.bench.result import COLUMNS
from hotloop.cli.main import main


def race(*timings):
    return Race("small", 1000, 50, 2, timings, floor_s=0.5, sum_floor_s=0.75)


PLAIN = Timing("pytorch", (4.0, 2.0, 3.0), (2.0, 1.0, 0.5, 0.4), 2**20)


def test_ratios_are_of_medians_and_the_fastest_comes_first():
    fast = Timing("hotloop", (1.0, 0.8, 1.2), (2.0, 1.0, 0.5, 0.4), 2**21)
    tuned = Timing("pytorch-tuned", (2.0, 2.5, 1.5), (2.0, 1.01, 0.5, 0.4), 2**20)
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in race(PLAIN, tuned, fast).rows()]
    assert [row["peer"] for row in rows] == ["hotloop", "pytorch-tuned", "pytorch"]
    best = rows[0]
    assert best["samples/s"] == "1,000"
    assert best["min to max"] == "833 to 1,250"
    assert best["n"] == "3"
    assert best["x pytorch"] == "3.00"
    assert best["x fastest peer"] == "2.00"  # Of the peers, not of itself.
    assert best["of floor"] == "50%"
    assert [row["loss"] for row in rows] == ["as pytorch"] * 3


def test_a_peer_that_learns_otherwise_is_told():
    odd = Timing("odd", (1.0,), (2.0, 1.1))
    assert race(PLAIN, odd).loss_verdict(odd) == "+10.0%"


def test_a_missing_peer_is_named_not_faked():
    rows = race(PLAIN, Timing("jax-jit", missing="not installed: pip install jax")).rows()
    assert rows[-1][:2] == ["jax-jit", "not installed: pip install jax"]
    assert not any(rows[-1][2:])


def test_a_peer_whose_library_is_not_there_is_left_out(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "jax" else real(name)
    )
    done = race_training("small", ["jax-jit"], num_samples=64, batch_size=32, rounds=1)
    (timing,) = done.timings
    assert timing.seconds == ()
    assert "pip install 'hotloop[peers]'" in timing.missing


def test_two_peers_race_for_real(capsys, tmp_path):
    out = tmp_path / "race.json"
    arguments = ["--models", "small", "--peers", "pytorch,pytorch-tuned", "--num-samples", "320"]
    assert main(["bench", "train", *arguments, "--rounds", "2", "--out", str(out)]) == 0
    (document,) = json.loads(out.read_text())
    assert [t["peer"] for t in document["timings"]] == ["pytorch", "pytorch-tuned"]
    for timing in document["timings"]:
        assert len(timing["seconds"]) == 2
        assert len(timing["losses"]) == 3
        assert timing["losses"][0] > timing["losses"][-1] > 0
        assert timing["samples_per_s"]["n"] == 2
        assert timing["peak_bytes"] > 2**20
    assert document["rates"]["flop_per_s"]["n"] == document["rates"]["bytes_per_s"]["n"] == 2
    updates = 24 * 235_146 * 320 / 64
    by_memory = updates / document["rates"]["bytes_per_s"]["median"]
    by_arithmetic = document["sum_floor_s"] - by_memory
    assert by_arithmetic > 0
    assert document["floor_s"] == pytest.approx(max(by_arithmetic, by_memory))
    plain, tuned = document["timings"]
    assert tuned["losses"] == pytest.approx(plain["losses"], rel=1e-3)
    assert {"torch", "python", "numpy"} <= set(document["about"]["versions"])
    assert "pytorch-tuned" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--models", "huge"], "huge"),
        (["--peers", "pytorch,tensorflow"], "tensorflow"),
        (["--rounds", "0"], "--rounds"),
        (["--num-samples", "0"], "--num-samples"),
    ],
)
def test_bad_flags_are_one_line(capsys, flags, named):
    assert main(["bench", "train", *flags]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) <= 3


@pytest.mark.full
def test_workers_against_ddp_for_real(capsys, tmp_path):
    out = tmp_path / "scale.json"
    arguments = ["--models", "small", "--num-samples", "256", "--rounds", "1", "--out", str(out)]
    assert main(["bench", "scale", *arguments, "--num-threads", "2"]) == 0
    (document,) = json.loads(out.read_text())
    rows = {row["peer"]: row for row in document["scale"]}
    assert list(rows) == ["hotloop", "workers-1", "workers-2", "ddp-2"]
    assert rows["workers-1"]["efficiency"] == 1
    assert all(row["samples_per_s"] > 0 for row in rows.values())
    assert rows["workers-2"]["predicted_per_s"] > rows["workers-1"]["predicted_per_s"]
    losses = {t["peer"]: t["losses"][1] for t in document["timings"]}
    assert all(loss == pytest.approx(losses["hotloop"], rel=0.02) for loss in losses.values())
    printed = capsys.readouterr().out
    assert "256 workers, batch" in printed
