"""Process that measures what the machine reaches now: ``python -m hotloop.bench.rates SETUP.json``.

Neighbours on the same host change the bandwidth of memory by half from minute to minute, so a
floor holds only for the minutes in which its rates were measured: this takes its turn like a peer.

Lines in: ``{"turn": n}``. Lines out: ``{"ready": true}``, then
``{"flop_per_s": x, "bytes_per_s": y}``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ..measure import least_seconds
from ..measure.ceilings import product, routes_of

# Products of this size, arrays of so many bytes, timed for so long a turn.
_SIZE = 2048
_ARRAY_BYTES = 128 << 20
_TURN_S = 0.6


def main() -> int:
    """Prepare, warm up, answer."""
    setup = json.loads(Path(sys.argv[1]).read_text())

    import torch

    torch.set_num_threads(setup["threads"])
    products = {
        route: product(torch.float32, route, _SIZE, setup["threads"])
        for route, _ in routes_of(torch.float32)
    }
    x, y, z = (torch.zeros(_ARRAY_BYTES // 4) for _ in range(3))
    streams = {"copy": lambda: z.copy_(x), "triad": lambda: torch.add(x, y, alpha=3.0, out=z)}
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        with torch.no_grad():
            seconds, _ = least_seconds({**products, **streams}, limit_s=_TURN_S)
        copy_s, triad_s = seconds["copy"], seconds["triad"]
        answer = {
            "flop_per_s": 2 * _SIZE**3 / min(seconds[route] for route in products),
            "bytes_per_s": max(2 * _ARRAY_BYTES / copy_s, 3 * _ARRAY_BYTES / triad_s),
        }
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
