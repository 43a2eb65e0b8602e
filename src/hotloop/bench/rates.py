"""Process that measures what the machine reaches now: ``python -m hotloop.bench.rates SETUP.json``.

Neighbours on the same host change the bandwidth of memory by half from minute to minute, so a
floor holds only for the minutes in which its rates were measured: this takes its turn like a peer.

Lines in: ``{"turn": n}``. Lines out: ``{"ready": true}``, then
``{"flop_per_s": x, "bytes_per_s": y}``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Products of this size, arrays of so many bytes, each timed for so long a turn.
_SIZE = 2048
_ARRAY_BYTES = 128 << 20
_TURN_S = 0.3


def main() -> int:
    """Prepare, warm up, answer."""
    setup = json.loads(Path(sys.argv[1]).read_text())

    import torch

    torch.set_num_threads(setup["threads"])
    a, b, c = (torch.rand(_SIZE, _SIZE) for _ in range(3))
    x, y, z = (torch.zeros(_ARRAY_BYTES // 4) for _ in range(3))
    products: list[Callable[[], object]] = [lambda: torch.mm(a, b, out=c)]
    if torch.backends.mkldnn.is_available():
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    streams: list[Callable[[], object]] = [
        lambda: z.copy_(x),
        lambda: torch.add(x, y, alpha=3.0, out=z),
    ]
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        with torch.no_grad():
            product_s = min(_least_s(call) for call in products)
            copy_s, triad_s = (_least_s(call) for call in streams)
        answer = {
            "flop_per_s": 2 * _SIZE**3 / product_s,
            "bytes_per_s": max(2 * _ARRAY_BYTES / copy_s, 3 * _ARRAY_BYTES / triad_s),
        }
        print(json.dumps(answer), flush=True)
    return 0


def _least_s(call: Callable[[], object]) -> float:
    call()
    times: list[float] = []
    end = time.perf_counter() + _TURN_S / 2
    while not times or time.perf_counter() < end:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


if __name__ == "__main__":
    sys.exit(main())
