"""Precision auto: what the probe accepts, what it refuses, and that the run itself is untouched."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hotloop
from hotloop.step import recorded
from hotloop.step.precision import BOUND, PROBE_STEPS, probe

AUTO = hotloop.Plan().replace({"step.precision": "auto", "step.compile": "always"})


class Fake:
    """A step whose loss follows a course, after a wait that stands for the work."""

    def __init__(self, course, spin, seen):
        self.course, self.spin, self.seen = iter(course), spin, seen

    def __call__(self, x, y):
        self.seen.append(x)
        for _ in range(self.spin):
            torch.mm(torch.ones(64, 64), torch.ones(64, 64))
        return torch.tensor(next(self.course))


def verdict(rounded, *, spins=(200, 20), batches=None):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, random = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    seen, exact = [], [2.0 / (1 + n) for n in range(PROBE_STEPS)]

    def make(three, precision):
        a_model, _, an_optimizer = three
        assert a_model is not model
        assert an_optimizer.param_groups[0]["params"][0] is a_model.weight
        with torch.no_grad():
            a_model.weight.zero_()
        torch.rand(3)
        auto = precision == "bfloat16"
        return Fake(rounded(exact) if auto else exact, spins[auto], seen)

    found = probe(
        make, (model, F.mse_loss, optimizer), batches or (lambda: [(torch.ones(1), torch.ones(1))])
    )
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert torch.equal(torch.random.get_rng_state(), random)
    return found, seen


def test_a_faster_step_that_learns_alike_is_accepted():
    found, seen = verdict(lambda exact: [v * (1 + BOUND / 2) for v in exact])
    assert found.accepted
    assert found.deviation == pytest.approx(BOUND / 2)
    assert "precision auto is bfloat16" in found.reason
    assert len(seen) == 2 * PROBE_STEPS


@pytest.mark.parametrize(
    "course",
    [
        lambda exact: [v * (1 + 2 * BOUND) for v in exact],
        lambda exact: [*exact[:-1], float("nan")],
        lambda exact: [*exact[:-1], float("inf")],
        # Only the last window drifts away.
        lambda exact: [*exact[:-8], *(v * 1.1 for v in exact[-8:])],
    ],
)
def test_another_course_is_refused(course):
    assert not verdict(course)[0].accepted


def test_no_gain_is_refused():
    found, _ = verdict(list, spins=(20, 200))
    assert not found.accepted
    assert found.speedup < 1


def test_both_see_the_same_batches_and_start_again_at_the_end():
    data = [(torch.full((1,), float(n)), torch.ones(1)) for n in range(5)]
    _, seen = verdict(list, batches=lambda: data)
    values = [x.item() for x in seen]
    assert values[:PROBE_STEPS] == values[PROBE_STEPS:]
    assert values[:7] == [0, 1, 2, 3, 4, 0, 1]


def task():
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.rand(10, 32, generator=generator)
    y = torch.randint(0, 10, (320,), generator=generator)
    x = prototypes[y] + 0.1 * torch.rand(320, 32, generator=generator)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Dropout(0.1), nn.Linear(48, 10))
    return model, torch.optim.Adam(model.parameters(), lr=1e-3), x, y


def test_bfloat16_computes_low_and_keeps_float32_weights():
    torch.manual_seed(0)
    model, optimizer, x, y = task()
    exact = F.cross_entropy(model.eval()(x[:32]), y[:32]).item()
    plan = hotloop.Plan().replace({"step.precision": "bfloat16", "step.compile": "always"})
    step = hotloop.compile_step(model, F.cross_entropy, optimizer, (x[:32], y[:32]), plan)
    losses = [step(x[:32], y[:32]).item() for _ in range(60)]
    assert (step.path, step.precision) == ("compiled", "bfloat16"), step.reason
    assert losses[0] != exact
    assert losses[0] == pytest.approx(exact, rel=0.02)
    assert losses[-1] < 0.8 * losses[0]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    states = [s for state in optimizer.state.values() for s in state.values()]
    assert {s.dtype for s in states} == {torch.float32}


def test_auto_leaves_the_model_alone_and_says_what_it_found():
    torch.manual_seed(0)
    model, optimizer, x, y = task()
    before, random = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    step = hotloop.compile_step(model, F.cross_entropy, optimizer, (x[:32], y[:32]), AUTO)
    assert "precision auto is" in step.reason
    assert "times as fast" in step.reason
    assert step.precision in ("float32", "bfloat16")
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert not optimizer.state
    assert torch.equal(torch.random.get_rng_state(), random)


def test_a_run_reports_its_precision_and_keeps_it_when_resumed(tmp_path):
    torch.manual_seed(0)
    model, optimizer, x, y = task()
    trainer = hotloop.Trainer(model, F.cross_entropy, optimizer, plan=AUTO)
    first = trainer.fit((x, y), batch_size=32, epochs=1, checkpoint_dir=tmp_path)
    assert f"precision auto is {first.precision}" in first.path_reason
    assert any("precision auto" in line for line in first.budget.assumptions)
    model, optimizer, x, y = task()
    trainer = hotloop.Trainer(model, F.cross_entropy, optimizer, plan=AUTO)
    second = trainer.fit((x, y), batch_size=32, epochs=2, checkpoint_dir=tmp_path, resume=True)
    assert second.precision == first.precision
    assert "probe" not in second.path_reason


def test_the_plain_path_stays_float32():
    model, optimizer, x, y = task()
    plan = hotloop.Plan().replace({"step.precision": "auto", "step.compile": "off"})
    step = hotloop.compile_step(model, F.cross_entropy, optimizer, (x[:32], y[:32]), plan)
    assert (step.path, step.precision) == ("plain", "float32")
    assert "precision auto is float32 on the plain path" in step.reason


def test_what_products_alone_do_not_compute_is_recorded_again_under_autocast(monkeypatch):
    """As on a processor that has products in bfloat16, with a model that wants more than these."""
    monkeypatch.setattr(recorded, "rounds_products", lambda: True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.rand(8, 1, 8, 8), torch.randint(0, 10, (8,))
    plan = hotloop.Plan().replace({"step.precision": "bfloat16", "step.compile": "always"})
    step = hotloop.compile_step(model, F.cross_entropy, optimizer, (x, y), plan)
    for number in range(6):
        # Two to see that, two under autocast.
        assert step.path == ("compiled" if number >= 4 else "plain")
        with torch.autocast("cpu", torch.bfloat16, enabled=number >= 2):
            expected = F.cross_entropy(copy.deepcopy(model)(x).float(), y)
        assert step(x, y).item() == pytest.approx(expected.item(), rel=1e-5)
    assert step.operations() == []
