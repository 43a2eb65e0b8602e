"""``hotloop tune`` and ``hotloop prove`` as a user meets them."""

import json

import pytest

import hotloop
from hotloop.cli.main import main
from hotloop.monitor.optimization import Change, Evidence, Optimization
from support import THOROUGH

QUICK = ["mnist", "--no-download", "--model", "small", "--samples", "640", "--quiet",
         "--compile", "off", "--tensor-arena", "never", "--num-threads", "1"]  # fmt: skip


def run(capsys, *argv):
    try:
        code = main([str(a) for a in argv])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


def test_prove_tells_interval_results_and_verdict(capsys):
    code, text, err = run(
        capsys, "prove", *QUICK, "--set", "cpu.queue_size=8", "--set", "parallel.num_workers=none",
        "--budget-s", 0.5,
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert text.split(":")[0] in ("proven", "regression", "no difference")
    for word in ("cpu.queue_size = 8", "num_workers = none", "95 % interval", "last bit"):
        assert word in text


def test_prove_takes_a_suggestion_of_a_report(tmp_path, capsys):
    folder = tmp_path / "run"
    code, *_ = run(capsys, "train", *QUICK, "--no-ceilings", "--max-steps", 3, "--out", folder)
    assert code == 0
    evidence = Evidence(metric="m", value=1, threshold=2, threshold_source="a test")
    suggestions = [
        Optimization(
            name="swap", title="swapping", change=Change(command="swapoff -a"), evidence=evidence
        ),
        Optimization(
            name="queue-size", title="a queue too short", evidence=evidence,
            change=Change(plan={"cpu.queue_size": 8}),
        ),
    ]  # fmt: skip
    path = folder / "report.json"
    document = json.loads(path.read_text())
    document["optimizations"] = [s.to_dict() for s in suggestions]
    path.write_text(json.dumps(document))
    argv = ["--from", path, "--name", "queue-size", "--json", "--quiet", "--budget-s", 0.5]
    code, text, _ = run(capsys, "prove", *argv)
    found = json.loads(text)
    assert code == 0
    assert found["change"] == {"cpu.queue_size": 8}
    assert found["present"]["step"]["compile"] == "off"
    assert found["exact"] is True
    proven = Optimization.from_dict(found["optimization"])
    assert proven.proof.n == found["comparison"]["n"] >= 4
    states = {"proven": "proven", "regression": "regression", "no difference": "hypothesis"}
    assert proven.state == states[found["verdict"]]
    assert json.loads(path.read_text()) == document  # Written only when asked to.
    if THOROUGH:
        code, text, _ = run(capsys, "prove", *argv, "--save")
        assert code == 0
        document["optimizations"][1] = json.loads(text)["optimization"]
        assert document["optimizations"][1]["proof"]["n"] >= 4
        assert json.loads(path.read_text()) == document
        code, text, _ = run(capsys, "report", folder)
        assert code == 0
        assert "times as fast" in text

    code, _, err = run(capsys, "prove", "--from", path, "--name", "swap")
    assert code == 2
    assert "swapoff -a" in err
    code, _, err = run(capsys, "prove", "--from", path, "--name", "swop")
    assert code == 2
    assert "swap, queue-size" in err
    code, _, err = run(capsys, "prove", "--from", folder / "recipe.json")
    assert code == 2
    assert "no suggestions" in err


def test_tune_in_no_time_writes_a_plan_and_tells_what_it_could_not_try(tmp_path, capsys):
    path = tmp_path / "tuned.toml"
    code, text, err = run(
        capsys, "tune", *QUICK, "--budget-s", 0.5, "--out", path, "--batch-sizes", "128",
        "--lr-rule", "sqrt", "--no-remember", "--json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    found = json.loads(text)
    assert {t["reason"] for t in found["tried"]} & {"the time was spent"}
    assert {t["outcome"] for t in found["tried"]} & {"kept", "won"}
    assert found["remembered"] is False
    assert found["learning_rate_factor"] == pytest.approx((found["batch_size"] / 64) ** 0.5)
    plan = hotloop.Plan.load(path)
    assert plan.to_dict() == found["plan"]
    assert plan.memory.tensor_arena == "never"
    assert path.read_text().startswith("# hotloop ")


@pytest.mark.parametrize(
    ("argv", "expect"),
    [
        (["tune"], "needs data"),
        (["tune", "mnist", "--budget-s", "0"], "above 0"),
        (["tune", "mnist", "--batch-sizes", "128"], "--lr-rule"),
        (["tune", "mnist", "--batch-sizes", "a", "--lr-rule", "none"], "whole numbers"),
        (["tune", "mnist", "--batch-sizes", "0", "--lr-rule", "none"], "at least 1"),
        (["prove", "mnist"], "needs a change"),
        (["prove", "mnist", "--set", "queue=3"], "part.knob=value"),
        (["prove", "mnist", "--set", "cpu.queue_siz=3"], "queue_size"),
        (["prove", "mnist", "--set", "cpu.queue_size=three"], "whole number"),
        (["prove", "mnist", "--set", "cpu.queue_size=none"], "whole number"),
        (["prove", "mnist", "--set", "cpu.queue_size=0"], "at least 1"),
        (["prove", "mnist", "--set", "cpu.num_threads=auto"], "number of threads"),
        (["prove", "mnist", "--set", "cpu.queue_size=4"], "change something"),
        (["prove", "--set", "cpu.queue_size=8"], "needs data"),
        (["prove", "mnist", "--set", "cpu.queue_size=8", "--margin", "-1"], "margin"),
        (["prove", "mnist", "--set", "cpu.queue_size=8", "--confidence", "95"], "confidence"),
        (["prove", "--from", "/nowhere/report.json"], "report of hotloop train"),
        (["prove", "mnist", "--set", "cpu.queue_size=8", "--from", "x"], "needs a change"),
        (["prove", "mnist", "--set", "cpu.queue_size=8", "--save"], "--from report.json"),
    ],
)
def test_bad_input_is_one_line_before_any_work(capsys, argv, expect):
    code, _, err = run(capsys, *argv, "--quiet")
    assert code == 2, err
    assert expect in err
    assert err.count("\n") == 1
