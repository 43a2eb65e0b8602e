"""``hotloop train`` and ``serve`` with a key: sealed data in, sealed checkpoints out."""

import shutil

import pytest

from hotloop.cli.main import main
from hotloop.data.mnist import SHIPPED_FOLDER

pytest.importorskip("cryptography", reason="pip install 'hotloop[enclave]'")


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mnist").mkdir()
    for path in SHIPPED_FOLDER.glob("*.gz"):
        shutil.copy(path, tmp_path / "mnist")
    assert main(["enclave", "key", "new", "key"]) == 0
    assert main(["enclave", "counter", "new", "counter"]) == 0
    assert main(["enclave", "seal", "mnist", "--key-file", "key"]) == 0
    return tmp_path


def train(*words):
    return main(["train", *words, "--no-ceilings", "--quiet", "--json"])


SEALED = ("--key-file", "key", "--counter", "counter")


@pytest.mark.full
def test_a_run_its_resume_and_its_rollback(place, capsys):
    run = (
        "mnist",
        "--data",
        "mnist.sealed",
        "--samples",
        "500",
        "--model",
        "small",
        "--out",
        "run",
    )
    assert train(*run, "--max-steps", "3", *SEALED) == 0
    assert [p.name for p in (place / "run" / "checkpoints").iterdir()] == ["step-000000003"]
    shutil.copytree(place / "run", place / "older")
    assert train("--resume", "run", "--max-steps", "6", *SEALED) == 0
    assert (place / "counter").read_text() == "2\n"
    capsys.readouterr()
    assert train("--resume", "older", *SEALED) == 2
    assert train("--resume", "run") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 2
    assert "an older one was put in its place" in errors[0]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("mnist", *SEALED), "the data must be sealed"),
        (("mnist", "--data", "mnist", *SEALED), "must be a sealed folder"),
        (("mnist", "--data", "mnist", "--counter", "counter"), "pass --key-file"),
        (("mnist", "--data", "mnist.sealed", "--key-file", "nowhere"), "must be readable"),
    ],
)
def test_what_is_not_sealed_is_refused(place, capsys, words, reason):
    assert train(*words, "--out", "run") == 2
    assert reason in capsys.readouterr().err
    assert not (place / "run").exists()
