"""In the steady state a run takes no new pages: what it needs it has."""

import itertools
import resource
import statistics

import pytest
import torch
from torch.nn import functional as F

import hotloop
from hotloop import kernels
from hotloop.train.zoo import build_model

EPOCHS, SAMPLES, BATCH = 8, 2560, 64


@pytest.mark.parametrize("compiling", ["always", "off"])
def test_minor_faults_a_step_are_near_zero(compiling):
    if compiling == "always" and not kernels.is_available():
        pytest.skip(kernels.unavailable_reason())
    torch.manual_seed(0)
    model = build_model("small")
    optimizer = torch.optim.Adam(model.parameters())
    x, y = torch.rand(SAMPLES, 1, 28, 28), torch.randint(0, 10, (SAMPLES,))
    plan = hotloop.Plan().replace({"step.compile": compiling, "cpu.num_threads": 2})
    faults, ended = [], 0

    def on_progress(progress):
        nonlocal ended
        if progress.epochs_done > ended:
            ended = progress.epochs_done
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)

    trainer = hotloop.Trainer(model, F.cross_entropy, optimizer, plan=plan)
    report = trainer.fit((x, y), batch_size=BATCH, epochs=EPOCHS, on_progress=on_progress)
    assert report.path == ("compiled" if compiling == "always" else "plain")
    assert len(faults) == EPOCHS
    # The first two epochs fill caches of allocators; one gradient would be 230 pages a step. An
    # epoch with an audit has more: a plain step gets the program's memory, and gives it back.
    of_epochs = [after - before for before, after in itertools.pairwise(faults[1:])]
    assert statistics.median(of_epochs) / (SAMPLES // BATCH) < 0.5
