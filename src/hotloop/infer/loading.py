"""``load_engine``: a model file or an exported folder to an engine, by path alone.

Never a pickle, never an address on the network. Torch is imported only where the file needs it.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError, ModelError
from ..machine import Machine
from .engine import Engine

SUFFIXES = (".onnx", ".xml", ".pt2", ".safetensors")


def load_engine(
    path: str | Path,
    *,
    num_threads: int | None = None,
    num_instances: int | None = None,
    factory: str | None = None,
) -> Engine:
    """An engine that answers, from a file or a folder.

    Args:
        path: a folder that ``runner.save`` or ``hotloop export`` wrote, an ``.onnx`` file, an
            OpenVINO ``.xml`` with its ``.bin`` beside, a ``.pt2`` archive of ``torch.export``, or a
            ``.safetensors`` file with ``factory``.
        num_threads: threads inside one call; ``None``: as exported, else all usable CPUs over
            ``num_instances``.
        num_instances: calls at the same time; ``None``: as exported, else 1.
        factory: ``"package.module:function"`` whose result is the ``torch.nn.Module`` that a
            ``.safetensors`` file holds the weights of.

    Raises:
        InputError: the path is an address, or a file of another kind.
        ModelError: the file is missing, damaged, or cannot be run.
        MissingExtraError: the engine's library is not installed.
    """
    path = local_path(path)
    instances = num_instances or 1
    threads = num_threads or max(1, Machine.probe().usable_cpus // instances)
    if path.suffix == ".onnx":
        from .engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(path, num_threads=threads, num_instances=instances)
    raise InputError(
        "a model is a folder of hotloop export, or a file " + ", ".join(SUFFIXES), got=path.name
    )


def local_path(path: str | Path) -> Path:
    """The path, if it is one and something is there.

    Raises:
        InputError: an address on the network.
        ModelError: nothing is there.
    """
    if "://" in str(path):
        raise InputError(
            "a model is loaded by path, never from an address", got=path,
            next_step="fetch the file, check it, and name its path",
        )  # fmt: skip
    path = Path(path)
    if not path.exists():
        raise ModelError("the model must be there", got=path, next_step="name an existing path")
    return path
