"""The report from numbers made by hand, its suggestions, and the comparison of two runs."""

import itertools
import json

import pytest
import torch

from hotloop import kernels
from hotloop.errors import RunError
from hotloop.launch import compare, waits
from hotloop.launch.compare import Outcome
from hotloop.launch.report import RunReport, report_text
from hotloop.launch.suggest import suggest
from support.processes import finish, launched, write

PRODUCT = {
    "batch": 0, "m": 64, "k": 784, "n": 3072, "layout": "nt", "adds": True, "num_threads": 2,
    "kernel": "onednn", "calls": 100, "seconds": 0.08,
    "kernel_s": {"torch": 1.7e-3, "onednn": 8e-4}, "flop": 308281344, "flop_per_s": 3.85e11,
}  # fmt: skip


def report(**values):
    base = {
        "script": ("train.py",), "wall_s": 22.0, "startup_s": 2.0, "user_s": 38.0, "system_s": 1.0,
        "num_threads": 2, "usable_cpus": 2, "peak_resident_bytes": 2**29, "minor_faults": 5000,
    }  # fmt: skip
    return RunReport(**(base | values))


@pytest.mark.parametrize(
    ("values", "first"),
    [
        ({"data_wait_s": 9.0, "loader_workers": 0, "batches": 90}, "data-bound"),
        ({"loader_workers": 16, "data_wait_s": 0.1}, "loader-workers"),
        ({"num_threads": 16}, "oversubscription"),
        ({"run_delay_s": 5.0}, "noisy-neighbour"),
        ({"major_faults": 9000}, "memory-short"),
        ({"update_s": 4.0, "updates": 100}, "fused-optimizer"),
        ({"update_s": 4.0, "updates": 100, "fused_updates": 100}, "compiled-step"),
        ({"product_s": 15.0, "bfloat16": True}, "bfloat16"),
    ],
)
def test_the_first_suggestion_names_the_cause(values, first):
    found = suggest(report(**values))
    assert found[0].name == first
    assert found[0].state == "hypothesis"
    assert found[0].change.command
    assert found[0].evidence.text
    assert found[0].exact is (first != "bfloat16")


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"product_s": 15.0, "bfloat16": None},
        {"data_wait_s": 1.0, "loader_workers": 0},
        {"wall_s": 3.0, "data_wait_s": 0.9},
        {"num_threads": None, "major_faults": 9000},
    ],
)
def test_nothing_is_suggested_without_a_reason(values):
    assert suggest(report(**values)) == ()


def test_text_and_json(tmp_path):
    made = report(
        products=(PRODUCT,) * 7, product_s=0.56, data_wait_s=9.0, loader_workers=0, update_s=1.0,
        children_s=2.0, run_delay_s=1.0, rank=0, major_faults=3,
    )  # fmt: skip
    made = RunReport.from_dict(made.to_dict() | {"optimizations": []})
    text = report_text(made)
    for words in ("rank 0", "22.0 s", "start-up 2.00 s", "512 MiB", "385 GFLOP/s", "2 more shapes"):
        assert words in text
    assert RunReport.from_dict(json.loads(json.dumps(made.to_dict()))).wall_s == 22.0
    bare = RunReport(script=(), wall_s=0.0, user_s=0.0, system_s=0.0)
    assert "unknown" in report_text(bare)
    assert "workers" in report_text(report(optimizations=suggest(made)))


def test_a_script_is_reported(tmp_path):
    script = write(
        tmp_path,
        """
        import torch
        from torch.utils.data import DataLoader, TensorDataset
        data = TensorDataset(torch.randn(64, 300), torch.randint(0, 4, (64,)))
        model = torch.nn.Linear(300, 400)
        optimizer = torch.optim.Adam(model.parameters())
        for _ in range(4):
            for x, y in DataLoader(data, batch_size=16):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
        print("done")
        """,
    )
    path = tmp_path / "report.json"
    code, out, err = finish(launched(script, options=("--report", str(path))), tmp_path)
    assert (code, out) == (0, "done\n")
    assert "hotloop: matmul" in err
    found = RunReport.from_dict(json.loads(path.read_text()))
    assert found.batches == 16
    assert found.loader_workers == 0
    assert found.updates == found.fused_updates == 16
    assert found.routed == kernels.is_available()
    assert 0 < found.startup_s < found.wall_s
    assert found.peak_resident_bytes > 2**20
    if found.routed:
        (use,) = [p for p in found.products if p["adds"]]
        assert (use["m"], use["k"], use["n"], use["calls"]) == (16, 300, 400, 16)


def test_a_report_that_cannot_be_written_leaves_the_exit_code(tmp_path):
    script = write(tmp_path, "raise SystemExit(6)")
    code, _, err = finish(launched(script, options=("--report", "/proc/no/report")), tmp_path)
    assert code == 6
    assert "could not be written" in err


def test_waits_count_batches(monkeypatch):
    module = torch.utils.data.dataloader
    monkeypatch.setattr(waits, "waits", waits.Waits())
    plain = module._SingleProcessDataLoaderIter._next_data
    monkeypatch.setattr(module._SingleProcessDataLoaderIter, "_next_data", waits._timed(plain))
    loader = torch.utils.data.DataLoader(list(range(10)), batch_size=3)
    assert [len(batch) for batch in loader] == [3, 3, 3, 1]
    assert waits.waits.batches == 4
    assert waits.waits.num_workers == 0
    assert waits.waits.seconds > 0


def test_runs_are_interleaved():
    clock = itertools.count()
    order = []

    def one(name):
        order.append(name)
        return Outcome(float(next(clock)), "")

    plain, changed = compare.interleave(lambda: one("a"), lambda: one("b"), 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert [o.seconds for o in plain] == [0, 3, 4]
    assert [o.seconds for o in changed] == [1, 2, 5]


def test_gain_and_interval():
    plain = [Outcome(s, "loss 1.5\n") for s in (2.0, 2.2, 1.8, 2.0)]
    changed = [Outcome(s, "loss 1.5\n") for s in (1.0, 1.1, 0.9, 1.0)]
    found = compare.compare(plain, changed)
    assert found.n == 4
    assert found.gain == pytest.approx(2.0)
    assert found.low == pytest.approx(2.0)
    assert found.high == pytest.approx(2.0)
    assert (found.numbers, found.greatest_difference) == (1, 0.0)
    assert "2.00 times" in compare.comparison_text(found)
    # Wide where it may be looked at whenever one likes; with three pairs there is none yet.
    assert compare.compare(plain[:3], changed[:3]).low is None
    noisy = compare.compare(plain, [Outcome(s, "") for s in (1.0, 4.0, 1.0, 4.0)])
    assert noisy.low < 1 < noisy.high
    assert "not clear" in compare.comparison_text(noisy)
    single = compare.compare(plain[:1], changed[:1])
    assert (single.low, single.high, single.greatest_difference) == (None, None, None)
    assert "n=1 pairs" in compare.comparison_text(single)


def test_only_numbers_that_do_not_change_by_themselves_are_compared():
    plain = ["loss 2.0 in 1.23 s nan", "loss 2.0 in 1.31 s nan"]
    assert compare.compare_outputs(plain, ["loss 2.002 in 0.5 s nan"]) == (2, pytest.approx(1e-3))
    assert compare.compare_outputs(plain, ["loss nan in 0.5 s nan"])[1] != 0
    assert compare.compare_outputs(plain, ["other 2.0 in 1 s nan"]) == (0, None)
    assert compare.compare_outputs(plain, ["loss 2.0 in 1 s nan 3"]) == (0, None)
    assert compare.compare_outputs(["a 1", "a 2"], ["a 3"]) == (0, None)
    assert compare.compare_outputs(["a 1"], ["a 1"]) == (0, None)


def test_compare_on_the_command_line(tmp_path):
    script = write(tmp_path, "import sys; print('loss', 1.25, sys.argv[1:])")
    code, out, err = finish(
        launched(script, "x", options=("--compare", "--rounds", "2", "--json")), tmp_path
    )
    assert code == 0
    document = json.loads(out)
    assert len(document["plain_s"]) == len(document["with_s"]) == 2
    assert document["greatest_difference"] == 0
    assert "pair 2 of 2" in err


def test_a_script_that_fails_cannot_be_compared(tmp_path):
    script = write(tmp_path, "raise ValueError('no data')")
    code, out, err = finish(launched(script, options=("--compare",)), tmp_path)
    assert (code, out) == (1, "")
    assert "no data" in err
    with pytest.raises(RunError, match="exit code"):
        compare.run_once(["false"], {})
