"""The kernel that copies rows: the bits of the plain path, for any layout, from any thread."""

import tempfile
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hotloop
from hotloop import kernels
from hotloop.data.rows import byte_table, copy_rows, read_rows
from hotloop.data.transforms import Normalize

if not kernels.is_available():
    pytest.skip(f"no kernels: {kernels.unavailable_reason()}", allow_module_level=True)


def from_memory(source, indices, out, table=None):
    return copy_rows(source, indices, out, table)


def from_file(source, indices, out, table=None):
    with tempfile.TemporaryFile() as file:
        file.write(source.numpy().tobytes())
        file.flush()
        return read_rows(file.fileno(), len(source), source.dtype, indices, out, table)


@pytest.mark.parametrize("move", [from_memory, from_file])
@given(
    st.integers(1, 30),
    st.lists(st.integers(1, 9), min_size=0, max_size=3),
    st.sampled_from([torch.uint8, torch.float32, torch.int64]),
    st.integers(0, 3),
    st.data(),
)
def test_rows_are_index_selects(move, count, shape, dtype, padding, data):
    source = torch.randint(0, 255, (count, *shape)).to(dtype)
    chosen = data.draw(st.lists(st.integers(0, count - 1), max_size=40))
    indices = torch.tensor(chosen, dtype=torch.int64)
    length = source[0].numel()
    room = torch.full((len(chosen), length + padding), 7, dtype=dtype)
    out = room[:, :length].unflatten(1, shape) if shape else room[:, 0]
    assert move(source, indices, out)
    assert torch.equal(out, source[indices])
    assert bool((room[:, max(length, 1) :] == 7).all())


@pytest.mark.parametrize("move", [from_memory, from_file])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("large", [False, True])
def test_bytes_become_the_values_that_two_passes_give(move, channels, large):
    shape = (channels, 33, 7)
    source = torch.randint(0, 256, (500 if large else 5, *shape), dtype=torch.uint8)
    scaling = Normalize(tuple(0.1 * (c + 1) for c in range(channels)), (0.3,) * channels)
    factor, offset = scaling.factor_and_offset(1 / 255)
    # At random, and in order, where several rows of a file are read at once.
    indices = torch.cat([torch.randperm(len(source)), torch.arange(len(source))])
    out = torch.empty(len(indices), *shape)
    assert move(source, indices, out, byte_table((factor, offset), shape))
    assert torch.equal(out, source[indices].float().mul_(factor).add_(offset))
    assert move(source, indices, out, byte_table(255.0, shape))
    assert torch.equal(out, source[indices].float().div_(255.0))


@pytest.mark.parametrize("move", [from_memory, from_file])
@pytest.mark.parametrize("bad", [-1, 4])
def test_an_index_outside_is_told_and_nothing_written(move, bad):
    out = torch.zeros(3, 2)
    with pytest.raises(IndexError, match=f"between 0 and 3.*got: {bad}"):
        move(torch.ones(4, 2), torch.tensor([0, bad, 1]), out)
    assert not out.any()


def test_a_file_that_fails_is_told(tmp_path):
    path = tmp_path / "rows"
    path.write_bytes(bytes(30))
    out, indices = torch.empty(4, 8, dtype=torch.uint8), torch.arange(4)
    with path.open("rb") as file, pytest.raises(EOFError):
        read_rows(file.fileno(), 4, torch.uint8, indices, out)
    with path.open("ab") as file, pytest.raises(OSError, match="Bad file descriptor"):
        read_rows(file.fileno(), 4, torch.uint8, indices, out)


def test_what_it_cannot_do_is_left_to_torch():
    source, indices = torch.ones(4, 6), torch.tensor([1, 2])
    assert not copy_rows(source.t(), indices, torch.empty(2, 4))
    assert not copy_rows(source, indices, torch.empty(2, 6, dtype=torch.float64))
    assert not copy_rows(source, indices, torch.empty(6, 2).t())
    # A factor for each pixel is no table of bytes.
    assert byte_table((torch.rand(6), torch.rand(6)), (2, 3)) is None


@pytest.mark.parametrize("move", [from_memory, from_file])
def test_rows_of_no_elements_are_none(move):
    assert move(torch.ones(4, 0), torch.tensor([1, 3]), torch.ones(2, 0))
    with pytest.raises(IndexError):
        move(torch.ones(4, 0), torch.tensor([4]), torch.ones(1, 0))


@pytest.mark.parametrize("above", [0, 1 << 30])
def test_a_dataset_gives_the_same_bits_with_and_without_it(monkeypatch, above):
    images = torch.randint(0, 256, (300, 1, 28, 28), dtype=torch.uint8).numpy()
    labels = torch.arange(300).numpy() % 10
    dataset = hotloop.data.open_dataset((images, labels), mmap_above_bytes=above)
    indices = torch.randperm(300)
    outs = []
    for available in (True, False):
        monkeypatch.setattr(kernels, "is_available", lambda available=available: available)
        x, y = torch.empty(300, 1, 28, 28), torch.empty(300, dtype=torch.int64)
        dataset.gather(indices, x, y, training=True)
        outs.append((x, y))
    assert torch.equal(outs[0][0], outs[1][0])
    assert torch.equal(outs[0][1], outs[1][1])


def test_several_threads_copy_at_once():
    source = torch.rand(2000, 784)
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(20):
            indices = torch.randint(0, 2000, (256,), generator=generator)
            out = torch.empty(256, 784)
            copy_rows(source, indices, out)
            if not torch.equal(out, source[indices]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
