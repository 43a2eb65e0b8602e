"""An export: whole or not at all, without torch where none is needed, and never code."""

import functools
import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file

import hotloop
from hotloop.errors import DataError, InputError, ModelError
from hotloop.infer import load_engine, measure_memory
from hotloop.train.zoo import build_model
from support import inference_models as models

ENGINES = ["hotloop", "eager", "onnxruntime", "openvino"]


def export(folder, model, example, engine, **options):
    options = {"budget_s": 0.3, "cache": False, "batch_sizes": [4], **options}
    with hotloop.compile_inference(model, example, engines=[engine], **options) as runner:
        return runner.save(folder)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A function: the export of a perceptron by an engine, made when first asked for."""

    @functools.cache
    def export_of(engine):
        folder = tmp_path_factory.mktemp(engine) / "out"
        return export(folder, models.perceptron(), torch.randn(4, 12), engine)

    return export_of


@pytest.fixture
def exported(pristine, tmp_path):
    """A copy of one, to be changed at will."""
    return Path(shutil.copytree(pristine("onnxruntime"), tmp_path / "out"))


def eager(model, *args, **kwargs):
    with torch.inference_mode():
        return model.eval()(*args, **kwargs)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_export_answers_as_the_model(tmp_path, engine):
    model = models.Residual()
    folder = export(tmp_path / "out", model, torch.randn(4, 1, 9, 9), engine)
    x = torch.randn(7, 1, 9, 9)
    want = eager(model, x)
    with hotloop.load_inference(folder) as runner:
        assert runner.engine.name == engine
        torch.testing.assert_close(runner(x), want, rtol=1e-4, atol=1e-5)
        # What was loaded can be kept again.
        again = runner.save(tmp_path / "again")
    served = load_engine(again)
    assert served.inputs[0].shape == (None, 1, 9, 9)
    (answer,) = served.run([x.numpy()])
    torch.testing.assert_close(torch.from_numpy(answer), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(DataError):
        served.run([x.numpy()[:, :, :8]])
    served.close()


@pytest.mark.parametrize("engine", ["eager", "onnxruntime", "openvino"])
def test_dicts_and_named_inputs_survive(tmp_path, engine):
    model = models.Named()
    example = {"ids": torch.randint(11, (4, 6)), "mask": torch.ones(4, 6)}
    folder = export(tmp_path / "out", model, example, engine)
    inputs = {"ids": torch.randint(11, (5, 6)), "mask": torch.rand(5, 6)}
    want = eager(model, **inputs)
    with hotloop.load_inference(folder) as runner:
        got = runner(**inputs)
    assert list(got) == list(want)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_a_compiled_graph_is_kept_as_a_graph_not_as_code(tmp_path):
    model = models.perceptron()
    folder = export(tmp_path / "out", model, torch.randn(4, 12), "inductor", budget_s=120.0)
    assert sorted(p.name for p in folder.iterdir()) == ["model.json", "model.pt2"]
    with zipfile.ZipFile(folder / "model.pt2") as archive:
        assert not [n for n in archive.namelist() if n.endswith((".so", ".cpp", ".o"))]
    x = torch.randn(3, 12)
    with hotloop.load_inference(folder) as runner:
        torch.testing.assert_close(runner(x), eager(model, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", ["hotloop", "onnxruntime", "openvino"])
def test_a_loaded_cnn_imports_no_torch_and_stays_small(tmp_path, engine):
    model = build_model("cnn")
    folder = export(tmp_path / "out", model, torch.randn(4, 1, 28, 28), engine)
    found = measure_memory(folder, [1, 64])
    assert found["imports_torch"] is False
    assert found["first_answer_s"] > 0
    if engine != "openvino":
        assert found["resident_bytes"] < (64 * 2**20 if engine == "hotloop" else 150e6)


def test_a_run_without_torch_installed_needs_none(exported):
    code = (
        "import sys\nsys.modules['torch'] = None\n"
        "import numpy, hotloop\n"
        f"runner = hotloop.load_inference({str(exported)!r})\n"
        "assert runner(numpy.zeros((3, 12), 'float32')).shape == (3, 3)\n"
        "batches = [numpy.zeros((2, 12), 'float32')] * 3\n"
        "assert [y.shape for y in runner.map(batches)] == [(2, 3)] * 3"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_document_says_what_was_found(exported):
    document = json.loads((exported / "model.json").read_text())
    assert document["engines"][0]["engine"] == "onnxruntime"
    assert document["engines"][0]["error"] <= 1e-4
    assert document["versions"]["onnxruntime"]
    assert document["inputs"] == [{"name": "input", "dtype": "float32", "shape": [None, 12]}]


def test_saving_replaces_an_export_but_nothing_else(tmp_path, exported):
    before = (exported / "model.onnx").read_bytes()
    export(exported, models.perceptron(20), torch.randn(4, 12), "onnxruntime")
    assert (exported / "model.onnx").read_bytes() != before
    other = tmp_path / "notes"
    other.mkdir()
    (other / "text.txt").write_text("mine")
    with pytest.raises(InputError, match="new, empty or an earlier export"):
        export(other, models.perceptron(), torch.randn(4, 12), "onnxruntime")
    assert [p.name for p in other.iterdir()] == ["text.txt"]


def test_a_save_that_fails_leaves_the_old_export_and_no_traces(exported, monkeypatch):
    from hotloop.infer import folder_writer as room

    before = sorted((p.name, p.read_bytes()) for p in exported.iterdir())

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(room, "_sync", full)
    with pytest.raises(hotloop.StorageError, match="No space left"):
        export(exported, models.perceptron(20), torch.randn(4, 12), "onnxruntime")
    assert sorted((p.name, p.read_bytes()) for p in exported.iterdir()) == before
    assert [p.name for p in exported.parent.iterdir()] == [exported.name]


def _edit(folder, **changes):
    path = folder / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "model.json").unlink(),
        lambda f: (f / "model.json").write_text("{"),
        lambda f: (f / "model.json").write_text("[" * 100_000),
        lambda f: (f / "model.json").write_text('{"format": "other"}'),
        lambda f: (f / "model.onnx").unlink(),
        lambda f: (f / "model.onnx").write_bytes(b"\0" * 100),
        lambda f: _edit(f, format_version=99),
        lambda f: _edit(f, engines=[]),
        lambda f: _edit(f, by_batch_size=[[4, 7]]),
        lambda f: _edit(f, inputs="x"),
    ],
)
def test_a_damaged_export_is_one_clear_line(exported, damage):
    damage(exported)
    with pytest.raises(ModelError):
        hotloop.load_inference(exported)
    with pytest.raises(ModelError):
        load_engine(exported)


@pytest.mark.parametrize("name", ["../model.onnx", "/etc/passwd", "", ".."])
def test_a_file_outside_the_folder_is_refused(exported, name):
    document = json.loads((exported / "model.json").read_text())
    document["engines"][0]["file"] = name
    (exported / "model.json").write_text(json.dumps(document))
    with pytest.raises(ModelError, match="must be a folder of hotloop export"):
        hotloop.load_inference(exported)


def test_an_engine_this_version_does_not_know_is_refused(exported):
    document = json.loads((exported / "model.json").read_text())
    document["engines"][0]["engine"] = "shell"
    (exported / "model.json").write_text(json.dumps(document))
    with pytest.raises(ModelError, match="this version knows"):
        hotloop.load_inference(exported)


@pytest.mark.parametrize("address", ["https://example.org/model.onnx", "s3://bucket/model"])
def test_an_address_is_refused(address):
    with pytest.raises(InputError, match="never from an address"):
        load_engine(address)


def test_files_of_each_kind(tmp_path, pristine, monkeypatch):
    model = models.perceptron()  # Its weights are the same each time.
    x = torch.randn(5, 12)
    want = eager(model, x)
    paths = {
        "onnx": pristine("onnxruntime") / "model.onnx",
        "xml": pristine("openvino") / "model.xml",
        "pt2": pristine("eager") / "model.pt2",
        "safetensors": tmp_path / "model.safetensors",
    }
    save_file(model.state_dict(), paths["safetensors"])
    (tmp_path / "my_models.py").write_text(Path(models.__file__).read_text())
    monkeypatch.syspath_prepend(tmp_path)
    for kind, path in paths.items():
        factory = "my_models:with_example" if kind == "safetensors" else None
        engine = load_engine(path, factory=factory, num_threads=1)
        assert [(s.dtype, s.shape) for s in engine.inputs] == [("float32", (None, 12))]
        assert [(s.dtype, s.shape) for s in engine.outputs] == [("float32", (None, 3))]
        (answer,) = engine.run([x.numpy()])
        torch.testing.assert_close(torch.from_numpy(answer), want, rtol=1e-4, atol=1e-5)
        engine.close()
    with pytest.raises(InputError, match="weights alone"):
        load_engine(paths["safetensors"])
    with pytest.raises(ModelError, match="must tell what goes in"):
        load_engine(paths["safetensors"], factory="my_models:without_example")
    with pytest.raises(ModelError, match="must give a model"):
        load_engine(paths["safetensors"], factory="my_models:nothing")
    with pytest.raises(ModelError, match=r"package\.module:function"):
        load_engine(paths["safetensors"], factory="nothing")


@pytest.mark.parametrize("suffix", ["onnx", "xml", "pt2", "safetensors", "pt", "pkl"])
def test_garbage_and_pickles_are_refused(tmp_path, suffix, monkeypatch):
    ran = []
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(pickle.dumps(_Bomb(tmp_path / "ran")))
    (tmp_path / "my_models2.py").write_text(Path(models.__file__).read_text())
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises((ModelError, InputError)):
        load_engine(path, factory="my_models2:with_example")
    assert not (tmp_path / "ran").exists()
    assert ran == []


class _Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def _rewritten(source, target, change):
    """The archive with some entries changed: ``change(name, data) -> data`` or ``None``."""
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(target, "w") as after:
        for name in before.namelist():
            data = change(name, before.read(name))
            if data is not None:
                after.writestr(name, data)
        for name, data in change("", b"") or []:
            after.writestr(name, data)


@pytest.mark.parametrize("attack", ["examples", "weights", "object", "legacy", "size", "code"])
def test_an_archive_cannot_run_code(tmp_path, pristine, attack):
    source = pristine("eager") / "model.pt2"
    ran = tmp_path / "ran"
    bomb = pickle.dumps(_Bomb(ran))

    def change(name, data):
        if not name:
            added = {
                "object": [("model/data/constants/custom_obj_0", bomb)],
                "legacy": [("model/data/constants/model.pt", bomb)],
                "code": [("model/data/aotinductor/model/x.so", b"\x7fELF")],
            }
            return added.get(attack, [])
        if attack == "examples" and "sample_inputs" in name:
            return bomb
        if attack == "weights" and name.endswith("weights_config.json"):
            document = json.loads(data)
            for entry in document["config"].values():
                entry["use_pickle"] = True
            return json.dumps(document).encode()
        if attack == "weights" and "weight_" in name and not name.endswith("json"):
            return bomb
        if attack == "size" and name.endswith("models/model.json"):
            text = data.decode()
            assert "Symbol('s" in text
            evil = f"__import__('pathlib').Path('{ran}').touch() or Symbol('s"
            return text.replace("Symbol('s", evil).encode()
        return data

    target = tmp_path / "attack.pt2"
    _rewritten(source, target, change)
    if attack == "examples":
        # Example inputs are not read at all: the rest of the archive is sound.
        engine = load_engine(target)
        assert engine.run([numpy.zeros((2, 12), "float32")])[0].shape == (2, 3)
    else:
        with pytest.raises(ModelError, match="plain tensors alone"):
            load_engine(target)
    assert not ran.exists()


@pytest.mark.parametrize(("asked", "told"), [(None, [True]), (False, [False]), (True, [True])])
def test_a_server_may_have_idle_threads_sleep(tmp_path, exported, monkeypatch, asked, told):
    from hotloop.infer.engines import onnxruntime as room

    document = json.loads((exported / "model.json").read_text())
    for entry in document["engines"]:
        entry["spinning"] = True  # Whatever won the race.
    (exported / "model.json").write_text(json.dumps(document))
    seen = []

    class Watched(room.OnnxRuntimeEngine):
        def __init__(self, path, *, spinning=True, **options):
            seen.append(spinning)
            super().__init__(path, spinning=spinning, **options)

    monkeypatch.setattr(room, "OnnxRuntimeEngine", Watched)
    for path in (exported, exported / "model.onnx"):
        seen.clear()
        engine = load_engine(path, spinning=asked)
        assert seen == told
        assert engine.run([numpy.zeros((2, 12), "float32")])[0].shape == (2, 3)
        engine.close()


def test_engines_of_a_server_have_the_threads_of_the_main_one(tmp_path, monkeypatch):
    """Small batches, fastest on all CPUs when raced alone, are called by each instance here."""
    from hotloop.infer import folder as room

    x = torch.randn(4, 12)
    folder = export(tmp_path / "out", models.perceptron(), x, "onnxruntime", goal="throughput")
    document = json.loads((folder / "model.json").read_text())
    (entry,) = document["engines"]
    document["engines"] = [
        {**entry, "num_threads": 2, "num_instances": 1},
        {**entry, "num_threads": 1, "num_instances": 2},
    ]
    document["by_batch_size"] = [[1, 0], [4, 1]]
    (folder / "model.json").write_text(json.dumps(document))

    class Two:
        usable_cpus = 2
        fingerprint = hotloop.Machine.probe().fingerprint

    monkeypatch.setattr(room.Machine, "probe", lambda: Two())
    with hotloop.load_inference(folder) as runner:
        assert [e.num_threads for e in runner.engines.values()] == [2, 1]
    engine = load_engine(folder)
    (only,) = engine.engines.values()
    assert (only.num_threads, only.num_instances) == (1, 2) == (
        engine.num_threads, engine.num_instances,
    )  # fmt: skip
    for rows in (1, 4, 70):
        assert engine.run([numpy.zeros((rows, 12), "float32")])[0].shape == (rows, 3)
    engine.close()
