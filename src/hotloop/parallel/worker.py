"""The process of one worker: a chunk number comes in, its gradients go into shared memory."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from ..step.program import Program
from .placement import WorkerPlacement, placed
from .shared import Place, opened

# A chunk; the chunk again, its loss, and the processor seconds that it took.
REQUEST, ANSWER = struct.Struct("i"), struct.Struct("iff")
# In place of a chunk number: end; and, for tests: die, or sleep before the next chunk.
END, DIE, SLEEP = -1, -2, -3


@dataclass(frozen=True)
class Job:
    """What a worker needs to know, all of it small.

    Attributes:
        path: the compiled chunk. block: path of the shared block, of ``num_bytes``.
        fixed: inputs that all chunks share; shared: buffers, which each chunk copies first.
        of_chunks: for each chunk, the copies, the slots and the key. control: last but x and y.
        x, y: of each chunk.
        placement: where to run; ``None``: anywhere.
    """

    path: str
    block: str
    num_bytes: int
    fixed: list[Place]
    shared: list[Place]
    of_chunks: list[list[Place]]
    control: Place
    x: list[Place]
    y: list[Place]
    placement: WorkerPlacement | None


def main(connection: Connection, job: Job) -> None:
    """Serve until told to end, or until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's; it ends its workers.
    torch.set_num_threads(1)
    with placed(job.placement):
        _serve(connection, job)


def _serve(connection: Connection, job: Job) -> None:
    # By its path, which costs the trainer nothing when this process dies on the way.
    descriptor = os.open(job.block, os.O_RDWR)
    block = opened(descriptor, job.num_bytes)
    os.close(descriptor)
    shared = [place.view(block) for place in job.shared]
    control = job.control.view(block)
    programs, copies, batches = [], [], []
    for places, x, y in zip(job.of_chunks, job.x, job.y, strict=True):
        program = Program(Path(job.path), 1)
        own = [place.view(block) for place in places]
        program.bind([*(p.view(block) for p in job.fixed), *own, control], control, [])
        programs.append(program)
        copies.append(own[: len(shared)])
        batches.append((x.view(block), y.view(block)))
    with contextlib.suppress(EOFError, OSError):
        connection.send_bytes(ANSWER.pack(END, 0.0, 0.0))
        pause_s = 0
        while (chunk := REQUEST.unpack(connection.recv_bytes())[0]) != END:
            if chunk == DIE:
                os.kill(os.getpid(), signal.SIGKILL)
            if chunk == SLEEP:
                pause_s = 3600
                continue
            if pause_s:
                signal.pause()
            began_s = time.thread_time()
            for copy, value in zip(copies[chunk], shared, strict=True):
                copy.copy_(value)
            loss = programs[chunk].run(*batches[chunk], None)
            used_s = time.thread_time() - began_s
            connection.send_bytes(ANSWER.pack(chunk, loss.item(), used_s))
