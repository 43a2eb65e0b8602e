"""How much memory each kernel reads and writes behind the addresses of its structure.

For programs that come from a file: what a structure says of its sizes and strides decides how far
its kernel goes, so that a program is refused before it runs where that is outside its memory. Each
function here states the rules of one kernel (``binding.py`` has them in words) and gives, by field,
bytes from the address on.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from . import binding
from .elementwise import OPERATIONS

LARGEST_SIZE = 2**31
_LARGEST_STRIDE = 2**40
_FLOAT = 4
_INT64 = 8
_STATE_BYTES = 16 + 8 + 624 * 8  # Of torch's CPU generator, as far as a draw looks.


class Refused(Exception):
    """Why a kernel must not be called with such a structure."""


class Entry(NamedTuple):
    """A kernel that a program may call: its structure, and its extents."""

    structure: Any
    extents: Callable[[Any], dict[str, int]]


def span(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last of a tensor, both included."""
    return 1 + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))


def _need(holds: bool, rule: str) -> None:
    if not holds:
        raise Refused(rule)


def check_numbers(call: Any) -> None:
    """Whether sizes and strides are such that sums and products of them say what they should.

    Raises:
        Refused: a size below 1 or above ``LARGEST_SIZE``, a stride below 0.
    """
    for name, kind in call._fields_:
        value = getattr(call, name)
        if isinstance(value, ctypes.Structure):
            if not isinstance(value, binding.UpdateRule):
                check_numbers(value)
        elif kind is ctypes.c_int64:
            if "stride" in name or isinstance(call, (binding.ImageStrides, binding.FilterStrides)):
                _need(0 <= value <= _LARGEST_STRIDE, f"{name} must be 0 or more")
            elif name in _MAY_BE_NEGATIVE:
                _need(abs(value) < LARGEST_SIZE, f"{name} must be below 2**31")
            else:
                least = 0 if name in _MAY_BE_ZERO else 1
                _need(least <= value < LARGEST_SIZE, f"{name} must be at least {least}")
        elif kind is ctypes.c_int32:
            _need(0 <= value <= 1, f"{name} must be 0 or 1")


_MAY_BE_NEGATIVE = ("ignore_index", "padding_index", "addend")
_MAY_BE_ZERO = ("pad_h", "pad_w")


def _strides(images: Any) -> tuple[int, int, int, int]:
    return images.n, images.c, images.h, images.w


def _images(sizes: Sequence[int], strides: Any) -> int:
    """Bytes of images [n, c, h, w] whose channels are adjacent."""
    _need(sizes[1] == 1 or strides.c == 1, "channels must be adjacent")
    return _FLOAT * span(sizes, _strides(strides))


def _matrix(rows: int, cols: int, matrix: Any) -> int:
    return _FLOAT * span((rows, cols), (matrix.row_stride, matrix.col_stride))


def _rows(rows: int, cols: int, stride: int) -> int:
    _need(rows == 1 or stride >= cols, "rows must not overlap")
    return _FLOAT * span((rows, cols), (stride, 1))


def _product(c: Any) -> dict[str, int]:
    _need(not (c.bias and c.mask) and not (c.mask and c.activation), "a mask goes alone")
    return {
        "a.data": _matrix(c.m, c.k, c.a),
        "b.data": _matrix(c.k, c.n, c.b),
        "c": _rows(c.m, c.n, c.c_row_stride),
        "bias": _FLOAT * c.n,
        "mask": _FLOAT * span((c.m, c.n), (c.mask_row_stride, 1)),
    }


def _batch_product(c: Any) -> dict[str, int]:
    last = (c.batch - 1) * _FLOAT
    _need(c.batch == 1 or c.out_batch_stride >= c.m * c.n, "results must not overlap")
    return {
        "a.data": last * c.a_batch_stride + _matrix(c.m, c.k, c.a),
        "b.data": last * c.b_batch_stride + _matrix(c.k, c.n, c.b),
        "out": last * c.out_batch_stride + _rows(c.m, c.n, c.out_row_stride),
    }


def _update(c: Any) -> dict[str, int]:
    return dict.fromkeys(("weight", "gradient", "state1", "state2"), _FLOAT * c.count)


def _product_update(c: Any) -> dict[str, int]:
    state = _rows(c.m, c.n, c.state_row_stride)
    return {
        "a.data": _matrix(c.m, c.k, c.a),
        "b.data": _matrix(c.k, c.n, c.b),
        "weight": _rows(c.m, c.n, c.weight_row_stride),
        **dict.fromkeys(("state1", "state2", "gradient"), state),
    }


class _Convolved:
    """Sizes of a convolution."""

    def __init__(self, s: Any) -> None:
        height = s.height + 2 * s.pad_h - s.filter_height + 1
        width = s.width + 2 * s.pad_w - s.filter_width + 1
        _need(min(height, width) > 0, "a convolution must have results")
        _need(s.filter_height <= 7 and s.filter_width <= 7, "filters have 1 to 7 rows and columns")
        _need(s.pad_h < s.filter_height and s.pad_w < s.filter_width, "padding is below the filter")
        self.images = s.batch, s.in_channels, s.height, s.width
        self.out = s.batch, s.out_channels, height, width
        self.pooled = s.batch, s.out_channels, height // 2, width // 2
        self.filters = s.out_channels, s.in_channels, s.filter_height, s.filter_width

    def filters_bytes(self, f: Any) -> int:
        return _FLOAT * span(self.filters, (f.o, f.i, f.h, f.w))

    def gradient(self, c: Any) -> dict[str, int]:
        if not c.argmax:
            return {"gradient": _images(self.out, c.gradient_strides)}
        n, channels, height, width = self.pooled
        _need(min(self.pooled) > 0, "pooled results must be there")
        g = c.gradient_strides
        planes = g.h == width and g.w == 1
        _need(g.c == 1 or planes, "a pooled gradient has adjacent channels, or planes")
        return {
            "gradient": _FLOAT * span(self.pooled, _strides(g)),
            "argmax": n * channels * height * width,
        }


def _convolve(c: Any) -> dict[str, int]:
    s = _Convolved(c.shape)
    made = {
        "input": _images(s.images, c.input_strides),
        "filters": s.filters_bytes(c.filter_strides),
        "bias": _FLOAT * c.shape.out_channels,
    }
    if not c.argmax:
        return made | {"output": _images(s.out, c.output_strides)}
    _need(min(s.pooled) > 0, "pooled results must be there")
    output = _FLOAT * span(s.pooled, _strides(c.output_strides))
    return made | {"output": output, "argmax": _product_of(s.pooled)}


def _convolve_input_gradient(c: Any) -> dict[str, int]:
    s = _Convolved(c.shape)
    images = _images(s.images, c.input_strides)
    return {
        **s.gradient(c),
        "filters": s.filters_bytes(c.filter_strides),
        "mask": images,
        "input_gradient": images,
    }


def _convolve_filter_gradient(c: Any) -> dict[str, int]:
    s = _Convolved(c.shape)
    return {
        **s.gradient(c),
        "input": _images(s.images, c.input_strides),
        "filter_gradient": s.filters_bytes(c.filter_strides),
        "bias_gradient": _FLOAT * c.shape.out_channels,
    }


def _product_of(sizes: Sequence[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _windows(w: Any) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    for size, made, kernel, stride, pad in (
        (w.height, w.output_height, w.kernel_h, w.stride_h, w.pad_h),
        (w.width, w.output_width, w.kernel_w, w.stride_w, w.pad_w),
    ):
        _need(2 * pad <= kernel, "padding is at most half of a window")
        _need((made - 1) * stride + kernel <= size + 2 * pad, "windows lie inside the images")
    return (w.batch, w.channels, w.height, w.width), (
        w.batch, w.channels, w.output_height, w.output_width,
    )  # fmt: skip


def _pool(c: Any) -> dict[str, int]:
    images, made = _windows(c.windows)
    _need(not c.argmax or c.windows.kernel_h * c.windows.kernel_w <= 255, "windows are too large")
    count = _product_of(made)
    return {
        "input": _FLOAT * span(images, _strides(c.input_strides)),
        "output": _FLOAT * count,
        "argmax": count,
    }


def _pool_backward(c: Any) -> dict[str, int]:
    images, made = _windows(c.windows)
    w = c.windows
    _need(
        (w.stride_h, w.stride_w, w.pad_h, w.pad_w) == (w.kernel_h, w.kernel_w, 0, 0),
        "windows lie next to each other",
    )
    return {
        "gradient": _FLOAT * span(made, _strides(c.gradient_strides)),
        "argmax": _product_of(made),
        "input_gradient": _FLOAT * span(images, _strides(c.input_gradient_strides)),
    }


def _cross_entropy(c: Any) -> dict[str, int]:
    return {
        "logits": _rows(c.rows, c.classes, c.row_stride),
        "labels": _INT64 * c.rows,
        "weights": _FLOAT * c.classes,
        "loss": _FLOAT,
        "gradient": _rows(c.rows, c.classes, c.gradient_row_stride) if c.gradient else 0,
    }


def _squared_error(c: Any) -> dict[str, int]:
    whole = _FLOAT * c.count
    return {"output": whole, "target": whole, "loss": _FLOAT, "gradient": whole}


def _column_sums(c: Any) -> dict[str, int]:
    return {
        "x": _rows(c.rows, c.cols, c.row_stride),
        "mask": _FLOAT * span((c.rows, c.cols), (c.mask_row_stride, 1)),
        "out": _FLOAT * c.cols,
    }


def _dense(*whole: str, rows: Sequence[str] = (), cols: Sequence[str] = ()) -> Any:
    """Of a kernel on dense rows: fields of whole matrices, of one float a row or a column."""

    def extents(c: Any) -> dict[str, int]:
        return {
            **dict.fromkeys(whole, _FLOAT * c.rows * c.cols),
            **dict.fromkeys(rows, _FLOAT * c.rows),
            **dict.fromkeys(cols, _FLOAT * c.cols),
        }

    return extents


def _softmax(c: Any) -> dict[str, int]:
    _need(not (c.logarithm and c.is_safe), "a safe softmax has no logarithm")
    whole = _FLOAT * c.rows * c.cols
    return {"x": whole, "out": whole}


def _image_means(c: Any) -> dict[str, int]:
    return {"x": _FLOAT * c.images * c.pixels * c.cols, "out": _FLOAT * c.images * c.cols}


def _image_means_gradient(c: Any) -> dict[str, int]:
    whole = _FLOAT * c.images * c.pixels * c.cols
    return {
        "gradient": _FLOAT * span((c.images, c.cols), (c.gradient_row_stride, 1)),
        "mask": whole,
        "out": whole,
    }


def _copy(c: Any) -> dict[str, int]:
    _need(1 <= c.num_dims <= 8, "a copy has 1 to 8 dimensions")
    _need(c.element_bytes in (1, 4, 8), "elements of a copy have 1, 4 or 8 bytes")
    sizes, read, written = (list(x)[: c.num_dims] for x in (c.sizes, c.from_strides, c.to_strides))
    _need(all(1 <= n < LARGEST_SIZE for n in sizes), "sizes must be at least 1")
    _need(all(0 <= s <= _LARGEST_STRIDE for s in (*read, *written)), "strides must be 0 or more")
    target = span(sizes, written)
    _need(_product_of(sizes) <= target, "what is written must not overlap")
    return {"source": c.element_bytes * span(sizes, read), "target": c.element_bytes * target}


def _add_count(_: Any) -> dict[str, int]:
    return {"count": _INT64}


def _draw(c: Any) -> dict[str, int]:
    return {"out": _FLOAT * c.count, "state": _STATE_BYTES}


def _embedding(c: Any) -> dict[str, int]:
    return {
        "indices": _INT64 * c.count,
        "table": _rows(c.rows, c.cols, c.table_row_stride),
        "out": _FLOAT * c.count * c.cols,
    }


def _embedding_gradient(c: Any) -> dict[str, int]:
    _need(-1 <= c.padding_index < c.rows, "the padding's index must be one of the rows")
    return {
        "indices": _INT64 * c.count,
        "gradient": _FLOAT * span((c.count, c.cols), (c.gradient_row_stride, 1)),
        "table_gradient": _FLOAT * c.rows * c.cols,
    }


def _no_extents(_: Any) -> dict[str, int]:
    return {}


def elementwise_tensor(c: Any, tensor: Any, *, stored: bool) -> int:
    """Bytes of one tensor of an ``ElementwiseCall``."""
    sizes = c.planes, c.rows, c.cols
    strides = tensor.plane_stride, tensor.row_stride, tensor.col_stride
    reach = span(sizes, strides)
    _need(not stored or _product_of(sizes) <= reach, "what is stored must not overlap")
    return _FLOAT * reach


def stored_tensors(operations: Sequence[Any]) -> set[int]:
    """Numbers of the tensors that the operations of an ``ElementwiseCall`` write."""
    return {o.out for o in operations if o.opcode == OPERATIONS.index("store")}


# What a program from a file may call. Not in it: what calls torch, and what runs other programs.
ENTRIES: dict[str, Entry] = {
    "hotloop_product": Entry(binding.ProductCall, _product),
    "hotloop_batch_product": Entry(binding.BatchProductCall, _batch_product),
    "hotloop_update": Entry(binding.UpdateCall, _update),
    "hotloop_product_update": Entry(binding.ProductUpdateCall, _product_update),
    "hotloop_convolve": Entry(binding.ConvolutionCall, _convolve),
    "hotloop_convolve_input_gradient": Entry(
        binding.ConvolutionInputGradientCall, _convolve_input_gradient
    ),
    "hotloop_convolve_filter_gradient": Entry(
        binding.ConvolutionFilterGradientCall, _convolve_filter_gradient
    ),
    "hotloop_pool": Entry(binding.PoolCall, _pool),
    "hotloop_pool_backward": Entry(binding.PoolBackwardCall, _pool_backward),
    "hotloop_cross_entropy": Entry(binding.CrossEntropyCall, _cross_entropy),
    "hotloop_squared_error": Entry(binding.SquaredErrorCall, _squared_error),
    "hotloop_column_sums": Entry(binding.ColumnSumsCall, _column_sums),
    "hotloop_softmax": Entry(binding.SoftmaxCall, _softmax),
    "hotloop_softmax_gradient": Entry(
        binding.SoftmaxGradientCall, _dense("result", "gradient", "input_gradient")
    ),
    "hotloop_layer_norm": Entry(
        binding.LayerNormCall, _dense("x", "out", rows=("mean", "rstd"), cols=("weight", "bias"))
    ),
    "hotloop_layer_norm_gradient": Entry(
        binding.LayerNormGradientCall,
        _dense("x", "gradient", "input_gradient", rows=("mean", "rstd"),
               cols=("weight", "weight_gradient", "bias_gradient")),
    ),
    "hotloop_rms_norm": Entry(
        binding.RmsNormCall, _dense("x", "out", rows=("rstd",), cols=("weight",))
    ),
    "hotloop_rms_norm_gradient": Entry(
        binding.RmsNormGradientCall,
        _dense("x", "gradient", "input_gradient", rows=("rstd",),
               cols=("weight", "weight_gradient")),
    ),
    "hotloop_row_sums": Entry(binding.RowSumsCall, _dense("x", rows=("out",))),
    "hotloop_batch_norm": Entry(
        binding.BatchNormCall,
        _dense("x", "addend", "out",
               cols=("weight", "bias", "mean", "rstd", "running_mean", "running_var")),
    ),
    "hotloop_batch_norm_gradient": Entry(
        binding.BatchNormGradientCall,
        _dense("x", "gradient", "mask", "masked_gradient", "input_gradient",
               cols=("mean", "rstd", "weight", "weight_gradient", "bias_gradient")),
    ),
    "hotloop_image_means": Entry(binding.ImageMeansCall, _image_means),
    "hotloop_image_means_gradient": Entry(binding.ImageMeansGradientCall, _image_means_gradient),
    "hotloop_copy": Entry(binding.CopyCall, _copy),
    "hotloop_add_count": Entry(binding.AddCountCall, _add_count),
    "hotloop_draw": Entry(binding.DrawCall, _draw),
    "hotloop_embedding": Entry(binding.EmbeddingCall, _embedding),
    "hotloop_embedding_gradient": Entry(binding.EmbeddingGradientCall, _embedding_gradient),
    "hotloop_elementwise": Entry(binding.ElementwiseCall, _no_extents),
}  # fmt: skip

# Addresses that may be null.
OPTIONAL = {
    "bias", "mask", "state1", "state2", "argmax", "weights", "addend", "running_mean",
    "running_var", "masked_gradient", "input_gradient", "weight_gradient", "bias_gradient",
}  # fmt: skip
# Of some kernels alone.
_OPTIONAL_HERE = {
    "hotloop_product_update": {"gradient"},
    "hotloop_cross_entropy": {"gradient"},
    "hotloop_squared_error": {"gradient"},
    "hotloop_layer_norm": {"weight", "mean", "rstd"},
    "hotloop_layer_norm_gradient": {"weight"},
    "hotloop_rms_norm": {"weight", "rstd"},
    "hotloop_rms_norm_gradient": {"weight"},
    "hotloop_batch_norm": {"weight"},
    "hotloop_batch_norm_gradient": {"weight"},
}
_REQUIRED_HERE = {
    "hotloop_convolve_input_gradient": {"input_gradient"},
    "hotloop_convolve_filter_gradient": {"bias_gradient"},
    "hotloop_pool_backward": {"argmax", "input_gradient"},
    "hotloop_softmax_gradient": {"input_gradient"},
}
_TOGETHER = (("running_mean", "running_var"), ("mean", "rstd"))


def check_null(entry: str, call: Any) -> None:
    """Whether the addresses that a kernel follows are there.

    Raises:
        Refused: one is null.
    """
    optional = (OPTIONAL | _OPTIONAL_HERE.get(entry, set())) - _REQUIRED_HERE.get(entry, set())
    for name, kind in call._fields_:
        value = getattr(call, name)
        if kind is ctypes.c_void_p and name not in optional:
            _need(bool(value), f"{name} must be there")
        elif isinstance(value, binding.Matrix):
            _need(bool(value.data), f"{name} must be there")
    for names in _TOGETHER:
        given = [bool(getattr(call, name)) for name in names if hasattr(call, name)]
        _need(all(given) or not any(given), f"{' and '.join(names)} go together")
    if getattr(call, "masked_gradient", None):
        _need(bool(call.mask), "a masked gradient needs its mask")
    if entry == "hotloop_product_update":
        _need(not call.state2 or bool(call.state1), "the second state needs a first one")


def is_written(call: Any, path: str) -> bool:
    """Whether a kernel writes what lies at the address in a field (``a.data``)."""
    holder, _, name = path.rpartition(".")
    made = getattr(call, holder) if holder else call
    return not binding.field_text(type(made), name).startswith("const ")
