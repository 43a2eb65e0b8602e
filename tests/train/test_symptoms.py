"""What users report of whole runs: accuracies of nothing, finished runs, other threads."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hotloop

PLAIN = hotloop.Plan().replace({"step.compile": "off"})
X = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
COUNTS = torch.randint(0, 4, (48,), generator=torch.Generator().manual_seed(1))


def trainer(outputs, loss, seed=0):
    torch.manual_seed(seed)
    model = nn.Linear(6, outputs)
    return hotloop.Trainer(model, loss, torch.optim.SGD(model.parameters(), lr=0.05), PLAIN)


def poisson(scores, y):
    return F.poisson_nll_loss(scores.squeeze(1), y.float())


def logistic(scores, y):
    return F.binary_cross_entropy_with_logits(scores.squeeze(1), y.float())


@pytest.mark.parametrize(
    ("loss", "y"),
    [
        (poisson, COUNTS), (logistic, COUNTS.clamp(max=1)), (logistic, COUNTS > 1),
        (lambda s, y: F.mse_loss(s, y.float().unsqueeze(1)), COUNTS),
    ],
    ids=["counts", "one logit", "booleans", "squares"],
)  # fmt: skip
def test_one_column_has_no_largest(loss, y):
    """Else the accuracy would be the share of zeros, and a target stop the run."""
    report = trainer(1, loss).fit((X, y), batch_size=16, epochs=2, validation=(X, y), monitor=False)
    assert report.steps == 6
    right = ((report.validation_accuracy or 0) > 0) and y.max() <= 1
    assert report.validation_accuracy is None or right


@pytest.mark.parametrize("stop", [{"epochs": 2}, {"epochs": 5, "max_steps": 6}])
def test_a_finished_run_that_is_started_again_is_done(tmp_path, stop):
    options = {"batch_size": 16, "checkpoint_dir": tmp_path, "monitor": False, **stop}
    first = trainer(4, F.cross_entropy)
    assert first.fit((X, COUNTS), **options).steps == 6
    for _ in range(2):
        again = trainer(4, F.cross_entropy, seed=9)
        losses = []
        report = again.fit((X, COUNTS), resume=True, on_losses=losses.extend, **options)
        assert (report.steps, losses) == (6, [])
        for one, other in zip(again.model.parameters(), first.model.parameters(), strict=True):
            assert torch.equal(one, other)


def test_fit_in_another_thread_than_the_main_one():
    here, there = trainer(4, F.cross_entropy), trainer(4, F.cross_entropy)
    here.fit((X, COUNTS), batch_size=16, epochs=2, monitor=False)
    found = []

    def run():
        try:
            found.append(there.fit((X, COUNTS), batch_size=16, epochs=2, monitor=False).steps)
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [6]
    for one, other in zip(here.model.parameters(), there.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_step_made_in_one_thread_and_called_in_another():
    model = nn.Linear(6, 4)
    twin = copy.deepcopy(model)
    optimizer, plain = (torch.optim.Adam(m.parameters(), lr=0.01) for m in (model, twin))
    step = hotloop.compile_step(model, F.cross_entropy, optimizer, (X, COUNTS))
    losses = []
    for _ in range(6):
        thread = threading.Thread(target=lambda: losses.append(step(X, COUNTS).item()))
        thread.start()
        thread.join()
    for loss in losses:
        plain.zero_grad()
        expected = F.cross_entropy(twin(X), COUNTS)
        expected.backward()
        plain.step()
        assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert len(losses) == 6
