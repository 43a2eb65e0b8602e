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
checkpoint   CheckpointStore: durable folders; encode, manifest, tensor_file, system_calls under it
evaluate     loss and accuracy on a data set
report       TrainReport
curve        the learning curve as a picture
interrupt    Ctrl-C as a flag
zoo          the models of the benchmarks
trials       plans on a user's model and data, each in a fresh process; trial_worker, child: of it
prove        a change against the present plan; tuner, tune_result: search, proof, plan file
tuned        what tuning found before, for plans left to measurement
"""

from .checkpoint import Checkpoint, CheckpointStore
from .progress import EpochRecord, Progress
from .prove import Proven, prove
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
