"""Runs without torch: the command in a process that refuses it, checkpoints both ways, memory."""

import json
import subprocess
import sys

import numpy
import pytest
import torch
from torch import nn

from hotloop import CheckpointStore, Plan, Trainer, kernels
from hotloop.cli.main import main
from hotloop.cli.recipe import Recipe
from hotloop.enclave.training import export_training, load_training
from hotloop.enclave.training.samples import Samples, open_samples
from hotloop.errors import CheckpointError, DataError
from hotloop.train import array_file
from hotloop.train.encode import join_state
from hotloop.train.system_calls import Files
from hotloop.train.zoo import build_model
from hotloop.units import MIB
from support.processes import environment

pytestmark = pytest.mark.skipif(
    not kernels.is_available(), reason=kernels.unavailable_reason() or ""
)

WITHOUT_TORCH = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("there is no torch here")

sys.meta_path.insert(0, Refuse())
from hotloop.cli.main import main

code = main(sys.argv[1:])
assert not any(name.partition(".")[0] == "torch" for name in sys.modules)
raise SystemExit(code)
"""


def command(tmp_path, *words):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, "enclave", "train", *map(str, words), "--json"],
        capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment(tmp_path),
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 32), nn.ReLU(), nn.Linear(32, 5))


def made_with(model):
    return torch.optim.Adam(model.parameters(), 0.01)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """An archive of 104 bytes images: one batch of 40, again, and 24."""
    draw = numpy.random.default_rng(0)
    x = draw.integers(0, 256, (104, 1, 6, 6)).astype("uint8")
    y = (x.reshape(104, -1)[:, :5].argmax(1)).astype("int64")
    path = tmp_path_factory.mktemp("data") / "points.npz"
    numpy.savez(path, x_train=x, y_train=y, x_test=x[:50], y_test=y[:50])
    return path


@pytest.fixture(scope="module")
def export(tmp_path_factory, data):
    model = perceptron()
    folder = tmp_path_factory.mktemp("exports") / "export"
    x, y = torch.randn(40, 1, 6, 6), torch.randint(5, (40,))
    export_training(model, nn.CrossEntropyLoss(), made_with(model), (x, y), folder, num_samples=104)
    return folder


def fitted(data, epochs, folder=None, **options):
    """The same run by ``Trainer.fit``: its model and report."""
    model = perceptron()
    plan = Plan.from_dict({"checkpoint": {"every_s": 0.0}})
    report = Trainer(model, nn.CrossEntropyLoss(), made_with(model), plan).fit(
        data, batch_size=40, epochs=epochs, seed=7, validation=data, monitor=False,
        checkpoint_dir=folder, **options,
    )  # fmt: skip
    return model, report


def test_the_command_makes_the_run_of_the_trainer_without_torch(tmp_path, data, export):
    said = command(tmp_path, export, "--data", data, "--epochs", 4, "--seed", 7, "--out", "run")
    model, report = fitted(data, 4)
    assert said["steps"] == 12
    for got, wanted in zip(said["epochs"], report.history, strict=True):
        assert got["train_loss"] == pytest.approx(wanted.train_loss, rel=1e-4)
        assert got["validation_loss"] == pytest.approx(wanted.validation_loss, rel=1e-4)
        assert got["validation_accuracy"] == pytest.approx(wanted.validation_accuracy)
    saved = CheckpointStore(tmp_path / "run").latest()
    assert saved.step == 12
    other = perceptron()
    other.load_state_dict(dict(saved.tensors["model"]))
    for mine, wanted in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=2e-5)
    optimizer = made_with(other)
    optimizer.load_state_dict(
        join_state(dict(saved.tensors["optimizer"]), saved.document["optimizer"])
    )
    assert all(float(state["step"]) == 12 for state in optimizer.state.values())


def test_a_run_goes_on_with_the_bits_of_one_that_was_not_cut(tmp_path, data, export):
    whole = load_training(export)
    whole.fit(open_samples(data, "train", None), 3, seed=7)
    for steps in (2, 5, None):
        run = load_training(export)
        run.fit(
            open_samples(data, "train", None), 3, seed=7, checkpoint_dir=tmp_path / "run",
            resume=steps != 2, max_steps=steps,
        )  # fmt: skip
    assert run.state.step == 9
    for name, array in whole.tensors.items():
        assert array.tobytes() == run.tensors[name].tobytes()


def test_the_trainer_goes_on_from_a_run_without_torch(tmp_path, data, export):
    run = load_training(export)
    run.fit(open_samples(data, "train", None), 2, seed=7, checkpoint_dir=tmp_path / "run")
    model, report = fitted(data, 4, tmp_path / "run", resume=True)
    wanted, _ = fitted(data, 4)
    assert report.steps == 12
    for mine, other in zip(model.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=2e-5)


def test_a_run_goes_on_from_the_trainer(tmp_path, data, export):
    fitted(data, 2, tmp_path / "run")
    run = load_training(export)
    run.fit(
        open_samples(data, "train", None), 4, seed=7, checkpoint_dir=tmp_path / "run", resume=True
    )
    wanted, _ = fitted(data, 4)
    for name, value in wanted.state_dict().items():
        numpy.testing.assert_allclose(run.tensors[name], value.numpy(), rtol=1e-3, atol=2e-5)


def test_another_seed_does_not_go_on(tmp_path, data, export):
    samples = open_samples(data, "train", None)
    load_training(export).fit(samples, 1, seed=7, checkpoint_dir=tmp_path / "run")
    with pytest.raises(CheckpointError, match="seed"):
        load_training(export).fit(samples, 2, seed=8, checkpoint_dir=tmp_path / "run", resume=True)
    with pytest.raises(CheckpointError, match="without checkpoints"):
        load_training(export).fit(samples, 2, seed=7, checkpoint_dir=tmp_path / "run")


def test_a_last_batch_without_a_program_is_dropped_where_asked(data, export):
    found = open_samples(data, "train", None)
    fewer = Samples(found.x[:90], found.y[:90])
    run = load_training(export)
    with pytest.raises(DataError, match="batches of 24, 40; got 10 samples"):
        run.fit(fewer, 1)
    assert run.state.step == 0
    assert run.fit(fewer, 1, drop_last=True).step == 2


def test_data_of_another_shape_is_refused(export):
    with pytest.raises(DataError, match=r"float32 \[1, 6, 6\]"):
        load_training(export).fit(
            Samples(numpy.zeros((40, 36), "float32"), numpy.zeros(40, "int64")), 1
        )


def test_a_label_outside_the_classes_changes_nothing(export):
    run = load_training(export)
    before = {name: array.copy() for name, array in run.tensors.items()}
    y = numpy.full(40, 5)
    with pytest.raises(Exception, match="labels must be in"):
        run.step(numpy.zeros((40, 1, 6, 6), "float32"), y)
    assert all((run.tensors[name] == before[name]).all() for name in before)


def test_the_cnn_trains_in_96_mib(tmp_path, monkeypatch):
    """All that is resident at its peak: interpreter, NumPy, kernels, digits, weights, arena."""
    monkeypatch.delenv("HOTLOOP_DATA", raising=False)  # 60,000 images would be 45 MiB alone.
    torch.manual_seed(0)
    model = build_model("cnn")
    x, y = torch.randn(64, 1, 28, 28), torch.randint(10, (64,))
    export_training(model, nn.CrossEntropyLoss(), made_with(model), (x, y), tmp_path / "export")
    said = command(
        tmp_path, "export", "--data", "mnist", "--max-steps", 5, "--drop-last", "--out", "run",
        "--threads", 2,
    )  # fmt: skip
    assert said["steps"] == 5
    assert said["peak_resident_bytes"] < 96 * MIB


def test_files_are_those_of_the_torch_writer(tmp_path):
    arrays = {
        "b": numpy.arange(6, dtype="float32").reshape(2, 3).T,
        "a": numpy.array(3, "int64"),
        "c": numpy.zeros((0, 4), "uint8"),
        "d": numpy.array([True, False]),
    }
    record = array_file.write_tensors(Files(), tmp_path / "mine", arrays)
    from hotloop.train.tensor_file import write_tensors

    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    assert write_tensors(Files(), tmp_path / "torch", tensors) == record
    assert (tmp_path / "mine").read_bytes() == (tmp_path / "torch").read_bytes()
    loaded = array_file.load_tensors(tmp_path / "mine")
    assert loaded.keys() == arrays.keys()
    assert all(
        (loaded[n] == arrays[n]).all() and loaded[n].dtype == arrays[n].dtype for n in loaded
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    draw = numpy.random.default_rng(1)
    path = tmp_path_factory.mktemp("pictures") / "pictures.npz"
    y = draw.integers(0, 10, 90)
    numpy.savez(path, x=draw.integers(0, 256, (90, 28, 28)).astype("uint8"), y=y)
    return path


def test_the_command_writes_an_export(pictures, tmp_path, capsys):
    out = tmp_path / "export"
    words = ["export", "small", "--training", "--data", str(pictures), "--batch-size", "40",
             "--optimizer", "sgd", "--schedule", "cosine", "--epochs", "2", "--out", str(out),
             "--threads", "1", "--json"]  # fmt: skip
    assert main(words) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["batch_sizes"] == [10, 40]
    assert said["notes"] == []
    run = load_training(out)
    assert run.document.optimizer == "SGD"
    assert len(run.document.rates) == 6
    run.fit(open_samples(pictures, "train", None), 2)
    assert run.state.step == 6
    assert main(words) == 2
    assert "new folder" in capsys.readouterr().err


def test_the_command_exports_the_weights_of_a_run(pictures, tmp_path, capsys):
    recipe = Recipe(dataset="file", data=str(pictures), model="small", batch_size=30)
    recipe.save(tmp_path / "recipe.json")
    torch.manual_seed(9)
    weights = build_model("small").state_dict()
    CheckpointStore(tmp_path / "checkpoints").save(1, tensors={"model": weights}, document={})
    assert main(["export", str(tmp_path), "--training", "--out", str(tmp_path / "out")]) == 0
    assert "batches of 30" in capsys.readouterr().out
    run = load_training(tmp_path / "out")
    assert all((run.tensors[name] == value.numpy()).all() for name, value in weights.items())
