"""What engines read, made once for each model: graphs, archives, ONNX files; and engines of it."""

from __future__ import annotations

import dataclasses
import importlib
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import HotloopError, ModelError
from .archive import write_archive
from .capture import (
    LowerPrecision,
    compiled_package,
    export_program,
    own_copy,
    write_onnx,
)
from .check import FLOAT32_ERROR
from .engine import Engine
from .network import Network
from .opening import open_engine
from .report import Setting
from .signature import Signature

Program = tuple[torch.export.ExportedProgram, int | None]
_ENGINES_OF = {
    "float32": ("hotloop", "eager", "inductor", "onnxruntime", "openvino"),
    "bfloat16": ("eager", "inductor", "openvino"),
    "int8": ("onnxruntime", "openvino"),
}
ENGINES = _ENGINES_OF["float32"]


class ArtifactBuilder:
    """One model's files in a temporary folder that lives as long as the builder.

    Args:
        model: a copy in eval mode, see ``capture.own_copy``.
        signature: of the model. example: its inputs.
        samples: one tensor for each input, for the ranges of int8; ``None``: no int8.
    """

    def __init__(
        self,
        model: nn.Module,
        signature: Signature,
        example: Sequence[torch.Tensor],
        samples: Sequence[torch.Tensor] | None = None,
    ) -> None:
        self.model = model
        self.signature = signature
        self.example = list(example)
        self.samples = samples
        self.weight_bytes = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
        # Of hotloop's own engine, once there is one: packed weights, and values of a call by batch.
        self.own_bytes: tuple[int, Callable[[int], int]] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="hotloop-infer-")
        self.folder = Path(self._folder.name)
        self._made: dict[Any, Any] = {}
        self._cleanup = weakref.finalize(self, self._folder.cleanup)

    @property
    def float32_error(self) -> float:
        """What a candidate in float32 may differ from eager, over the largest value."""
        return FLOAT32_ERROR

    def close(self) -> None:
        """Remove the files."""
        self._cleanup()

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` gave or raised, at the first call."""
        if key not in self._made:
            try:
                self._made[key] = make()
            except HotloopError as error:
                self._made[key] = error
        made = self._made[key]
        if isinstance(made, HotloopError):
            raise made
        return made

    def program(self, precision: str = "float32") -> Program:
        """The graph and the batch size it is bound to, see ``capture.export_program``."""

        def make() -> Any:
            if precision == "float32":
                return export_program(self.model, self.signature, self.example)
            lower = LowerPrecision(self.model, torch.bfloat16, self.signature).eval()
            return export_program(lower, lower.flat_signature(), self.example)

        result: Program = self._once(("program", precision), make)
        return result

    def archive(self, precision: str = "float32") -> Path:
        """The graph as a ``.pt2`` file."""

        def make() -> Path:
            path = self.folder / ("model.pt2" if precision == "float32" else f"{precision}.pt2")
            write_archive(self.program(precision)[0], path)
            return path

        path: Path = self._once(("archive", precision), make)
        return path

    def network(self) -> Network:
        """The graph as layers of hotloop's own engine.

        Raises:
            ModelError: the graph holds what no layer does, or is one for a single batch size.
        """

        def make() -> Network:
            from .lowering import lower

            program, fixed = self.program()
            if fixed is not None:
                raise ModelError("hotloop's own engine takes graphs for any batch size", got=fixed)
            return lower(program)

        network: Network = self._once("network", make)
        return network

    def onnx(self, precision: str = "float32") -> Path:
        """The graph as an ``.onnx`` file, in float32 or int8."""

        def make() -> Path:
            path = self.folder / f"{precision}.onnx"
            if precision == "float32":
                write_onnx(self.program()[0], self.signature, path, self.weight_bytes)
                return path
            if self.samples is None:
                raise ModelError("int8 needs samples", next_step="pass samples=x")
            from .quantize import write_int8

            batch = self.fixed_batch("float32") or min(64, len(self.samples[0]))
            arrays = [sample.numpy() for sample in self.samples]
            source = self.onnx()
            write_int8(source, path, self.signature.inputs, arrays, batch)
            return path

        path: Path = self._once(("onnx", precision), make)
        return path

    def fixed_batch(self, precision: str) -> int | None:
        """The only batch size the graph takes, ``None``: any."""
        return self.program(precision)[1]

    def fixed_batch_of(self, setting: Setting) -> int | None:
        """The only batch size that an engine of this setting takes, ``None``: any."""
        if setting.engine == "eager":
            return None
        lower = setting.engine == "inductor" and setting.precision == "bfloat16"
        return self.fixed_batch("bfloat16" if lower else "float32")

    def must_compile(self, setting: Setting) -> bool:
        """Whether a compiler has to run before there is an engine of this setting."""
        return setting.engine == "inductor" and ("package", setting.precision) not in self._made

    def weights_of(self, setting: Setting) -> tuple[str, str]:
        """Names the copy of the weights that engines of this setting share."""
        return setting.engine, setting.precision

    def build(self, setting: Setting) -> Engine:
        """An engine with these settings.

        Raises:
            HotloopError: a library is missing, or the model cannot go there.
        """
        engine = open_engine(setting, self._source(setting), self.signature)
        if setting.engine == "hotloop":
            self.own_bytes = engine.weight_bytes, engine.working_bytes  # type: ignore[attr-defined]
        return engine

    def _source(self, setting: Setting) -> Any:
        """What ``open_engine`` takes."""
        if setting.engine in ("onnxruntime", "openvino"):
            # Before a graph is written that nobody could read.
            importlib.import_module(f"{__package__}.engines.{setting.engine}").library()
            return self.onnx("int8" if setting.precision == "int8" else "float32")
        if setting.engine == "hotloop":
            return self.network()
        if setting.engine == "inductor":
            precision = setting.precision
            program, _ = self.program(precision)
            return self._once(
                ("package", precision),
                lambda: compiled_package(program, self.archive(precision), precision),
            )
        if setting.layout == "channels_last":
            return self._once("channels_last", self._channels_last)
        return self.model

    def _channels_last(self) -> nn.Module:
        # torch's signature of `to` has no overload for the memory format alone.
        return own_copy(self.model).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def settings_for(
    goal: str, engines: Sequence[str], precisions: Sequence[str], usable_cpus: int, images: bool
) -> list[Setting]:
    """All candidates of a race.

    Args:
        goal: ``"latency"``: one call at a time; ``"throughput"``: several instances as well.
        images: whether the model has convolutions over images.
    """
    every = usable_cpus
    shapes = [(every, 1)]
    if every > 1:
        shapes += [(1, 1)] if goal == "latency" else [(1, every)]
    if goal == "throughput" and every >= 4:
        shapes += [(2, every // 2)]
    found = []
    for precision in precisions:
        for engine in engines:
            if engine not in _ENGINES_OF[precision]:
                continue
            for threads, instances in shapes:
                base = Setting(
                    engine=engine, precision=precision,
                    num_threads=threads, num_instances=instances,
                )  # fmt: skip
                found.append(base)
                if engine == "onnxruntime" and threads > 1:
                    found.append(dataclasses.replace(base, spinning=False))
                if engine == "eager" and images and threads == every:
                    found.append(dataclasses.replace(base, layout="channels_last"))
    return found
