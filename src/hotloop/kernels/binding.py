"""Everything that crosses between Python and the C++ of ``kernels/cpp``, declared once.

Each structure and function is declared here, in Python. The build writes the C++ side from it
(``write_header`` makes ``abi.h``), so the compiler refuses a definition
that differs; when a library is loaded, ``loader.py`` compares the size of each structure and the
offset of each field with what the compiler made of them, and the hash of this declaration with the
one that the library was built from.

To add a call: declare a structure with what it takes, and a function that takes a pointer to it.
A function that can fail returns a status, 0 for done; ``hotloop_error`` has the words.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MOST_PARAMETERS = 8


@dataclass(frozen=True)
class CType:
    """A type as C++ writes it, and as ctypes passes it. ``count``: elements of an array field."""

    text: str
    passed: Any
    count: int = 0


int32 = CType("int32_t", ctypes.c_int32)
int64 = CType("int64_t", ctypes.c_int64)
uint64 = CType("uint64_t", ctypes.c_uint64)
float32 = CType("float", ctypes.c_float)
float64 = CType("double", ctypes.c_double)
text = CType("const char*", ctypes.c_char_p)
nothing = CType("void", None)


def pointer(to: str = "void") -> CType:
    """The address of something: ``pointer("const float")``."""
    return CType(f"{to}*", ctypes.c_void_p)


def array(of: CType, count: int) -> CType:
    """So many of a type, one after the other in a structure."""
    return CType(of.text, of.passed * count, count)


_structures: dict[str, Any] = {}
_field_types: dict[str, dict[str, CType]] = {}
_functions: dict[str, tuple[CType, dict[str, CType]]] = {}


def structure(name: str, doc: str, /, **fields: CType) -> Any:
    """Declare a structure; returns its ctypes class. ``doc`` stands above it in C++ too."""
    members = [(field, kind.passed) for field, kind in fields.items()]
    made = type(name, (ctypes.Structure,), {"__doc__": doc, "_fields_": members})
    _structures[name] = made
    _field_types[name] = fields
    return made


def field_text(made: Any, field: str) -> str:
    """The type of a structure's field as C++ writes it: ``"const float*"``."""
    return _field_types[made.__name__][field].text


def value(made: Any) -> CType:
    """A structure as a field of another one."""
    return CType(made.__name__, made)


def function(name: str, /, result: CType = int32, **parameters: CType) -> None:
    """Declare a function of the library."""
    if len(parameters) > _MOST_PARAMETERS:
        raise ValueError(f"{name} takes {len(parameters)} parameters: put them in a structure")
    _functions[name] = result, parameters


# ---- Errors, threads, scratch memory --------------------------------------------------------

function("hotloop_error", text)
# Words for the calling thread's error: of an instruction that is a function of Python's.
function("hotloop_set_error", nothing, words=text)
function("hotloop_binding_hash", text)
# 16 hex digits of the C++ that the library was built from.
function("hotloop_build_hash", text)
# Index of the first row (size or offset, in the order of `layout`) that differs; -1: all agree.
function("hotloop_check_layout", int64, rows=pointer("const int64_t"), count=int64)

OpenMp = structure(
    "OpenMp",
    """Entries of the OpenMP runtime that torch has loaded, so that both share their threads.

    See "Implementing a parallel construct" in libgomp's manual for GOMP_parallel.""",
    parallel=pointer(),
    barrier=pointer(),
    thread_num=pointer(),
    num_threads=pointer(),
    max_threads=pointer(),
    set_num_threads=pointer(),
)
function("hotloop_use_openmp", nothing, runtime=pointer("const OpenMp"))
TorchInterface = structure(
    "TorchInterface",
    """Entries of torch's C interface, by name; null where this torch has none.

    torch/csrc/inductor/aoti_torch/c/shim.h and torch/csrc/stable/c/shim.h, which torch keeps from
    one version to the next. `torch_interface.h` gives them their types.""",
    **{
        name: pointer()
        for name in (
            "aoti_torch_get_data_ptr",
            "aoti_torch_get_dim",
            "aoti_torch_get_numel",
            "aoti_torch_get_sizes",
            "aoti_torch_get_strides",
            "aoti_torch_get_storage_offset",
            "aoti_torch_get_dtype",
            "aoti_torch_get_layout",
            "aoti_torch_get_device_type",
            "aoti_torch_empty_strided",
            "aoti_torch_delete_tensor_object",
            "aoti_torch__reinterpret_tensor",
            "aoti_torch_cpu__linear_pointwise",
            "aoti_torch_cpu_mm_out",
            "aoti_torch_cpu_bmm_out",
            "aoti_torch_cpu_addmm_out",
            "aoti_torch_library_init_impl",
            "aoti_torch_library_init_fragment",
            "aoti_torch_library_def",
            "aoti_torch_library_impl",
            "aoti_torch_delete_library_object",
            "torch_get_const_data_ptr",
            "torch_exception_get_what_without_backtrace",
            "torch_get_num_threads",
            "MKL_Set_Num_Threads_Local",
        )
    },
)
function("hotloop_use_torch", nothing, torch=pointer("const TorchInterface"))
# How long idle threads of hotloop's own pool look for work before they sleep.
function("hotloop_set_spin", nothing, spin_ns=int64)
# What the kernels of all threads keep from one call to the next.
function("hotloop_scratch_bytes", int64)

# ---- Rows of packed storage -------------------------------------------------------------------

RowCopy = structure(
    "RowCopy",
    """Rows of packed storage that become rows of a batch.

    Rows `indices` (count of them, each in [0, num_rows)) of `rows`, or of the file `fd` where rows
    is null, go to `out`, out_step_bytes apart. With `table` (float [channels][256]) stored rows are
    bytes, and written ones the floats that they stand for. After the call `bad_index` is the place
    in `indices` of the first index outside, and then nothing was written; -1: none is.
    `file_error`: -1: the file is too short; above 0: errno of a read that failed.""",
    rows=pointer("const unsigned char"),
    fd=int64,
    num_rows=int64,
    row_bytes=int64,
    indices=pointer("const int64_t"),
    count=int64,
    out=pointer("char"),
    out_step_bytes=int64,
    table=pointer("const float"),
    channels=int64,
    num_threads=int64,
    bad_index=int64,
    file_error=int64,
)
function("hotloop_copy_rows", copy=pointer("RowCopy"))

# ---- The tensor arena ---------------------------------------------------------------------------
# One a process; `allocator_hook.h` says how torch's tensors get there.

ArenaCounters = structure(
    "ArenaCounters",
    "What the arena holds, in bytes and blocks; ArenaStats in memory/tensor_arena.py says more.",
    **dict.fromkeys(
        (
            "live_bytes",
            "peak_live_bytes",
            "num_live",
            "top_bytes",
            "peak_top_bytes",
            "touched_bytes",
            "free_bytes",
            "capacity_bytes",
            "reserved_bytes",
            "num_allocations",
            "num_fallbacks",
        ),
        uint64,
    ),
)
ArenaEvent = structure(
    "ArenaEvent",
    "A block placed at an offset for a request; requested_bytes -1: the one there was freed.",
    offset_bytes=uint64,
    requested_bytes=int64,
)
# Whether tensors of the torch that is loaded can come from the arena; changes nothing.
function("hotloop_arena_check")
# 1: torch has asked for a tensor's memory since the first hotloop_arena_install.
function("hotloop_arena_is_asked")
# Bytes of addresses reserved: at least least_bytes, or 0.
function("hotloop_arena_reserve", uint64, wanted_bytes=uint64, least_bytes=uint64)
# From now on requests of threshold_bytes and more come from the arena, up to capacity_bytes, until
# as many calls of hotloop_arena_uninstall. huge_pages: 1 asks for them, -1 for none.
function(
    "hotloop_arena_install",
    capacity_bytes=uint64,
    threshold_bytes=uint64,
    granularity_bytes=uint64,
    huge_pages=int32,
)
function("hotloop_arena_uninstall", nothing)
function("hotloop_arena_trim", nothing)
function("hotloop_arena_count", nothing, counters=pointer("ArenaCounters"))
function("hotloop_arena_reset_peak", nothing)
# Bytes from the arena's start to a block in use; -1: it is not one.
function("hotloop_arena_offset_of", int64, pointer=pointer("const void"))
# Events from now on, up to capacity, null stops; returns how many there were since the last call.
function("hotloop_arena_record", uint64, events=pointer("ArenaEvent"), capacity=uint64)

# ---- Numeric kernels ---------------------------------------------------------------------------
# float32 throughout; strides in elements; num_threads: at most. Results do not depend on it.

Matrix = structure(
    "Matrix",
    "A matrix in memory: element (i, j) is data[i * row_stride + j * col_stride].",
    data=pointer("const float"),
    row_stride=int64,
    col_stride=int64,
)
ProductCall = structure(
    "ProductCall",
    """C[m, n] = activation(A[m, k] B[k, n] + bias[n]), or that where mask[m, n] is above 0, else 0.

    Columns of C and of mask are adjacent. bias and mask may be null, and at most one of them is
    given; with mask there is no activation. activation: 0 none, 1 relu. bfloat16: A and B are
    rounded to it and summed in float32; an error where hotloop_has_bfloat16() is 0.""",
    m=int64,
    n=int64,
    k=int64,
    a=value(Matrix),
    b=value(Matrix),
    c=pointer("float"),
    c_row_stride=int64,
    bias=pointer("const float"),
    mask=pointer("const float"),
    mask_row_stride=int64,
    activation=int32,
    bfloat16=int32,
    num_threads=int64,
)
function("hotloop_product", product=pointer("const ProductCall"))
function("hotloop_has_bfloat16")
BatchProductCall = structure(
    "BatchProductCall",
    """out[i] [m, n] = a[i] [m, k] b[i] [k, n] for each i of the batch; columns of out adjacent.""",
    batch=int64,
    m=int64,
    n=int64,
    k=int64,
    a=value(Matrix),
    b=value(Matrix),
    a_batch_stride=int64,
    b_batch_stride=int64,
    out=pointer("float"),
    out_batch_stride=int64,
    out_row_stride=int64,
    num_threads=int64,
)
function("hotloop_batch_product", call=pointer("const BatchProductCall"))
TorchProductCall = structure(
    "TorchProductCall",
    """out = a b (+ bias), of torch's own tensors, by torch.

    Each is the address of a word that holds a tensor's address (`Tensor._cdata`). bias may be null.
    by_onednn: by mkldnn's linear, which takes b transposed; out is dense then. is_batch: of such
    matrices.""",
    out=pointer(),
    a=pointer(),
    b=pointer(),
    bias=pointer(),
    by_onednn=int32,
    is_batch=int32,
)
function("hotloop_torch_product", product=pointer("const TorchProductCall"))

UpdateRule = structure(
    "UpdateRule",
    """Scalars of one update; the formulas are those of torch.optim's single-tensor functions.

    kind: 0 SGD, 1 with momentum, 2 Nesterov, 3 Adam, 4 AdamW, 5 RMSprop, 6 Adagrad, 7 NAdam,
    8 NAdam with decoupled decay, 9 Adamax, 10 Adadelta. RAdam is Adam with other scalars.
    gradient_rate, moment_rate: NAdam's shares of the step.""",
    kind=int32,
    first_step=int32,
    **dict.fromkeys(
        (
            "lr",
            "beta1",
            "beta2",
            "eps",
            "weight_decay",
            "bias_correction1",
            "bias_correction2_sqrt",
            "momentum",
            "dampening",
            "alpha",
            "gradient_rate",
            "moment_rate",
        ),
        float64,
    ),
)
UpdateCall = structure(
    "UpdateCall",
    """Updates `count` adjacent weights by scale * gradient.

    state1: momentum, the first moment, the squares of RMSprop, Adagrad and Adadelta; null for SGD.
    state2: the second moment, Adamax's maximum, Adadelta's squared steps; else null.""",
    count=int64,
    weight=pointer("float"),
    gradient=pointer("const float"),
    state1=pointer("float"),
    state2=pointer("float"),
    rule=value(UpdateRule),
    scale=float32,
    num_threads=int64,
)
function("hotloop_update", update=pointer("const UpdateCall"))
ProductUpdateCall = structure(
    "ProductUpdateCall",
    """Updates weight[m, n] and its states by the gradient scale * A[m, k] B[k, n].

    The gradient goes to memory only where `gradient` is not null. Columns are adjacent; rows of the
    states and of the gradient lie state_row_stride apart. Else as ProductCall and UpdateCall.""",
    m=int64,
    n=int64,
    k=int64,
    a=value(Matrix),
    b=value(Matrix),
    weight=pointer("float"),
    weight_row_stride=int64,
    state1=pointer("float"),
    state2=pointer("float"),
    gradient=pointer("float"),
    state_row_stride=int64,
    rule=value(UpdateRule),
    scale=float32,
    bfloat16=int32,
    num_threads=int64,
)
function("hotloop_product_update", update=pointer("const ProductUpdateCall"))

ImageStrides = structure(
    "ImageStrides",
    "Strides of images [batch, channels, height, width].",
    n=int64,
    c=int64,
    h=int64,
    w=int64,
)
Windows = structure(
    "Windows",
    """Windows of kernel_h x kernel_w, stride_h and stride_w apart, over padded images.

    With [batch, channels, height, width] of the images, output_height and output_width of what is
    made of them.""",
    **dict.fromkeys(
        (
            "batch",
            "channels",
            "height",
            "width",
            "output_height",
            "output_width",
            "kernel_h",
            "kernel_w",
            "stride_h",
            "stride_w",
            "pad_h",
            "pad_w",
        ),
        int64,
    ),
)
PoolCall = structure(
    "PoolCall",
    """The maximum of each window, then an activation; what lies outside an image counts as nothing.

    The first of equal values stays, and a NaN wins. Output is dense: [n, h, w, c] where
    channels_last is 1, else [n, c, h, w]. argmax may be null; else it gets, for each result, the
    place of the maximum in its window, row by row, or 255 where relu cut it off; dense, in the
    order [n, h, w, c] where the input's channels are adjacent, else [n, c, h, w].
    activation: as Layer, but only 0 and 1 with argmax, whose windows have at most 255 places.""",
    windows=value(Windows),
    input=pointer("const float"),
    input_strides=value(ImageStrides),
    output=pointer("float"),
    argmax=pointer("uint8_t"),
    channels_last=int32,
    activation=int32,
    num_threads=int64,
)
function("hotloop_pool", pool=pointer("const PoolCall"))
PoolBackwardCall = structure(
    "PoolBackwardCall",
    """The gradient of a pooling's input, from that of its output and its argmax.

    Of windows that lie next to each other (stride as kernel, no padding). Every element of
    input_gradient is written. The order of argmax follows whether input_gradient's channels are
    adjacent, as in PoolCall.""",
    windows=value(Windows),
    gradient=pointer("const float"),
    gradient_strides=value(ImageStrides),
    argmax=pointer("const uint8_t"),
    input_gradient=pointer("float"),
    input_gradient_strides=value(ImageStrides),
    num_threads=int64,
)
function("hotloop_pool_backward", pool=pointer("const PoolBackwardCall"))
PoolPlanesCall = structure(
    "PoolPlanesCall",
    """The maximum of each window of dense planes, and its index in its plane: as torch's operator.

    Input and output are dense, [n, c, h, w]; each window has a pixel inside. The first of equal
    values stays, and the last NaN wins.""",
    windows=value(Windows),
    input=pointer("const float"),
    output=pointer("float"),
    indices=pointer("int64_t"),
    num_threads=int64,
)
function("hotloop_pool_planes", pool=pointer("const PoolPlanesCall"))

ConvolutionShape = structure(
    "ConvolutionShape",
    """Images [batch, in_channels, height, width] and filters [out_channels, in_channels, ...].

    Stride 1; filters of 1 to 7 rows and columns, padding less than these.""",
    batch=int64,
    in_channels=int64,
    height=int64,
    width=int64,
    out_channels=int64,
    filter_height=int64,
    filter_width=int64,
    pad_h=int64,
    pad_w=int64,
)
FilterStrides = structure(
    "FilterStrides",
    "Strides of filters [out_channels, in_channels, filter_height, filter_width].",
    o=int64,
    i=int64,
    h=int64,
    w=int64,
)
ConvolutionCall = structure(
    "ConvolutionCall",
    """Output = input * filters (+ bias), relu where asked.

    Channels of input and output are adjacent. With argmax the results are pooled by 2 x 2, and
    argmax [batch, height / 2, width / 2, out_channels] is as PoolCall's; then the channels of the
    output may lie output_strides.c apart.""",
    shape=value(ConvolutionShape),
    input=pointer("const float"),
    input_strides=value(ImageStrides),
    filters=pointer("const float"),
    filter_strides=value(FilterStrides),
    bias=pointer("const float"),
    output=pointer("float"),
    output_strides=value(ImageStrides),
    argmax=pointer("uint8_t"),
    relu=int32,
    num_threads=int64,
)
function("hotloop_convolve", convolution=pointer("const ConvolutionCall"))
ConvolutionInputGradientCall = structure(
    "ConvolutionInputGradientCall",
    """The gradient of the input from that of the output, or of the pooled output and its argmax.

    0 where mask, laid out as input_gradient, is not above 0; mask may be null. Channels are
    adjacent but those of a pooled output's gradient, which may lie in planes.""",
    shape=value(ConvolutionShape),
    gradient=pointer("const float"),
    gradient_strides=value(ImageStrides),
    argmax=pointer("const uint8_t"),
    filters=pointer("const float"),
    filter_strides=value(FilterStrides),
    mask=pointer("const float"),
    input_gradient=pointer("float"),
    input_strides=value(ImageStrides),
    num_threads=int64,
)
function(
    "hotloop_convolve_input_gradient", convolution=pointer("const ConvolutionInputGradientCall")
)
ConvolutionFilterGradientCall = structure(
    "ConvolutionFilterGradientCall",
    "The gradients of the filters and of the bias; else as ConvolutionInputGradientCall.",
    shape=value(ConvolutionShape),
    input=pointer("const float"),
    input_strides=value(ImageStrides),
    gradient=pointer("const float"),
    gradient_strides=value(ImageStrides),
    argmax=pointer("const uint8_t"),
    filter_gradient=pointer("float"),
    filter_strides=value(FilterStrides),
    bias_gradient=pointer("float"),
    num_threads=int64,
)
function(
    "hotloop_convolve_filter_gradient",
    convolution=pointer("const ConvolutionFilterGradientCall"),
)

CrossEntropyCall = structure(
    "CrossEntropyCall",
    """Cross entropy of logits [rows, classes] with labels, and its gradient times `scale`.

    Columns are adjacent. Rows whose label is ignore_index count as nothing. weights: [classes];
    null: all 1. reduction: 0 mean (over the weights of the labels), 1 sum. gradient: null: none; it
    may be `logits`. A label outside [0, classes) is an error, and nothing is written.""",
    rows=int64,
    classes=int64,
    logits=pointer("const float"),
    row_stride=int64,
    labels=pointer("const int64_t"),
    ignore_index=int64,
    weights=pointer("const float"),
    loss=pointer("float"),
    gradient=pointer("float"),
    gradient_row_stride=int64,
    reduction=int32,
    scale=float32,
    num_threads=int64,
)
function("hotloop_cross_entropy", call=pointer("const CrossEntropyCall"))
SquaredErrorCall = structure(
    "SquaredErrorCall",
    """The squares of output - target of `count` adjacent elements, and the gradient times `scale`.

    reduction: 0 mean, 1 sum. gradient: of the output; null: none; it may be `output`.""",
    count=int64,
    output=pointer("const float"),
    target=pointer("const float"),
    loss=pointer("float"),
    gradient=pointer("float"),
    reduction=int32,
    scale=float32,
    num_threads=int64,
)
function("hotloop_squared_error", call=pointer("const SquaredErrorCall"))
ColumnSumsCall = structure(
    "ColumnSumsCall",
    """out[cols] = the sum of each column of x [rows, cols], of columns that are adjacent.

    With mask (else null) an element counts 0 where mask is not above 0.""",
    rows=int64,
    cols=int64,
    x=pointer("const float"),
    row_stride=int64,
    mask=pointer("const float"),
    mask_row_stride=int64,
    out=pointer("float"),
    num_threads=int64,
)
function("hotloop_column_sums", call=pointer("const ColumnSumsCall"))

RandomCall = structure(
    "RandomCall",
    """out[count]: numbers that depend on a key, on streams and on their position, nothing else.

    kind 0: from a to b, evenly. 1: 1 where a number from 0 to 1 is below a, else 0. 2: normal, of
    mean a and deviation b; takes both streams.""",
    count=int64,
    kind=int64,
    key=pointer("const int64_t"),
    first_stream=uint64,
    second_stream=uint64,
    a=float32,
    b=float32,
    out=pointer("float"),
)
function("hotloop_random", call=pointer("const RandomCall"))

SoftmaxCall = structure(
    "SoftmaxCall",
    """out = softmax of each row of x [rows, cols], dense, or its logarithm; out may be x.

    is_safe: 0 for a row of negative infinity, which else gives NaN; no logarithm then.""",
    rows=int64,
    cols=int64,
    x=pointer("const float"),
    out=pointer("float"),
    logarithm=int32,
    is_safe=int32,
    num_threads=int64,
)
function("hotloop_softmax", call=pointer("const SoftmaxCall"))
SoftmaxGradientCall = structure(
    "SoftmaxGradientCall",
    "The gradient of a softmax's input from its result; input_gradient may be `gradient`.",
    rows=int64,
    cols=int64,
    result=pointer("const float"),
    gradient=pointer("const float"),
    input_gradient=pointer("float"),
    logarithm=int32,
    num_threads=int64,
)
function("hotloop_softmax_gradient", call=pointer("const SoftmaxGradientCall"))
LayerNormCall = structure(
    "LayerNormCall",
    """out = (x - mean) rstd weight + bias of each row of x [rows, cols], dense.

    weight, bias: [cols], may be null. mean, rstd: [rows], what the gradient needs; may be null.""",
    rows=int64,
    cols=int64,
    x=pointer("const float"),
    weight=pointer("const float"),
    bias=pointer("const float"),
    out=pointer("float"),
    mean=pointer("float"),
    rstd=pointer("float"),
    epsilon=float32,
    num_threads=int64,
)
function("hotloop_layer_norm", call=pointer("const LayerNormCall"))
LayerNormGradientCall = structure(
    "LayerNormGradientCall",
    "Gradients of a layer norm; weight and each of the results may be null.",
    rows=int64,
    cols=int64,
    x=pointer("const float"),
    gradient=pointer("const float"),
    mean=pointer("const float"),
    rstd=pointer("const float"),
    weight=pointer("const float"),
    input_gradient=pointer("float"),
    weight_gradient=pointer("float"),
    bias_gradient=pointer("float"),
    num_threads=int64,
)
function("hotloop_layer_norm_gradient", call=pointer("const LayerNormGradientCall"))
RmsNormCall = structure(
    "RmsNormCall",
    """out = x rstd weight, rstd = 1 / sqrt(mean of x^2 + epsilon), of each row of x [rows, cols].

    weight: [cols]. rstd: [rows], what the gradient needs. Either may be null.""",
    rows=int64,
    cols=int64,
    x=pointer("const float"),
    weight=pointer("const float"),
    out=pointer("float"),
    rstd=pointer("float"),
    epsilon=float32,
    num_threads=int64,
)
function("hotloop_rms_norm", call=pointer("const RmsNormCall"))
RmsNormGradientCall = structure(
    "RmsNormGradientCall",
    "Gradients of an RMS norm; weight and each of the results may be null.",
    rows=int64,
    cols=int64,
    x=pointer("const float"),
    gradient=pointer("const float"),
    rstd=pointer("const float"),
    weight=pointer("const float"),
    input_gradient=pointer("float"),
    weight_gradient=pointer("float"),
    num_threads=int64,
)
function("hotloop_rms_norm_gradient", call=pointer("const RmsNormGradientCall"))
RowSumsCall = structure(
    "RowSumsCall",
    "out [rows] = sums of the rows of x [rows, cols], dense, / divisor.",
    rows=int64,
    cols=int64,
    x=pointer("const float"),
    out=pointer("float"),
    divisor=float32,
    num_threads=int64,
)
function("hotloop_row_sums", call=pointer("const RowSumsCall"))
BatchNormCall = structure(
    "BatchNormCall",
    """out = relu((x - mean) rstd weight + bias + addend), x [rows, cols], dense; mean of a column.

    weight, bias: [cols]; addend: as x; each may be null. mean, rstd: [cols], what the gradient
    needs. running_mean, running_var: [cols], which take over the share `momentum` of the batch's
    mean and unbiased variance; may be null. relu: 0: none.""",
    rows=int64,
    cols=int64,
    x=pointer("const float"),
    weight=pointer("const float"),
    bias=pointer("const float"),
    addend=pointer("const float"),
    out=pointer("float"),
    mean=pointer("float"),
    rstd=pointer("float"),
    running_mean=pointer("float"),
    running_var=pointer("float"),
    momentum=float64,
    epsilon=float64,
    relu=int32,
    num_threads=int64,
)
function("hotloop_batch_norm", call=pointer("const BatchNormCall"))
BatchNormGradientCall = structure(
    "BatchNormGradientCall",
    """Gradients of a batch norm from `gradient`, 0 where mask is not above 0.

    mask: what relu after it gave; masked_gradient: where the gradient goes that relu leaves, with a
    mask alone. weight, mask and each of the results may be null.""",
    rows=int64,
    cols=int64,
    x=pointer("const float"),
    gradient=pointer("const float"),
    mask=pointer("const float"),
    mean=pointer("const float"),
    rstd=pointer("const float"),
    weight=pointer("const float"),
    masked_gradient=pointer("float"),
    input_gradient=pointer("float"),
    weight_gradient=pointer("float"),
    bias_gradient=pointer("float"),
    num_threads=int64,
)
function("hotloop_batch_norm_gradient", call=pointer("const BatchNormGradientCall"))
ImageMeansCall = structure(
    "ImageMeansCall",
    "out [images, cols] = sums over the pixels of x [images, pixels, cols] / divisor, both dense.",
    images=int64,
    pixels=int64,
    cols=int64,
    x=pointer("const float"),
    out=pointer("float"),
    divisor=float32,
    num_threads=int64,
)
function("hotloop_image_means", call=pointer("const ImageMeansCall"))
ImageMeansGradientCall = structure(
    "ImageMeansGradientCall",
    """out [images, pixels, cols], dense = gradient [images, cols] / divisor for each pixel.

    mask: as out: 0 where it is not above 0; may be null.""",
    images=int64,
    pixels=int64,
    cols=int64,
    gradient=pointer("const float"),
    gradient_row_stride=int64,
    mask=pointer("const float"),
    out=pointer("float"),
    divisor=float32,
    num_threads=int64,
)
function("hotloop_image_means_gradient", call=pointer("const ImageMeansGradientCall"))
CopyCall = structure(
    "CopyCall",
    """target = source, of up to 8 dimensions; strides are those of elements.

    element_bytes: 1, 4 or 8. A stride of 0 repeats what is read.""",
    num_dims=int64,
    sizes=array(int64, 8),
    from_strides=array(int64, 8),
    to_strides=array(int64, 8),
    source=pointer("const void"),
    target=pointer("void"),
    element_bytes=int64,
    num_threads=int64,
)
function("hotloop_copy", call=pointer("const CopyCall"))
AddCountCall = structure(
    "AddCountCall",
    "*count += addend, as a counter of batches.",
    count=pointer("int64_t"),
    addend=int64,
)
function("hotloop_add_count", call=pointer("const AddCountCall"))
DrawCall = structure(
    "DrawCall",
    """`value` with this probability, else 0, for each of `count` floats, as torch draws them.

    state: of its CPU generator, as `torch.Generator.get_state` gives it, at a multiple of 8 bytes;
    it goes on.""",
    count=int64,
    out=pointer("float"),
    state=pointer(),
    probability=float64,
    value=float32,
)
function("hotloop_draw", call=pointer("const DrawCall"))
EmbeddingCall = structure(
    "EmbeddingCall",
    """Row i of `out` [count, cols], dense, is row indices[i] of `table` [rows, cols].

    An index outside [0, rows) is an error, and nothing is written.""",
    count=int64,
    rows=int64,
    cols=int64,
    indices=pointer("const int64_t"),
    table=pointer("const float"),
    table_row_stride=int64,
    out=pointer("float"),
    num_threads=int64,
)
function("hotloop_embedding", call=pointer("const EmbeddingCall"))
EmbeddingGradientCall = structure(
    "EmbeddingGradientCall",
    """The gradient of a table [rows, cols], dense, from that of its rows; every element is written.

    Rows of index padding_index count as nothing; -1: all count. Else as EmbeddingCall.""",
    count=int64,
    rows=int64,
    cols=int64,
    indices=pointer("const int64_t"),
    padding_index=int64,
    gradient=pointer("const float"),
    gradient_row_stride=int64,
    table_gradient=pointer("float"),
    num_threads=int64,
)
function("hotloop_embedding_gradient", call=pointer("const EmbeddingGradientCall"))

# ---- Element-wise programs -----------------------------------------------------------------------

ElementwiseTensor = structure(
    "ElementwiseTensor",
    "A tensor over [planes, rows, cols]; a stride of 0 repeats it.",
    data=pointer("float"),
    plane_stride=int64,
    row_stride=int64,
    col_stride=int64,
)
ElementwiseOperation = structure(
    "ElementwiseOperation",
    """One operation on registers 0 to 15; opcode: in the order of OPERATIONS of elementwise.py.

    A load has its tensor in `a`, a store in `out`. -1 for a, b or c: `constant` stands there.""",
    **dict.fromkeys(("opcode", "out", "a", "b", "c"), int32),
    constant=float32,
)
ElementwiseCall = structure(
    "ElementwiseCall",
    """Runs the operations for each element of [planes, rows, cols]; at most 256 operations.

    What is stored lies exactly where what is loaded does, or apart from all of it. A program that
    cannot run (a register that nothing wrote) is an error, and nothing is written.""",
    planes=int64,
    rows=int64,
    cols=int64,
    operations=pointer("const ElementwiseOperation"),
    num_operations=int64,
    tensors=pointer("const ElementwiseTensor"),
    num_tensors=int64,
    num_threads=int64,
)
function("hotloop_elementwise", call=pointer("const ElementwiseCall"))

# ---- Layers of a network ------------------------------------------------------------------------

AttentionOperand = structure(
    "AttentionOperand",
    """Queries, keys or values: part of the value at `input`, which has sample_floats a sample.

    Element e of row r of head h is at offset + h * head_stride + r * row_stride + e.""",
    input=int64,
    offset=int64,
    head_stride=int64,
    row_stride=int64,
    sample_floats=int64,
)
Attention = structure(
    "Attention",
    """softmax(q k^T scale) v of each head; results lie [query][head][element].

    Queries and keys have head_size elements, values value_size. causal: query i sees no key
    after key i.""",
    operands=array(value(AttentionOperand), 3),
    heads=int64,
    queries=int64,
    keys=int64,
    head_size=int64,
    value_size=int64,
    causal=int32,
    scale=float32,
)
Layer = structure(
    "Layer",
    """One layer of a network: activation(what it computes + bias + addend).

    input, addend, output: floats from the arena's start for one sample, or -1 the network's input,
    -2 its output, -3 none. Images are height x width x channels and become output_height x
    output_width x output_channels; a linear layer makes `height` rows of output_channels from rows
    of `channels`. kind, activation: in the order of KINDS and ACTIVATIONS of infer/network.py.
    weight: panels of panel_cols columns that hotloop_pack_panels has made (of a layer norm: its
    weight). filters: what hotloop_prepare_filters has made, for 3 x 3 filters with stride 1.""",
    kind=int64,
    input=int64,
    addend=int64,
    output=int64,
    windows=value(Windows),
    output_channels=int64,
    panel_cols=int64,
    activation=int32,
    max_pool_2x2=int32,
    logarithm=int32,
    epsilon=float32,
    weight=pointer("const float"),
    filters=pointer("const float"),
    bias=pointer("const float"),
    attention=value(Attention),
)
Network = structure(
    "Network",
    "Layers in order; arena_floats: of the values between them, for one sample.",
    layers=pointer("const Layer"),
    num_layers=int64,
    arena_floats=int64,
    num_threads=int64,
)
function(
    "hotloop_network_run",
    network=pointer("const Network"),
    batch=int64,
    input=pointer("const float"),
    output=pointer("float"),
)
# Bytes of values between the layers in a call with so many samples; a large batch goes in parts.
function("hotloop_network_values_bytes", int64, arena_floats=int64, batch=int64)
# Columns of a panel: as many as there are sums for, or fewer so that threads have equal parts.
function("hotloop_panel_cols", int64, outputs=int64, num_threads=int64)
function("hotloop_packed_floats", int64, outputs=int64, depth=int64, panel_cols=int64)
# W [outputs, depth] to panels [depth][panel_cols]; the last one as wide as its vectors need.
function(
    "hotloop_pack_panels",
    nothing,
    weight=pointer("const float"),
    outputs=int64,
    depth=int64,
    panel_cols=int64,
    to=pointer("float"),
)
# Filters [outputs, 3, 3, channels] as their layer reads them.
function("hotloop_prepared_filter_floats", int64, outputs=int64, channels=int64)
function(
    "hotloop_prepare_filters",
    nothing,
    filters=pointer("const float"),
    outputs=int64,
    channels=int64,
    to=pointer("float"),
)
# Whether such a convolution needs its panels too, for the smallest batches.
function(
    "hotloop_needs_panels",
    channels=int64,
    output_height=int64,
    output_width=int64,
    num_threads=int64,
)

# ---- Programs of kernels -------------------------------------------------------------------------

ControlRow = structure(
    "ControlRow",
    """The UpdateRule of one parameter group in one step, as numbers of one type.

    A step of a program has a table [groups] of these.""",
    **dict.fromkeys(
        (
            "kind",
            "lr",
            "beta1",
            "beta2",
            "eps",
            "weight_decay",
            "bias_correction1",
            "bias_correction2_sqrt",
            "momentum",
            "dampening",
            "alpha",
            "first_step",
            "gradient_rate",
            "moment_rate",
        ),
        float64,
    ),
    unused=array(float64, 2),
)
Instruction = structure(
    "Instruction",
    """One call of a program: `entry` gets `call`, its structure, and returns a status.

    It is a function of this library that takes one pointer. rule: where in that
    structure the scalars of an update are; they are written before each call, from row `group` of
    the step's table. Null: there are none.""",
    entry=pointer(),
    call=pointer(),
    rule=pointer("UpdateRule"),
    group=int64,
)
InputCopy = structure(
    "InputCopy",
    "`bytes` of `source` go to `target` before a step; those of the next step lie step_bytes on.",
    source=pointer("const char"),
    target=pointer("char"),
    bytes=int64,
    step_bytes=int64,
)
InstructionRun = structure(
    "InstructionRun",
    """`steps` steps: inputs are copied, then the instructions run in order.

    tables: [steps][groups]; null: rules stay as they are. After a step the float at `loss` goes to
    losses[step] (either may be null) and each of `counters` grows by one. The first call that fails
    ends the run: then failed is its number, else -1. steps_done: whole steps, whatever the status.
    num_threads: for the copies.""",
    instructions=pointer("const Instruction"),
    num_instructions=int64,
    steps=int64,
    tables=pointer("const ControlRow"),
    groups=int64,
    inputs=pointer("const InputCopy"),
    num_inputs=int64,
    loss=pointer("const float"),
    losses=pointer("float"),
    counters=pointer("float*"),
    num_counters=int64,
    num_threads=int64,
    steps_done=int64,
    failed=int64,
)
function("hotloop_run_instructions", run=pointer("InstructionRun"))

# ---- A team of threads ---------------------------------------------------------------------------

WorkerPlacement = structure(
    "WorkerPlacement",
    """Where a worker's thread runs and where its new pages come from.

    No CPUs: anywhere. policy_mode: of set_mempolicy(2), with these nodes; -1: as it is.""",
    cpus=pointer("const int32_t"),
    num_cpus=int64,
    nodes=pointer("const int32_t"),
    num_nodes=int64,
    policy_mode=int64,
)
TeamOpen = structure(
    "TeamOpen",
    """A team of `num_workers` threads; the first one is whoever calls.

    `placements`: one for each worker; that of the first is not used. `team`: the result.""",
    num_workers=int64,
    placements=pointer("const WorkerPlacement"),
    team=pointer(),
)
TeamWeight = structure(
    "TeamWeight",
    """How one weight gets its gradient and its update.

    factored 1: the gradient is left^T right, of left [depth, rows] and right [depth, cols], which
    all chunks wrote their part of. factored 0: the chunks' gradients (rows 1, cols elements) lie
    chunk_stride floats apart from `left` on, and are added in the order of the chunks. group: row
    of the control table. gradient: where the sum goes, with no update; null: one is made.""",
    factored=int64,
    group=int64,
    rows=int64,
    cols=int64,
    depth=int64,
    weight=pointer("float"),
    state1=pointer("float"),
    state2=pointer("float"),
    left=pointer("const float"),
    right=pointer("const float"),
    chunk_stride=int64,
    gradient=pointer("float"),
)
TeamBuffer = structure(
    "TeamBuffer",
    """A buffer that the model changes: each chunk works on a copy, chunk_stride_bytes apart.

    After a step `shared` becomes the copies' mean where is_float is 1, else the first chunk's.""",
    bytes=int64,
    is_float=int64,
    shared=pointer("char"),
    copies=pointer("char"),
    chunk_stride_bytes=int64,
)
ChunkCopy = structure(
    "ChunkCopy",
    """What a chunk takes before its instructions, or hands over after them.

    `bytes` of source + chunk * source_step go to target + chunk * target_step. scale: 0, or what
    they are multiplied by, being floats.""",
    source=pointer("const char"),
    target=pointer("char"),
    bytes=int64,
    source_step=int64,
    target_step=int64,
    scale=float32,
)
ChunkProgram = structure(
    "ChunkProgram",
    """Forward and backward of a chunk on the memory of one worker.

    The first num_batch of `taken` are parts of the batch. An instruction may be a function of
    Python's.""",
    taken=pointer("const ChunkCopy"),
    num_taken=int64,
    num_batch=int64,
    instructions=pointer("const Instruction"),
    num_instructions=int64,
    given=pointer("const ChunkCopy"),
    num_given=int64,
)
# Of a batch that lies at the sources of the program's copies.
function("hotloop_chunk_run", program=pointer("const ChunkProgram"), chunk=int64)
TeamBind = structure(
    "TeamBind",
    """What a team works on; its memory stays the caller's.

    programs: one for each worker; null: chunks run elsewhere, and a step is the update alone.
    loss_share: of each chunk's loss in that of the batch. keys: of each chunk, written before it
    runs where chunks draw random numbers. losses: of each chunk, which its program hands over.""",
    num_chunks=int64,
    programs=pointer("const ChunkProgram"),
    weights=pointer("const TeamWeight"),
    num_weights=int64,
    buffers=pointer("const TeamBuffer"),
    num_buffers=int64,
    loss_share=float64,
    keys=pointer("int64_t"),
    losses=pointer("const float"),
)
TeamFill = structure(
    "TeamFill",
    """Memory that workers write before anybody else does, so that its pages are near them.

    Each writes its share of the rows: whole multiples of `grain` of them, or with grain 0 those of
    the chunks that it begins with. `source` null: zeros.""",
    target=pointer("char"),
    source=pointer("const char"),
    rows=int64,
    row_bytes=int64,
    grain=int64,
)
WorkerTimes = structure(
    "WorkerTimes",
    """What a worker did in one call: chunks it ran, `stolen` of them another's.

    busy: running them, cpu: of that with a processor; wait: for the others; update: its share.""",
    **dict.fromkeys(("chunks", "stolen", "busy_ns", "wait_ns", "update_ns", "cpu_ns"), int64),
)
TeamRun = structure(
    "TeamRun",
    """`steps` steps of a team.

    batch: where each part of it lies, chunk after chunk, as far apart as the programs' copies say.
    It must stay as it is where a worker hangs.
    tables: [steps][groups]. keys: of each step; null where chunks draw nothing. times: for each
    worker. steps_done: the weights are those after so many steps, whatever the status. hangs: 1
    where a worker did not come back in time; the team must be closed then.""",
    batch=pointer("const char* const"),
    steps=int64,
    tables=pointer("const ControlRow"),
    groups=int64,
    losses=pointer("float"),
    counters=pointer("float*"),
    num_counters=int64,
    keys=pointer("const int64_t"),
    times=pointer("WorkerTimes"),
    steps_done=int64,
    hangs=int64,
)
function("hotloop_team_open", open=pointer("TeamOpen"))
# Ends the threads. A team of which one hung is left in memory: that thread still uses it.
function("hotloop_team_close", nothing, team=pointer())
function("hotloop_team_bind", team=pointer(), bind=pointer("const TeamBind"))
# Chunks that each worker begins a step with; chunks that it must have left for another one to take
# one; seconds after which a chunk counts as hanging, 0: never.
function(
    "hotloop_team_balance",
    nothing,
    team=pointer(),
    quota=pointer("const int32_t"),
    steal_threshold=int64,
    hang_s=float64,
)
function("hotloop_team_fill", team=pointer(), fills=pointer("const TeamFill"), count=int64)
function("hotloop_team_run", team=pointer(), run=pointer("TeamRun"))
# For tests: worker `worker` fails (kind 1) or sleeps (2) at its next chunk.
function(
    "hotloop_team_inject_fault",
    nothing,
    team=pointer(),
    worker=int64,
    kind=int64,
    seconds=float64,
)

# ---- Guards of a recorded step -------------------------------------------------------------------

GuardWord = structure(
    "GuardWord",
    "A word of memory, and what stands there as long as nothing has changed.",
    address=pointer("const uint64_t"),
    expected=uint64,
)
GuardBlock = structure(
    "GuardBlock",
    """Memory that is looked at only as long as `slot` holds `owner`, which keeps it in being.

    content: `count` words that are those of `expected` as long as nothing has changed.""",
    slot=pointer("const uint64_t"),
    owner=uint64,
    content=pointer("const uint64_t"),
    expected=pointer("const uint64_t"),
    count=int64,
)
# Index of the first one that is not as expected, in order; -1: all are. None after that one is
# read: a word may be the address of those that follow.
function("hotloop_first_changed_word", int64, words=pointer("const GuardWord"), count=int64)
function("hotloop_first_changed_block", int64, blocks=pointer("const GuardBlock"), count=int64)

# ---- Matrix products of a running program -------------------------------------------------------

RouterRow = structure(
    "RouterRow",
    """One shape of matrix product a[m, k] b[k, n], and which kernel makes it.

    batch: 0: one product. layout: 1: a is transposed, 2: b is, 4: a bias is added, 8: into memory
    of the caller. kernel: 0 torch, 1 oneDNN, 2 hotloop; -1: not known. calls, ns: so far.
    best_s: least seconds of a call by each kernel; infinite: not tried.""",
    batch=int64,
    m=int64,
    k=int64,
    n=int64,
    layout=int32,
    threads=int32,
    kernel=int32,
    reserved=int32,
    calls=int64,
    ns=int64,
    best_s=array(float64, 3),
)
RouterMode = structure(
    "RouterMode",
    """least_work: multiply-adds of the smallest product that is routed.

    exact: products are those of float32 (else they are torch's). timed: kernels that are not known
    yet may be timed; else torch's is taken.""",
    least_work=int64,
    exact=int32,
    timed=int32,
)
function("hotloop_router_set_mode", nothing, mode=pointer("const RouterMode"))
# Takes over torch's mm and bmm on the CPU; nothing where it has them already.
function("hotloop_router_install")
function("hotloop_router_remove", nothing)
# Takes a row's kernel and seconds as known.
function("hotloop_router_know", nothing, row=pointer("const RouterRow"))
# Forgets what is known, and the calls.
function("hotloop_router_clear", nothing)
# Writes up to `count` rows; the result is how many there are.
function("hotloop_router_rows", int64, rows=pointer("RouterRow"), count=int64)

# ---- The two sides ------------------------------------------------------------------------------


def layout() -> list[int]:
    """Size of each structure and offset of each of its fields, as ctypes has them."""
    rows: list[int] = []
    for made in _structures.values():
        rows.append(ctypes.sizeof(made))
        rows += [getattr(made, field).offset for field, *_ in made._fields_]
    return rows


def layout_names() -> list[str]:
    """What each row of ``layout`` is, for a message."""
    names: list[str] = []
    for name, fields in _field_types.items():
        names.append(f"size of {name}")
        names += [f"offset of {name}.{field}" for field in fields]
    return names


def declare(library: ctypes.CDLL) -> None:
    """Give each function of a loaded library its types.

    Raises:
        AttributeError: the library lacks one.
    """
    for name, (result, parameters) in _functions.items():
        entry = getattr(library, name)
        entry.restype = result.passed
        entry.argtypes = [kind.passed for kind in parameters.values()]


@functools.cache
def binding_hash() -> str:
    """16 hex digits of the whole declaration."""
    return hashlib.sha256(_declarations().encode()).hexdigest()[:16]


def header() -> str:
    """The text of ``abi.h``."""
    rows: list[str] = []
    for name, fields in _field_types.items():
        rows.append(f"sizeof({name})")
        rows += [f"offsetof({name}, {field})" for field in fields]
    return "\n".join(
        [
            "// Made by the build from src/hotloop/kernels/binding.py: change that file.",
            "#pragma once",
            "#include <cstddef>",
            "#include <cstdint>",
            "",
            _declarations(),
            f'#define HOTLOOP_BINDING_HASH "{binding_hash()}"',
            "#define HOTLOOP_LAYOUT " + ", ".join(rows),
            "",
        ]
    )


def _declarations() -> str:
    lines = ["namespace hotloop {", ""]
    for name, made in _structures.items():
        lines += [f"// {line.strip()}".rstrip() for line in (made.__doc__ or "").splitlines()]
        lines += [f"struct {name} {{"]
        for field, kind in _field_types[name].items():
            lines.append(f"  {kind.text} {field}{f'[{kind.count}]' if kind.count else ''};")
        lines += ["};", ""]
    lines += ["}  // namespace hotloop", "", 'extern "C" {', "using namespace hotloop;"]
    for name, (result, parameters) in _functions.items():
        lines.append(f"{result.text} {_signature(name, parameters)};")
    return "\n".join([*lines, "}", ""])


def _signature(name: str, parameters: dict[str, CType]) -> str:
    listed = ", ".join(f"{kind.text} {parameter}" for parameter, kind in parameters.items())
    return f"{name}({listed})"


def write_header(path: str) -> None:
    """Write ``abi.h``; the build calls this."""
    Path(path).write_text(header(), encoding="utf-8")
