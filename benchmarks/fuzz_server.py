"""The fuzz tests of ``tests/serve`` for stated counts: ``benchmarks/fuzz_server.py 100000 500``.

Drawn bodies for the tensor parser, then schemathesis with so many examples for each operation of a
server in this process. Exit code 1 and the failing example where something is found.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from hotloop.serve import Limits
from support import fuzzing, serving


def main() -> int:
    num_bodies, num_examples = (int(text) for text in (*sys.argv[1:], "20000", "100")[:2])
    limits = Limits(max_body_bytes=1_000_000, max_json_bytes=100_000)
    count = taken = 0

    @settings(
        max_examples=num_bodies, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(fuzzing.bodies())
    def parser(body: tuple[bytes, bytes | None]) -> None:
        nonlocal count, taken
        count += 1
        taken += fuzzing.check(body, limits)

    started = time.monotonic()
    parser()
    print(f"parser: {count:,} bodies, {taken:,} taken, the rest refused, nothing else; "
          f"{time.monotonic() - started:.0f} s")  # fmt: skip
    with serving.Running(serving.Doubler()) as served, tempfile.TemporaryDirectory() as folder:
        found = fuzzing.run_schemathesis(served.address, folder, max_examples=num_examples)
        served.still_serves()
        statuses = dict(sorted(served.server.stats.requests.items()))
    print(found.stdout[-1500:])
    print(f"answers by route and status: {statuses}")
    return found.returncode


if __name__ == "__main__":
    sys.exit(main())
