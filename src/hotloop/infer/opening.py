"""An engine from its setting and what it runs. Imports the library of that engine alone."""

from __future__ import annotations

from typing import Any

from ..errors import ModelError
from .engine import Engine
from .report import Setting
from .signature import Signature


def open_engine(setting: Setting, source: Any, signature: Signature | None = None) -> Engine:
    """An engine that answers.

    Args:
        setting: its threads and instances are those of the engine.
        source: the path of an ONNX or OpenVINO file; a ``Network`` or its file; the path of a
            compiled package; a module (``eager``).
        signature: of the model. ``None``: read off the file, by ONNX Runtime and OpenVINO.

    Raises:
        HotloopError: a library is missing, or the source is not what the engine takes.
    """
    threads = {"num_threads": setting.num_threads, "num_instances": setting.num_instances}
    shared: dict[str, Any] = {**threads, "precision": setting.precision}
    if setting.engine == "onnxruntime":
        from .engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(source, spinning=setting.spinning, **shared)
    if setting.engine == "openvino":
        from .engines.openvino import OpenVinoEngine

        return OpenVinoEngine(source, **shared)
    if setting.engine not in ("hotloop", "eager", "inductor"):
        raise ModelError("the engine must be one that this version knows", got=setting.engine)
    assert signature is not None, "these engines cannot tell what goes in"
    if setting.engine == "hotloop":
        from .engines.hotloop import HotloopEngine

        return HotloopEngine(
            source, signature.inputs, signature.outputs, spinning=setting.spinning, **threads
        )
    from .engines.torch import EagerEngine, InductorEngine

    if setting.engine == "inductor":
        return InductorEngine(source, signature, **shared)
    channels_last = setting.layout == "channels_last"
    return EagerEngine(source, signature, channels_last=channels_last, **shared)
