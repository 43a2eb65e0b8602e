"""Bytes that changed after they were written, and manifests made by another hand."""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as safetensors_bytes

from hotloop.errors import CheckpointError
from hotloop.train.checkpoint import CheckpointStore
from hotloop.train.encode import join_state, split_state
from support import examples
from support.checkpoint_samples import sample, save_sample, variant_of

FILES = ["model.safetensors", "optimizer.safetensors", "document.json", "manifest.json"]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine")
    for step in (1, 2):
        save_sample(CheckpointStore(folder), step)
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    shutil.copytree(pristine, tmp_path / "run")
    return tmp_path / "run"


def newest(folder):
    return folder / "step-000000002"


def assert_the_one_before_is_used(folder, expected=""):
    found = CheckpointStore(folder).latest()
    assert variant_of(found) == (1, "a")
    (line,) = found.skipped
    assert line.startswith(f"{newest(folder)}: ")
    assert expected in line
    assert "\n" not in line
    assert newest(folder).exists()


@settings(
    max_examples=examples(80),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(name=st.sampled_from(FILES), place=st.floats(0, 1, exclude_max=True), data=st.data())
def test_any_changed_byte_is_seen(folder, name, place, data):
    path = newest(folder) / name
    good = path.read_bytes()
    position = int(place * len(good))
    damage = data.draw(st.sampled_from(["flip", "cut", "grow", "insert", "zeros", "lose"]))
    if damage == "flip":
        bit = data.draw(st.integers(0, 7))
        bad = bytearray(good)
        bad[position] ^= 1 << bit
    elif damage == "cut":
        bad = good[:position]
    elif damage == "grow":
        bad = good + data.draw(st.sampled_from([b"\0", b" ", b"\n", good]))
    elif damage == "insert":
        bad = good[:position] + data.draw(st.sampled_from([b" ", b"\n", b"0"])) + good[position:]
    elif damage == "zeros":
        bad = bytes(len(good))
    else:
        bad = None
    try:
        path.unlink() if bad is None else path.write_bytes(bad)
        assert_the_one_before_is_used(folder)
    finally:
        path.write_bytes(good)


def test_every_single_bit_of_the_manifest_counts(folder):
    path = newest(folder) / "manifest.json"
    good = path.read_bytes()
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 1 << position % 8
        path.write_bytes(bad)
        assert_the_one_before_is_used(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_checkpoint_is_seen(folder, name):
    shutil.copy(folder / "step-000000001" / name, newest(folder) / name)
    assert_the_one_before_is_used(folder)


def test_a_whole_checkpoint_under_another_name_is_seen(folder):
    shutil.rmtree(newest(folder))
    shutil.copytree(folder / "step-000000001", newest(folder))
    assert_the_one_before_is_used(folder, "the manifest must be of step 2; got 1")


def test_with_all_damaged_the_error_is_one_line(folder):
    for path in folder.iterdir():
        (path / "document.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"all 2 are damaged; got .*document") as caught:
        CheckpointStore(folder).latest()
    assert "\n" not in str(caught.value)
    assert len(list(folder.iterdir())) == 2


def test_all_damaged_ones_that_are_newer_are_reported(folder):
    store = CheckpointStore(folder)
    for step in (3, 4):
        (save_sample(CheckpointStore(folder, keep_last=9), step) / "manifest.json").unlink()
    found = store.latest()
    assert variant_of(found) == (2, "a")
    assert [Path(line.split(": ")[0]).name for line in found.skipped] == [
        "step-000000004",
        "step-000000003",
    ]


def forge(folder, change=None, files=None):
    """Rewrite the newest manifest with its checksum right, as a careful liar would."""
    for name, data in (files or {}).items():
        (newest(folder) / name).write_bytes(data)
    path = newest(folder) / "manifest.json"
    body = json.loads(path.read_bytes())
    del body["sha256"]
    for name, data in (files or {}).items():
        digest = hashlib.sha256(data).hexdigest()
        body["files"][name] = {"size_bytes": len(data), "sha256": digest}
    if change is not None:
        change(body)
    text = json.dumps(body, indent=1) + "\n"
    body["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(body, indent=1) + "\n")


def test_a_forged_manifest_passes_where_it_tells_the_truth(folder):
    """The forgeries below must fail for what they say, not for how they are made."""
    forge(folder, files={"document.json": (newest(folder) / "document.json").read_bytes()})
    assert variant_of(CheckpointStore(folder).latest()) == (2, "a")


def listing(name):
    def change(body):
        body["files"][name] = body["files"]["model.safetensors"]
        body["files"] = dict(sorted(body["files"].items()))

    return change


def record(key, value):
    def change(body):
        body["files"]["model.safetensors"][key] = value

    return change


def field(key, value):
    return lambda body: body.update({key: value})


def without(name):
    return lambda body: body["files"].pop(name)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (listing("../step-000000001/model.safetensors"), "letters, digits"),
        (listing("/etc/model.safetensors"), "letters, digits"),
        (listing("a/b.safetensors"), "letters, digits"),
        (listing(".safetensors"), "letters, digits"),
        (listing("a\0.safetensors"), "letters, digits"),
        (listing("x" * 65 + ".safetensors"), "letters, digits"),
        (listing("/etc/passwd"), "no known kind"),
        (listing("evil.py"), "no known kind"),
        (listing(""), "no known kind"),
        (without("document.json"), "must list document.json"),
        (record("size_bytes", -1), "size and a sha256"),
        (record("size_bytes", 2**62), "must have 4611686018427387904 bytes"),
        (record("size_bytes", True), "size and a sha256"),
        (record("size_bytes", 1.5), "size and a sha256"),
        (record("size_bytes", None), "size and a sha256"),
        (record("sha256", "0" * 64), "does not match its sha256"),
        (record("sha256", "../" * 22), "64 hexadecimal"),
        (record("sha256", 5), "size and a sha256"),
        (record("mode", "rwx"), "cannot be read"),
        (field("version", 2), "version 1; got 2"),
        (field("version", "1"), "must be of a hotloop checkpoint"),
        (field("format", "pickle"), "must be of a hotloop checkpoint"),
        (field("step", "2"), "whole number"),
        (field("step", -2), "whole number"),
        (field("files", []), "cannot be read"),
        (field("files", {"document.json": 5}), "cannot be read"),
        (field("comment", "hello"), "own sha256"),
    ],
)
def test_a_manifest_made_by_another_hand_is_refused(folder, change, expected):
    forge(folder, change)
    assert_the_one_before_is_used(folder, expected)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"format": "hotloop checkpoint"}',
        b"5",
    ],
)
def test_a_manifest_that_is_no_manifest_is_refused(folder, data):
    (newest(folder) / "manifest.json").write_bytes(data)
    assert_the_one_before_is_used(folder)


def test_a_huge_manifest_or_document_is_not_read(folder):
    with (newest(folder) / "manifest.json").open("r+b") as file:
        file.truncate(2**40)
    assert_the_one_before_is_used(folder, "the manifest is too large; got 1099511627776 bytes")


def test_a_document_larger_than_any_written_is_not_parsed(folder, monkeypatch):
    monkeypatch.setattr("hotloop.train.manifest.MAX_DOCUMENT_BYTES", 10)
    with pytest.raises(CheckpointError, match=r"document\.json is too large"):
        CheckpointStore(folder).latest()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"[]", "must be a JSON object"),
        (b"{", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
    ],
)
def test_a_document_of_another_shape_is_refused(folder, data, expected):
    forge(folder, files={"document.json": data})
    assert_the_one_before_is_used(folder, expected)


class Bomb:
    def __reduce__(self):
        return os.abort, ()


def header(entries, body=b""):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + body


TIED_TO_NOTHING = header(
    {
        "__metadata__": {"head": "embed"},
        "w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
    },
    b"\0",
)


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(Bomb()),
        b"",
        b"\0" * 8,
        b"\xff" * 64,
        (10**6).to_bytes(8, "little") + b"{}",
        header({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}}, b"\0" * 4),
        header({"w": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}),
        header({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"\0" * 8),
        header({"w": {"dtype": "OBJECT", "shape": [1], "data_offsets": [0, 8]}}, b"\0" * 8),
        TIED_TO_NOTHING,
    ],
)
def test_a_tensor_file_that_is_none_is_refused_though_its_checksum_holds(folder, data):
    forge(folder, files={"model.safetensors": data})
    assert_the_one_before_is_used(folder)


def test_loading_never_unpickles(folder, monkeypatch):
    def unpickle(*args, **kwargs):
        raise AssertionError("pickle on the load path")

    for module in (pickle, torch.serialization.pickle):
        for name in ("load", "loads", "Unpickler"):
            monkeypatch.setattr(module, name, unpickle)
    monkeypatch.setattr(torch, "load", unpickle)
    found = CheckpointStore(folder).latest()
    assert variant_of(found) == (2, "a")
    tensors, document = split_state({"lr": (0.1, float("inf")), "moments": {0: torch.ones(2)}})
    assert join_state(tensors, document)["lr"] == (0.1, float("inf"))


def test_a_safetensors_file_of_the_library_is_read(folder):
    forge(folder, files={"model.safetensors": safetensors_bytes(sample(2)["tensors"]["model"])})
    assert variant_of(CheckpointStore(folder).latest()) == (2, "a")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_only_plain_files_are_read(folder, name, kind):
    path = newest(folder) / name
    if kind == "link":
        path.rename(folder / name)
        path.symlink_to(folder / name)
    else:
        path.unlink()
        os.mkfifo(path) if kind == "fifo" else path.mkdir()
    assert_the_one_before_is_used(folder)


def test_only_a_folder_is_a_checkpoint(folder):
    newest(folder).rename(folder / "moved")
    newest(folder).symlink_to(folder / "moved")
    assert_the_one_before_is_used(folder, "must be a folder")
    newest(folder).unlink()
    newest(folder).write_bytes(b"")
    assert_the_one_before_is_used(folder, "must be a folder")
