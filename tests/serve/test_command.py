"""``hotloop serve`` as a user meets it: start, one answer, signals, bad input, no torch."""

import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from torch import nn

import hotloop
from hotloop.cli.main import main
from hotloop.infer.archive import write_archive

pytest.importorskip("onnxruntime")
from smoke_serve import tiny_model

BODY = json.dumps({"inputs": [[1, 2, 3, 4]]}).encode()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny.onnx")


def start(model, *flags):
    command = [
        sys.executable,
        "-m",
        "hotloop",
        "serve",
        str(model),
        "--port",
        "0",
        "--json",
        *flags,
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    return process, json.loads(process.stdout.readline())


def finish(process, number):
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    return process.returncode, [json.loads(line) for line in errors.splitlines()]


def test_it_serves_without_torch_and_ends_with_sigterm(model):
    process, told = start(model, "--log-requests")
    assert (told["name"], told["engine"]) == ("tiny", "onnxruntime")
    with urllib.request.urlopen(f"{told['address']}/predict", BODY) as got:
        assert json.load(got)["outputs"] == {"y": [[10, 10]]}
    maps = Path(f"/proc/{process.pid}/maps").read_text()
    assert "onnxruntime" in maps
    assert "libtorch" not in maps
    code, log = finish(process, signal.SIGTERM)
    assert code == 0
    events = [line["event"] for line in log]
    assert events == ["serving", "request", "draining", "stopped"]
    assert log[1]["route"] == "predict"
    assert log[1]["status"] == 200
    assert log[-1]["finished"] is True


def test_sighup_loads_again_and_ctrl_c_is_130(model):
    process, told = start(model)
    process.send_signal(signal.SIGHUP)
    for line in process.stderr:
        if json.loads(line)["event"] == "model loaded":
            break
    with urllib.request.urlopen(f"{told['address']}/v2/models/tiny") as got:
        assert json.load(got)["versions"] == ["2"]
    assert finish(process, signal.SIGINT)[0] == 130


def test_a_token_and_another_name(model, tmp_path):
    (tmp_path / "token").write_text("0123456789abcdef")
    process, told = start(model, "--name", "other", "--token-file", str(tmp_path / "token"))
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{told['address']}/predict", BODY)
    assert refused.value.code == 401
    refused.value.close()
    allowed = {"Authorization": "Bearer 0123456789abcdef"}
    request = urllib.request.Request(f"{told['address']}/v2/models/other", headers=allowed)
    with urllib.request.urlopen(request) as got:
        assert json.load(got)["name"] == "other"
    assert finish(process, signal.SIGTERM)[0] == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--host", "0.0.0.0"], "--token-file"),
        (["--host", "not a host", "--insecure"], "address of this machine"),
        (["--port", "70000"], "0 to 65535"),
        (["--port", "-1"], "0 to 65535"),
        (["--max-queue", "0"], "--max-queue must be above 0"),
        (["--max-latency-ms", "nan"], "--max-latency-ms must be above 0"),
        (["--tls-cert", "c.pem"], "go together"),
        (["--tls-cert", "c.pem", "--tls-key", "k.pem"], "PEM"),
        (["--token-file", "none"], "readable"),
        (["--affinity", "sideways"], "thread_affinity must be"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(model, capsys, monkeypatch, tmp_path, flags, said):
    monkeypatch.chdir(tmp_path)
    port = [] if "--port" in flags else ["--port", "0"]
    code = main(["serve", str(model), *port, *flags])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert said in err
    assert err.startswith("hotloop: error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "path", ["missing.onnx", "http://example.invalid/m.onnx", "m.pkl", "m.onnx"]
)
def test_models_that_cannot_be_served(capsys, monkeypatch, tmp_path, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    code = main(["serve", path, "--port", "0"])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.count("\n") == 1


class Sums(nn.Module):
    """The sum of a row, twice, and its square."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = x.sum(1, keepdim=True)
        return torch.cat([total, total, total * total], 1)


def ask_both_ways(address, name):
    with urllib.request.urlopen(f"{address}/predict", BODY) as got:
        assert [*json.load(got)["outputs"].values()] == [[[10, 10, 100]]]
    with urllib.request.urlopen(f"{address}/v2/models/{name}") as got:
        (spec,) = json.load(got)["inputs"]
    assert (spec["datatype"], spec["shape"]) == ("FP32", [-1, 4])
    tensor = {"name": spec["name"], "datatype": "FP32", "shape": [2, 4], "data": [1.0] * 8}
    body = json.dumps({"inputs": [tensor]}).encode()
    with urllib.request.urlopen(f"{address}/v2/models/{name}/infer", body) as got:
        (out,) = json.load(got)["outputs"]
    assert (out["shape"], out["data"]) == ([2, 3], [4, 4, 16] * 2)


def test_an_export_of_openvino_is_served_without_torch(tmp_path):
    pytest.importorskip("openvino")
    example = torch.randn(2, 4)
    with hotloop.compile_inference(
        Sums(), example, engines=["openvino"], batch_sizes=[1], cache=False
    ) as runner:
        runner.save(tmp_path / "sums")
    process, told = start(tmp_path / "sums")
    assert (told["name"], told["engine"]) == ("sums", "openvino")
    ask_both_ways(told["address"], "sums")
    maps = Path(f"/proc/{process.pid}/maps").read_text()
    assert "openvino" in maps
    assert "libtorch" not in maps
    assert finish(process, signal.SIGTERM)[0] == 0


def test_an_archive_of_torch_export_is_served(tmp_path):
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        Sums().eval(), (torch.randn(3, 4),), dynamic_shapes={"x": {0: batch}}
    )
    path = tmp_path / "sums.pt2"
    write_archive(program, path)
    process, told = start(path)
    assert told["name"] == "sums"
    ask_both_ways(told["address"], "sums")
    assert finish(process, signal.SIGTERM)[0] == 0
