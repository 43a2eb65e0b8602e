import resource
import signal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hotloop.data import Normalize, open_dataset
from hotloop.data.storage import FileColumn, MemoryColumn
from hotloop.errors import DataError, HotloopError, StorageError
from hotloop.memory import MemoryPool


def read(data, indices=None, **options):
    """Gather into padded rows, as a pool lends them."""
    indices = torch.arange(data.num_samples) if indices is None else torch.tensor(indices)
    with MemoryPool(data.layouts(len(indices)), 1) as pool:
        x, y = pool.acquire().rows()
        data.gather(indices, x, y, **options)
        return x.clone(), y.clone()


def refused(data, **options):
    with pytest.raises(HotloopError) as error:
        open_dataset(data, **options)
    text = str(error.value)
    assert "\n" not in text
    return text


LABELS = np.arange(6)


@pytest.mark.parametrize("mmap_above_bytes", [0, 1 << 20])
@pytest.mark.parametrize(
    ("dtype", "shape", "sample_dtype", "factor"),
    [
        (np.uint8, (3, 5), torch.float32, 255),
        (np.bool_, (7,), torch.float32, 1),
        (np.float32, (2, 3), torch.float32, 1),
        (np.float64, (), torch.float32, 1),
        (np.float16, (4,), torch.float32, 1),
        (np.int64, (9,), torch.int64, 1),
        (np.int32, (9,), torch.int64, 1),
        (np.uint16, (3,), torch.int64, 1),
        (torch.bfloat16, (5,), torch.float32, 1),
        (torch.int8, (5,), torch.int64, 1),
    ],
)
def test_what_goes_in_comes_out(dtype, shape, sample_dtype, factor, mmap_above_bytes):
    values = np.random.default_rng(0).integers(0, 2 if dtype is np.bool_ else 100, (6, *shape))
    values = (
        torch.from_numpy(values).to(dtype)
        if isinstance(dtype, torch.dtype)
        else values.astype(dtype)
    )
    data = open_dataset((values, LABELS), mmap_above_bytes=mmap_above_bytes)
    assert (data.num_samples, data.sample_shape, data.num_classes) == (6, shape, 6)
    assert (data.sample_dtype, data.target_dtype) == (sample_dtype, torch.int64)
    assert data.is_mapped == (mmap_above_bytes == 0)
    assert data.resident_bytes == (0 if data.is_mapped else data.storage_bytes)
    wanted = torch.as_tensor(values).to(sample_dtype)
    if factor != 1:
        wanted = wanted / factor
    for indices in ([0, 1, 2, 3, 4, 5], [5, 0, 0, 3], [2], [2, 3, 4]):
        x, y = read(data, indices)
        assert x.dtype == sample_dtype
        assert torch.equal(x, wanted[indices])
        assert y.tolist() == indices


@settings(deadline=None)
@given(
    indices=st.lists(st.integers(0, 19), min_size=1, max_size=40),
    width=st.integers(1, 20),
    in_file=st.booleans(),
)
def test_rows_come_from_memory_and_from_a_file_alike(indices, width, in_file):
    values = np.random.default_rng(width).integers(0, 256, (20, width), dtype=np.uint8)
    column = (FileColumn if in_file else MemoryColumn)(20, (width,), torch.uint8)
    for start in range(0, 20, 7):
        column.append(values[start : start + 7])
    out = torch.empty(len(indices), width + 3)[:, :width]
    column.gather(torch.tensor(indices), out)
    assert torch.equal(out, torch.from_numpy(values[indices]).float())
    with pytest.raises(IndexError):
        column.gather(torch.tensor([20]), out[:1])
    with pytest.raises(IndexError):
        column.gather(torch.tensor([3, -1]), out[:2] if len(out) > 1 else torch.empty(2, width))


def test_targets():
    x = np.zeros((4, 2), np.float32)
    classes = open_dataset((x, np.array([True, False, True, True])))
    assert (classes.target_dtype, classes.num_classes) == (torch.int64, 2)
    regression = open_dataset((x, np.linspace(0, 1, 4)))
    assert (regression.target_dtype, regression.num_classes) == (torch.float32, None)
    vectors = open_dataset((x, np.ones((4, 3), np.float64)))
    assert (vectors.target_shape, vectors.target_dtype) == ((3,), torch.float32)
    tokens = open_dataset((x, np.array([[1, -100], [2, 7], [0, 0], [3, 3]], np.int32)))
    assert (tokens.target_shape, tokens.num_classes) == ((2,), 8)
    assert read(tokens)[1][0].tolist() == [1, -100]


def test_what_cannot_be_packed_is_refused_in_one_line(tmp_path):
    x = np.ones((5000, 300), np.float32)
    y = np.zeros(5000, np.int64)
    for bad, name in ((np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")):
        spoiled = x.copy()
        spoiled[4321, 7] = bad
        assert f"{name} in sample 4321" in refused((spoiled, y))
    huge = x.astype(np.float64)
    huge[2, 2] = 1e300
    assert "1e+300 in sample 2" in refused((huge, y))
    assert "sample 3" in refused((x[:4], np.array([0, 0, 0, np.nan])))
    assert "-1 for sample 4999" in refused((x, np.where(np.arange(5000) == 4999, -1, 0)))
    masks = open_dataset((x[:2], np.array([[0, -100], [-5, 0]])))  # The loss knows what it skips.
    assert masks.labels == {0: 0, -100: 0, -5: 1}
    assert "5000 samples and 4999 targets" in refused((x, y[:-1]))
    assert "at least 1 sample" in refused((x[:0], y[:0]))
    assert "real numbers" in refused((np.array([object()] * 3), y[:3]))
    assert "real numbers" in refused((np.array(["a", "b"]), y[:2]))
    assert "real numbers" in refused((np.ones(2, complex), y[:2]))
    assert "at least 1" in refused((np.ones((3, 0)), y[:3]))
    assert "2**63" in refused((np.full(2, 2**64 - 1, np.uint64), y[:2]))
    assert "first dimension" in refused((np.array(1.0), y))
    assert "NumPy array or a torch tensor" in refused(([[1.0]], [0]))
    assert "pair (X, Y)" in refused(x)
    assert "pair (X, Y)" in refused((x, y, y))
    assert "paths" not in refused(object())
    assert "masked" in refused((np.ma.masked_equal(x, 1), y))
    assert "dense" in refused((torch.eye(3).to_sparse(), y[:3]))
    assert "at least 1" in refused((x, y), num_samples=0)
    assert "at most the 5000" in refused((x, y), num_samples=5001)
    assert "train or test" in refused((x, y), split="valid")
    assert "does not exist" in refused(tmp_path / "nothing.npz")
    assert "does not exist" in refused(str(tmp_path / "nothing"))
    (tmp_path / "data.xml").write_text("1,2\n")
    assert "no known kind" in refused(tmp_path / "data.xml")
    assert "IDX files" in refused(tmp_path)


def test_a_full_disk_is_one_line(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        text = refused(
            (np.zeros((30_000, 100), np.uint8), np.zeros(30_000, np.int64)),
            mmap_above_bytes=0,
            storage_folder=tmp_path,
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "could not be written" in text
    assert str(tmp_path) in text
    assert list(tmp_path.iterdir()) == []


def test_a_storage_folder_that_is_none_is_one_line(tmp_path):
    with pytest.raises(StorageError, match="could not be written"):
        open_dataset(
            (np.ones((2, 2)), LABELS[:2]), mmap_above_bytes=0, storage_folder=tmp_path / "no"
        )


def test_a_file_that_shrinks_is_noticed():
    column = FileColumn(10, (4,), torch.float32)
    column.append(np.ones((9, 4), np.float32))
    with pytest.raises(StorageError, match="144 of 160 bytes"):
        column.gather(torch.arange(10), torch.empty(10, 4))


def test_views_share_storage_and_close_apart():
    data = open_dataset((np.arange(12, dtype=np.float32).reshape(6, 2), LABELS), num_samples=5)
    assert open_dataset(data) is data
    few = open_dataset(data, num_samples=3, transforms=[Normalize(1.0, 2.0)])
    assert "first 3 of" in few.description
    data.close()
    data.close()
    assert torch.equal(read(few)[0], (torch.arange(6.0).reshape(3, 2) - 1) / 2)
    with pytest.raises(DataError, match="closed"):
        read(data, [0])
    assert "between 1 and 3" in refused(few, num_samples=4)


def test_outputs_of_another_shape_or_type_are_refused():
    data = open_dataset((np.ones((6, 2)), LABELS))
    x, y, two = torch.empty(2, 2), torch.empty(2, dtype=torch.int64), torch.arange(2)
    data.gather(two, x, y)
    for wrong in ((x[:1], y), (x.double(), y), (x, y.float()), (x, y[:, None])):
        with pytest.raises(DataError, match="of shape"):
            data.gather(two, *wrong)


@pytest.mark.parametrize("shape", [(3, 3), (5,), (1, 7, 3)])
def test_batches_are_contiguous_as_a_loader_gives_them_and_padded_rows_can_be_written_too(shape):
    data = open_dataset((np.full((6, *shape), 51, np.uint8), LABELS))
    with MemoryPool(data.layouts(4), 2) as pool:
        for count in (4, 3):
            buffer = pool.acquire()
            buffer.num_rows = count
            x, y = buffer.rows()
            assert x.is_contiguous()
            assert x.data_ptr() % 64 == 0
            data.gather(torch.arange(count), x, y)
            assert torch.equal(x, torch.full((count, *shape), 51.0) / 255)
    numel = x[0].numel()
    wide = torch.full((4, numel + 3), 9.0)
    data.gather(torch.arange(4), wide[:, :numel].unflatten(1, shape), y.new_empty(4))
    assert torch.equal(wide[:, :numel], torch.full((4, numel), 51.0) / 255)
    assert (wide[:, numel:] == 9.0).all()


def test_the_normalization_of_bytes_is_that_of_torchvision():
    pixels = np.arange(256, dtype=np.uint8).reshape(2, 1, 8, 16)
    data = open_dataset((pixels, LABELS[:2]), transforms=[Normalize(0.1307, 0.3081)])
    exact = (torch.from_numpy(pixels).double() / 255 - 0.1307) / 0.3081
    assert (read(data)[0] - exact).abs().max() < 1e-6
    plain = open_dataset((pixels, LABELS[:2]))
    assert torch.equal(read(plain)[0], torch.from_numpy(pixels).float().div(255))
