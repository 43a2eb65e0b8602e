"""Damaged and crafted training exports: refused in one line, and never run out of their memory."""

import json
import random
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from hotloop import kernels
from hotloop.enclave.training import document as documents
from hotloop.enclave.training import export_training, load_training
from hotloop.errors import CheckpointError, ModelError
from hotloop.train import array_file
from support import FOLDER, THOROUGH, examples
from support.processes import environment

pytestmark = pytest.mark.skipif(
    not kernels.is_available(), reason=kernels.unavailable_reason() or ""
)


def model_of(name):
    torch.manual_seed(0)
    if name == "perceptron":
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.GELU(), nn.Linear(16, 4))
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(8, 4),
    )  # fmt: skip


@pytest.fixture(scope="module", params=["perceptron", "cnn"])
def export(request, tmp_path_factory):
    model = model_of(request.param)
    folder = tmp_path_factory.mktemp("exports") / request.param
    x, y = torch.randn(6, 1, 6, 6), torch.randint(4, (6,))
    optimizer = torch.optim.Adam(model.parameters())
    export_training(model, nn.CrossEntropyLoss(), optimizer, (x, y), folder)
    return folder


@pytest.fixture
def copied(export, tmp_path):
    shutil.copytree(export, tmp_path / "copy")
    return tmp_path / "copy"


def changed(folder, change):
    """The document with something else in it, and its sha256 right."""
    path = folder / documents.DOCUMENT
    body = json.loads(path.read_bytes())
    change(body)
    path.write_bytes(documents.to_bytes(body))


def test_every_flipped_byte_is_found(copied):
    draw = random.Random(0)
    for path in sorted(copied.iterdir()):
        data = path.read_bytes()
        for at in {0, len(data) - 1, *(draw.randrange(len(data)) for _ in range(examples(200)))}:
            bit = 1 << draw.randrange(8)
            path.write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
            with pytest.raises(ModelError) as refused:
                load_training(copied)
            assert "\n" not in str(refused.value)
        for cut in (0, 1, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:cut])
            with pytest.raises(ModelError):
                load_training(copied)
        path.write_bytes(data)
    load_training(copied)


def test_a_file_that_is_missing_is_named(copied):
    (copied / documents.MODEL_FILE).unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load_training(copied)


def instruction(body, entry):
    return next(i for i in body["programs"][0]["instructions"] if i["entry"] == entry)


def test_an_operand_outside_its_memory_is_refused(copied):
    def change(body):
        call = instruction(body, "hotloop_product")["call"]
        call["c"][1] = body["programs"][0]["arena_bytes"] - 4

    changed(copied, change)
    with pytest.raises(ModelError, match=r"hotloop_product: c: .* inside its memory"):
        load_training(copied)


@pytest.mark.parametrize(
    "entry", ["hotloop_torch_product", "hotloop_run_instructions", "system", 3]
)
def test_only_kernels_are_called(copied, entry):
    def change(body):
        instruction(body, "hotloop_product")["entry"] = entry

    changed(copied, change)
    with pytest.raises(ModelError, match="one of hotloop's kernels"):
        load_training(copied)


def test_an_update_without_its_states_is_refused(copied):
    def change(body):
        call = instruction(body, "hotloop_update")["call"]
        call["state2"] = None

    changed(copied, change)
    with pytest.raises(ModelError, match="has 2 states"):
        load_training(copied)


def test_a_field_more_is_refused(copied):
    changed(copied, lambda body: instruction(body, "hotloop_product")["call"].update(more=1))
    with pytest.raises(ModelError, match="fields must be"):
        load_training(copied)


def test_an_argmax_that_nobody_wrote_is_refused(export, copied):
    if export.name != "cnn":
        pytest.skip("without pooling")

    def change(body):
        instruction(body, "hotloop_convolve_filter_gradient")["call"]["argmax"][1] = 0

    changed(copied, change)
    with pytest.raises(ModelError, match="argmax must be one that a pooling wrote"):
        load_training(copied)


def test_an_export_of_another_version_says_so(copied):
    changed(copied, lambda body: body.update(binding="0" * 16))
    with pytest.raises(ModelError, match="version of hotloop"):
        load_training(copied)


def test_no_change_of_numbers_leaves_its_memory(export, tmp_path):
    """Signed again, so that only the checks of what it says stand between it and the kernels."""
    count = 5000 if THOROUGH else 150
    done = subprocess.run(
        [sys.executable, FOLDER / "training_fuzz.py", export, tmp_path / "work", "1", str(count)],
        capture_output=True, text=True, timeout=500, env=environment(tmp_path), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout)
    assert said["refused"] + said["ran"] == count
    assert said["refused"] > count // 4
    assert said["ran"] > 0


@pytest.mark.parametrize("seed", range(examples(40)))
def test_a_damaged_tensor_file_is_refused(export, tmp_path, seed):
    draw = random.Random(seed)
    data = bytearray((export / documents.MODEL_FILE).read_bytes())
    length = int.from_bytes(data[:8], "little")
    for _ in range(draw.choice([1, 1, 3])):
        data[draw.randrange(8 + length)] = draw.randrange(256)
    path = tmp_path / "damaged"
    path.write_bytes(data)
    whole = array_file.load_tensors(export / documents.MODEL_FILE)
    try:
        loaded = array_file.load_tensors(path)
    except CheckpointError:
        return
    # A name may be another name, and nothing is wrong with it.
    assert sorted(a.nbytes for a in loaded.values()) == sorted(a.nbytes for a in whole.values())
