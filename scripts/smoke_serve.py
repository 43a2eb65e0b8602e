"""Start ``hotloop serve`` on a tiny model, ask, put load on it, stop it with SIGTERM: exit 0."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy
import onnx
from onnx import TensorProto, helper


def tiny_model(path: Path) -> Path:
    """``y = x @ w`` with ``w`` of ones, batch first."""
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4, 2], numpy.ones(8, numpy.float32))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "tiny", [x], [y], [weight])
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), str(path))
    return path


def main() -> None:
    """Serve, ask, stop."""
    path = tiny_model(Path(sys.argv[1]) / "tiny.onnx")
    command = [sys.executable, "-m", "hotloop", "serve", str(path), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            address = json.loads(process.stdout.readline())["address"]
            body = json.dumps({"inputs": [[1, 2, 3, 4]]}).encode()
            with urllib.request.urlopen(f"{address}/predict", body, timeout=30) as got:
                answer = json.load(got)
            assert answer["outputs"]["y"] == [[10, 10]], answer
            load = [sys.executable, "-m", "hotloop", "bench", "load", address, "--json"]
            told = subprocess.run([*load, "--duration-s", "1"], stdout=subprocess.PIPE, check=True)
            assert set(json.loads(told.stdout)["outcomes"]) == {"200"}, told.stdout
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


if __name__ == "__main__":
    main()
