"""Sealed exports and weights answer as plain ones do; nothing of them is written."""

import shutil

import pytest
import torch
from safetensors.torch import save_model

import hotloop
from hotloop.errors import ModelError, SealedError
from hotloop.infer import load_engine
from hotloop.sealed import Sealed, SealingKey, seal
from support import inference_models as models

pytest.importorskip("cryptography", reason="pip install 'hotloop[enclave]'")

KEY = SealingKey(bytes(range(32)))


@pytest.mark.parametrize("engine", ["hotloop", "eager", "onnxruntime", "openvino"])
def test_an_export(tmp_path, monkeypatch, engine):
    x = torch.randn(4, 12)
    options = {"budget_s": 0.2, "cache": False, "batch_sizes": [4], "engines": [engine]}
    with hotloop.compile_inference(models.perceptron(), x, **options) as runner:
        folder = runner.save(tmp_path / "plain")
    seal(folder, tmp_path / "sealed", KEY)
    with hotloop.load_inference(folder) as runner:
        want = runner(x)
    shutil.rmtree(folder)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.mkdtemp", None)  # Nothing may go through a temporary folder.
    place = Sealed(tmp_path / "sealed", KEY)
    with hotloop.load_inference(place) as runner:
        assert torch.equal(runner(x), want)
        with pytest.raises(ModelError, match="no file to keep"):
            runner.save(tmp_path / "again")
    served = load_engine(Sealed(tmp_path / "sealed", KEY))
    assert torch.equal(torch.from_numpy(served.run([x.numpy()])[0]), want)
    served.close()
    with pytest.raises(SealedError, match="another key"):
        hotloop.load_inference(Sealed(tmp_path / "sealed", SealingKey(bytes(32))))
    for path in (tmp_path / "sealed").iterdir():
        data = path.read_bytes()
        path.write_bytes(data[:-1])
        with pytest.raises(SealedError):
            hotloop.load_inference(Sealed(tmp_path / "sealed", KEY))
        path.write_bytes(data)
    assert list((tmp_path / "temporary").iterdir()) == []


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(6, 6)
        self.second = torch.nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.example_input = torch.zeros(2, 6)

    def forward(self, x):
        return self.second(self.first(x).relu())


def test_weights_with_tied_names(tmp_path):
    torch.manual_seed(0)
    model = Tied()
    save_model(model, tmp_path / "w.safetensors")
    seal(tmp_path / "w.safetensors", tmp_path / "w.safetensors.sealed", KEY)
    place = Sealed(tmp_path / "w.safetensors.sealed", KEY)
    engine = load_engine(place, factory=f"{__name__}:Tied")
    x = torch.randn(2, 6)
    (answer,) = engine.run([x.numpy()])
    torch.testing.assert_close(torch.from_numpy(answer), model(x).detach())
    engine.close()
    with pytest.raises(ModelError, match="weights of Linear"):
        load_engine(place, factory=f"{__name__}:other")


def other():
    return torch.nn.Linear(6, 6), torch.zeros(2, 6)
