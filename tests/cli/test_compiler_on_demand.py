"""torch's compiler stays out of a command that compiles nothing, and is there for one that does."""

import subprocess
import sys
from pathlib import Path

TRAIN = """
import sys
from hotloop.cli.main import main
sys.argv = ["hotloop", "train", "mnist", "--no-download", "--samples", "200", "--epochs", "1",
            "--model", "{model}", "--max-steps", "6", "--batch-size", "16", "--no-ceilings",
            "--quiet", "--runs-dir", "{runs}"]
code = main()
print("compiler:", "torch._dynamo.eval_frame" in sys.modules, code)
"""
MODEL = """
import torch
from torch import nn

def net():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
                          nn.Dropout(0.1), nn.Flatten(), nn.Linear(8 * 13 * 13, 10))
    return {wrapped}
"""


def _run(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_training_does_not_import_the_compiler(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(MODEL.format(wrapped="model"))
    code = TRAIN.format(model="nets:net", runs=tmp_path / "runs")
    assert "compiler: False 0" in _run(code, tmp_path)


def test_a_model_that_compiles_gets_the_compiler(tmp_path: Path) -> None:
    wrapped = "torch.compile(model, backend='eager')"
    (tmp_path / "nets.py").write_text(MODEL.format(wrapped=wrapped))
    code = TRAIN.format(model="nets:net", runs=tmp_path / "runs")
    assert "compiler: True 0" in _run(code, tmp_path)


def test_what_was_left_alone_is_disabled_once_the_compiler_is_there(tmp_path: Path) -> None:
    code = """
import torch
from hotloop.cli.compiler_on_demand import import_compiler_on_demand
import_compiler_on_demand()
weight = torch.nn.Parameter(torch.ones(2))
optimizer = torch.optim.SGD([weight], 0.1)
optimizer.zero_grad()
method = torch.optim.Optimizer.zero_grad.__wrapped__
assert method.__dynamo_disable is method
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist() == [2, 2]
assert not hasattr(method, "__dynamo_disable")
optimizer.zero_grad()
assert method.__dynamo_disable is not method
import torch._dynamo
assert torch._dynamo.config.recompile_limit > 0 and torch._dynamo.is_compiling() is False
print("right")
"""
    assert "right" in _run(code, tmp_path)
