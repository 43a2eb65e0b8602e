"""A run that is cut off in mid-epoch goes on as if it had not been, whatever its data."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import hotloop
from support.data_sources import (
    LOSS,
    SIZE,
    WIDTH,
    N,
    Noisy,
    Samples,
    Stream,
    arrays,
    fit,
    make_trainer,
    same_weights,
)


class ThreeGenerators(Samples):
    """Draws from torch, NumPy and Python."""

    def __getitem__(self, index):
        noise = torch.randn(WIDTH) + random.random() + float(np.random.rand())
        return self.x[index] + noise, self.y[index]


class Keeping:
    """A loader of batches that knows where it is, as torchdata's ``StatefulDataLoader``."""

    def __init__(self, x, y):
        self.dataset, self.batch_size, self.num_workers = Stream(x, y), SIZE, 0
        self.sampler = self.batch_sampler = self.collate_fn = None
        self.drop_last = False
        self._at = self._from = 0

    def __iter__(self):
        batches = list(zip(self.dataset.x.split(SIZE), self.dataset.y.split(SIZE), strict=True))
        start, self._from = self._from, 0
        for self._at, batch in enumerate(batches[start:], start + 1):
            yield batch

    def state_dict(self):
        return {"at": self._at}

    def load_state_dict(self, state):
        self._from = state["at"]


def padded(samples):
    x, y = zip(*samples, strict=True)
    return torch.stack(x), torch.stack(y)


def loader_of(dataset, **options):
    return lambda: DataLoader(dataset(*arrays()), batch_size=SIZE, shuffle=True, **options)


SOURCES = {
    "samples": lambda: Samples(*arrays()),
    "noisy": lambda: Noisy(*arrays()),
    "generators": lambda: ThreeGenerators(*arrays()),
    "loader": loader_of(TensorDataset),
    "own_generator": lambda: loader_of(TensorDataset, generator=torch.Generator().manual_seed(3))(),
    "collate": loader_of(TensorDataset, collate_fn=padded),
    "worker": loader_of(TensorDataset, collate_fn=padded, num_workers=1),
    "noisy_loader": loader_of(Noisy),
    "generators_loader": loader_of(ThreeGenerators),
    "keeping": lambda: Keeping(*arrays()),
}
STEPS = -(-N // SIZE)


def run(make, folder=None, seeds=5, **options):
    random.seed(seeds)
    np.random.seed(seeds)
    batch_size = SIZE if isinstance(make(), Samples) else None
    trainer = make_trainer(0.5)
    losses, trainer, report = fit(
        make(), trainer, batch_size=batch_size, checkpoint_dir=folder, epochs=3, **options
    )
    return losses, trainer, report


@pytest.mark.parametrize("stop_at", [2, STEPS, STEPS + 3])
@pytest.mark.parametrize("kind", SOURCES)
def test_a_run_goes_on_in_the_middle_of_an_epoch(tmp_path, kind, stop_at):
    make = SOURCES[kind]
    whole_losses, whole, whole_report = run(make)
    before, _, _ = run(make, tmp_path, max_steps=stop_at)
    after, resumed, report = run(make, tmp_path, seeds=6, resume=True)
    assert before + after == whole_losses
    assert same_weights(resumed.model, whole.model)
    assert [r.train_loss for r in report.history] == [r.train_loss for r in whole_report.history]


def test_a_stream_begins_its_epoch_again_and_says_so(tmp_path):
    def stream():
        x, y = arrays()
        return zip(x.split(SIZE), y.split(SIZE), strict=True)

    fit(stream, epochs=2, max_steps=STEPS + 2, checkpoint_dir=tmp_path)
    losses, _, report = fit(stream, epochs=2, checkpoint_dir=tmp_path, resume=True)
    assert len(losses) == STEPS
    assert report.steps == 2 * STEPS + 2
    assert any("begins its epoch again" in note for note in report.notes)


def test_skipped_batches_of_a_loader_are_not_read(tmp_path):
    def loader(dataset):
        return DataLoader(dataset, batch_size=SIZE, collate_fn=padded, num_workers=0)

    fit(loader(Samples(*arrays())), epochs=1, max_steps=4, checkpoint_dir=tmp_path)
    dataset = Samples(*arrays())
    fit(loader(dataset), epochs=1, checkpoint_dir=tmp_path, resume=True)
    rest = list(range(4 * SIZE, N))
    assert dataset.given[-len(rest) :] == rest
    assert len(dataset.given) < N + 2 * SIZE


def test_other_data_is_not_gone_on_with(tmp_path):
    data = TensorDataset(*arrays())
    fit(data, batch_size=SIZE, drop_last=True, epochs=1, checkpoint_dir=tmp_path)
    options = {"batch_size": SIZE, "epochs": 2, "checkpoint_dir": tmp_path, "resume": True}
    with pytest.raises(hotloop.CheckpointError, match="drop_last must be as it was: True"):
        fit(data, **options)
    with pytest.raises(hotloop.CheckpointError, match="num_samples must be as it was"):
        fit(TensorDataset(*arrays(N - 1)), drop_last=True, **options)


# What a checkpoint holds beside weights and optimizer.


class Weighted(torch.nn.Module):
    """A loss with parameters, a buffer, and a state of its own."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(()))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, scores, y):
        with torch.no_grad():
            self.seen += 1
        return (LOSS(scores, y) + 0.01 * self.seen) * torch.exp(-self.scale) + self.scale

    def as_method(self, scores, y):
        return self(scores, y)


def of_kind(kind):
    """A loss and what it keeps."""
    inner = Weighted()
    if kind == "module":
        return inner, inner
    if kind == "method":
        return inner.as_method, inner
    if kind == "closure":
        return lambda scores, y: inner(scores, y), inner
    temperature = torch.nn.Parameter(torch.ones(()))

    def free(scores, y):
        return LOSS(scores * temperature, y)

    holder = torch.nn.Module()
    holder.temperature = temperature
    return free, holder


@pytest.mark.parametrize("kind", ["module", "method", "closure", "free parameter"])
def test_what_a_loss_keeps_is_in_the_checkpoint(tmp_path, kind):
    def trainer():
        made = make_trainer()
        loss, keeper = of_kind(kind)
        parameters = [*made.model.parameters(), *keeper.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=0.05)
        return hotloop.Trainer(made.model, loss, optimizer, made.plan), keeper

    data = arrays()
    whole, kept = trainer()
    fit(data, whole, batch_size=SIZE)
    fit(data, trainer()[0], batch_size=SIZE, max_steps=5, checkpoint_dir=tmp_path)
    resumed, found = trainer()
    fit(data, resumed, batch_size=SIZE, checkpoint_dir=tmp_path, resume=True)
    assert same_weights(found, kept)
    assert same_weights(resumed.model, whole.model)
    made = make_trainer()
    optimizer = torch.optim.Adam(made.model.parameters(), lr=0.05)
    other = hotloop.Trainer(made.model, LOSS, optimizer, made.plan)
    with pytest.raises(hotloop.CheckpointError, match=r"same loss|must fit this run"):
        fit(data, other, batch_size=SIZE, checkpoint_dir=tmp_path, resume=True)


class Odd(torch.nn.Module):
    """A state that is more than dense tensors of float32."""

    def __init__(self, extra=None, **buffers):
        super().__init__()
        self.layer, self.extra = torch.nn.Linear(WIDTH, 2), extra
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state

    def forward(self, x):
        return self.layer(x)


SQUARE = torch.eye(3) * torch.arange(1.0, 4.0)
BUFFERS = {
    "coo": lambda: SQUARE.to_sparse(),
    "uncoalesced": lambda: torch.sparse_coo_tensor(
        [[0, 0]], [1.0, 2.0], (3,), check_invariants=True
    ),
    "csr": lambda: SQUARE.to_sparse_csr(),
    "csc": lambda: SQUARE.to_sparse_csc(),
    "bsr": lambda: torch.eye(4).to_sparse_bsr((2, 2)),
    "complex": lambda: torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex128),
    "bits": lambda: torch.tensor([True, False]),
    "empty": lambda: torch.empty(0, 3),
}


@pytest.mark.filterwarnings("ignore:.*[Ss]parse.*")
@pytest.mark.parametrize("kind", [*BUFFERS, "extra"])
def test_what_is_odd_in_a_model_is_in_the_checkpoint(tmp_path, kind):
    def trainer(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return hotloop.Trainer(model, LOSS, optimizer, make_trainer().plan)

    extra = {"version": 3, "names": ["a", "b"], "table": torch.arange(3)}
    there = Odd(extra) if kind == "extra" else Odd(odd=BUFFERS[kind]())
    fit(arrays(), trainer(there), batch_size=SIZE, epochs=1, checkpoint_dir=tmp_path)
    if kind == "extra":
        here = Odd()
        fit(arrays(), trainer(here), batch_size=SIZE, checkpoint_dir=tmp_path, resume=True)
        assert here.extra["names"] == ["a", "b"]
        assert here.extra["table"].tolist() == [0, 1, 2]
        return
    buffer = BUFFERS[kind]()
    blank = buffer.clone() if buffer.layout != torch.strided else torch.zeros_like(buffer)
    if buffer.layout != torch.strided:
        blank = blank * 2
    here = Odd(odd=blank)
    fit(arrays(), trainer(here), batch_size=SIZE, checkpoint_dir=tmp_path, resume=True)
    assert here.odd.layout == buffer.layout
    dense = [t.to_dense() if t.layout != torch.strided else t for t in (here.odd, buffer)]
    assert torch.equal(*dense)


@pytest.mark.parametrize("state", [lambda: object(), lambda: {"f": print}, lambda: torch.device])
def test_a_state_that_cannot_be_kept_is_told_before_the_first_step(tmp_path, state):
    model = Odd(state())
    trainer = hotloop.Trainer(model, LOSS, torch.optim.SGD(model.parameters(), lr=0.1))
    steps = []
    with pytest.raises(hotloop.CheckpointError, match="plain Python values and tensors") as error:
        fit(arrays(), trainer, checkpoint_dir=tmp_path, on_progress=steps.append)
    assert not steps
    assert "\n" not in str(error.value)
    fit(arrays(), trainer, epochs=1)
