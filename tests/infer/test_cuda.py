"""Inference on a GPU against eager; what needs no device is tested without one."""

import copy
import threading

import numpy
import pytest
import torch
from torch import nn

import hotloop
from hotloop.errors import InputError, ModelError
from hotloop.infer.capture import read_signature
from hotloop.infer.check import FLOAT32_ERROR
from hotloop.infer.cuda import (
    COMPILED_GRAPH,
    CUDA_ENGINES,
    GRAPH,
    TF32_ERROR,
    CudaArtifactBuilder,
    cuda_settings,
)
from support import inference_models as models

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def _runner(model, example, **options):
    options = {"cache": False, "batch_sizes": [4], "engines": [GRAPH], **options}
    return hotloop.compile_inference(model, example, **options)


def _eager(model, *args, **kwargs):
    with torch.inference_mode():
        return copy.deepcopy(model).eval()(*args, **kwargs)


def _close(got, want):
    # PyTorch's default takes TF32 for convolutions.
    torch.testing.assert_close(got.cpu(), want.cpu(), rtol=2e-3, atol=2e-3)


@needs_gpu
@pytest.mark.parametrize("engine", CUDA_ENGINES)
def test_each_batch_size_answers_as_eager(engine):
    model = models.Residual().cuda()
    x = torch.randn(4, 1, 9, 9, device="cuda")
    with _runner(model, x, engines=[engine]) as runner:
        assert runner.engine.name == engine
        for batch in (1, 4, 4, 9, 1):
            x = torch.randn(batch, 1, 9, 9, device="cuda")
            got = runner(x)
            assert got.device == x.device
            _close(got, _eager(model, x))


@needs_gpu
def test_the_race_is_in_the_report_and_remembered(monkeypatch):
    from hotloop.infer import compile as room

    monkeypatch.setattr(room, "BUSY", float("inf"))
    model, x = models.perceptron().cuda(), torch.randn(4, 12, device="cuda")
    with hotloop.compile_inference(model, x, batch_sizes=[1, 4]) as runner:
        rows = runner.report.rows
        assert {row.setting.engine for row in rows} == set(CUDA_ENGINES)
        assert all(row.error is not None and row.error <= FLOAT32_ERROR for row in rows)
        assert sum(row.won for row in rows) == 2
        assert runner.report.memory["model_parameters_bytes"] == sum(
            p.nbytes for p in model.parameters()
        )
    with hotloop.compile_inference(model, x, batch_sizes=[1, 4]) as again:
        assert again.report.from_cache
        _close(again(x), _eager(model, x))


@needs_gpu
def test_more_sizes_than_graphs_are_kept(monkeypatch):
    monkeypatch.setattr("hotloop.infer.cuda.MAX_GRAPHS", 2)
    model = models.perceptron().cuda()
    with _runner(model, torch.randn(4, 12, device="cuda")) as runner:
        for batch in (1, 2, 3, 4, 5, 1, 3):
            x = torch.randn(batch, 12, device="cuda")
            _close(runner(x), _eager(model, x))
        assert len(runner.engine._graphs) == 2


@needs_gpu
def test_arrays_and_tensors_of_the_host_are_answered_too():
    model = models.perceptron().cuda()
    with _runner(model, numpy.zeros((4, 12), numpy.float32)) as runner:
        x = torch.randn(7, 12)
        want = _eager(model, x.cuda())
        got = runner(x.numpy())
        assert isinstance(got, numpy.ndarray)
        _close(torch.from_numpy(got), want)
        _close(runner(x), want)
        x.requires_grad_()
        answer = runner(x)
        assert not answer.requires_grad
        _close(answer, want)
        _close(runner(x.detach().cuda()), want)


@needs_gpu
def test_several_inputs_and_results_keep_their_structure():
    pair = models.Pair().cuda()
    left, right = torch.randn(4, 5, device="cuda"), torch.randn(4, 3, device="cuda")
    with _runner(pair, (left, right)) as runner:
        both, classes = runner(left, right)
        want = _eager(pair, left, right)
        _close(both, want[0])
        assert torch.equal(classes, want[1])
    named = models.Named().cuda()
    example = {"ids": torch.randint(0, 11, (4, 6)), "mask": torch.ones(4, 6)}
    with _runner(named, example) as runner:
        got = runner(**{k: v.cuda() for k, v in example.items()})
        want = _eager(named, **{k: v.cuda() for k, v in example.items()})
        assert list(got) == list(want)
        for key in want:
            _close(got[key], want[key])


@needs_gpu
def test_an_answer_is_the_callers_own():
    model = models.perceptron().cuda()
    with _runner(model, torch.randn(4, 12, device="cuda")) as runner:
        x = torch.randn(4, 12, device="cuda")
        first = runner(x)
        before = first.clone()
        runner(torch.randn(4, 12, device="cuda"))
        assert torch.equal(first, before)


@needs_gpu
def test_threads_with_streams_of_their_own_get_their_own_answers():
    model = models.perceptron(512).cuda()
    wrong = []
    with _runner(model, torch.randn(4, 12, device="cuda")) as runner:

        def work(seed: int) -> None:
            with torch.cuda.stream(torch.cuda.Stream()):
                draw = torch.Generator("cuda").manual_seed(seed)
                for _ in range(50):
                    x = torch.randn(4, 12, device="cuda", generator=draw)
                    got, want = runner(x), model(x)
                    if not torch.allclose(got, want, rtol=1e-4, atol=1e-5):
                        wrong.append(seed)

        with torch.no_grad():
            threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert not wrong


@needs_gpu
def test_lower_precision_is_checked_against_its_bound():
    model = models.Residual().cuda()
    x = torch.randn(64, 1, 9, 9)
    before = torch.backends.cuda.matmul.fp32_precision
    with _runner(model, x[:4], max_error=0.05, samples=x) as runner:
        rows = {row.setting.precision: row for row in runner.report.rows}
        assert set(rows) == {"float32", "tf32", "bfloat16"}
        assert all(row.error is not None and row.error <= 0.05 for row in rows.values())
        assert rows["bfloat16"].error > rows["float32"].error
    with _runner(model, x[:4], max_error=1e-9, samples=x) as runner:
        assert runner.engine.precision == "float32"
        rows = {row.setting.precision: row for row in runner.report.rows}
        assert "above" in (rows["bfloat16"].excluded or "")
    assert torch.backends.cuda.matmul.fp32_precision == before
    labels = _eager(model, x.cuda()).argmax(1).cpu()
    with _runner(model, x[:4], max_accuracy_loss=0.1, samples=(x, labels)) as runner:
        losses = [row.accuracy_loss for row in runner.report.rows]
        assert any(loss is not None for loss in losses)


@needs_gpu
def test_a_model_on_a_gpu_is_not_exported(tmp_path):
    model = models.perceptron().cuda()
    with (
        _runner(model, torch.randn(4, 12)) as runner,
        pytest.raises(ModelError, match="a model on the CPU"),
    ):
        runner.save(tmp_path / "export")
    assert not (tmp_path / "export").exists()


@needs_gpu
def test_engines_of_the_cpu_are_refused_on_a_gpu():
    with pytest.raises(InputError, match="an engine is one of cuda graph"):
        _runner(models.perceptron().cuda(), torch.randn(4, 12), engines=["openvino"])


def _builder(model: nn.Module, example: torch.Tensor) -> CudaArtifactBuilder:
    signature, tensors = read_signature(model, example)
    return CudaArtifactBuilder(model, signature, tensors, torch.device("cpu"))


def test_candidates_of_a_gpu():
    settings = cuda_settings(CUDA_ENGINES, False)
    assert [(s.engine, s.precision) for s in settings] == [
        (GRAPH, "float32"), (COMPILED_GRAPH, "float32"),
    ]  # fmt: skip
    lower = {s.precision for s in cuda_settings(CUDA_ENGINES, True)}
    assert lower == {"float32", "tf32", "bfloat16"}


def test_only_convolutions_may_differ_by_tf32():
    linear = _builder(models.perceptron(), torch.randn(4, 12))
    images = _builder(models.Residual(), torch.randn(4, 1, 9, 9))
    assert linear.float32_error == FLOAT32_ERROR
    assert images.float32_error == TF32_ERROR


def test_a_builder_for_a_gpu_compiles_once_and_writes_nothing():
    artifacts = _builder(models.perceptron(), torch.randn(4, 12))
    plain, compiled = cuda_settings(CUDA_ENGINES, False)
    assert not artifacts.must_compile(plain)
    assert artifacts.must_compile(compiled)
    artifacts.build(compiled)
    assert not artifacts.must_compile(compiled)
    assert artifacts.fixed_batch_of(compiled) is None
    assert artifacts.weights_of(plain) == artifacts.weights_of(compiled)
    with pytest.raises(ModelError, match="a model on the CPU"):
        artifacts.archive()
    with pytest.raises(ModelError, match="a model on the CPU"):
        artifacts.onnx()


def test_a_model_on_another_kind_of_device_is_refused():
    model = nn.Linear(3, 2, device="meta")
    with pytest.raises(ModelError, match="on the CPU or on one CUDA device"):
        hotloop.compile_inference(model, torch.randn(4, 3))
