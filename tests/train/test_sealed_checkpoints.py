"""Sealed checkpoints: the same bits, none that is damaged, and none that is older."""

import random
import shutil

import pytest
import torch

from hotloop.errors import CheckpointError, InputError, StorageError
from hotloop.sealed import FileCounter, Sealed, SealingKey, unseal
from hotloop.train.checkpoint import CheckpointStore
from support.checkpoint_samples import QuickFiles, save_sample, variant_of
from support.data_sources import arrays, make_trainer
from support.sealing import damaged

pytest.importorskip("cryptography", reason="pip install 'hotloop[enclave]'")

KEY = SealingKey(bytes(range(32)))


@pytest.fixture
def counter(tmp_path):
    made = FileCounter(tmp_path / "counter")
    made.create()
    return made


def store_of(tmp_path, counter=None, key=KEY, files=None, keep_last=2):
    place = Sealed(tmp_path / "run", key, counter=counter)
    return CheckpointStore(place, files=files or QuickFiles(), keep_last=keep_last)


def test_it_comes_back_and_old_ones_go(tmp_path, counter):
    store = store_of(tmp_path, counter)
    assert store.latest() is None
    for step in range(1, 5):
        save_sample(store, step)
    assert variant_of(store_of(tmp_path, counter).latest()) == (4, "a")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "step-000000003",
        "step-000000004",
    ]
    assert counter.read() == 4
    names = {p.name for p in (tmp_path / "run" / "step-000000004").iterdir()}
    assert all(name.endswith(".sealed") for name in names)


def test_tied_names_empty_and_odd_tensors_come_back(tmp_path):
    store = store_of(tmp_path)
    weight = torch.randn(300, 1000)
    tensors = {"a": weight, "b": weight, "none": torch.empty(0, 3), "one": torch.tensor(True),
               "turned": torch.randn(5, 7).t(), "half": torch.randn(3).bfloat16()}  # fmt: skip
    store.save(1, tensors={"model": tensors}, document={})
    found = store.latest().tensors["model"]
    assert found["a"] is found["b"]
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype


def test_the_owner_opens_it(tmp_path):
    save_sample(store_of(tmp_path), 3)
    (tmp_path / "plain").mkdir()
    unseal(tmp_path / "run" / "step-000000003", tmp_path / "plain" / "step-000000003", KEY)
    assert variant_of(CheckpointStore(tmp_path / "plain").latest()) == (3, "a")


def test_an_older_one_is_found(tmp_path, counter):
    store = store_of(tmp_path, counter)
    save_sample(store, 1)
    shutil.copytree(tmp_path / "run", tmp_path / "kept")
    save_sample(store, 2)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(CheckpointError, match="counted, 2"):
        store_of(tmp_path, counter).latest()
    (tmp_path / "kept").rename(tmp_path / "run")
    with pytest.raises(CheckpointError, match="older one was put"):
        store_of(tmp_path, counter).latest()
    assert variant_of(store_of(tmp_path).latest()) == (1, "a"), "without a counter nobody knows"


def test_a_damaged_newest_one_does_not_let_an_older_one_in(tmp_path, counter):
    store = store_of(tmp_path, counter)
    save_sample(store, 1)
    newest = save_sample(store, 2)
    (newest / "document.json.sealed").write_bytes(b"")
    with pytest.raises(CheckpointError, match="what is newer is damaged"):
        store_of(tmp_path, counter).latest()
    assert variant_of(store_of(tmp_path).latest()) == (1, "a")


def test_a_save_that_ends_before_the_counter_follows_is_accepted_and_counted(tmp_path, counter):
    class Broken(FileCounter):
        def advance(self, number):
            raise StorageError("the counter is away")

    save_sample(store_of(tmp_path, counter), 1)
    store = store_of(tmp_path, Broken(counter.path))
    with pytest.raises(StorageError, match="away"):
        save_sample(store, 2)
    assert counter.read() == 1
    assert variant_of(store_of(tmp_path, counter).latest()) == (2, "a")
    assert counter.read() == 2


def test_files_of_two_checkpoints_are_not_mixed(tmp_path):
    store = store_of(tmp_path)
    first, second = save_sample(store, 1), save_sample(store, 2)
    shutil.copy(first / "model.safetensors.sealed", second)
    found = store_of(tmp_path).latest()
    assert variant_of(found) == (1, "a")
    assert "does not verify" in found.skipped[0]


def test_another_key_no_key_and_plain_checkpoints(tmp_path):
    save_sample(store_of(tmp_path), 1)
    with pytest.raises(CheckpointError, match="another key"):
        store_of(tmp_path, key=SealingKey(bytes(32))).latest()
    with pytest.raises(CheckpointError, match="pass its key"):
        CheckpointStore(tmp_path / "run").latest()
    save_sample(CheckpointStore(tmp_path / "plain", files=QuickFiles()), 1)
    with pytest.raises(CheckpointError, match="must be a sealed folder"):
        CheckpointStore(Sealed(tmp_path / "plain", KEY)).latest()


def test_a_counter_that_is_missing_stops_the_run(tmp_path):
    store = store_of(tmp_path, FileCounter(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="counter new"):
        save_sample(store, 1)
    assert not (tmp_path / "run").exists()


def damage(tmp_path, count, seed):
    draw = random.Random(seed)
    paths = [save_sample(store_of(tmp_path), step) for step in (1, 2)]
    names = sorted(p.name for p in paths[1].iterdir())
    done = 0
    for _ in range(count):
        name = draw.choice(names)
        other, data = ((path / name).read_bytes() for path in paths)
        changed = damaged(data, other, draw)
        if changed == data:
            continue
        (paths[1] / name).write_bytes(changed)
        done += 1
        found = store_of(tmp_path).latest()
        assert variant_of(found) == (1, "a")
        assert len(found.skipped) == 1
        assert "\n" not in found.skipped[0]
        (paths[1] / name).write_bytes(data)
    assert variant_of(store_of(tmp_path).latest()) == (2, "a")
    return done


def test_a_damaged_one_is_left_for_the_one_before(tmp_path):
    assert damage(tmp_path, 150, 1) > 100


@pytest.mark.full
def test_3_000_damaged_ones(tmp_path):
    assert damage(tmp_path, 3_000, 2) > 2_500


class Failing(QuickFiles):
    """The n-th write or sync fails."""

    def __init__(self, left):
        self.left = left

    def _count(self):
        self.left -= 1
        if self.left < 0:
            raise OSError(28, "No space left on device")

    def create(self, path):
        self._count()
        return super().create(path)

    def write(self, fd, data):
        self._count()
        return super().write(fd, data[: max(1, len(data) // 2)])

    def fsync(self, fd):
        self._count()


def _fails_in_one_line(store):
    try:
        save_sample(store, 2)
    except StorageError as error:
        return "No space left" in str(error) and "\n" not in str(error)
    return False


def test_each_call_that_fails_leaves_the_one_before(tmp_path, counter):
    save_sample(store_of(tmp_path, counter), 1)
    left, failed = 0, True
    while failed:
        store = store_of(tmp_path, counter, files=Failing(left))
        failed, left = _fails_in_one_line(store), left + 1
        names = sorted(p.name for p in (tmp_path / "run").iterdir())
        if names[-1] == "step-000000002":  # Whole; what failed is the sync of its name.
            break
        assert names == ["step-000000001"]
        assert counter.read() == 1
    assert left > 40
    assert variant_of(store_of(tmp_path, counter).latest()) == (2, "a")


def test_a_run_resumes_from_it_with_the_same_bits(tmp_path, counter):
    x, y = arrays()
    whole, cut = make_trainer(), make_trainer()
    whole.fit((x, y), 8, 2, monitor=False)
    place = Sealed(tmp_path / "run", KEY, counter=counter)
    cut.fit((x, y), 8, 2, monitor=False, max_steps=5, checkpoint_dir=place)
    resumed = make_trainer()
    resumed.fit((x, y), 8, 2, monitor=False, checkpoint_dir=place, resume=True)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
