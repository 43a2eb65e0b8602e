"""Changes numbers of a training export, signs it again, and runs what is still accepted.

Each block of memory ends at a page that nobody may touch: a program that leaves its memory ends
this process with a signal. Arguments: folder of the export, folder to work in, seed, count.
Prints how many documents were refused, and how many ran.
"""

import ctypes
import json
import mmap
import random
import shutil
import sys
from pathlib import Path

import numpy

from hotloop.enclave.training import document as documents
from hotloop.enclave.training import load_training, memory
from hotloop.errors import HotloopError

PAGE = mmap.PAGESIZE
MOST_BYTES = 2**28
_kept = []


def guarded_block(size_bytes):
    """``memory.block_of``, ending as near to a forbidden page as its alignment allows."""
    if size_bytes > MOST_BYTES:
        raise MemoryError
    whole = -(-size_bytes // PAGE) * PAGE
    mapped = mmap.mmap(-1, whole + PAGE)
    _kept.append(mapped)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    assert not ctypes.CDLL(None).mprotect(
        ctypes.c_void_p(address + whole), ctypes.c_size_t(PAGE), 0
    )
    start = (whole - size_bytes) // 64 * 64
    return numpy.frombuffer(mapped, numpy.uint8, size_bytes, start)


def numbers_in(value, found, path=()):
    """Where numbers are in a tree."""
    if isinstance(value, dict):
        for key, each in value.items():
            numbers_in(each, found, (*path, key))
    elif isinstance(value, list):
        for key, each in enumerate(value):
            numbers_in(each, found, (*path, key))
    elif value is None or type(value) in (int, float):
        found.append(path)


def changed(value, draw):
    """Another number, near or far, or something that is none."""
    if value is None:
        return draw.choice([[0, 0], [1, 0], [0, 64], 0, ""])
    small = [value + 1, value - 1, value * 2, value // 2, value + 64, value - 64, 0, 1, -1]
    return draw.choice([*small, *small, 2**31, 2**40, 2**63, -(2**63), None, "1", [0, 0], 0.5])


def main(export, work, seed, count):
    memory.block_of = guarded_block
    draw = random.Random(seed)
    body = json.loads((export / documents.DOCUMENT).read_bytes())
    found = []
    numbers_in({name: body[name] for name in ("programs", "tensors", "x", "y", "optimizer",
                                              "batch_size", "num_threads")}, found)  # fmt: skip
    refused = ran = 0
    shutil.copytree(export, work)
    for _ in range(count):
        made = json.loads(json.dumps(body))
        for _ in range(draw.choice([1, 1, 1, 2, 4])):
            *above, last = draw.choice(found)
            holder = made
            try:
                for key in above:
                    holder = holder[key]
                holder[last]
            except (TypeError, IndexError):  # Above it something was changed before.
                continue
            if holder[last] is not None and type(holder[last]) not in (int, float):
                continue  # Changed before.
            holder[last] = changed(holder[last], draw)
        (work / documents.DOCUMENT).write_bytes(documents.to_bytes(made))
        _kept.clear()
        try:
            run = load_training(work, num_threads=1)
            for (kind, size), program in run._programs.items():
                for number, array in program.parts:
                    array[...] = 0 if number else 0.5
                program.run(run._tables(1)[0] if kind == "train" else None)
                assert size == program.batch_size
            ran += 1
        except (HotloopError, MemoryError):
            refused += 1
    print(json.dumps({"refused": refused, "ran": ran}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
