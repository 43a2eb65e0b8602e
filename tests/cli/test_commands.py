"""The commands as a user meets them: good runs, bad input, exit codes, nothing left behind."""

import gzip
import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hotloop.cli.main import build_parser, main

SMALL = ["--no-download", "--no-ceilings", "--quiet", "--model", "small"]


def run(capsys, *argv):
    """Exit code, stdout, stderr of one command."""
    try:
        code = main([str(a) for a in argv])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def arrays(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 1, 28, 28)).astype(np.float32)
    y = rng.integers(0, 10, 80)
    path = tmp_path / "samples.npz"
    np.savez(path, x=x, y=y)
    return path


def write_idx(folder: Path, *, magic=2051, count=50, rows=None, label=3, cut=0):
    folder.mkdir(parents=True, exist_ok=True)
    pixels = bytes(28 * 28 * (count if rows is None else rows))
    images = struct.pack(">iiii", magic, count, 28, 28) + pixels
    labels = struct.pack(">ii", 2049, count) + bytes([label]) * count
    for split in ("train", "t10k"):
        (folder / f"{split}-images-idx3-ubyte").write_bytes(images[: len(images) - cut])
        (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    return folder


def test_help_and_machine_start_without_torch():
    for argv in (
        ["--help"],
        ["machine", "--json"],
        ["train", "--help"],
        ["plan", "--help"],
        ["report", "--help"],
        ["export", "--help"],
        ["serve", "--help"],
    ):
        code = (
            "import sys\nfrom hotloop.cli.main import main\n"
            f"try:\n    main({argv!r})\nexcept SystemExit:\n    pass\n"
            "assert 'torch' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_training_leaves_checkpoint_report_and_page_and_resumes(tmp_path, capsys):
    out = tmp_path / "run"
    argv = ["train", "mnist", *SMALL, "--samples", 640, "--out", out, "--json"]
    code, text, _ = run(capsys, *argv, "--epochs", 2, "--max-steps", 13)
    assert code == 0
    report = json.loads(text)
    assert (report["steps"], report["stopped"]) == (13, "max steps reached")
    code, text, _ = run(capsys, "train", "--resume", out, "--no-ceilings", "--quiet", "--json")
    report = json.loads(text)
    assert (code, report["steps"], report["stopped"]) == (0, 20, "epochs done")
    assert report["validation_accuracy"] > 0.5
    assert "Loss by step" in (out / "report.html").read_text()
    saved = json.loads((out / "report.json").read_text())
    assert len(saved["curve"]) == 20
    assert saved["budget"]["total_bytes"] > 0
    code, text, _ = run(capsys, "report", out, "--html", tmp_path / "report.html")
    assert code == 0
    assert "measured peak" in text
    assert "MNIST train" in (tmp_path / "report.html").read_text()
    whole = tmp_path / "whole"
    argv[argv.index("--out") + 1] = whole
    assert run(capsys, *argv, "--epochs", 2)[0] == 0
    name = "checkpoints/step-000000020/model.safetensors"
    assert (whole / name).read_bytes() == (out / name).read_bytes()


def test_own_model_and_own_data(tmp_path, arrays, capsys, monkeypatch):
    (tmp_path / "mymodels.py").write_text(
        "from torch import nn\n"
        "def build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    code, text, err = run(
        capsys, "train", "--model", "mymodels:build", "--data", arrays, "--test-data", arrays,
        "--epochs", 1, "--out", "run", "--no-ceilings", "--quiet",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "test accuracy" in text
    assert "measured peak" in text


def test_plan_prints_the_table_and_says_what_would_fit(tmp_path, capsys):
    code, text, _ = run(capsys, "plan", "mnist", "--no-download", "--save", tmp_path / "p.toml")
    assert code == 0
    assert "Model parameters  4.58 MiB" in text
    assert "[cpu]" in (tmp_path / "p.toml").read_text()
    # In a process of its own: what a process takes already counts, and tests before this one took.
    argv = [sys.executable, "-m", "hotloop", "plan", "mnist", "--no-download", "--batch-size",
            "1024", "--memory-limit", "600MiB"]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--micro-batch-size" in done.stderr
    assert "Working memory" in done.stdout
    done = subprocess.run([*argv, "--json"], capture_output=True, text=True, check=False)
    code, text = done.returncode, done.stdout
    document = json.loads(text)
    assert (code, document["fits"]) == (2, False)
    assert 1 <= document["largest_micro_batch_size"] < 1024


def refused(capsys, *argv, expect, code=2):
    got, _, err = run(capsys, *argv)
    assert got == code, err
    lines = [line for line in err.splitlines() if line.startswith("hotloop")]
    assert len(lines) == 1
    assert expect in lines[0]
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("idx", "expect"),
    [
        ({"cut": 100}, "train-images-idx3-ubyte"),
        ({"magic": 9999}, "magic"),
        ({"label": 11}, "labels"),
        ({"rows": 51}, "train-images-idx3-ubyte"),
    ],
)
def test_damaged_idx_files(tmp_path, capsys, idx, expect):
    folder = write_idx(tmp_path / "idx", **idx)
    out = tmp_path / "run"
    refused(capsys, "train", "mnist", *SMALL, "--data", folder, "--out", out, expect=expect)
    assert not out.exists()


def test_bad_data_is_one_line_and_leaves_nothing(tmp_path, arrays, capsys):
    out = ["--out", tmp_path / "run", *SMALL]
    refused(capsys, "train", *out, expect="needs data")
    refused(capsys, "train", "--data", tmp_path / "no.npz", *out, expect="does not exist")
    refused(capsys, "train", "mnist", "--data", tmp_path, *out, expect="IDX files")
    with_nan = dict(np.load(arrays))
    with_nan["x"][7, 0, 3, 3] = np.nan
    np.savez(tmp_path / "nan.npz", **with_nan)
    refused(capsys, "train", "--data", tmp_path / "nan.npz", *out, expect="sample 7")
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": [1.0, 2.0], "b": [0.5, 1.5]}), tmp_path / "t.parquet")
    refused(capsys, "train", "--data", tmp_path / "t.parquet", *out, expect="a, b")
    refused(capsys, "train", "--data", arrays, *out, "--batch-size", 0, expect="--batch-size")
    refused(capsys, "train", "--data", arrays, *out, "--num-threads", "x", expect="--num-threads")
    refused(
        capsys, "train", "--data", arrays, *out, "--memory-limit", "1MiB", expect="memory limit"
    )
    assert not (tmp_path / "run").exists()


def test_bad_models(tmp_path, arrays, capsys, monkeypatch):
    (tmp_path / "badmodels.py").write_text(
        "from torch import nn\n"
        "def raises():\n    raise ValueError('no weights here')\n"
        "def narrow():\n    return nn.Sequential(nn.Flatten(), nn.Linear(784, 3))\n"
        "def wrong():\n    return nn.Linear(5, 10)\n"
        "def text():\n    return 'model'\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    base = ["train", "--data", arrays, "--out", "run", "--no-ceilings", "--quiet", "--model"]
    refused(capsys, *base, "badmodels:raises", expect="no weights here at badmodels.py:3")
    refused(capsys, *base, "badmodels:narrow", expect="one score for each of the 10 classes")
    refused(capsys, *base, "badmodels:wrong", expect="must run on a batch of shape (64, 1, 28, 28)")
    refused(capsys, *base, "badmodels:text", expect="torch.nn.Module; got str")
    refused(capsys, *base, "badmodels:none", expect="callable named none")
    refused(capsys, *base, "nosuchmodule:f", expect="must import")
    refused(capsys, *base, "huge", expect="cnn, small, big")
    assert not (tmp_path / "run").exists()


def test_folders_that_cannot_be_used(tmp_path, arrays, capsys):
    (tmp_path / "file").write_text("")
    base = ["train", "--data", arrays, *SMALL, "--epochs", 1]
    refused(capsys, *base, "--out", tmp_path / "file" / "run", expect="must be writable")
    assert run(capsys, *base, "--out", tmp_path / "run")[0] == 0
    before = sorted(p.name for p in (tmp_path / "run").rglob("*"))
    refused(capsys, *base, "--out", tmp_path / "run", expect="already holds a run")
    assert sorted(p.name for p in (tmp_path / "run").rglob("*")) == before
    refused(capsys, "train", "--resume", tmp_path / "none", expect="recipe of a run")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_while_running_is_a_failure(tmp_path, arrays, capsys, monkeypatch):
    from hotloop.train.system_calls import Files

    def full(self, *args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Files, "write", full)
    refused(
        capsys, "train", "--data", arrays, *SMALL, "--out", tmp_path / "run",
        expect="No space left", code=1,
    )  # fmt: skip


def test_an_error_with_json_is_a_document(tmp_path, capsys):
    code, text, _ = run(capsys, "train", "--data", tmp_path / "no.npz", "--json")
    document = json.loads(text)
    assert code == document["exit_code"] == 2
    assert document["kind"] == "DataError"


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        main(["train", "--data", str(tmp_path / "no.npz"), "--out", str(tmp_path / "o"), "--debug"])


def test_unknown_options_are_usage_errors(capsys):
    assert run(capsys, "train", "mnist", "--bach-size", 3)[0] == 2
    assert run(capsys, "dance")[0] == 2
    assert run(capsys)[0] == 2


def test_every_command_has_json_and_debug():
    choices = build_parser()._subparsers._group_actions[0].choices
    assert set(choices) == {
        "machine", "plan", "train", "tune", "prove", "report", "run", "export",
        "serve", "bench", "enclave",
    }  # fmt: skip
    for parser in choices.values():
        flags = {flag for action in parser._actions for flag in action.option_strings}
        assert {"--json", "--debug"} <= flags


def test_training_does_not_change_torch_threads(tmp_path, arrays, capsys):
    before = torch.get_num_threads()
    run(capsys, "train", "--data", arrays, *SMALL, "--out", tmp_path / "r", "--num-threads", 1)
    assert torch.get_num_threads() == before
