"""Names of element types: the protocol's and numpy's."""

from __future__ import annotations

from ..errors import ModelError

# Open Inference Protocol v2, "Tensor Data Types"; BYTES and BF16 have no plain numpy form.
TO_NUMPY = {
    "BOOL": "bool", "UINT8": "uint8", "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64",
    "INT8": "int8", "INT16": "int16", "INT32": "int32", "INT64": "int64",
    "FP16": "float16", "FP32": "float32", "FP64": "float64",
}  # fmt: skip
FROM_NUMPY = {numpy_name: name for name, numpy_name in TO_NUMPY.items()}


def protocol_name(dtype: str) -> str:
    """The protocol's name of a numpy dtype.

    Raises:
        ModelError: the protocol has none.
    """
    name = FROM_NUMPY.get(dtype)
    if name is None:
        raise ModelError(
            "a served model's inputs and outputs must be numbers of a known type", got=dtype,
            next_step=f"export it with one of {', '.join(FROM_NUMPY)}",
        )  # fmt: skip
    return name
