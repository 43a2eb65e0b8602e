"""What tuning found before: when a run takes it over, and when it must not."""

import copy
import functools
import subprocess
import sys

import pytest
import torch
from torch import nn

import hotloop
from hotloop.machine import Machine
from hotloop.train.tuned import parts_fingerprint
from hotloop.tuning.remembered import forget, remember

LOSS = nn.functional.cross_entropy
AUTO = hotloop.Plan.auto().replace({"step.compile": "off", "memory.tensor_arena": "never"})
X = torch.randn(96, 8, generator=torch.Generator().manual_seed(0))
DATA = (X, (X.sum(1) > 0).long())
EXAMPLE = (torch.empty(1, 8), torch.empty(1, dtype=torch.int64))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def make_trainer(plan=AUTO, *, seed=0, width=4, optimizer=torch.optim.Adam, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 2))
    return hotloop.Trainer(model, LOSS, optimizer(model.parameters(), lr=0.01), plan, **options)


def keep(trainer, knobs, batch_size=16):
    machine, model = (
        Machine.probe().fingerprint(),
        parts_fingerprint(trainer.parts, batch_size, EXAMPLE),
    )
    assert remember(machine, model, knobs, "1.3 times")
    return machine, model


def test_a_resumed_run_takes_what_it_began_with_whatever_was_tuned_since(cache, tmp_path):
    keep(make_trainer(), {"cpu.num_threads": 1, "cpu.queue_size": 7})
    whole = make_trainer()
    report = whole.fit(DATA, 16, epochs=3)
    assert report.plan["cpu"]["queue_size"] == 7
    first = make_trainer()
    first.fit(DATA, 16, epochs=3, max_steps=7, checkpoint_dir=tmp_path / "run")
    keep(make_trainer(), {"cpu.num_threads": 1, "cpu.queue_size": 9, "memory.micro_batch_size": 4})
    resumed = make_trainer(seed=5)
    report = resumed.fit(DATA, 16, epochs=3, checkpoint_dir=tmp_path / "run", resume=True)
    assert report.plan["cpu"]["queue_size"] == 7
    assert report.plan["memory"]["micro_batch_size"] is None
    assert any("as when the run began" in note for note in report.notes)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)

    plain = tmp_path / "plain"
    forget(*keep(make_trainer(), {}))
    make_trainer().fit(DATA, 16, epochs=3, max_steps=7, checkpoint_dir=plain)
    keep(make_trainer(), {"cpu.queue_size": 9})
    report = make_trainer().fit(DATA, 16, epochs=3, checkpoint_dir=plain, resume=True)
    assert report.plan["cpu"]["queue_size"] == 4


def test_what_another_version_kept_is_no_reason_to_fail(cache):
    keep(make_trainer(), {"cpu.queue_size": 0})
    report = make_trainer().fit(DATA, 16, max_steps=1)
    assert report.plan["cpu"]["queue_size"] == 4
    keep(make_trainer(), {"cpu.gone": 1, "cpu.queue_size": 8})
    assert make_trainer().fit(DATA, 16, max_steps=1).plan["cpu"]["queue_size"] == 8


def test_fingerprints_tell_work_apart_and_not_values():
    def of(trainer, batch_size=16, example=EXAMPLE):
        return parts_fingerprint(trainer.parts, batch_size, example)

    base = of(make_trainer())
    trained = make_trainer(seed=3)
    trained.fit(DATA, 16, max_steps=2)
    assert of(trained) == base
    assert of(make_trainer(hotloop.Plan())) == base
    others = [
        of(make_trainer(), 32),
        of(make_trainer(width=5)),
        of(make_trainer(optimizer=torch.optim.SGD)),
        of(make_trainer(optimizer=functools.partial(torch.optim.Adam, amsgrad=True))),
        of(make_trainer(clip_norm=1.0)),
        of(make_trainer(), example=(torch.empty(1, 8, 1), EXAMPLE[1])),
    ]
    other_loss = copy.copy(make_trainer())
    other_loss.loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)
    others.append(of(other_loss))
    assert len({base, *others}) == len(others) + 1


def test_the_fingerprint_is_the_same_in_every_process():
    code = (
        "import torch, hotloop\nfrom torch import nn\n"
        "from hotloop.train.tuned import parts_fingerprint\n"
        "model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))\n"
        "optimizer = torch.optim.Adam(model.parameters(), lr=0.5)\n"
        "trainer = hotloop.Trainer(model, nn.functional.cross_entropy, optimizer)\n"
        "example = torch.empty(1, 8), torch.empty(1, dtype=torch.int64)\n"
        "print(parts_fingerprint(trainer.parts, 16, example))"
    )
    there = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert there.stdout.strip() == parts_fingerprint(make_trainer().parts, 16, EXAMPLE)
