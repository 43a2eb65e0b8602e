"""The budget of a run once its step is made: with the pool of batches that it is fed from."""

from __future__ import annotations

import dataclasses

from ..memory import Budget, MemoryPool
from ..memory.tree import flatten
from .build_step import BuiltStep
from .predict import Prediction
from .run_data import RunData


def refine_budget(data: RunData, predicted: Prediction, built: BuiltStep) -> Budget:
    """The budget of the report: as predicted, with the pool that was made.

    Every step begins plain, so its working memory is that of PyTorch's step.
    """
    if built.layouts is None:  # A batch in use and one that is loaded.
        pool_bytes = 2 * sum(t.nbytes for t in flatten(data.batch)[0] if not t.is_sparse)
    else:
        pool_bytes = MemoryPool.predict_bytes(built.layouts, built.num_buffers)
    return dataclasses.replace(predicted.budget, batch_data_bytes=pool_bytes + data.resident_bytes)
