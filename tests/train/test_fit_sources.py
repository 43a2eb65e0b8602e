"""What fit takes: each source against the same loop in plain PyTorch on the same batches."""

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

import hotloop
from support.data_sources import (
    LOSS,
    SEED,
    SIZE,
    WIDTH,
    N,
    Noisy,
    Samples,
    Stream,
    arrays,
    close,
    fit,
    make_model,
    make_trainer,
    plain,
    same_weights,
    shuffled,
)


def padded(samples):
    """A collate function of a user's own."""
    x, y = zip(*samples, strict=True)
    return torch.stack(x), torch.stack(y)


def epochs_of(loader, epochs=2):
    """A plain loop as a user writes it: seeded once, then over the loader."""
    torch.manual_seed(SEED)
    for _ in range(epochs):
        yield from loader


# Data that hotloop orders.


@pytest.mark.parametrize(
    "make",
    [
        Samples,
        TensorDataset,
        lambda x, y: Subset(TensorDataset(x.flip(0), y.flip(0)), range(N - 1, -1, -1)),
        lambda x, y: ConcatDataset([TensorDataset(x[:9], y[:9]), TensorDataset(x[9:], y[9:])]),
        lambda x, y: list(zip(x.numpy(), y.tolist(), strict=True)),
        lambda x, y: (x.numpy(), y.numpy()),
    ],
    ids=["samples", "tensors", "subset", "concatenated", "list", "arrays"],
)
@pytest.mark.parametrize("compiling", ["off", "auto"])
def test_samples_by_number_are_packed_and_shuffled_by_the_seed(make, compiling):
    x, y = arrays()
    expected, model = plain(shuffled(x, y))
    losses, trainer, report = fit(make(x, y), make_trainer(compile=compiling), batch_size=SIZE)
    assert close(losses, expected)
    for mine, theirs in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert report.steps == len(expected)
    assert not any("read" in note for note in report.notes)


def test_files_are_what_their_arrays_are(tmp_path):
    pa = pytest.importorskip("pyarrow")
    csv, feather, parquet = (
        pytest.importorskip(f"pyarrow.{name}") for name in ("csv", "feather", "parquet")
    )
    x, y = arrays()
    expected = fit((x, y), batch_size=SIZE)[0]
    np.savez(tmp_path / "a.npz", x=x.numpy(), y=y.numpy())
    columns = {f"f{k}": x[:, k].numpy() for k in range(WIDTH)}
    table = pa.table({**columns, "label": y.numpy()})
    parquet.write_table(table, tmp_path / "a.parquet")
    feather.write_feather(table, tmp_path / "a.feather")
    csv.write_csv(table, tmp_path / "a.csv")
    for suffix in ("npz", "parquet", "feather", "csv"):
        losses, _, report = fit(tmp_path / f"a.{suffix}", batch_size=SIZE)
        assert losses == expected, suffix
        assert report.validation_loss is None


def test_random_samples_stay_random_and_are_the_same_in_a_run_of_the_same_seed():
    x, y = arrays()
    data = Noisy(x, y)
    losses, _, report = fit(data, batch_size=SIZE)
    given = data.given[-2 * N :]
    epochs = [torch.stack([sample for sample, _ in given[k * N : (k + 1) * N]]) for k in (0, 1)]
    labels = torch.stack([label for _, label in given])
    assert not torch.equal(epochs[0].sort(0).values, epochs[1].sort(0).values)
    sizes = [SIZE] * (N // SIZE) + [N % SIZE]
    parts = zip(torch.cat(epochs).split(sizes * 2), labels.split(sizes * 2), strict=True)
    assert close(losses, plain(parts)[0])
    assert any("draws random numbers" in note for note in report.notes)
    again = fit(Noisy(x, y), batch_size=SIZE)[0]
    assert again == losses


def test_a_coin_that_shows_the_same_side_twice_is_seen_all_the_same():
    class Flipped(Samples):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image.flip(0) if torch.rand(()) < 1e-9 else image, label

    report = fit(Flipped(*arrays()), batch_size=SIZE)[2]
    assert any("draws random numbers" in note for note in report.notes)
    with pytest.raises(hotloop.DataError, match="must stay the same"):
        hotloop.open_dataset(Flipped(*arrays()))


# Loaders: their batch size, sampler, collate_fn and workers.


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(
    "options",
    [
        {"shuffle": True},
        {"shuffle": False, "drop_last": True},
        {"shuffle": True, "collate_fn": padded},
        {"shuffle": True, "generator": True},
        {"sampler": torch.utils.data.WeightedRandomSampler(torch.rand(N), 30)},
        {"batch_sampler": [[0, 1, 2], [3, 4], [9, 8, 7, 6]]},
        {"shuffle": True, "collate_fn": padded, "num_workers": 1},
    ],
    ids=["shuffled", "drop_last", "collate", "generator", "weighted", "batch_sampler", "worker"],
)
def test_a_loader_is_iterated_as_a_plain_loop_does(options, dropout):
    def loader():
        own = dict(options)
        if own.pop("generator", None):
            own["generator"] = torch.Generator().manual_seed(5)
        if "batch_sampler" not in own:
            own["batch_size"] = SIZE
        return DataLoader(TensorDataset(*arrays()), **own)

    expected, model = plain(epochs_of(loader()), dropout)
    losses, trainer, _ = fit(loader(), make_trainer(dropout))
    assert losses == expected
    assert same_weights(trainer.model, model)


def test_a_loader_of_random_samples_draws_what_a_plain_loop_draws():
    x, y = arrays()
    options = {"batch_size": SIZE, "shuffle": True}
    expected, model = plain(epochs_of(DataLoader(Noisy(x, y), **options)), 0.5)
    losses, trainer, _ = fit(DataLoader(Noisy(x, y), **options), make_trainer(0.5))
    assert losses == expected
    assert same_weights(trainer.model, model)


def test_a_loader_that_can_be_packed_is_packed_and_runs_as_a_program():
    loader = DataLoader(Samples(*arrays(400)), batch_size=SIZE, shuffle=True)
    losses, _, report = fit(loader, make_trainer(compile="always"))
    count = len(loader.dataset.given)
    assert count < 500  # Read once, not once an epoch.
    assert close(losses, plain(epochs_of(loader))[0])
    assert report.path == "compiled"
    assert report.budget.batch_data_bytes > 0


def test_what_belongs_to_a_loader_is_refused_beside_one():
    loader = DataLoader(TensorDataset(*arrays()), batch_size=SIZE)
    with pytest.raises(hotloop.InputError, match="has its own batch size"):
        fit(loader, batch_size=SIZE + 1)
    with pytest.raises(hotloop.InputError, match="leave drop_last out"):
        fit(loader, drop_last=True)
    assert len(fit(loader, batch_size=SIZE)[0]) == 2 * len(loader)


# Data that can only be gone through.


def batches():
    x, y = arrays()
    return zip(x.split(SIZE), y.split(SIZE), strict=True)


class Again:
    """An object of a user's own that gives batches."""

    def __iter__(self):
        return batches()


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (Stream(*arrays()), {"batch_size": SIZE}),
        (DataLoader(Stream(*arrays()), batch_size=SIZE), {}),
        (DataLoader(Stream(*arrays()), batch_size=SIZE, num_workers=1), {}),
        (batches, {}),
        (lambda: iter(Again()), {}),
        (Again(), {}),
    ],
    ids=["iterable", "loader", "worker", "function", "lambda", "object"],
)
def test_streams_are_gone_through_anew_in_each_epoch(data, options):
    expected, model = plain([*batches(), *batches()])
    losses, trainer, report = fit(data, **options)
    assert losses == expected
    assert same_weights(trainer.model, model)
    assert (report.epochs, report.batch_size) == (2, SIZE)
    assert any("begins its epoch again" in note for note in report.notes)


def test_a_stream_that_draws_random_numbers_draws_what_a_plain_loop_draws():
    def noisy():
        for x, y in batches():
            yield x + torch.randn(x.shape), y

    def plain_loop():
        torch.manual_seed(SEED)
        yield from noisy()
        yield from noisy()

    expected, _ = plain(plain_loop(), 0.5)
    assert fit(noisy, make_trainer(0.5))[0] == expected


def test_streams_that_are_none():
    with pytest.raises(hotloop.DataError, match="without calling it"):
        fit(batches())
    with pytest.raises(hotloop.DataError, match="at least 1 batch"):
        fit(lambda: iter([]))
    with pytest.raises(hotloop.DataError, match="must return an iterator"):
        fit(lambda: 3)
    calls = []

    def once():
        calls.append(1)
        return batches() if len(calls) == 1 else iter([])

    with pytest.raises(hotloop.DataError, match="none in epoch 1"):
        fit(once)


# Validation.


@pytest.mark.parametrize(
    "validation",
    [
        arrays(20),
        Samples(*arrays(20)),
        DataLoader(TensorDataset(*arrays(20)), batch_size=5),
        DataLoader(TensorDataset(*arrays(20)), batch_size=7, shuffle=True),
        Stream(*arrays(20)),
        lambda: iter([arrays(20)]),
    ],
    ids=["arrays", "samples", "loader", "shuffled", "stream", "function"],
)
@pytest.mark.parametrize("data", [arrays(), Stream(*arrays())], ids=["packed", "stream"])
def test_validation_data_of_any_kind_with_data_of_any_other(data, validation):
    losses, trainer, report = fit(data, make_trainer(0.5), batch_size=SIZE, validation=validation)
    assert losses == fit(data, make_trainer(0.5), batch_size=SIZE)[0]  # It leaves no trace.
    x, y = arrays(20)
    with torch.no_grad():
        scores = trainer.model.eval()(x)
    assert report.validation_loss == pytest.approx(LOSS(scores, y).item(), rel=1e-5)
    assert report.validation_accuracy == pytest.approx((scores.argmax(1) == y).float().mean())


def test_to_batch_says_what_is_x_and_what_y():
    x, y = arrays()
    samples = [{"image": x[k], "label": y[k], "name": k} for k in range(N)]

    def pair(batch):
        return batch["image"], batch["label"]

    expected, _ = plain(shuffled(x, y))
    assert close(fit(samples, batch_size=SIZE, to_batch=pair, validation=samples)[0], expected)
    loader = DataLoader(samples, batch_size=SIZE, shuffle=True)
    torch.manual_seed(SEED)
    assert close(fit(loader, to_batch=pair)[0], plain(map(pair, epochs_of(loader)))[0])

    def computed(batch):
        return batch["image"] * 2, batch["label"]

    doubled, _ = plain(shuffled(2 * x, y))
    assert close(fit(samples, batch_size=SIZE, to_batch=computed)[0], doubled)
    with pytest.raises(hotloop.InputError, match="to_batch is for"):
        fit((x, y), to_batch=pair)


def test_the_model_has_the_batches_its_own_loader_would_give():
    seen = []

    class Looking(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = make_model()

        def forward(self, x):
            seen.append((x.dtype, x.stride(), x.is_contiguous()))
            return self.layer(x.float())

    model = Looking()
    x, y = arrays()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = hotloop.Trainer(model, LOSS, optimizer, make_trainer().plan)
    for dtype in (torch.uint8, torch.float64, torch.int16, torch.bool, torch.bfloat16):
        seen.clear()
        fit(TensorDataset((x * 9).to(dtype), y), trainer, batch_size=SIZE, epochs=1)
        assert set(seen) == {(dtype, (WIDTH, 1), True)}
