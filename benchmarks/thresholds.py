"""Costs that rules of ``hotloop.monitor.rules`` reckon with, measured on this machine.

    python benchmarks/thresholds.py [--json benchmarks/results/thresholds.json]

A fault: fresh memory of 64 MiB is taken, one byte of each 4 KiB page is written, and the memory is
given back, against writing the same bytes again; by one thread, and by two at once.
"""

import argparse
import ctypes
import json
import mmap
import statistics
import sys
import threading
import time
from pathlib import Path

from about import about

SIZE, ROUNDS = 64 * 2**20, 15
PAGES = SIZE // mmap.PAGESIZE


def touch(memory: mmap.mmap) -> float:
    """Seconds of one pass of memset, whose loop is not Python's."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    began_s = time.perf_counter()
    ctypes.memset(address, 1, SIZE)
    return time.perf_counter() - began_s


def fault_s() -> float:
    """Seconds of a fault more than writing the page again, giving it back included."""
    memory = mmap.mmap(-1, SIZE)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    fresh_s = touch(memory)
    again_s = touch(memory)
    began_s = time.perf_counter()
    memory.close()
    return (fresh_s - again_s + time.perf_counter() - began_s) / PAGES


def together(count: int) -> list[float]:
    found: list[float] = []

    def work() -> None:
        for _ in range(ROUNDS):
            found.append(fault_s())

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = {}
    for count in (1, 2):
        values = together(count)
        rows[f"fault_s, {count} threads"] = {
            "median": statistics.median(values), "min": min(values), "max": max(values),
            "n": len(values),
        }  # fmt: skip
        print(f"{count} threads: {statistics.median(values) * 1e6:.2f} us a fault")
    if args.json:
        document = {
            "what": "seconds of a minor page fault of 4 KiB, zeroing and giving back included",
            "rows": rows,
            **about(),
        }
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
