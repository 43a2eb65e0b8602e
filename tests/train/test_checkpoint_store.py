"""Saving, finding, keeping and replacing checkpoints on a disk that works; bad arguments."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, load_model

from hotloop.errors import CheckpointError, PlanError, StorageError
from hotloop.train import tensor_file
from hotloop.train.checkpoint import CheckpointStore
from hotloop.train.encode import join_state, split_state
from support import examples
from support.checkpoint_samples import QuickFiles


def raw(tensor):
    plain = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    return bytes(plain.flatten().view(torch.uint8).numpy())


def assert_same(found, expected):
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert raw(found[name]) == raw(tensor.resolve_conj().resolve_neg()), name


def state_at(step):
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"weight": torch.randn(3, 5, generator=generator), "steps": torch.tensor(step)},
        "rng": {"state": torch.randint(0, 255, (7,), generator=generator, dtype=torch.uint8)},
    }


def save(store, step):
    return store.save(step, tensors=state_at(step), document={"step": step, "note": "ä\ud800"})


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_comes_back(tmp_path):
    store = CheckpointStore(tmp_path / "not" / "there" / "yet")
    assert store.latest() is None
    path = save(store, 123)
    assert path == tmp_path / "not" / "there" / "yet" / "step-000000123"
    assert names(path) == ["document.json", "manifest.json", "model.safetensors", "rng.safetensors"]
    found = CheckpointStore(store.folder).latest()
    assert (found.step, found.path, found.skipped) == (123, path, ())
    assert found.document == {"step": 123, "note": "ä\ud800"}
    for group, tensors in state_at(123).items():
        assert_same(found.tensors[group], tensors)


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-0000000001").mkdir()
    (tmp_path / "notes.txt").write_text("step-000000001")
    assert CheckpointStore(tmp_path).latest() is None


@pytest.mark.parametrize("keep_last", [1, 3])
def test_the_last_are_kept(tmp_path, keep_last):
    store = CheckpointStore(tmp_path, keep_last=keep_last)
    (tmp_path / "notes.txt").write_text("mine")
    for step in range(0, 50, 10):
        save(store, step)
        assert store.not_removed == ()
    kept = [f"step-{step:09d}" for step in range(0, 50, 10)][-keep_last:]
    assert names(tmp_path) == ["notes.txt", *kept]
    assert store.latest().step == 40


def test_steps_too_large_for_nine_digits_still_count(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 999_999_999)
    save(store, 1_000_000_000)
    assert store.latest().step == 1_000_000_000


def test_a_step_saved_again_replaces_itself(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2)
    save(store, 10)
    save(store, 20)
    again = store.save(20, tensors={"model": {"weight": torch.zeros(2)}}, document={"second": True})
    assert names(tmp_path) == ["step-000000010", again.name]
    assert again.name == "step-000000020.1"
    found = store.latest()
    assert (found.step, found.path, found.document) == (20, again, {"second": True})
    third = store.save(20, tensors={}, document={})
    assert names(tmp_path) == ["step-000000010", third.name]
    assert store.latest().tensors == {}


def test_a_checkpoint_of_an_earlier_step_is_not_removed_by_its_own_save(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=1)
    save(store, 30)
    path = save(store, 20)
    assert path.is_dir()
    assert store.latest().step == 30


def test_damaged_ones_do_not_push_out_the_last_good_one(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2)
    for step in (1, 2):
        save(store, step)
    for step in (3, 4):
        path = save(CheckpointStore(tmp_path, keep_last=9), step)
        (path / "model.safetensors").unlink()
    assert store.latest().step == 2
    save(store, 5)
    assert [
        name for name in names(tmp_path) if (tmp_path / name / "model.safetensors").exists()
    ] == [
        "step-000000002",
        "step-000000005",
    ]
    save(store, 6)
    assert names(tmp_path) == ["step-000000005", "step-000000006"]


def test_a_bit_that_only_the_checksum_shows_counts_as_damage_once_seen(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=1)
    save(store, 1)
    damaged = save(CheckpointStore(tmp_path, keep_last=2), 2)
    data = bytearray((damaged / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(data)
    found = store.latest()
    assert found.step == 1
    assert found.skipped == (f"{damaged}: model.safetensors does not match its sha256.",)
    assert damaged.is_dir()
    save(store, 3)
    assert names(tmp_path) == ["step-000000003"]


dtypes = st.sampled_from(sorted(tensor_file.DTYPE_NAMES, key=str))
shapes = st.lists(st.integers(0, 4), max_size=4)


@st.composite
def drawn_tensors(draw):
    shape = draw(shapes)
    dtype = draw(dtypes)
    base = torch.randint(0, 2, (*shape, 3), generator=torch.Generator().manual_seed(5)).to(dtype)
    tensor = base[..., 1] if draw(st.booleans()) else base[..., 0].clone()
    if tensor.ndim and draw(st.booleans()):
        tensor = tensor.transpose(0, -1)
    if dtype == torch.complex64 and draw(st.booleans()):
        tensor = (tensor + 1j).conj()
    return tensor


@settings(
    max_examples=examples(80),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    group=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])), drawn_tensors(), max_size=5
    )
)
def test_any_tensors_are_read_by_the_safetensors_library(tmp_path, group):
    group.pop("__metadata__", None)
    store = CheckpointStore(tmp_path, keep_last=1, files=QuickFiles())
    path = store.save(1, tensors={"g": group}, document={}) / "g.safetensors"
    assert_same(store.latest().tensors["g"], group)
    assert_same(load_file(path), group)
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == sorted(group)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert length % 8 == 0


def test_tensors_larger_than_a_chunk_are_written_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "CHUNK_BYTES", 64)
    group = {
        "straight": torch.arange(1000.0),
        "crossed": torch.arange(600.0).reshape(20, 30).t(),
        "wide rows": torch.arange(600.0).reshape(300, 2).t(),
        "channels last": torch.arange(480.0)
        .reshape(2, 3, 8, 10)
        .to(memory_format=torch.channels_last),
        "spread": torch.ones(1).expand(100),
    }
    store = CheckpointStore(tmp_path)
    store.save(1, tensors={"g": group}, document={})
    found = store.latest().tensors["g"]
    assert_same(found, group)
    assert all(tensor.is_contiguous() for tensor in found.values())


def test_memory_to_save_is_predicted():
    straight = torch.zeros(5000, 1000)
    assert tensor_file.extra_bytes({}) == 0
    assert tensor_file.extra_bytes({"a": straight}) == 0
    assert tensor_file.extra_bytes({"a": straight.t()}) == tensor_file.CHUNK_BYTES
    assert tensor_file.extra_bytes({"a": straight[:, :10]}) == 5000 * 10 * 4
    one_row = straight.t().unsqueeze(0)
    assert tensor_file.extra_bytes({"a": one_row}) == 5000 * 1000 * 4


def test_large_files_are_mapped_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "MAPPED_BYTES", 100)
    group = {f"w{index}": torch.full((index, 7), float(index)) for index in range(20)}
    store = CheckpointStore(tmp_path)
    store.save(1, tensors={"g": group, "none": {}}, document={})
    assert_same(store.latest().tensors["g"], group)
    assert store.latest().tensors["none"] == {}


def test_loaded_tensors_do_not_hang_on_the_file(tmp_path):
    store = CheckpointStore(tmp_path)
    path = save(store, 1) / "model.safetensors"
    tensors = store.latest().tensors["model"]
    path.write_bytes(bytes(path.stat().st_size))
    assert_same(tensors, state_at(1)["model"])


def test_tied_weights_are_stored_once_and_tied_again(tmp_path):
    weight = torch.nn.Parameter(torch.randn(10, 4))
    half = weight[:5]
    state = {"embed": weight, "head": weight, "half": half, "again": weight.detach()}
    state |= {"format": torch.ones(2), "empty": torch.empty(0), "also empty": torch.empty(0)}
    store = CheckpointStore(tmp_path)
    path = store.save(1, tensors={"model": state}, document={}) / "model.safetensors"
    assert sorted(load_file(path)) == ["also empty", "embed", "empty", "format", "half"]
    found = store.latest().tensors["model"]
    assert_same(found, state)
    assert found["embed"] is found["head"] is found["again"]
    assert found["half"].data_ptr() != found["embed"].data_ptr()


class TiedModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(10, 4)
        self.head = torch.nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight


def test_the_library_loads_a_tied_model_from_the_file(tmp_path):
    model, other = TiedModel(), TiedModel()
    store = CheckpointStore(tmp_path)
    path = store.save(1, tensors={"model": model.state_dict()}, document={}) / "model.safetensors"
    load_model(other, path)
    assert torch.equal(other.head.weight, model.embed.weight)
    other.load_state_dict(store.latest().tensors["model"])
    assert other.head.weight is other.embed.weight


def test_a_training_state_resumes_through_the_store(tmp_path):
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    tensors, document = split_state(optimizer.state_dict())
    store = CheckpointStore(tmp_path)
    store.save(
        1,
        tensors={"model": model.state_dict(), "optimizer": tensors},
        document={"optimizer": document},
    )
    found = store.latest()
    state = join_state(found.tensors["optimizer"], found.document["optimizer"])
    assert state["param_groups"] == optimizer.state_dict()["param_groups"]
    for index, moments in optimizer.state_dict()["state"].items():
        assert_same(state["state"][index], moments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, "whole number; got -1"),
        ({"step": True}, "whole number; got True"),
        ({"step": 10**18}, "whole number"),
        ({"tensors": {"../evil": {}}}, "letters, digits"),
        ({"tensors": {"": {}}}, "letters, digits"),
        ({"tensors": {"a": {"w": 5}}}, "'w' in group 'a' of type int"),
        ({"tensors": {"a": {5: torch.ones(1)}}}, "must be a Unicode text"),
        ({"tensors": {"a": {"\ud800": torch.ones(1)}}}, "must be a Unicode text"),
        ({"tensors": {"a": {"__metadata__": torch.ones(1)}}}, "__metadata__"),
        ({"tensors": {"a": {"w": torch.ones(1, device="meta")}}}, "on meta"),
        ({"tensors": {"a": {"w": torch.ones(2, 2).to_sparse()}}}, "sparse"),
        ({"tensors": {"a": {"w": torch.ones(1, dtype=torch.complex128)}}}, "complex128"),
        ({"document": {"a": [{"b": float("nan")}]}}, r"nan at document\.a\.0\.b"),
        ({"document": {"a": {5: 1}}}, r"dict at document\.a"),
        ({"document": {"a": (1, 2)}}, r"tuple at document\.a"),
        ({"document": {"a": torch.ones(1)}}, r"Tensor at document\.a"),
        ({"document": {"a": 2**63}}, r"9223372036854775808 at document\.a"),
        ({"document": [1]}, "must be a mapping"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path, change, message):
    arguments = {"step": 1, "tensors": {}, "document": {}} | change
    with pytest.raises(CheckpointError, match=message) as caught:
        CheckpointStore(tmp_path / "new").save(
            arguments["step"], tensors=arguments["tensors"], document=arguments["document"]
        )
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == []


def test_documents_that_nest_without_end_or_are_huge_are_refused(tmp_path, monkeypatch):
    loop = []
    loop.append(loop)
    store = CheckpointStore(tmp_path)
    with pytest.raises(CheckpointError, match="256 levels"):
        store.save(1, tensors={}, document={"a": loop})
    monkeypatch.setattr("hotloop.train.manifest.MAX_DOCUMENT_BYTES", 100)
    with pytest.raises(CheckpointError, match="at most 100 bytes"):
        store.save(1, tensors={}, document={"a": "x" * 100})


def test_at_least_one_checkpoint_is_kept(tmp_path):
    with pytest.raises(PlanError, match="keep_last must be at least 1; got 0"):
        CheckpointStore(tmp_path, keep_last=0)


def test_a_file_where_the_folder_should_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StorageError, match="choose a path that is no file") as caught:
            save(CheckpointStore(folder), 1)
        assert "\n" not in str(caught.value)
    with pytest.raises(StorageError, match="readable"):
        CheckpointStore(tmp_path / "file").latest()


def test_a_store_stays_where_it_was_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = CheckpointStore("runs")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert save(store, 1).parent == tmp_path / "runs"


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def leftover(folder, pid):
    path = folder / f".tmp-{pid}-0123456789abcdef"
    path.mkdir()
    (path / "model.safetensors").write_bytes(b"half")
    return path


def test_what_dead_writers_left_is_removed_by_the_next_save_only(tmp_path):
    dead, own = leftover(tmp_path, dead_pid()), leftover(tmp_path, os.getpid())
    alive = leftover(tmp_path, os.getppid())
    foreign = tmp_path / ".tmp-notes"
    foreign.mkdir()
    store = CheckpointStore(tmp_path)
    assert store.latest() is None
    assert dead.exists()
    save(store, 1)
    assert not dead.exists()
    assert not own.exists()
    assert alive.exists()
    assert foreign.exists()


def test_a_writer_of_another_pid_space_is_known_by_its_lock(tmp_path):
    """Two containers may both call themselves process 7; the lock tells them apart."""
    path = leftover(tmp_path, dead_pid())
    store = CheckpointStore(tmp_path)
    fd = store._files.open_folder(path)
    store._files.lock(fd)
    save(store, 1)
    assert path.exists()
    os.close(fd)
    save(store, 2)
    assert not path.exists()


def test_the_manifest_lists_sizes_and_checksums(tmp_path):
    path = save(CheckpointStore(tmp_path), 4)
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"], manifest["step"]) == (
        "hotloop checkpoint",
        1,
        4,
    )
    sums = subprocess.run(
        ["sha256sum", *manifest["files"]], cwd=path, capture_output=True, text=True, check=True
    ).stdout
    assert dict(reversed(line.split()) for line in sums.splitlines()) == {
        name: record["sha256"] for name, record in manifest["files"].items()
    }
    for name, record in manifest["files"].items():
        assert (path / name).stat().st_size == record["size_bytes"]
