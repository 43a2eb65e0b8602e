"""Graphs for any batch size, in both precisions."""

import pytest
import torch

from hotloop.infer.artifacts import ArtifactBuilder, settings_for
from hotloop.infer.capture import own_copy, read_signature, resized
from support import inference_models as models


def builder(model, example):
    twin = own_copy(model)
    return ArtifactBuilder(twin, *read_signature(twin, example))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 2, 6])
def test_the_graph_takes_any_batch_size(precision, batch):
    for model, example in (
        (models.Residual(), torch.randn(batch, 1, 9, 9)),
        (models.Pair(), (torch.randn(batch, 5), torch.randn(batch, 3))),
        (models.Named(), {"ids": torch.randint(11, (batch, 6)), "mask": torch.ones(batch, 6)}),
    ):
        artifacts = builder(model, example)
        program, fixed = artifacts.program(precision)
        assert fixed is None
        tensors = resized(artifacts.example, artifacts.signature.inputs, 5)
        with torch.inference_mode():
            want = artifacts.signature.call(artifacts.model, tensors)
            flat = precision == "bfloat16"
            got = (
                program.module()(*tensors)
                if flat
                else artifacts.signature.call(program.module(), tensors)
            )
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype
            if b.is_floating_point():
                close = {"rtol": 0.1, "atol": 0.1} if flat else {"rtol": 1e-4, "atol": 1e-5}
                torch.testing.assert_close(a, b, **close)
        artifacts.close()


def test_a_graph_bound_to_its_batch_size_says_so():
    assert builder(models.BoundToFour(), torch.randn(4, 6)).program()[1] == 4


def test_files_go_with_the_builder():
    artifacts = builder(models.perceptron(), torch.randn(2, 12))
    path = artifacts.onnx()
    assert path.is_file()
    artifacts.close()
    assert not path.parent.exists()


def test_the_settings_of_a_race():
    engines = ["eager", "inductor", "onnxruntime", "openvino"]
    everything = settings_for("latency", engines, ["float32", "bfloat16", "int8"], 4, True)
    assert len(set(everything)) == len(everything)
    pairs = {(s.engine, s.precision) for s in everything}
    assert ("onnxruntime", "bfloat16") not in pairs
    assert ("eager", "int8") not in pairs
    assert ("openvino", "int8") in pairs
    assert all(s.num_instances == 1 for s in everything)
    many = settings_for("throughput", engines, ["float32"], 4, False)
    assert {(s.num_threads, s.num_instances) for s in many} == {(4, 1), (1, 4), (2, 2)}
    assert {s.num_threads for s in settings_for("latency", engines, ["float32"], 1, False)} == {1}
