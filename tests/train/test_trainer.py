"""The trainer against plain PyTorch, and against itself after an interruption."""

import copy
import os
import signal

import pytest
import torch
from torch import nn

import hotloop
from hotloop.data import GlobalSampler
from hotloop.train.loop import TrainLoop

LOSS = nn.functional.cross_entropy


def make_data(n=150, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 6, 6, generator=generator)
    return x, (x.sum((1, 2, 3)) > 0).long()


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(64, 2),
    )


def make_trainer(model=None, *, every_steps=None, scheduled=True, lr=1e-2):
    model = model or make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    scheduler = None
    if scheduled:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 7, gamma=0.7)
    plan = hotloop.Plan().replace(
        {"cpu.num_threads": 1, "checkpoint.every_steps": every_steps, "checkpoint.every_s": 0}
    )
    return hotloop.Trainer(
        model, LOSS, optimizer, plan, scheduler=scheduler, scheduler_interval="step"
    )


def same(a, b):
    """Bit-identical tensors, name by name."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("compiling", ["off", "auto"])
def test_it_computes_what_a_plain_loop_computes(compiling):
    # Rows of 128 bytes need no padding: the kernels see the same strides, hence the same bits.
    x = torch.randn(150, 32, generator=torch.Generator().manual_seed(0))
    y = (x.sum(1) > 0).long()
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 2))
    plan = hotloop.Plan().replace(
        {"cpu.num_threads": torch.get_num_threads(), "step.compile": compiling}
    )
    plain = copy.deepcopy(model)
    trainer = hotloop.Trainer(model, LOSS, torch.optim.Adam(model.parameters()), plan)
    report = trainer.fit((x, y), batch_size=16, epochs=3, seed=5)

    optimizer = torch.optim.Adam(plain.parameters())
    sampler = GlobalSampler(len(x), 16, seed=5)
    last = []
    for epoch in range(3):
        last = []
        for index in sampler.batches(epoch):
            optimizer.zero_grad()
            loss = LOSS(plain(x[index]), y[index])
            loss.backward()
            optimizer.step()
            last.append((loss.item(), len(index)))
    if compiling == "off":
        assert same(model.state_dict(), plain.state_dict())
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    mean = sum(loss * n for loss, n in last) / len(x)
    assert report.train_loss == pytest.approx(mean, rel=1e-6)
    assert report.steps == 30


@pytest.fixture(scope="module")
def uninterrupted():
    """A trainer after three epochs, and its report."""
    whole = make_trainer()
    return whole, whole.fit(make_data(), batch_size=16, epochs=3, validation=make_data(40, 1))


@pytest.mark.parametrize("stop_at", [1, 4, 9, 10, 11, 19, 20, 25])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, uninterrupted, stop_at):
    data = make_data()
    whole, expected = uninterrupted
    make_trainer().fit(
        data, batch_size=16, epochs=3, validation=make_data(40, 1), max_steps=stop_at,
        checkpoint_dir=tmp_path,
    )  # fmt: skip
    resumed = make_trainer(make_model(seed=99))
    report = resumed.fit(
        data, batch_size=16, epochs=3, validation=make_data(40, 1), checkpoint_dir=tmp_path,
        resume=True,
    )  # fmt: skip
    assert same(resumed.model.state_dict(), whole.model.state_dict())
    for p, q in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert same(resumed.optimizer.state[p], whole.optimizer.state[q])
    assert resumed.scheduler.get_last_lr() == whole.scheduler.get_last_lr()
    assert [r.train_loss for r in report.history] == [r.train_loss for r in expected.history]
    assert report.curve == expected.curve
    assert any("resumed at step" in note for note in report.notes)


def test_what_it_sets_it_restores():
    model = make_model().eval()
    torch.manual_seed(3)
    before = (
        torch.get_num_threads(),
        torch.random.get_rng_state(),
        signal.getsignal(signal.SIGINT),
        os.sched_getaffinity(0),
    )
    make_trainer(model).fit(make_data(), batch_size=16)
    assert torch.get_num_threads() == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])
    assert signal.getsignal(signal.SIGINT) is before[2]
    assert os.sched_getaffinity(0) == before[3]
    assert not any(module.training for module in model.modules())


def test_ctrl_c_saves_and_the_run_goes_on_later(tmp_path, monkeypatch):
    data = make_data()
    whole = make_trainer()
    whole_report = whole.fit(data, batch_size=16, epochs=2)

    show = TrainLoop._show
    monkeypatch.setattr(
        TrainLoop,
        "_show",
        lambda self, *a, **k: (
            show(self, *a, **k),
            self.state.step >= 5 and os.kill(os.getpid(), signal.SIGINT),
        ),
    )
    report = make_trainer().fit(data, batch_size=16, epochs=2, checkpoint_dir=tmp_path)
    monkeypatch.undo()
    # One call may make several steps.
    assert report.stopped == "interrupted"
    assert 5 <= report.steps < whole_report.steps
    resumed = make_trainer(make_model(7))
    resumed.fit(data, batch_size=16, epochs=2, checkpoint_dir=tmp_path, resume=True)
    assert same(resumed.model.state_dict(), whole.model.state_dict())


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(tmp_path):
    data = make_data()
    whole = make_trainer(every_steps=3)
    whole.fit(data, batch_size=16, epochs=2, checkpoint_dir=tmp_path / "whole")
    make_trainer(every_steps=3).fit(
        data, batch_size=16, epochs=2, max_steps=8, checkpoint_dir=tmp_path / "run"
    )
    newest = sorted((tmp_path / "run").iterdir())[-1] / "model.safetensors"
    blob = bytearray(newest.read_bytes())
    blob[-3] ^= 1
    newest.write_bytes(blob)
    resumed = make_trainer()
    report = resumed.fit(
        data, batch_size=16, epochs=2, checkpoint_dir=tmp_path / "run", resume=True
    )
    assert any("step-000000008" in note for note in report.notes)
    assert any("resumed at step 6" in note for note in report.notes)
    assert same(resumed.model.state_dict(), whole.model.state_dict())


def test_micro_batches_give_the_same_run_to_float32_rounding():
    data = make_data()
    models = []
    for micro in (None, 4):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, 2))
        plan = hotloop.Plan().replace({"memory.micro_batch_size": micro})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        hotloop.Trainer(model, LOSS, optimizer, plan).fit(data, batch_size=16, epochs=2)
        models.append(model.state_dict())
    for name, tensor in models[0].items():
        torch.testing.assert_close(models[1][name], tensor, rtol=1e-4, atol=1e-6)


def test_a_run_that_cannot_fit_is_refused_and_fit_memory_takes_the_largest_micro_batch():
    x = torch.zeros(16, 1, 64, 64)
    y = torch.zeros(16, dtype=torch.int64)

    def trainer(limit):
        model = nn.Sequential(nn.Conv2d(1, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(246016, 2))
        plan = hotloop.Plan().replace({"memory.limit_bytes": limit})
        return hotloop.Trainer(model, LOSS, torch.optim.SGD(model.parameters()), plan)

    free = trainer(None)
    budget = hotloop.Budget.predict(free.model, (x, y), 16, loss_fn=LOSS, optimizer=free.optimizer)
    limit = budget.total_bytes - budget.working_memory_bytes // 2
    with pytest.raises(hotloop.BudgetError, match=r"must fit the memory limit.*--micro-batch-size"):
        trainer(limit).fit((x, y), batch_size=16)
    report = trainer(limit).fit((x, y), batch_size=16, fit_memory=True)
    assert 1 <= report.plan["memory"]["micro_batch_size"] < 16
    assert report.budget.total_bytes <= limit


def test_early_stop_at_the_target_accuracy():
    report = make_trainer(scheduled=False).fit(
        make_data(), batch_size=16, epochs=50, validation=make_data(60, 1), target_accuracy=0.7
    )
    assert report.stopped == "target accuracy reached"
    assert report.validation_accuracy >= 0.7
    assert report.epochs < 50


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"batch_size": 0}, "batch_size must be"),
        ({"epochs": 0}, "epochs must be"),
        ({"target_accuracy": 1.5}, "target_accuracy must be"),
        ({"target_accuracy": 0.9}, "needs validation data"),
        ({"resume": True}, "resume needs checkpoint_dir"),
    ],
)
def test_arguments_outside_their_rule(change, rule):
    with pytest.raises(hotloop.InputError, match=rule):
        make_trainer().fit(make_data(), **change)


def test_a_checkpoint_of_another_model_or_run_is_refused(tmp_path):
    data = make_data()
    make_trainer(scheduled=False).fit(data, batch_size=16, checkpoint_dir=tmp_path)
    with pytest.raises(hotloop.CheckpointError, match="already holds a run"):
        make_trainer(scheduled=False).fit(data, batch_size=16, checkpoint_dir=tmp_path)
    other = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    with pytest.raises(hotloop.CheckpointError, match="same model"):
        make_trainer(other, scheduled=False).fit(
            data, batch_size=16, checkpoint_dir=tmp_path, resume=True
        )
    with pytest.raises(hotloop.CheckpointError, match="batch_size must be as it was: 16"):
        make_trainer(scheduled=False).fit(data, batch_size=8, checkpoint_dir=tmp_path, resume=True)


def test_a_loss_that_diverges_ends_the_run_with_a_clear_line():
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e20)
    x, _ = make_data()
    trainer = hotloop.Trainer(model, nn.functional.mse_loss, optimizer)
    with pytest.raises(hotloop.DivergedError, match="loss must stay finite"):
        trainer.fit((x, torch.randn(len(x), 1)), batch_size=16, epochs=5)


def test_too_few_scores_for_the_labels():
    x, _ = make_data()
    with pytest.raises(hotloop.ModelError, match="one score for each of the 7 classes"):
        make_trainer().fit((x, torch.arange(len(x)) % 7), batch_size=16)


def test_a_model_whose_course_depends_on_values_trains_all_the_same():
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(36, 2)

        def forward(self, x):
            x = x.flatten(1)
            return self.layer(x) if x.sum().item() > 0 else self.layer(-x)

    model = Moody()
    trainer = hotloop.Trainer(model, LOSS, torch.optim.SGD(model.parameters(), lr=0.1))
    report = trainer.fit(make_data(), batch_size=16)
    assert report.steps == 10
    assert report.budget.working_memory_bytes is None
    assert report.prediction_error is None
    assert any("depends on values" in note for note in report.notes)


def test_a_scheduler_does_not_hide_the_optimizer_from_the_budget():
    trainer = make_trainer(scheduled=True)
    for p in trainer.model.parameters():
        p.grad = torch.ones_like(p)
    before = copy.deepcopy(trainer.model.state_dict())
    budget = hotloop.Budget.predict(
        trainer.model, make_data(16), 16, loss_fn=LOSS, optimizer=trainer.optimizer
    )
    sizes = sum(p.numel() * 4 for p in trainer.model.parameters())
    assert 2 * sizes <= budget.optimizer_state_bytes < 2 * sizes + 100
    assert same(before, trainer.model.state_dict())
