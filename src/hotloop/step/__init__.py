"""The train step: one call from a batch to updated weights.

check         what must hold of model, loss and optimizer before the first step
step          compile_step: a step as it was chosen
path_choice   whether a step is compiled, and why
capture       the whole step as one graph
chunk         the gradients of a part of a batch
updates       optimizer rules in that graph
operators     hotloop's own operators, and the passes that put them there
graph_file    a graph as plain values
compile_worker  the process that compiles; compiler: the C++ compiler that it needs
rehearsal     a small step captured before memory is predicted
program       compiled code: load, bind, run one step or many
operations    where the time goes: products and convolutions, timed alone
cuda          the step on a GPU, captured in a CUDA graph
precision     precision auto: a probe on copies
pooling       max pooling and its relu as two operators
routes        which kernel makes each matrix product, by measurement
compiled      a compiled step bound to a model and an optimizer
accumulator   GradientAccumulator
guards        what changed in Python between two steps; the step took it for constant
guards_reach  finds it: code (what it names), places and tensors (a watch for each thing found)
guards_memory where it shows: words of memory, compared in one call (tables)
guards_watch  how values are compared and named; settings: of torch, and random numbers
"""

from .accumulator import GradientAccumulator
from .step import TrainStep, compile_step

__all__ = ["GradientAccumulator", "TrainStep", "compile_step"]
