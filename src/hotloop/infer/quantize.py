"""8-bit integers: ONNX Runtime's static quantization, calibrated on samples.

Weights: one scale for each output channel, symmetric. Activations: one scale a tensor from the
smallest and largest value seen. Both engines that read ONNX run the result in integer kernels.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MissingExtraError, ModelError
from ..machine import Machine
from .capture import quiet
from .engine import TensorSpec, first_line

if TYPE_CHECKING:
    import numpy

# More change the ranges little and take time.
CALIBRATION_SAMPLES = 512
_OPERATORS = ["Conv", "Gemm", "MatMul"]


def write_int8(
    source: Path,
    target: Path,
    inputs: Sequence[TensorSpec],
    samples: Sequence[numpy.ndarray],
    batch_size: int,
) -> None:
    """Quantize an ONNX file.

    Args:
        source, target: paths of ``.onnx`` files.
        inputs: of the model.
        samples: one array for each input, ``[samples, ...]``.
        batch_size: samples of a call while the ranges are found.

    Raises:
        MissingExtraError: ``onnxruntime`` or ``onnx`` is not installed.
        ModelError: the model cannot be quantized.
    """
    try:
        from onnxruntime import quantization
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise MissingExtraError("int8", str(error.name), "onnx") from error
    prepared = target.with_name("prepared.onnx")
    isa = Machine.probe().isa
    try:
        with quiet(), contextlib.redirect_stdout(io.StringIO()):
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            quantization.quantize_static(
                str(prepared),
                str(target),
                _Batches([s.name for s in inputs], samples, batch_size),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=_OPERATORS,
                per_channel=True,
                # Without VNNI, sums of two products of full 8 bits saturate 16.
                reduce_range=not any("vnni" in name for name in isa),
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                extra_options={"WeightSymmetric": True, "ActivationSymmetric": False},
            )
    except Exception as error:
        raise ModelError(
            "the model must be one that ONNX Runtime can quantize",
            got=f"{type(error).__name__}: {first_line(error)}",
        ) from error
    finally:
        prepared.unlink(missing_ok=True)


class _Batches:
    """What the library calls a CalibrationDataReader."""

    def __init__(self, names: list[str], samples: Sequence[Any], batch_size: int) -> None:
        count = min(CALIBRATION_SAMPLES, len(samples[0]))
        # Whole batches alone where there is one: a fixed batch size takes no other.
        starts = range(0, count - batch_size + 1, batch_size) if count >= batch_size else [0]
        self._feeds = iter(
            [
                dict(zip(names, [s[i : i + batch_size] for s in samples], strict=True))
                for i in starts
            ]
        )

    def get_next(self) -> dict[str, Any] | None:
        """The next feed, ``None`` at the end."""
        return next(self._feeds, None)

    def __len__(self) -> int:
        return CALIBRATION_SAMPLES
