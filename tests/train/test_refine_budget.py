"""The budget of a run whose step is compiled: from the compiled step, before the run."""

import gc

import pytest
import torch
from torch import nn

import hotloop
from hotloop.step import rehearsal, step
from hotloop.step.compiler import has_compiler
from hotloop.step.program import may_be_compiled

if not has_compiler():
    pytest.skip("no C++ compiler here", allow_module_level=True)

LOSS = nn.functional.cross_entropy
WIDTH = 1024


def run(samples, *, compiles, batch_size=64, epochs=1, micro=None, **options):
    gc.collect()  # What an earlier run holds would count as this one's.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
    model.append(nn.Linear(WIDTH, 4))
    plan = hotloop.Plan().replace({"step.compile": compiles, "cpu.num_threads": 2})
    plan = plan.replace({"memory.micro_batch_size": micro})
    trainer = hotloop.Trainer(model, LOSS, torch.optim.Adam(model.parameters()), plan)
    x, y = torch.randn(samples, 32), torch.randint(4, (samples,))
    return trainer.fit((x, y), batch_size=batch_size, epochs=epochs, **options)


def test_a_compiled_step_has_no_gradients_and_reaches_as_far_as_predicted():
    plain = run(256, compiles="off")
    report = run(256, compiles="always")
    assert report.path == "compiled"
    budget = report.budget
    assert plain.budget.gradient_buffers_bytes > 4 * WIDTH * WIDTH
    assert budget.gradient_buffers_bytes == 0
    reached = report.arena["peak_top_bytes"] - budget.optimizer_state_bytes
    # Beside the arena: packed factors, less than the weights once more.
    assert reached <= budget.working_memory_bytes < reached + budget.model_parameters_bytes
    step_of = ("gradient_buffers_bytes", "working_memory_bytes")
    compiled, pytorch = (sum(getattr(b, n) for n in step_of) for b in (budget, plain.budget))
    assert compiled < pytorch


@pytest.mark.parametrize("compiles", ["off", "always"])
def test_what_can_be_counted_at_the_end_is_what_was_predicted(compiles):
    test = torch.randn(64, 32), torch.randint(4, (64,))
    report = run(256 + 16, compiles=compiles, validation=test)
    counted = report.used_bytes
    assert set(counted) == {"model_parameters_bytes", "batch_data_bytes", "optimizer_state_bytes"}
    for name, size in counted.items():
        assert size == pytest.approx(getattr(report.budget, name), rel=1e-3), name


def test_a_last_smaller_batch_counts_with_gradients_of_its_own():
    even, uneven = run(256, compiles="always"), run(256 + 16, compiles="always")
    more = uneven.budget.working_memory_bytes - even.budget.working_memory_bytes
    assert more > 0.9 * 4 * WIDTH * WIDTH
    reached = uneven.arena["peak_top_bytes"] - uneven.budget.optimizer_state_bytes
    assert uneven.budget.working_memory_bytes == pytest.approx(reached, rel=0.05)


@pytest.mark.parametrize("samples", [256, 256 + 8])
def test_sums_of_micro_batches_stay_beside_the_update_and_a_smaller_batch(samples):
    report = run(samples, compiles="always", micro=16)
    budget = report.budget
    assert report.path == "compiled"
    assert budget.gradient_buffers_bytes > 4 * WIDTH * WIDTH
    held = budget.optimizer_state_bytes + budget.gradient_buffers_bytes
    reached = report.arena["peak_top_bytes"] - held
    assert budget.working_memory_bytes == pytest.approx(reached, rel=0.05)


def test_evaluation_counts_where_it_takes_most():
    test = torch.randn(64, 32), torch.randint(4, (64,))
    before = run(256, compiles="always").budget
    after = run(256, compiles="always", validation=test).budget
    assert after.working_memory_bytes >= before.working_memory_bytes
    assert run(256, compiles="always", validation=test, max_steps=2).budget.total_bytes > 0


def test_a_short_run_is_captured_only_where_such_a_step_may_be_compiled(monkeypatch, tmp_path):
    run(256, compiles="always")
    model = nn.Linear(8, 2)
    batch = torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64)
    assert not may_be_compiled(model, batch)
    captured = []
    real = step.try_compiled
    monkeypatch.setattr(step, "try_compiled", lambda *a, **k: captured.append(1) or real(*a, **k))
    assert run(256, compiles="auto").path == "compiled"
    assert len(captured) == 1
    assert run(256, compiles="auto", batch_size=32).path == "plain"
    assert len(captured) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert run(256, compiles="auto").path == "plain"
    assert len(captured) == 1


def test_rehearsing_a_capture_leaves_the_random_state():
    rehearsal.rehearse_capture.cache_clear()
    before = torch.random.get_rng_state()
    rehearsal.rehearse_capture()
    assert torch.equal(before, torch.random.get_rng_state())
