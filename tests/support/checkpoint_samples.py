"""Small checkpoints whose contents follow from their step and a letter, for the tests beside."""

import os

import torch

from hotloop.train.checkpoint import Checkpoint, CheckpointStore
from hotloop.train.system_calls import Files


class QuickFiles(Files):
    """No waiting for the disk: for tests that cut no power and save often."""

    def fsync(self, fd):
        os.fstat(fd)


def sample(step, variant="a"):
    generator = torch.Generator().manual_seed(1000 * step + ord(variant))
    model = {"weight": torch.randn(7, 11, generator=generator), "bias": torch.ones(11) * step}
    return {
        "tensors": {"model": model, "optimizer": {"0.step": torch.tensor(step)}},
        "document": {"step": step, "variant": variant},
    }


def save_sample(store: CheckpointStore, step, variant="a"):
    return store.save(step, **sample(step, variant))


def variant_of(found: Checkpoint | None):
    """(step, variant) of an intact sample, ``None`` of nothing; fails on any wrong bit."""
    if found is None:
        return None
    step, variant = found.document["step"], found.document["variant"]
    expected = sample(step, variant)
    assert found.step == step
    assert found.document == expected["document"]
    assert sorted(found.tensors) == sorted(expected["tensors"])
    for group, tensors in expected["tensors"].items():
        assert sorted(found.tensors[group]) == sorted(tensors)
        for name, tensor in tensors.items():
            assert found.tensors[group][name].numpy().tobytes() == tensor.numpy().tobytes()
    return step, variant
