"""Data-parallel training: chunks of a batch on workers that share the weights; several machines.

team          threads that run chunks and update their share of the weights
chunk_program  a chunk on the memory of one worker; plain_chunks: chunks as PyTorch makes them
processes     the same with processes; shared: the memory they share; worker: what one runs;
              preloaded: what they are forked with
placement     WorkerPlacement: where a worker runs and takes memory from
step          ParallelStep: a train step on a team; what to do when a worker hangs
balance       LoadBalancer, WorkerStats, BatchSizeAdjuster: how many chunks each worker begins with
synchronizer  GradientSynchronizer: the weighted sum of gradients, for loops of one's own
hosts         Hosts: several machines under torchrun, one reduction between them; joining: how they
              find each other
simulate      what a number of workers of given speeds would do
trainer       DataParallelTrainer
"""

from .balance import BatchSizeAdjuster, LoadBalancer, WorkerStats
from .hosts import Hosts
from .joining import joined
from .placement import WorkerPlacement, default_num_workers, place_workers
from .step import ParallelStep, default_chunk_size
from .synchronizer import GradientSynchronizer
from .trainer import DataParallelTrainer

__all__ = [
    "BatchSizeAdjuster",
    "DataParallelTrainer",
    "GradientSynchronizer",
    "Hosts",
    "LoadBalancer",
    "ParallelStep",
    "WorkerPlacement",
    "WorkerStats",
    "default_chunk_size",
    "default_num_workers",
    "joined",
    "place_workers",
]
