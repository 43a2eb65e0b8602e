"""A train step as a graph: recorded below autograd, rewritten by passes, run without autograd.

recording     what ATen was asked for in one step, and what that depends on
compare       whether two recordings are the same step
from_recording  a recording as a graph
drawing       random numbers as functions of a key; table: a graph as plain values
lower         a graph as instructions on memory: hotloop's kernels, else ATen
memory_plan   where each temporary lies
program       instructions bound to memory, run step by step
"""
