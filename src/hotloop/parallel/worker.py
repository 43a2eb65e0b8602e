"""The process of one worker: a chunk number comes in, its gradients go into shared memory."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import struct
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from ..graph.table import Row, from_rows
from ..step.chunk import Chunk, Part
from .chunk_program import ChunkProgram, Rows
from .placement import WorkerPlacement, placed
from .shared import Place, opened

# A chunk; the chunk again, and the processor seconds that it took.
REQUEST, ANSWER = struct.Struct("i"), struct.Struct("if")
# In place of a chunk number: end; and, for tests: die, or sleep before the next chunk.
END, DIE, SLEEP = -1, -2, -3


@dataclass(frozen=True)
class Job:
    """What a worker needs to know, all of it small.

    Attributes:
        graph: of the chunk (``graph.table``). parts, scale: as ``ChunkProgram`` has them.
        block: path of the shared block, of ``num_bytes``.
        tensors: what the graph's inputs are, by kind. rows: of the chunks, in the order of
            ``Rows.tensors``. batch: its parts.
        placement: where to run; ``None``: anywhere.
    """

    graph: list[Row]
    parts: list[Part]
    scale: float
    block: str
    num_bytes: int
    tensors: dict[str, list[Place]]
    rows: list[Place]
    batch: list[Place]
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
    program = _program(job, block)
    with contextlib.suppress(EOFError, OSError):
        connection.send_bytes(ANSWER.pack(END, 0.0))
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
            program.run(chunk)
            used_s = time.thread_time() - began_s
            connection.send_bytes(ANSWER.pack(chunk, used_s))


def _program(job: Job, block: mmap.mmap) -> ChunkProgram:
    """The chunk on the memory that all processes see."""

    def views(places: list[Place]) -> list[torch.Tensor]:
        return [place.view(block) for place in places]

    tensors = {kind: views(places) for kind, places in job.tensors.items()}
    chunk = Chunk(from_rows(job.graph), tensors, job.parts, [], [])
    rows = Rows.from_tensors(job.parts, views(job.rows))
    return ChunkProgram(chunk, tensors, rows, job.scale, views(job.batch))
