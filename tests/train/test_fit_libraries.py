"""Data of other libraries, where they are installed: Hugging Face ``datasets``, torchdata."""

import pytest
import torch
from torch.utils.data import TensorDataset

from support.data_sources import SIZE, Stream, arrays, fit, same_weights


def pair(batch):
    return batch["x"], batch["y"]


@pytest.fixture
def table():
    datasets = pytest.importorskip("datasets")
    x, y = arrays()
    columns = {"x": x.tolist(), "y": y.tolist()}
    return datasets.Dataset.from_dict(columns).with_format("torch")


def test_a_table_of_hugging_face_is_packed(table):
    losses, _, report = fit(table, batch_size=SIZE, to_batch=pair)
    assert losses == fit(arrays(), batch_size=SIZE)[0]
    assert not any("read" in note for note in report.notes)


def test_a_stream_of_hugging_face_goes_on_where_it_was(table, tmp_path):
    options = {"batch_size": SIZE, "to_batch": pair}
    stream = table.to_iterable_dataset()
    losses, whole, _ = fit(stream, **options)
    before = fit(stream, max_steps=9, checkpoint_dir=tmp_path, **options)[0]
    after, resumed, report = fit(stream, checkpoint_dir=tmp_path, resume=True, **options)
    assert before + after == losses
    assert same_weights(resumed.model, whole.model)
    assert not any("begins its epoch again" in note for note in report.notes)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", [TensorDataset, Stream])
def test_a_loader_of_torchdata_goes_on_where_it_was(kind, workers, tmp_path):
    loading = pytest.importorskip("torchdata.stateful_dataloader")

    def loader():
        torch.manual_seed(0)  # Its sampler draws when it is made.
        shuffled = {"shuffle": True} if kind is TensorDataset else {}
        return loading.StatefulDataLoader(
            kind(*arrays()), batch_size=SIZE, num_workers=workers, **shuffled
        )

    losses, whole, _ = fit(loader())
    before = fit(loader(), max_steps=9, checkpoint_dir=tmp_path)[0]
    after, resumed, report = fit(loader(), checkpoint_dir=tmp_path, resume=True)
    assert before + after == losses
    assert same_weights(resumed.model, whole.model)
    assert not any("begins its epoch again" in note for note in report.notes)
