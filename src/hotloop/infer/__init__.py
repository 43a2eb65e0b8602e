"""Inference: the fastest engine for this model on this machine, by race. Importing loads no torch.

compile    compile_inference: candidates built, checked against eager, raced
selector   one race: candidates built, checked, timed in turn
artifacts  what engines read, each made once; all candidates of a race
opening    an engine from its setting and what it runs
capture    the model as a graph: torch.export, ONNX, AOTInductor
network    a forward pass as layers for hotloop's own engine; kernels/ run it
lowering   a captured graph, after the passes of graph/, to such layers; views: values looked at
           in another way
quantize   8-bit integers, calibrated
check      differences from eager, accuracy
report     what the race found
remembered winners of earlier races
runner     InferenceRunner
folder     an export, read; folder_writer writes it
archive    .pt2 archives without pickle
memory     the guide's inference table
engine     what every backend looks like
loading    a file or folder to an engine; imports torch only where the file needs it
engines/   the backends
cuda       the same call on a GPU
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .engine import Engine, TensorSpec
from .folder import load_inference
from .loading import load_engine
from .memory import measure_memory
from .report import InferenceReport
from .runner import InferenceRunner

if TYPE_CHECKING:
    from .compile import compile_inference

__all__ = [
    "Engine",
    "InferenceReport",
    "InferenceRunner",
    "TensorSpec",
    "compile_inference",
    "load_engine",
    "load_inference",
    "measure_memory",
]


def __getattr__(name: str) -> Any:
    # The one public name whose module needs torch.
    if name == "compile_inference":
        from .compile import compile_inference

        return compile_inference
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
