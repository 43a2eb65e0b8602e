"""One library of kernels with several versions of torch: its tests under each interpreter given.

python benchmarks/torch_versions.py [--json FILE] PYTHON [PYTHON ...]

Each PYTHON has a torch, pytest and hypothesis; hotloop and its library are those of this checkout.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = (
    "tests/memory/test_tensor_arena.py",
    "tests/memory/test_arena_owners.py",
    "tests/memory/test_arena_model.py",
    "tests/data/test_rows.py",
    "tests/kernels",
)
ABOUT = """
import json, sys, torch
from hotloop import kernels
from hotloop.memory import TensorArena
kernels.use_torch()
arena = TensorArena()
before = arena.stats()
with arena:
    inside = arena.offset(torch.ones(300_000)) == 0
print(json.dumps({
    "torch": torch.__version__, "python": sys.version.split()[0],
    "library": kernels.library()._name,
    "tensors_in_arena": inside, "reason": arena.reason,
}))
"""


def run(python: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(
        [python, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )


def measure(python: str, tests: list[str]) -> dict[str, object]:
    about = run(python, "-c", ABOUT)
    if about.returncode:
        return {"error": about.stderr.strip().splitlines()[-1]}
    row: dict[str, object] = json.loads(about.stdout)
    library = Path(str(row["library"]))
    row["library"] = library.name
    row["library_sha256"] = hashlib.sha256(library.read_bytes()).hexdigest()
    done = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not full", *tests)
    row["tests"] = {
        word: int(number)
        for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)
    }
    if done.returncode:
        print(done.stdout[-3000:], file=sys.stderr)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tests", nargs="*", default=list(TESTS))
    parser.add_argument("python", nargs="+")
    args = parser.parse_args()
    rows = []
    for python in args.python:
        rows.append(measure(python, args.tests))
        print(json.dumps(rows[-1]), flush=True)
        if args.json:
            document = {"tests": args.tests, "rows": rows}
            args.json.write_text(json.dumps(document, indent=1) + "\n")
    failed = [row for row in rows if "error" in row or row["tests"].keys() - {"passed", "skipped"}]
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
