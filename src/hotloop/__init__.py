"""hotloop: train and serve PyTorch models as fast as the machine allows, in a known memory budget.

This file is the table of contents. Every public name is imported on first use, so that
``import hotloop`` changes nothing and does not load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lazy import names_in
from .version import VERSION as __version__

if TYPE_CHECKING:
    from .data import PackedDataset, load_mnist, open_dataset
    from .errors import (
        BudgetError,
        CheckpointError,
        DataError,
        DivergedError,
        HotloopError,
        InputError,
        MissingExtraError,
        ModelError,
        PlanError,
        PoolError,
        RunError,
        StorageError,
    )
    from .infer import InferenceReport, InferenceRunner, compile_inference, load_inference
    from .machine import Ceilings, ThreadAffinity
    from .measure import Machine
    from .memory import (
        Arguments,
        BatchBuffer,
        BatchLayout,
        Budget,
        BufferState,
        MemoryPool,
        TensorArena,
    )
    from .monitor import (
        CacheStats,
        CpuStats,
        MemoryStats,
        Optimization,
        PerformanceMonitor,
        PerformanceReport,
    )
    from .parallel import (
        BatchSizeAdjuster,
        DataParallelTrainer,
        GradientSynchronizer,
        LoadBalancer,
        WorkerStats,
    )
    from .plan import (
        CheckpointConfig,
        CpuConfig,
        MemoryConfig,
        NumaConfig,
        ParallelConfig,
        Plan,
        StepConfig,
    )
    from .sealed import Sealed, read_key
    from .step import FunctionStep, GradientAccumulator, TrainStep, compile_step
    from .train import CheckpointStore, Trainer, TrainReport, tune

_ROOM_OF = {
    # machine and plan
    "Machine": "measure",  # Whose ceilings can be measured.
    "ThreadAffinity": "machine",
    "Ceilings": "machine",
    "Plan": "plan",
    "CpuConfig": "plan",
    "NumaConfig": "plan",
    "MemoryConfig": "plan",
    "CheckpointConfig": "plan",
    "StepConfig": "plan",
    "ParallelConfig": "plan",
    # memory
    "Arguments": "memory",
    "BatchLayout": "memory",
    "BatchBuffer": "memory",
    "BufferState": "memory",
    "MemoryPool": "memory",
    "Budget": "memory",
    "TensorArena": "memory",
    # data
    "PackedDataset": "data",
    "open_dataset": "data",
    "load_mnist": "data",
    # training
    "compile_step": "step",
    "TrainStep": "step",
    "FunctionStep": "step",
    "GradientAccumulator": "step",
    "Trainer": "train",
    "TrainReport": "train",
    "CheckpointStore": "train",
    "tune": "train",
    # workers
    "DataParallelTrainer": "parallel",
    "GradientSynchronizer": "parallel",
    "LoadBalancer": "parallel",
    "WorkerStats": "parallel",
    "BatchSizeAdjuster": "parallel",
    # monitor
    "PerformanceMonitor": "monitor",
    "PerformanceReport": "monitor",
    "CpuStats": "monitor",
    "MemoryStats": "monitor",
    "CacheStats": "monitor",
    "Optimization": "monitor",
    # inference
    "compile_inference": "infer",
    "load_inference": "infer",
    "InferenceRunner": "infer",
    "InferenceReport": "infer",
    # sealed files
    "Sealed": "sealed",
    "read_key": "sealed",
    # errors
    "SealedError": "errors",
    "HotloopError": "errors",
    "InputError": "errors",
    "PlanError": "errors",
    "DataError": "errors",
    "ModelError": "errors",
    "CheckpointError": "errors",
    "BudgetError": "errors",
    "MissingExtraError": "errors",
    "RunError": "errors",
    "StorageError": "errors",
    "PoolError": "errors",
    "DivergedError": "errors",
}

__all__ = [
    "Arguments",
    "BatchBuffer",
    "BatchLayout",
    "BatchSizeAdjuster",
    "Budget",
    "BudgetError",
    "BufferState",
    "CacheStats",
    "Ceilings",
    "CheckpointConfig",
    "CheckpointError",
    "CheckpointStore",
    "CpuConfig",
    "CpuStats",
    "DataError",
    "DataParallelTrainer",
    "DivergedError",
    "FunctionStep",
    "GradientAccumulator",
    "GradientSynchronizer",
    "HotloopError",
    "InferenceReport",
    "InferenceRunner",
    "InputError",
    "LoadBalancer",
    "Machine",
    "MemoryConfig",
    "MemoryPool",
    "MemoryStats",
    "MissingExtraError",
    "ModelError",
    "NumaConfig",
    "Optimization",
    "PackedDataset",
    "ParallelConfig",
    "PerformanceMonitor",
    "PerformanceReport",
    "Plan",
    "PlanError",
    "PoolError",
    "RunError",
    "Sealed",
    "SealedError",
    "StepConfig",
    "StorageError",
    "TensorArena",
    "ThreadAffinity",
    "TrainReport",
    "TrainStep",
    "Trainer",
    "WorkerStats",
    "__version__",
    "compile_inference",
    "compile_step",
    "load_inference",
    "load_mnist",
    "open_dataset",
    "read_key",
    "tune",
]


__getattr__ = names_in(__name__, _ROOM_OF)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
