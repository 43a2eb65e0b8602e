"""The train step: one call from a batch to updated weights.

check         what must hold of model, loss and optimizer before the first step
step          compile_step: a step as it was chosen
path_choice   how a step is run, and why
recorded      steps recorded, checked and run as programs of ``graph``
guards        what changed in Python between two steps; the step took it for constant
guards_reach  finds it: code (what it names), places and tensors (a watch for each thing found)
guards_memory where it shows: words of memory, compared in one call (tables)
guards_watch  how values are compared and named; settings: of torch, and random numbers
updates       optimizer rules: which, their state, their scalars; update_nodes: in a recorded graph
operations    where the time goes: products and convolutions, timed alone
precision     precision auto: a probe on copies
cuda          the step on a GPU, captured in a CUDA graph
accumulator   GradientAccumulator

For workers, whose chunks are compiled by Inductor:

capture       forward, loss and backward as one graph; chunk: those of a part of a batch
graph_file    a graph as plain values
compile_worker  the process that compiles; compiler: the C++ compiler that it needs
rehearsal     a small step captured before memory is predicted
program       compiled code: load, bind, run
"""

from .accumulator import GradientAccumulator
from .step import TrainStep, compile_step

__all__ = ["GradientAccumulator", "TrainStep", "compile_step"]
