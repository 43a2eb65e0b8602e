"""The public names, pinned; and what importing them must not do."""

import subprocess
import sys

import pytest

import hotloop

PUBLIC = [
    "Arguments", "BatchBuffer", "BatchLayout", "BatchSizeAdjuster", "Budget", "BudgetError",
    "BufferState",
    "CacheStats", "Ceilings", "CheckpointConfig", "CheckpointError", "CheckpointStore",
    "CpuConfig", "CpuStats", "DataError", "DataParallelTrainer", "DivergedError",
    "FunctionStep", "GradientAccumulator", "GradientSynchronizer", "HotloopError",
    "InferenceReport",
    "InferenceRunner", "InputError", "LoadBalancer",
    "Machine", "MemoryConfig", "MemoryPool", "MemoryStats", "MissingExtraError", "ModelError",
    "NumaConfig", "Optimization", "PackedDataset", "ParallelConfig", "PerformanceMonitor",
    "PerformanceReport", "Plan", "PlanError", "PoolError", "RunError",
    "Sealed", "SealedError", "StepConfig",
    "StorageError", "TensorArena", "ThreadAffinity", "TrainReport", "TrainStep", "Trainer",
    "WorkerStats", "__version__", "compile_inference", "compile_step", "load_inference",
    "load_mnist", "open_dataset", "read_key", "tune",
]  # fmt: skip


def test_the_exported_names_are_these():
    assert sorted(hotloop.__all__) == PUBLIC
    assert set(PUBLIC) <= set(dir(hotloop))


@pytest.mark.parametrize("name", PUBLIC)
def test_every_name_is_there(name):
    assert getattr(hotloop, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Trainr'"):
        _ = hotloop.Trainr


def test_import_changes_nothing_and_loads_no_torch():
    code = (
        "import os, sys, logging, threading, signal\n"
        "before = dict(os.environ), logging.root.handlers[:], threading.active_count(), "
        "signal.getsignal(signal.SIGINT)\n"
        "import hotloop\n"
        "after = dict(os.environ), logging.root.handlers[:], threading.active_count(), "
        "signal.getsignal(signal.SIGINT)\n"
        "assert before == after and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
