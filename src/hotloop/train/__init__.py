"""Training: from data to a trained model, and back from any checkpoint.

trainer      Trainer: what is trained, and fit
run          a run stage by stage, each a file: resolve, run_data, tuned, predict, build_step,
             refine_budget, make_loop, loop, memory_use, loop_report
request      what fit was asked for; parts: what is trained
run_context  threads, placement, allocator, random state and signals of a run
loop         the loop itself: batches, steps, evaluation, checkpoints, when to stop
monitoring   what the monitor is told of a run
progress     counters and history of a run
snapshot     a run as tensors and a document, and back
checkpoint   CheckpointStore: durable folders; encode, manifest, tensor_file, system_calls under it;
             array_file: the same files of NumPy arrays
evaluate     loss and accuracy on a data set
report       TrainReport
curve        the learning curve as a picture
interrupt    Ctrl-C as a flag
zoo          the models of the benchmarks
trials       plans on a user's model and data, each in a fresh process; trial_worker, child: of it
proof        a change against the present plan; tuner, tune_result: search, proof, plan file
tuned        what tuning found before, for plans left to measurement

Importing loads no torch, nor do progress, checkpoint, manifest, system_calls and array_file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import names_in

if TYPE_CHECKING:
    from .checkpoint import Checkpoint, CheckpointStore
    from .progress import EpochRecord, Progress
    from .proof import Proven, prove
    from .report import TrainReport
    from .trainer import Trainer
    from .tune_result import TuneResult
    from .tuner import tune

__all__ = [
    "Checkpoint",
    "CheckpointStore",
    "EpochRecord",
    "Progress",
    "Proven",
    "TrainReport",
    "Trainer",
    "TuneResult",
    "prove",
    "tune",
]

_MODULE_OF = {
    "Checkpoint": "checkpoint",
    "CheckpointStore": "checkpoint",
    "EpochRecord": "progress",
    "Progress": "progress",
    "Proven": "proof",
    "TrainReport": "report",
    "Trainer": "trainer",
    "TuneResult": "tune_result",
    "prove": "proof",
    "tune": "tuner",
}
__getattr__ = names_in(__name__, _MODULE_OF)
