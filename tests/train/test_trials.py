"""Trials in fresh processes, on models of which it is known what is slow and what differs."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from torch import nn

import hotloop
from hotloop.cli.recipe import Recipe
from hotloop.cli.tune import _text
from hotloop.errors import InputError, ModelError, PlanError, RunError
from hotloop.machine import Machine
from hotloop.measure import compare
from hotloop.monitor.optimization import Change, Evidence, Optimization
from hotloop.train.losses import equal_to_rounding, loss_difference
from hotloop.train.proof import Proven, prove
from hotloop.train.trial_worker import KEPT_LOSSES, Slices
from hotloop.train.trials import PlanTrials, Source, pickled_source
from hotloop.train.tuner import heading, tune_source
from hotloop.tuning import PRESENT, Group, key_of

PLANTED = '''
"""Work whose speed and results depend on the plan in a way that tests know."""
import time
import torch
from torch import nn
import hotloop
from hotloop.train.trials import Work
from hotloop.train.tuned import parts_fingerprint

class Slow(nn.Module):
    """Waits as long as it is told to in each forward pass."""
    def __init__(self, wait_s):
        super().__init__()
        self.inner, self.wait_s = nn.Linear(8, 2), wait_s
    def forward(self, x):
        time.sleep(self.wait_s)
        return self.inner(x)

def work(arguments, plan):
    torch.manual_seed(0)
    model = Slow(0.001 if plan.cpu.queue_size == 16 else 0.01)
    if plan.cpu.queue_size == 3:  # Another mathematics.
        nn.init.ones_(model.inner.weight)
    if plan.cpu.queue_size == 2:
        raise ValueError("planted\\nfailure")
    print("what a model prints must not mix with the answers")
    optimizer = torch.optim.SGD(model.parameters(), 0.01 * arguments["lr_factor"])
    trainer = hotloop.Trainer(model, nn.functional.cross_entropy, optimizer, plan)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, generator=generator)
    data = (x, (x.sum(1) > 0).long())
    example = (torch.empty(1, 8), torch.empty(1, dtype=torch.int64))
    size = arguments["batch_size"]
    return Work(trainer, data, size, 0, parts_fingerprint(trainer.parts, size, example))
'''
# No compiler, no arena: what is tested here is the trial, and it is to start quickly.
PLAN = hotloop.Plan().replace(
    {"cpu.num_threads": 1, "step.compile": "off", "memory.tensor_arena": "never"}
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache of these tests' own; one for all, as compiled parts lie there too."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def planted(tmp_path, monkeypatch, cache):
    """Source of the work above."""
    (tmp_path / "planted_work.py").write_text(PLANTED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return Source("planted_work:work", {}, 20)


def trials_of(source, **options):
    return PlanTrials(source, PLAN, **{"slice_s": 0.05, **options})


def test_slices_lead_in_and_wait_for_the_next_line():
    said, now = [], itertools.count()
    lines = iter(['{"do": "slice", "s": 5}\n', '{"do": "slice", "s": 3}\n', ""])
    slices = Slices(
        lambda **values: said.append(values), lambda: next(lines), 2, lambda: {"ready": True},
        clock=lambda: float(next(now)),
    )  # fmt: skip

    def train():
        for step in range(1000):
            slices([float(2 * step), float(2 * step + 1)])

    with pytest.raises(SystemExit):
        train()
    assert said[0] == {"ready": True}
    assert [set(s) for s in said[1:]] == [{"s_per_step", "steps", "losses"}] * 2
    # The clock ticks once a call, and a call makes two steps.
    assert [s["s_per_step"] for s in said[1:]] == [0.5, 0.5]
    assert [s["steps"] for s in said[1:]] == [10, 6]
    assert said[-1]["losses"] == [float(i) for i in range(KEPT_LOSSES)]
    assert slices.steps_per_call == 2


def test_a_planted_gain_is_proven_and_a_planted_loss_is_a_regression(planted):
    with trials_of(planted) as trials:
        faster = prove(trials, {"cpu.queue_size": 16}, budget_s=10)
        assert faster.comparison.verdict == "proven"
        assert faster.comparison.low > 1
        assert (faster.loss_difference, faster.exact) == (0.0, True)
        assert "last bit" in faster.numerics
        slower = prove(trials, PRESENT, against={"cpu.queue_size": 16}, budget_s=10)
        assert slower.comparison.verdict == "regression"
        differs = prove(trials, {"cpu.queue_size": 3}, budget_s=0.1)
        assert differs.exact is False
        assert "NOT equal" in differs.numerics
        suggestion = Optimization(
            name="queue", title="a queue too short", change=Change(plan={"cpu.queue_size": 16}),
            evidence=Evidence(metric="x", value=1, threshold=2, threshold_source="a test"),
        )  # fmt: skip
        proven = faster.applied_to(suggestion)
        assert (proven.state, proven.exact) == ("proven", True)
        assert proven.proof.low == faster.comparison.low
        assert slower.applied_to(suggestion).state == "regression"
        assert differs.applied_to(suggestion).exact is False
        assert json.loads(json.dumps(proven.to_dict()))["proof"]["n"] == faster.comparison.n
        with pytest.raises(PlanError, match="change something"):
            prove(trials, {"cpu.queue_size": 4})
        with pytest.raises(PlanError, match="queue_size"):
            prove(trials, {"cpu.queue_siz": 5})
        assert trials.prepare([{"cpu.queue_size": 16}]) == {}  # It runs already.


def test_what_cannot_run_or_differs_is_told_and_processes_end(planted):
    with trials_of(planted, check_results=True) as trials:
        bad = [{"cpu.queue_size": 2}, {"cpu.queue_size": 3}, {"cpu.thread_affinity": "9999"}]
        failures = trials.prepare([PRESENT, *bad])
        reasons = [failures[key_of(candidate)] for candidate in bad]
        assert "ValueError: planted" in reasons[0]
        assert "losses of the first" in reasons[1]
        assert "CPU 9999" in reasons[2]
        assert set(trials._running) == {key_of(PRESENT)}
        child = trials._running[key_of(PRESENT)]._process
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(RunError, match="signal 9"):
            trials.measure(PRESENT)
        assert trials.measure(PRESENT) > 0  # Started anew.
        child = trials._running[key_of(PRESENT)]._process
    assert child.poll() is not None


@pytest.mark.full
def test_another_precision_is_told_with_what_decided_it(planted):
    auto, low = {"step.precision": "auto"}, {"step.precision": "bfloat16"}
    with trials_of(planted, check_results=True) as trials:
        failures = trials.prepare([PRESENT, auto, low])
        # Only what is compiled is probed, so it would run as the present plan does.
        assert failures == {key_of(auto): "precision auto is float32 on the plain path"}
    with trials_of(planted) as trials:
        found = prove(trials, low, budget_s=0.1)
        assert found.exact is False
        assert "as the plan says, which nothing has probed" in found.precision_reason
        assert found.numerics.endswith(found.precision_reason)
        assert found.to_dict()["precision_reason"] in found.proof().numerics
        assert prove(trials, {"cpu.queue_size": 16}, budget_s=0.1).precision_reason is None
        found = prove(trials, auto, budget_s=0.1)
        assert found.numerics.endswith("last bit; precision auto is float32 on the plain path")


def test_a_trial_ends_with_its_parent(planted, tmp_path):
    code = textwrap.dedent(f"""
        import os, sys
        sys.path.insert(0, {str(tmp_path)!r})
        from hotloop.plan import Plan
        from hotloop.train.trials import PlanTrials, Source
        plan = Plan.from_dict({PLAN.to_dict()!r})
        trials = PlanTrials(Source("planted_work:work", {{}}, 20), plan)
        trials.require([{{}}])
        print(next(iter(trials._running.values()))._process.pid, flush=True)
        os.kill(os.getpid(), 9)
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pid = int(done.stdout)
    for _ in range(200):
        if not _is_running(pid):
            return
        time.sleep(0.1)
    os.kill(pid, 9)
    pytest.fail("the trial outlived its parent")


def _is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_too_little_memory_for_one_more_is_a_reason(planted):
    with trials_of(planted, free_bytes=lambda: 1000) as trials:
        failures = trials.prepare([PRESENT, {"cpu.queue_size": 16}])
        assert key_of(PRESENT) not in failures
        assert "not enough memory" in failures[key_of({"cpu.queue_size": 16})]


QUEUES = ({"cpu.queue_size": 16}, {"cpu.queue_size": 2}, {"cpu.queue_size": 3})


def test_tuning_finds_the_planted_gain_writes_its_proof_and_is_remembered(planted, tmp_path, cache):
    machine = Machine.probe()
    told = []
    result = tune_source(
        planted,
        PLAN,
        machine,
        budget_s=20,
        slice_s=0.05,
        space=[Group("queue", QUEUES)],
        on_progress=lambda p: told.append(p.text),
    )
    assert result.best["cpu.queue_size"] == 16
    line = next(entry for entry in result.lines if entry.group == "queue")
    assert line.kept
    assert line.proven.comparison.low > 1
    assert result.overall.comparison.verdict == "proven"
    failed = {t.candidate["cpu.queue_size"]: t.reason for t in result.tried if t.reason}
    assert "planted" in failed[2]
    assert "differ" in failed[3]
    assert any("proving queue" in text for text in told)
    assert json.loads(json.dumps(result.to_dict()))["lines"][0]["kept"]

    shown = _text(result, tmp_path / "x", Recipe(batch_size=20))
    for words in ("won", "failed: ValueError", "Remembered", "queue_size 16: proven", "In all"):
        assert words in shown
    text = result.toml(heading(result, machine))
    path = tmp_path / "tuned.toml"
    path.write_text(text)
    assert hotloop.Plan.load(path) == result.plan
    above = text[: text.index("queue_size = 16")].splitlines()[-2:]
    assert "proven:" in " ".join(above)
    assert not list(cache.rglob("*.journal"))

    assert result.remembered
    work = __import__("planted_work").work
    arguments = {"batch_size": 20, "lr_factor": 1.0}
    auto = hotloop.Plan.auto().replace({"memory.tensor_arena": "never"})
    plain = work(arguments, PLAN)
    trainer = hotloop.Trainer(plain.trainer.model, nn.functional.cross_entropy,
                              plain.trainer.optimizer, auto)  # fmt: skip
    report = trainer.fit(plain.data, 20, max_steps=2)
    assert report.plan["cpu"]["queue_size"] == 16
    (note,) = [n for n in report.notes if "hotloop tune" in n]
    assert "queue_size 16" in note
    assert "interval" in note
    other = trainer.fit(plain.data, 25, max_steps=2)  # Another batch size is other work.
    assert other.plan["cpu"]["queue_size"] == 4
    mine = hotloop.Trainer(trainer.model, trainer.loss_fn, trainer.optimizer,
                           auto.replace({"cpu.queue_size": 5}))  # fmt: skip
    assert mine.fit(plain.data, 20, max_steps=2).plan["cpu"]["queue_size"] == 5
    fixed = hotloop.Trainer(trainer.model, trainer.loss_fn, trainer.optimizer, PLAN)
    assert not [n for n in fixed.fit(plain.data, 20, max_steps=2).notes if "tune" in n]


@pytest.mark.full
def test_tuning_cut_off_goes_on_and_does_not_measure_again(planted, tmp_path):
    machine, journal = Machine.probe(), tmp_path / "j.journal"
    options = {
        "budget_s": 8,
        "slice_s": 0.05,
        "space": [Group("queue", QUEUES[:1])],
        "journal": journal,
        "keep": False,
    }

    class Cut(Exception):
        pass

    def cut(progress):
        if "proving queue" in progress.text:
            raise Cut

    with pytest.raises(Cut):
        tune_source(planted, PLAN, machine, on_progress=cut, **options)
    rounds = journal.read_text().count('"round"')
    told = []
    result = tune_source(
        planted, PLAN, machine, on_progress=lambda p: told.append(p.text), **options
    )
    assert result.best["cpu.queue_size"] == 16
    assert any("went on with a search cut off" in note for note in result.notes)
    assert rounds >= 1
    starts = [text for text in told if text.startswith("starting")]
    assert starts == ["starting the present plan", "starting queue_size 16"]  # For the proof.
    assert not journal.exists()
    assert not result.remembered


def module_trainer(model, plan=PLAN):
    optimizer = torch.optim.Adam(model.parameters())
    return hotloop.Trainer(model, nn.functional.cross_entropy, optimizer, plan)


def arrays(n=300):
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(0))
    return x, (x.sum(1) > 0).long()


def test_a_pickled_trainer_trains_as_it_would_here(tmp_path):
    torch.manual_seed(0)
    trainer = module_trainer(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)))
    trainer.fit(arrays(), 20, max_steps=3)  # The optimizer has a state that must come along.
    data = hotloop.open_dataset(arrays())
    with trials_of(pickled_source(trainer, data, 20, 5, tmp_path)) as trials:
        trials.measure(PRESENT)
        there = trials.losses[key_of(PRESENT)]
        trials.lr_rule = "linear"
        assert trials.lr_factor_of({"batch_size": 10}) == 0.5
    here = []
    trainer.fit(arrays(), 20, epochs=2, seed=5, on_losses=here.extend)
    assert loss_difference(there, here) == (0.0, KEPT_LOSSES)


def test_losses_are_told_as_they_come():
    told = []
    report = module_trainer(nn.Linear(8, 2)).fit(arrays(), 20, epochs=2, on_losses=told.extend)
    assert told == [loss for _, loss in report.curve]


def test_what_cannot_be_pickled_is_one_line(tmp_path):
    model = nn.Linear(8, 2)
    trainer = hotloop.Trainer(
        model, lambda a, b: (a.sum() + b.sum()) * 1.0, torch.optim.SGD(model.parameters(), 0.1)
    )
    with pytest.raises(ModelError, match=r"picklable.*Next: define the classes"):
        hotloop.tune(trainer, arrays(), 20)
    with pytest.raises(InputError, match="batch_size"):
        hotloop.tune(trainer, arrays(), 0)


SCRIPT = """
import sys
import torch
from torch import nn
import hotloop

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 2)
    def forward(self, x):
        return self.inner(x)

def tune():
    model = Net()
    plan = hotloop.Plan().replace({
        "cpu.num_threads": 1, "step.compile": "off", "memory.tensor_arena": "never"})
    trainer = hotloop.Trainer(
        model, nn.functional.cross_entropy, torch.optim.SGD(model.parameters(), 0.1), plan)
    x = torch.randn(100, 8)
    before = [p.clone() for p in model.parameters()]
    found = hotloop.tune(trainer, (x, (x.sum(1) > 0).long()), 20, budget_s=0.5, save=sys.argv[1])
    assert hotloop.Plan.load(sys.argv[1]) == found
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))

"""


@pytest.mark.parametrize("guarded", [True, False])
def test_a_script_with_its_own_classes_can_tune(tmp_path, cache, guarded):
    path = tmp_path / "script.py"
    call = "if __name__ == '__main__':\n    tune()\n" if guarded else "tune()\n"
    path.write_text(SCRIPT + call)
    done = subprocess.run(
        [sys.executable, str(path), str(tmp_path / "plan.toml")],
        capture_output=True, text=True, env=os.environ | {"XDG_CACHE_HOME": str(cache)},
    )  # fmt: skip
    if guarded:
        assert done.returncode == 0, done.stderr
        assert "num_threads" in (tmp_path / "plan.toml").read_text()
    else:
        assert "__name__ == '__main__'" in done.stderr


def test_the_difference_of_losses():
    assert loss_difference([1.0, 2.0], [1.0, 2.0, 3.0]) == (0.0, 2)
    assert loss_difference([1.0, 2.0], [1.0, 1.9])[0] == pytest.approx(0.05)
    assert loss_difference([1.0, 0.0], [1.0, 1e-12])[0] < 1e-4
    assert equal_to_rounding([2.3, 2.4, 1.9], [2.3, 2.4001, 1.9003])
    assert not equal_to_rounding([2.3, 2.4], [2.301, 2.4])  # Nothing has grown yet.
    assert not equal_to_rounding([2.3, 2.4, 1.9], [2.3, 2.4, 1.902])
    assert not equal_to_rounding([2.3, math.nan], [2.3, 2.4])
    assert not equal_to_rounding([], [])
    same = {"change": {}, "comparison": compare(lambda: 1.0, lambda: 1.0), "steps": 16}
    found = [
        Proven(**same, loss_difference=size, exact=exact).numerics
        for size, exact in ((3e-8, True), (2e-3, True), (2e-3, False))
    ]
    assert found == [
        "losses of 16 steps equal to 3.0e-08",
        "losses of 16 steps equal to rounding, which grew to 2.0e-03",
        "losses of 16 steps NOT equal: they differ by 2.0e-03",
    ]
