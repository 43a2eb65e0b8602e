"""``load_engine``: a model file or an exported folder to an engine, by path alone.

Never a pickle, never an address on the network. Torch is imported only where the file needs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import InputError
from ..machine import Machine
from ..sealed import Sealed
from .engine import Engine
from .folder import load_inference, local_path
from .opening import open_engine
from .report import Setting

_ENGINE_OF = {
    ".onnx": "onnxruntime", ".xml": "openvino", ".pt2": "eager", ".safetensors": "eager",
}  # fmt: skip


def load_engine(
    path: str | Path | Sealed,
    *,
    num_threads: int | None = None,
    num_instances: int | None = None,
    spinning: bool | None = None,
    factory: str | None = None,
) -> Engine:
    """An engine that answers, from a file or a folder.

    Args:
        path: a folder that ``runner.save`` or ``hotloop export`` wrote, an ``.onnx`` file, an
            OpenVINO ``.xml`` with its ``.bin`` beside, a ``.pt2`` archive of ``torch.export``, or a
            ``.safetensors`` file with ``factory``. ``Sealed``: one of these, sealed.
        num_threads: threads inside one call; ``None``: as exported, else all usable CPUs over
            ``num_instances``.
        num_instances: calls at the same time; ``None``: as exported, else 1.
        spinning: ``False``: idle threads of ONNX Runtime sleep at once; ``None``: as exported.
        factory: ``"package.module:function"`` whose result is the ``torch.nn.Module`` that a
            ``.safetensors`` file holds the weights of.

    Raises:
        InputError: the path is an address, or a file of another kind.
        ModelError: the file is missing, damaged, or cannot be run.
        MissingExtraError: the engine's library is not installed.
    """
    path = local_path(path)
    if path.is_dir():
        return load_inference(
            path,
            num_threads=num_threads,
            num_instances=num_instances,
            spinning=spinning,
            alike=True,
        )
    if path.suffix not in _ENGINE_OF:
        known = ", ".join(_ENGINE_OF)
        raise InputError(f"a model is a folder of hotloop export, or a file {known}", got=path.name)
    instances = num_instances or 1
    setting = Setting(
        engine=_ENGINE_OF[path.suffix],
        num_threads=num_threads or max(1, Machine.probe().usable_cpus // instances),
        num_instances=instances,
        spinning=spinning is not False,
    )
    source: Any = path
    signature = None
    if setting.engine == "eager":
        from .files import module_with_weights, read_program

        archive = path.suffix == ".pt2"
        source, signature = read_program(path) if archive else module_with_weights(path, factory)
    return open_engine(setting, source, signature)
