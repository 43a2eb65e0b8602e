"""`hotloop export` as a user meets it."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import hotloop
from hotloop.cli.main import main
from hotloop.measure import medians
from hotloop.train.zoo import build_model

QUICK = ["--engines", "onnxruntime,eager", "--budget-s", 1, "--quiet", "--batch-sizes", "1,4"]


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(medians, "TURN_S", 0.001)
    monkeypatch.chdir(tmp_path)


def run(capsys, *argv):
    """Exit code, stdout, stderr of one command."""
    try:
        code = main([str(a) for a in argv])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def answers(folder, x):
    with hotloop.load_inference(folder) as runner:
        return runner(x)


def test_weights_of_a_file_are_the_exports(tmp_path, capsys):
    model = build_model("small")
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    code, text, _ = run(
        capsys, "export", "small", "--weights", tmp_path / "w.safetensors", *QUICK, "--json"
    )
    assert code == 0
    document = json.loads(text)
    assert document["out"] == "export-small"
    assert document["measured"]["resident_bytes"] > 0
    assert document["measured"]["first_answer_s"] > 0
    assert document["inputs"] == ["input float32 [batch, 1, 28, 28]"]
    x = torch.randn(3, 1, 28, 28)
    with torch.inference_mode():
        torch.testing.assert_close(
            answers("export-small", x), model.eval()(x), rtol=1e-4, atol=1e-5
        )


def test_the_table_tells_the_winner(capsys):
    code, text, _ = run(capsys, "export", "small", *QUICK, "--no-measure", "--out", "here")
    assert code == 0
    assert "batch 4:" in text
    assert "* " in text
    assert "wrote   here" in text


def test_a_training_run_is_exported_with_its_newest_weights(tmp_path, capsys):
    common = ["--no-download", "--no-ceilings", "--quiet", "--model", "small", "--samples", 320]
    code, _, _ = run(capsys, "train", "mnist", *common, "--epochs", 1, "--out", tmp_path / "run")
    assert code == 0
    code, _, _ = run(capsys, "export", tmp_path / "run", *QUICK, "--no-measure", "--out", "out")
    assert code == 0
    weights = hotloop.CheckpointStore(tmp_path / "run" / "checkpoints").latest().tensors["model"]
    model = build_model("small")
    model.load_state_dict(dict(weights))
    x = torch.randn(3, 1, 28, 28)
    with torch.inference_mode():
        torch.testing.assert_close(answers("out", x), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_a_factory_with_a_shape_and_lower_precision_on_samples(tmp_path, capsys):
    (tmp_path / "nets_to_export.py").write_text(
        "from torch import nn\n"
        "def build():\n    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 3))\n"
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 20)).astype(np.float32)
    np.savez(tmp_path / "samples.npz", x=x, y=rng.integers(0, 3, 200))
    argv = ["export", "nets_to_export:build", "--shape", "20", *QUICK, "--no-measure", "--json"]
    code, text, _ = run(capsys, *argv, "--samples", "samples.npz", "--max-accuracy-loss", 0.1)
    assert code == 0
    rows = json.loads(text)["report"]["rows"]
    int8 = [r for r in rows if r["setting"]["precision"] == "int8"]
    assert int8
    assert all(r["accuracy_loss"] is not None for r in int8)
    code, _, err = run(capsys, "export", "nets_to_export:build", *QUICK)
    assert code == 2
    assert "--shape" in err


@pytest.mark.parametrize(
    ("argv", "rule"),
    [
        (["huge"], "MODEL must be small, big, cnn"),
        (["nowhere:build"], "must give a model"),
        (["small", "--weights", "none.safetensors"], "must hold the weights"),
        (["small", "--batch-sizes", "0"], "whole numbers"),
        (["small", "--shape", "3,x"], "whole numbers"),
        (["small", "--shape", "3:colour"], "dtype"),
        (["small", "--engines", "tensorrt"], "an engine is one of"),
        (["small", "--max-accuracy-loss", "0.1"], "needs samples"),
        (["small", "--max-error", "-1"], "max_error"),
        (["small", "--goal", "speed"], "invalid choice"),
        (["."], "recipe"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_exit_code_2_and_leaves_nothing(tmp_path, capsys, argv, rule):
    code, _, err = run(capsys, "export", *argv, "--quiet", "--out", "out")
    assert code == 2
    assert rule in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_foreign_folder_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    code, _, err = run(capsys, "export", "small", *QUICK, "--out", "mine")
    assert code == 2
    assert "earlier export" in err
