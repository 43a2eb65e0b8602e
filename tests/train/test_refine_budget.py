"""The budget of a run whose step is recorded: that of PyTorch's step, which it takes first."""

import gc
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import hotloop
from hotloop import kernels

if not kernels.is_available():
    pytest.skip(kernels.unavailable_reason(), allow_module_level=True)

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


def reached(report):
    """Of the arena, beside what the budget counts apart."""
    budget = report.budget
    held = budget.optimizer_state_bytes + budget.gradient_buffers_bytes
    return report.arena["peak_top_bytes"] - held


CASES = [(samples, micro) for samples in (64 * 12, 64 * 12 + 8) for micro in (None, 16)]


@pytest.fixture(scope="module")
def reports():
    """Of each case the plain run and the recorded one, in a process whose arena is empty before."""
    done = subprocess.run([sys.executable, __file__], check=True, capture_output=True, text=True)
    return dict(zip(CASES, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_recorded_run_is_budgeted_as_a_plain_one_and_stays_inside(reports, case):
    plain, recorded = reports[case]
    assert (plain["path"], recorded["path"]) == ("plain", "compiled"), recorded["reason"]
    for name in ("gradient_buffers_bytes", "working_memory_bytes", "optimizer_state_bytes"):
        assert plain["budget"][name] == recorded["budget"][name], name
    # With micro-batches PyTorch's update runs beside the program's block, which may part the room
    # that its temporaries need: one weight's size at most.
    _, micro = case
    more = recorded["budget"]["model_parameters_bytes"] if micro else 0
    assert recorded["reached"] <= recorded["budget"]["working_memory_bytes"] + more


@pytest.mark.parametrize("compiles", ["off", "always"])
def test_what_can_be_counted_at_the_end_is_what_was_predicted(compiles):
    test = torch.randn(64, 32), torch.randint(4, (64,))
    report = run(256 + 16, compiles=compiles, validation=test)
    counted = report.used_bytes
    assert set(counted) == {"model_parameters_bytes", "batch_data_bytes", "optimizer_state_bytes"}
    for name, size in counted.items():
        assert size == pytest.approx(getattr(report.budget, name), rel=1e-3), name


def main():
    for_each = []
    for samples, micro in CASES:
        both = [run(samples, compiles=compiles, micro=micro) for compiles in ("off", "always")]
        for_each.append(
            [
                {
                    "path": r.path, "reason": r.path_reason, "budget": r.budget.to_dict(),
                    "reached": reached(r),
                }
                for r in both
            ]
        )  # fmt: skip
    print(json.dumps(for_each))


if __name__ == "__main__":
    main()
