"""The train step: one call from a batch to updated weights.

check         what must hold of model, loss and optimizer before the first step
step          TrainStep: parts of a batch, the fast path or PyTorch's; compile: chooses it
batch         one batch: its trees, its tensors, the key of its program; layout: of its image
loss_weight   what a loss is the mean of, so that parts make the loss of a batch (loss_parts)
function      the same of a train function of the user's own: recorded_function, and function_guards
              (what it reaches), function_markers (steps of optimizers and schedulers inside it),
              function_updates (their rules in its graph), effects (what it prints or writes)
path_choice   how a step is run, and why
recorded      steps recorded, checked and run as programs of ``graph``
guards        what changed in Python between two steps; the step took it for constant
guards_reach  finds it: code (what it names), places and tensors (a watch for each thing found)
guards_memory where it shows: words of memory, compared in one call (tables)
guards_watch  how values are compared and named; settings: of torch, and random numbers
recorded_chunk  the same of a chunk of a batch, for workers; chunk: its graph, what it hands over
updates       optimizer rules: which, their state, their scalars; update_nodes: in a recorded graph
operations    where the time goes: products and convolutions, timed alone
precision     precision auto: a probe on copies
cuda          the step on a GPU, captured in a CUDA graph
gradients     GradientStep: gradients alone, for loops of other people
accumulator   GradientAccumulator
"""

from .accumulator import GradientAccumulator
from .batch import NO_TARGET
from .compile import compile_step
from .function import FunctionStep
from .step import TrainStep

__all__ = ["NO_TARGET", "FunctionStep", "GradientAccumulator", "TrainStep", "compile_step"]
