"""Process that compiles one captured step to a shared library: ``python -m ... REQUEST TARGET``.

A process of its own, so that the compiler's memory and imports never burden the training process
and its random state is never touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import sys
import tempfile
from pathlib import Path
from typing import Any


def compile_request(request: dict[str, Any], target: Path, keep: str | None = None) -> None:
    """Compile and move the finished library into place.

    Args:
        request: graph, inputs as ``(shape, strides, dtype)``, num_threads.
        target: where the library goes.
        keep: folder in which the generated sources stay, for reading.
    """
    import torch._inductor
    from torch._inductor import config

    from ..graph import operators
    from ..machine.cache_dir import COMPILER
    from .graph_file import from_values

    torch.set_num_threads(request["num_threads"])
    graph = from_values(request["graph"])
    inputs = []
    for shape, strides, dtype in request["inputs"]:
        tensor = torch.empty_strided(shape, strides, dtype=dtype)
        inputs.append(tensor.zero_())
    with contextlib.ExitStack() as stack:
        folder = keep or stack.enter_context(tempfile.TemporaryDirectory(prefix="hotloop-step-"))
        # The compiler's precompiled headers, seconds of work each, are kept beside the steps.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = keep or str(COMPILER.folder)
        built = Path(folder) / "step.so"
        with config.patch(
            {
                "fallback_random": True,  # The draws of plain PyTorch, bit for bit.
                "cpp.threads": request["num_threads"],
                "aot_inductor.compile_wrapper_opt_level": "O1",
                "autotune_local_cache": False,
                "aot_inductor.output_path": str(built),
                "aot_inductor.custom_ops_to_c_shims": operators.shims(),
                **request["options"],
            }
        ):
            made = torch._inductor.aot_compile(graph, tuple(inputs))
        # Renamed within one file system: seen whole or not at all.
        staged = target.with_name(f".{target.name}.{os.getpid()}")
        staged.write_bytes(Path(str(made)).read_bytes())
        working_bytes = rehearsed(staged, inputs, request["num_threads"])
        if working_bytes is not None:
            note = staged.with_suffix(f"{staged.suffix}.json")
            note.write_text(json.dumps({"working_bytes": working_bytes}))
            note.replace(target.with_suffix(".json"))
        staged.replace(target)


def rehearsed(library: Path, inputs: list[Any], num_threads: int) -> int | None:
    """What one step on zeros takes beside its inputs: how far it reaches in the tensor arena, and
    what hotloop's kernels keep for packed factors.

    ``None``: there is no arena here, or the step fails on zeros.
    """
    from .. import kernels
    from ..errors import RunError
    from ..memory import TensorArena
    from .program import Program

    *bound, x, y = inputs
    try:
        program = Program(library, num_threads)
        program.bind(bound, bound[-1], [])
        with TensorArena() as arena:
            if arena.reason is not None:
                return None
            program.run(x, y, None)
            return arena.stats().peak_top_bytes + int(kernels.library().hotloop_scratch_bytes())
    except RunError:
        return None


def main() -> int:
    """Read the request, compile, and say why not in one line."""
    request = pickle.loads(Path(sys.argv[1]).read_bytes())
    try:
        compile_request(request, Path(sys.argv[2]), *sys.argv[3:4])
    except Exception as error:
        if len(sys.argv) > 3:
            raise
        lines = str(error).strip().splitlines() or [""]
        print(f"{type(error).__name__}: {lines[0][:200]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
