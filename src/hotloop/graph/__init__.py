"""Graphs of ATen's operations and hotloop's own, for training and inference: passes over them.

A train step is recorded below autograd and run without it; a model's forward pass comes from
``torch.export`` and becomes layers of the engine in ``infer/``.

recording     what ATen was asked for in one step, and what that depends on
user_code     the line of the user's code that runs
compare       whether two recordings are the same step
from_recording  a recording as a graph
ordering      readers of what a function writes and reads again stand before the next write
passes        all passes over a graph of training, in their order
from_export   a graph of inference, and its passes
drawing       random numbers as functions of a key; table: a graph as plain values
choices       which kernel makes an operation: timed once, kept for the run
lower         a graph as instructions on memory: hotloop's kernels, else ATen
epilogues     what a kernel does with its result before it reaches memory
batch_norm_folding  batch norm in eval mode into the weights before it
memory_plan   where each temporary lies
program       instructions bound to memory, run step by step
"""
