"""Sources of batches: what is packed, what is read, and that both are what a loader would give."""

import sqlite3

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

from hotloop.data import PackedBatches, batches, open_batches, open_dataset
from hotloop.data.ahead import read_ahead
from hotloop.data.loaded import LoaderBatches, ReadBatches
from hotloop.data.rows_source import vectorized
from hotloop.data.samples import SampleReader
from hotloop.errors import DataError, InputError

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 6, 5), dtype=np.uint8)
COLOURS = np.random.default_rng(1).integers(0, 256, (40, 6, 5, 3), dtype=np.uint8)
LABELS = np.random.default_rng(2).integers(0, 4, 40)


class ToTensor:
    """Bytes ``[H, W]`` or ``[H, W, C]`` to floats ``[C, H, W]``, as torchvision's."""

    def __call__(self, image):
        image = image[:, :, None] if image.ndim == 2 else image
        return torch.from_numpy(image.transpose(2, 0, 1).copy()).float().div(255)


class Normalize:
    def __init__(self, mean, std):
        self.mean, self.std = mean, std

    def __call__(self, image):
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        return image.sub_(mean).div_(std)


class Compose:
    def __init__(self, transforms):
        self.transforms = transforms

    def __call__(self, image):
        for transform in self.transforms:
            image = transform(image)
        return image


class Vision(Dataset):
    """As an image set of torchvision; counts its reads."""

    target_transform = None

    def __init__(self, data, targets, transform):
        self.data, self.targets, self.transform = data, targets, transform
        self.reads = 0

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        self.reads += 1
        return self.transform(np.asarray(self.data[index])), int(self.targets[index])


class Inverted(Vision):
    """Looks the same, but is not."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return -image, label


def all_of(opened):
    """Samples and targets of packed batches, in the order of the data."""
    dataset = opened.dataset if isinstance(opened, PackedBatches) else opened
    outs = [torch.empty_like(t, device="cpu") for t in dataset.example_tensors(len(dataset))]
    dataset.gather(torch.arange(len(dataset)), *outs)
    return dataset.batch(outs)


TRANSFORMS = {
    "bytes": (IMAGES, ToTensor()),
    "normalized": (IMAGES, Compose([ToTensor(), Normalize([0.13], [0.31])])),
    "colours": (COLOURS, Compose([ToTensor(), Normalize([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])])),
    "torch": (torch.from_numpy(IMAGES), Compose([ToTensor()])),
}


@pytest.mark.parametrize("mmap_above_bytes", [0, 1 << 20])
@pytest.mark.parametrize("kind", TRANSFORMS)
@pytest.mark.parametrize("subset", [False, True])
def test_image_sets_are_read_as_bytes_and_are_what_their_transform_gives(
    kind, subset, mmap_above_bytes
):
    data, transform = TRANSFORMS[kind]
    dataset = Vision(data, LABELS.tolist(), transform)
    whole = Subset(dataset, range(39, 2, -2)) if subset else dataset
    slow = default_collate([whole[k] for k in range(len(whole))])
    dataset.reads = 0
    opened = open_dataset(whole, mmap_above_bytes=mmap_above_bytes)
    assert dataset.reads < 20
    assert opened.columns[0].dtype == torch.uint8
    x, y = all_of(opened)
    assert torch.equal(x, slow[0])
    assert torch.equal(y, slow[1])


def test_a_set_that_only_looks_like_one_is_read_the_slow_way():
    dataset = Inverted(IMAGES, LABELS, ToTensor())
    assert vectorized(SampleReader(dataset)) is None
    slow = default_collate([dataset[k] for k in range(40)])
    assert torch.equal(all_of(open_dataset(dataset))[0], slow[0])
    odd = Vision(IMAGES, LABELS, Compose([ToTensor(), torch.sqrt]))
    assert vectorized(SampleReader(odd)) is None
    flat = Vision(IMAGES.reshape(40, -1), LABELS, lambda image: torch.from_numpy(image / 255.0))
    assert vectorized(SampleReader(flat)) is None


@pytest.mark.parametrize("without_kernels", [False, True])
def test_the_table_of_bytes_without_compiled_kernels(monkeypatch, without_kernels):
    if without_kernels:
        monkeypatch.setattr("hotloop.kernels.is_available", lambda: False)
    data, transform = TRANSFORMS["colours"]
    dataset = Vision(data, LABELS, transform)
    slow = default_collate([dataset[k] for k in range(40)])[0]
    for above in (0, 1 << 20):
        assert torch.equal(all_of(open_dataset(dataset, mmap_above_bytes=above))[0], slow)


class Several(Dataset):
    """Has ``__getitems__``; each sample is a dict."""

    def __len__(self):
        return 30

    def __getitem__(self, index):
        return {"a": torch.full((2,), float(index)), "b": index, "c": index / 2, "d": index > 9}

    def __getitems__(self, indices):
        return [self[index] for index in indices]


def test_numbers_become_what_a_loader_makes_of_them():
    opened = open_batches(Several(), batch_size=30, training=False)
    (x,) = all_of(opened)
    expected = default_collate([Several()[k] for k in range(30)])
    assert x.keys() == expected.keys()
    for name, values in expected.items():
        assert x[name].dtype == values.dtype
        assert torch.equal(x[name], values)


class Slow(Dataset):
    def __len__(self):
        return 10**6

    def __getitem__(self, index):
        return torch.zeros(3), 0


def test_what_would_take_too_long_is_read_while_training(monkeypatch):
    monkeypatch.setattr(batches, "_read_s", lambda reader: 0.001)
    opened = open_batches(Slow(), batch_size=4)
    assert isinstance(opened, ReadBatches)
    assert "would take about 1000 s" in opened.notes[0]
    assert next(opened.batches(0))[0].shape == (4, 3)
    monkeypatch.setattr(batches, "_MOST_PACKED_BYTES", 10)
    assert "would take" in open_batches(Slow(), batch_size=4).notes[0]


class Database(Dataset):
    """Its connection works in the thread alone that opened it; samples have two lengths."""

    def __init__(self):
        self.connection = sqlite3.connect(":memory:")
        self.connection.execute("create table numbers (value integer)")
        self.connection.executemany("insert into numbers values (?)", [(k,) for k in range(20)])

    def __len__(self):
        return 20

    def __getitem__(self, index):
        query = "select value from numbers where rowid = ?"
        (value,) = self.connection.execute(query, (index + 1,)).fetchone()
        return torch.full((1 + value % 2,), value)


def test_what_works_in_one_thread_alone_is_read_there():
    loader = DataLoader(Database(), batch_size=3, collate_fn=torch.cat)
    opened = open_batches(loader)
    assert isinstance(opened, ReadBatches)
    assert [x.tolist() for (x,) in opened.batches(0)] == [x.tolist() for x in loader]


def test_reading_ahead_gives_all_in_order_and_errors_in_their_place():
    assert list(read_ahead(lambda k: k * 2, range(20))) == list(range(0, 40, 2))
    assert list(read_ahead(lambda k: k, [])) == []

    def fails(k):
        if k == 3:
            raise OSError("three")
        return k

    values = read_ahead(fails, range(9))
    assert [next(values) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="three"):
        next(values)
    left_early = read_ahead(lambda k: k, iter(range(10**9)))
    assert next(left_early) == 0
    left_early.close()


class Lengths(torch.utils.data.Sampler):
    """A sampler of a user's own, which is told the epoch."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter([self.epoch, 5, 3])

    def __len__(self):
        return 3


def test_a_sampler_of_ones_own_is_kept_and_told_the_epoch():
    data = TensorDataset(torch.arange(10), torch.arange(10))
    opened = open_batches(DataLoader(data, batch_size=2, sampler=Lengths()))
    assert isinstance(opened, LoaderBatches)
    for epoch in (0, 1, 7):
        got = [x.tolist() for x, _ in opened.batches(epoch)]
        assert got == [[epoch, 5], [3]]


def test_first_batches_leave_no_trace():
    loader = DataLoader(TensorDataset(torch.arange(10)), batch_size=2, sampler=Lengths())
    state = torch.random.get_rng_state()
    opened = open_batches(loader)
    assert opened.first()[0].tolist() == [0, 5]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_data_of_no_kind():
    for data, told in (
        (3, "data must be arrays"),
        (object(), "data must be arrays"),
        (iter([]), "without calling it"),
        (torch.zeros(3, 2), r"pass the targets too, or \(X,\)"),
        ({"a": torch.zeros(3), "b": torch.zeros(4)}, "must count the samples"),
        ((np.zeros(3), {"b": np.array(["x"] * 3)}), "type that torch knows"),
        ([], "an empty list"),
    ):
        with pytest.raises(DataError, match=told) as error:
            open_batches(data)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="batch_size must be left out"):
        open_batches(lambda: iter([]), batch_size=3)


# Tables and images.


def test_text_with_whole_numbers_first_and_others_later(tmp_path):
    pytest.importorskip("pyarrow")
    path = tmp_path / "a.csv"
    rows = [f"{k},{k % 3}" for k in range(300_000)] + ["1.5,2"]
    path.write_text("\n".join(["value,label", *rows]))
    x, y = all_of(open_dataset(path))
    assert x[-1].tolist() == [1.5]
    assert x[:4, 0].tolist() == [0, 1, 2, 3]
    assert y.dtype == torch.int64
    (tmp_path / "b.tsv").write_text("value\tlabel\n1\t0\n2.5\t1\n")
    assert all_of(open_dataset(tmp_path / "b.tsv"))[0].tolist() == [[1.0], [2.5]]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a,label\n1,0\nx,1\n", "'a'"),
        ("a,label\n1,0\n,1\n", "row 1"),
        ("a,b\n1,0\n", "label column"),
        ("a,label\n1,0\n2\n", "CSV"),
        ("a,label\n", "at least 1 sample"),
        ("", "CSV"),
    ],
)
def test_text_that_is_no_table_of_numbers(tmp_path, text, told):
    pytest.importorskip("pyarrow")
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=told) as error:
        open_dataset(tmp_path / "a.csv")
    assert "\n" not in str(error.value)


def test_arrow_with_an_index_and_as_a_stream(tmp_path):
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"a": np.arange(9.0), "label": np.arange(9) % 2})
    for name, writer in (("a.arrow", pa.ipc.new_file), ("b.arrow", pa.ipc.new_stream)):
        with pa.OSFile(str(tmp_path / name), "wb") as file, writer(file, table.schema) as out:
            for batch in table.to_batches(max_chunksize=4):
                out.write_batch(batch)
        x, y = all_of(open_dataset(tmp_path / name))
        assert x[:, 0].tolist() == list(range(9))
        assert y.tolist() == [k % 2 for k in range(9)]
    (tmp_path / "c.arrow").write_bytes(b"ARROW1 but no more")
    with pytest.raises(DataError, match="not a sound Arrow file"):
        open_dataset(tmp_path / "c.arrow")


@pytest.fixture
def image_folder(tmp_path):
    """Two classes of three images in train, one of each in val."""
    image = pytest.importorskip("PIL.Image")
    for split, count in (("train", 3), ("val", 1)):
        for number, name in enumerate(("cats", "dogs")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for k in range(count):
                pixels = np.full((4, 6, 3), 10 * number + k, np.uint8)
                image.fromarray(pixels).save(folder / f"{k}.png")
    return tmp_path / "images"


def test_folders_of_images_by_class(image_folder):
    x, y = all_of(open_dataset(image_folder))
    assert x.shape == (6, 3, 4, 6)
    assert y.tolist() == [0, 0, 0, 1, 1, 1]
    assert (x[:, 0, 0, 0] * 255).round().tolist() == [0, 1, 2, 10, 11, 12]
    assert len(open_dataset(image_folder, split="test")) == 2
    assert all_of(open_dataset(image_folder / "train", image_size=(2, 2)))[0].shape[2:] == (2, 2)


def test_images_of_several_sizes_or_that_are_none(image_folder):
    image = pytest.importorskip("PIL.Image")
    odd = image_folder / "train" / "dogs" / "9.png"
    image.fromarray(np.zeros((5, 5), np.uint8)).save(odd)
    with pytest.raises(DataError, match=r"5 x 5 in .*9\.png.*image_size"):
        open_dataset(image_folder)
    assert len(open_dataset(image_folder, image_size=(4, 4))) == 7
    odd.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"9\.png must be an image"):
        open_dataset(image_folder)
    with pytest.raises(DataError, match="a folder of images for each class"):
        open_dataset(image_folder / "train" / "cats")


def test_images_without_pillow_say_what_to_install(monkeypatch, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(InputError, match=r"pip install 'hotloop\[images\]'"):
        open_dataset(tmp_path)
