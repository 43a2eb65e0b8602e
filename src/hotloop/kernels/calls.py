"""Numeric kernels by themselves, on tensors: for timing and for tests.

Programs and networks call them from C++. Each function here gives a ``Call``, which holds its
tensors and can be made again and again at the price of one C call. Tensors are float32 on the CPU;
shapes are those of the structures in ``binding.py``.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Sequence
from typing import Any, Protocol

from . import binding
from .elementwise import OPERATIONS, Operation
from .loader import failure, library, use_torch


class Tensor(Protocol):
    """What is asked of a tensor: torch's are such."""

    @property
    def shape(self) -> Sequence[int]:
        """Sizes."""

    def data_ptr(self) -> int:
        """Where it lies."""

    def stride(self) -> tuple[int, ...]:
        """How far neighbours are apart in each dimension, in elements."""


class Call:
    """A kernel and its arguments.

    Raises:
        RunError: there are no kernels here; when called, what the kernel said.
    """

    def __init__(self, entry: str, arguments: ctypes.Structure, *tensors: Tensor | None) -> None:
        self._library = library()
        if "torch" in sys.modules:  # So that both share their threads.
            use_torch()
        self.name, self._entry = entry, getattr(self._library, entry)
        self._at = ctypes.addressof(arguments)
        self.arguments: Any = arguments
        self._keep: tuple[Any, ...] = arguments, tensors

    def hold(self, *more: Any) -> None:
        """Keep what the structure points to as long as the call lives."""
        self._keep += more

    @property
    def entry_address(self) -> int:
        """Where the kernel's function is."""
        return ctypes.cast(self._entry, ctypes.c_void_p).value or 0

    @property
    def arguments_address(self) -> int:
        """Where the structure is that it takes."""
        return self._at

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What it works on."""
        given: tuple[Tensor | None, ...] = self._keep[1]
        return given

    @property
    def keep(self) -> tuple[Any, ...]:
        """Structure, tensors and more: they must live as long as the addresses are used."""
        return self._keep

    def __call__(self) -> None:
        """Run it."""
        if self._entry(self._at):
            raise failure(self._library)

    def by(self, loaded: ctypes.CDLL) -> None:
        """Run it by the library of another level (``loader.load``)."""
        if getattr(loaded, self.name)(self._at):
            raise failure(loaded)


def product(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    relu: bool = False,
    num_threads: int = 1,
    bfloat16: bool = False,
) -> Call:
    """``out[m, n] = a[m, k] @ b[k, n]`` and what follows; see ``ProductCall``.

    Args:
        a, b: of any strides. out, mask: columns adjacent. bias: ``[n]``.
        bfloat16: factors are rounded to it, where ``has_bfloat16``.
    """
    arguments = binding.ProductCall(
        a.shape[0], b.shape[1], a.shape[1], _matrix(a), _matrix(b), address(out), out.stride()[0],
        address(bias), address(mask), 0 if mask is None else mask.stride()[0], relu, bfloat16,
        num_threads,
    )  # fmt: skip
    return Call("hotloop_product", arguments, a, b, out, bias, mask)


def batch_product(a: Tensor, b: Tensor, out: Tensor, *, num_threads: int = 1) -> Call:
    """``out[i] = a[i] @ b[i]``, of any strides but that columns of out are adjacent.

    Args:
        a: ``[batch, m, k]``. b: ``[batch, k, n]``. out: ``[batch, m, n]``.
    """
    (batch, m, k), n = a.shape, b.shape[2]
    arguments = binding.BatchProductCall(
        batch, m, n, k, *(binding.Matrix(address(t), *t.stride()[1:]) for t in (a, b)),
        a.stride()[0], b.stride()[0], address(out), *out.stride()[:2], num_threads,
    )  # fmt: skip
    return Call("hotloop_batch_product", arguments, a, b, out)


def has_bfloat16() -> bool:
    """Whether this processor has an instruction for products in bfloat16.

    Raises:
        RunError: there are no kernels here.
    """
    return bool(library().hotloop_has_bfloat16())


def torch_product(a: Any, b: Any, out: Any, bias: Any = None, *, by_onednn: bool = False) -> Call:
    """``out = a @ b (+ bias)`` by torch itself; ``TorchProductCall``. torch's tensors alone."""
    given = [out, a, b.t() if by_onednn else b, bias]
    words = (ctypes.c_void_p * 4)(*(None if t is None else t._cdata for t in given))
    at, size = ctypes.addressof(words), ctypes.sizeof(ctypes.c_void_p)
    places = [None if t is None else at + size * n for n, t in enumerate(given)]
    arguments = binding.TorchProductCall(*places, by_onednn, a.dim() == 3)
    call = Call("hotloop_torch_product", arguments, *given)
    call.hold(words)
    return call


def product_update(
    a: Tensor,
    b: Tensor,
    weight: Tensor,
    states: Sequence[Tensor],
    rule: Any,
    *,
    gradient: Tensor | None = None,
    scale: float = 1.0,
    num_threads: int = 1,
    bfloat16: bool = False,
) -> Call:
    """``weight`` and its states updated by the gradient ``scale * a @ b``: ``ProductUpdateCall``.

    Args:
        states: as many as the rule has, with rows as far apart as those of ``gradient``.
        rule: a ``binding.UpdateRule``.
    """
    first, second = [*states, None, None][:2]
    rows = next((t.stride()[0] for t in (first, gradient) if t is not None), weight.stride()[0])
    arguments = binding.ProductUpdateCall(
        a.shape[0], b.shape[1], a.shape[1], _matrix(a), _matrix(b), address(weight),
        weight.stride()[0], address(first), address(second), address(gradient), rows, rule, scale,
        bfloat16, num_threads,
    )  # fmt: skip
    return Call("hotloop_product_update", arguments, a, b, weight, *states, gradient)


def update(
    weight: Tensor,
    gradient: Tensor,
    states: Sequence[Tensor],
    rule: Any,
    *,
    scale: float = 1.0,
    num_threads: int = 1,
) -> Call:
    """The same update by a gradient that lies in memory; all dense and laid out alike."""
    first, second = [*states, None, None][:2]
    arguments = binding.UpdateCall(
        _count(weight), address(weight), address(gradient), address(first), address(second), rule,
        scale, num_threads,
    )  # fmt: skip
    return Call("hotloop_update", arguments, weight, gradient, *states)


def convolve(
    x: Tensor,
    filters: Tensor,
    bias: Tensor | None,
    out: Tensor,
    argmax: Tensor | None = None,
    *,
    padding: tuple[int, int],
    relu: bool = False,
    num_threads: int = 1,
) -> Call:
    """``out = x * filters (+ bias)``, pooled by 2 x 2 where there is an argmax.

    Args:
        x: ``[N, C, H, W]``, channels adjacent. filters: ``[O, C, KH, KW]`` of any strides, 1 to 7
            rows and columns.
        argmax: uint8 ``[N, OH / 2, OW / 2, O]``, dense.
    """
    arguments = binding.ConvolutionCall(
        _convolution_shape(x, filters, padding), address(x), _image_strides(x), address(filters),
        binding.FilterStrides(*filters.stride()), address(bias), address(out), _image_strides(out),
        address(argmax), relu, num_threads,
    )  # fmt: skip
    return Call("hotloop_convolve", arguments, x, filters, bias, out, argmax)


def convolve_input_gradient(
    gradient: Tensor,
    filters: Tensor,
    out: Tensor,
    argmax: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    padding: tuple[int, int],
    num_threads: int = 1,
) -> Call:
    """``out``: the gradient of the images; 0 where ``mask``, laid out alike, is not above 0."""
    arguments = binding.ConvolutionInputGradientCall(
        _convolution_shape(out, filters, padding), address(gradient), _image_strides(gradient),
        address(argmax), address(filters), binding.FilterStrides(*filters.stride()), address(mask),
        address(out), _image_strides(out), num_threads,
    )  # fmt: skip
    tensors = gradient, filters, out, argmax, mask
    return Call("hotloop_convolve_input_gradient", arguments, *tensors)


def convolve_filter_gradient(
    x: Tensor,
    gradient: Tensor,
    out: Tensor,
    bias_gradient: Tensor,
    argmax: Tensor | None = None,
    *,
    padding: tuple[int, int],
    num_threads: int = 1,
) -> Call:
    """``out``, ``bias_gradient``: the gradients of the filters and of the bias."""
    arguments = binding.ConvolutionFilterGradientCall(
        _convolution_shape(x, out, padding), address(x), _image_strides(x), address(gradient),
        _image_strides(gradient), address(argmax), address(out),
        binding.FilterStrides(*out.stride()), address(bias_gradient), num_threads,
    )  # fmt: skip
    tensors = x, gradient, out, bias_gradient, argmax
    return Call("hotloop_convolve_filter_gradient", arguments, *tensors)


def max_pool(
    x: Tensor,
    out: Tensor,
    argmax: Tensor | None = None,
    *,
    kernel: tuple[int, int],
    stride: tuple[int, int] | None = None,
    padding: tuple[int, int] = (0, 0),
    relu: bool = False,
    num_threads: int = 1,
) -> Call:
    """The maximum of each window of x ``[N, C, H, W]``: ``PoolCall``. out: dense, either way."""
    windows = binding.Windows(*x.shape, *out.shape[2:], *kernel, *(stride or kernel), *padding)
    channels_last = out.stride()[1] == 1 and out.shape[1] > 1
    arguments = binding.PoolCall(
        windows, address(x), _image_strides(x), address(out), address(argmax), channels_last, relu,
        num_threads,
    )  # fmt: skip
    return Call("hotloop_pool", arguments, x, out, argmax)


def max_pool_gradient(
    gradient: Tensor, argmax: Tensor, out: Tensor, *, kernel: tuple[int, int], num_threads: int = 1
) -> Call:
    """``out``: the gradient of what was pooled over windows next to each other."""
    windows = binding.Windows(*out.shape, *gradient.shape[2:], *kernel, *kernel, 0, 0)
    arguments = binding.PoolBackwardCall(
        windows, address(gradient), _image_strides(gradient), address(argmax), address(out),
        _image_strides(out), num_threads,
    )  # fmt: skip
    return Call("hotloop_pool_backward", arguments, gradient, argmax, out)


def pool_planes(
    x: Tensor,
    out: Tensor,
    indices: Tensor,
    *,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    num_threads: int = 1,
) -> Call:
    """``out``, int64 ``indices`` of ``max_pool2d_with_indices``, all dense: ``PoolPlanesCall``."""
    windows = binding.Windows(*x.shape, *out.shape[2:], *kernel, *stride, *padding)
    arguments = binding.PoolPlanesCall(
        windows, address(x), address(out), address(indices), num_threads
    )
    return Call("hotloop_pool_planes", arguments, x, out, indices)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    loss: Tensor,
    gradient: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    ignore_index: int = -100,
    mean: bool = True,
    scale: float = 1.0,
    num_threads: int = 1,
) -> Call:
    """``loss``, one float, and ``gradient`` of the logits: ``CrossEntropyCall``.

    Args:
        logits, gradient: ``[rows, classes]``, columns adjacent. labels: int64 ``[rows]``, dense.
        mean: else the sum. scale: the gradient of the loss.
    """
    arguments = binding.CrossEntropyCall(
        *logits.shape, address(logits), logits.stride()[0], address(labels), ignore_index,
        address(weights), address(loss), address(gradient),
        0 if gradient is None else gradient.stride()[0], not mean, scale, num_threads,
    )  # fmt: skip
    return Call("hotloop_cross_entropy", arguments, logits, labels, loss, gradient, weights)


def squared_error(
    output: Tensor,
    target: Tensor,
    loss: Tensor,
    gradient: Tensor | None = None,
    *,
    mean: bool = True,
    scale: float = 1.0,
    num_threads: int = 1,
) -> Call:
    """``loss``, one float, and ``gradient`` of the output; all dense and laid out alike."""
    arguments = binding.SquaredErrorCall(
        _count(output), address(output), address(target), address(loss), address(gradient),
        not mean, scale, num_threads,
    )  # fmt: skip
    return Call("hotloop_squared_error", arguments, output, target, loss, gradient)


def column_sums(
    x: Tensor, out: Tensor, mask: Tensor | None = None, *, num_threads: int = 1
) -> Call:
    """``out[cols]``: sums of the columns of x ``[rows, cols]``, 0 for what ``mask`` cuts off."""
    arguments = binding.ColumnSumsCall(
        *x.shape, address(x), x.stride()[0], address(mask),
        0 if mask is None else mask.stride()[0], address(out), num_threads,
    )  # fmt: skip
    return Call("hotloop_column_sums", arguments, x, out, mask)


def softmax(
    x: Tensor,
    out: Tensor,
    *,
    logarithm: bool = False,
    is_safe: bool = False,
    num_threads: int = 1,
) -> Call:
    """``out``: softmax over the last dimension, or its logarithm; both dense. In place too.

    Args:
        is_safe: rows of negative infinity give 0.
    """
    rows, cols = _rows(x)
    arguments = binding.SoftmaxCall(
        rows, cols, address(x), address(out), logarithm, is_safe, num_threads
    )
    return Call("hotloop_softmax", arguments, x, out)


def softmax_gradient(
    result: Tensor,
    gradient: Tensor,
    out: Tensor,
    *,
    logarithm: bool = False,
    num_threads: int = 1,
) -> Call:
    """``out``: the gradient of what ``result`` was made from; all dense. In place too."""
    rows, cols = _rows(result)
    arguments = binding.SoftmaxGradientCall(
        rows, cols, address(result), address(gradient), address(out), logarithm, num_threads
    )
    return Call("hotloop_softmax_gradient", arguments, result, gradient, out)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    *,
    epsilon: float = 1e-5,
    num_threads: int = 1,
) -> Call:
    """``out``, ``mean`` and ``rstd`` as ``torch.native_layer_norm``, x ``[rows, cols]`` dense.

    Normalized over more than one dimension: pass x as such a matrix.
    """
    rows, cols = _rows(x)
    arguments = binding.LayerNormCall(
        rows, cols, address(x), address(weight), address(bias), address(out), address(mean),
        address(rstd), epsilon, num_threads,
    )  # fmt: skip
    return Call("hotloop_layer_norm", arguments, x, weight, bias, out, mean, rstd)


def layer_norm_gradient(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    outs: Sequence[Tensor | None],
    *,
    num_threads: int = 1,
) -> Call:
    """``outs``: the gradients of x, weight and bias, or ``None`` for what is not wanted."""
    rows, cols = _rows(x)
    arguments = binding.LayerNormGradientCall(
        rows, cols, address(x), address(gradient), address(mean), address(rstd), address(weight),
        *(address(out) for out in outs), num_threads,
    )  # fmt: skip
    tensors = gradient, x, mean, rstd, weight, *outs
    return Call("hotloop_layer_norm_gradient", arguments, *tensors)


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    out: Tensor,
    rstd: Tensor | None = None,
    *,
    epsilon: float,
    num_threads: int = 1,
) -> Call:
    """``out`` and ``rstd`` as ``torch._fused_rms_norm``, x ``[rows, cols]``: ``RmsNormCall``."""
    arguments = binding.RmsNormCall(
        *_rows(x), *(address(t) for t in (x, weight, out, rstd)), epsilon, num_threads
    )
    return Call("hotloop_rms_norm", arguments, x, weight, out, rstd)


def rms_norm_gradient(
    gradient: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    outs: Sequence[Tensor | None],
    *,
    num_threads: int = 1,
) -> Call:
    """``outs``: the gradients of x and weight, or ``None``; ``RmsNormGradientCall``."""
    tensors = x, gradient, rstd, weight, *outs
    arguments = binding.RmsNormGradientCall(*_rows(x), *(address(t) for t in tensors), num_threads)
    return Call("hotloop_rms_norm_gradient", arguments, *tensors)


def row_sums(x: Tensor, out: Tensor, *, divisor: float = 1.0, num_threads: int = 1) -> Call:
    """``out``, one for each row of x ``[rows, cols]``, dense: its sum, divided."""
    arguments = binding.RowSumsCall(*_rows(x), address(x), address(out), divisor, num_threads)
    return Call("hotloop_row_sums", arguments, x, out)


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    mean: Tensor,
    rstd: Tensor,
    *,
    running: tuple[Tensor | None, Tensor | None] = (None, None),
    momentum: float = 0.1,
    epsilon: float = 1e-5,
    addend: Tensor | None = None,
    relu: bool = False,
    num_threads: int = 1,
) -> Call:
    """``out``, ``mean``, ``rstd`` as ``torch.native_batch_norm`` in training: ``BatchNormCall``.

    Args:
        x, addend, out: ``[rows, cols]``, or images ``[N, C, H, W]`` with channels adjacent; dense.
        running: mean and variance, updated in place.
    """
    rows, cols = _channels(x)
    arguments = binding.BatchNormCall(
        rows, cols, *(address(t) for t in (x, weight, bias, addend, out, mean, rstd, *running)),
        momentum, epsilon, relu, num_threads,
    )  # fmt: skip
    tensors = x, weight, bias, addend, out, mean, rstd, *running
    return Call("hotloop_batch_norm", arguments, *tensors)


def batch_norm_gradient(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    outs: Sequence[Tensor | None],
    *,
    mask: Tensor | None = None,
    masked_gradient: Tensor | None = None,
    num_threads: int = 1,
) -> Call:
    """``outs``: the gradients of x, weight and bias, or ``None``; ``BatchNormGradientCall``."""
    tensors = x, gradient, mask, mean, rstd, weight, masked_gradient, *outs
    arguments = binding.BatchNormGradientCall(
        *_channels(x), *(address(t) for t in tensors), num_threads
    )
    return Call("hotloop_batch_norm_gradient", arguments, *tensors)


def image_means(x: Tensor, out: Tensor, *, divisor: float, num_threads: int = 1) -> Call:
    """``out [N, C, ...]``: sums over the pixels of x ``[N, C, H, W]``, channels adjacent.

    Or over the rows of sequences ``[N, rows, C]``.
    """
    n, c = x.shape[0], x.shape[2 if len(x.shape) == 3 else 1]
    pixels = math.prod(x.shape) // (n * c)
    arguments = binding.ImageMeansCall(n, pixels, c, address(x), address(out), divisor, num_threads)
    return Call("hotloop_image_means", arguments, x, out)


def image_means_gradient(
    gradient: Tensor,
    out: Tensor,
    mask: Tensor | None = None,
    *,
    divisor: float,
    num_threads: int = 1,
) -> Call:
    """``out [N, C, H, W]``, channels adjacent: ``gradient [N, C, ...]`` for each pixel."""
    n, c, h, w = out.shape
    arguments = binding.ImageMeansGradientCall(
        n, h * w, c, address(gradient), gradient.stride()[0], address(mask), address(out), divisor,
        num_threads,
    )  # fmt: skip
    return Call("hotloop_image_means_gradient", arguments, gradient, out, mask)


def copy(source: Tensor, target: Tensor, *, element_bytes: int = 4, num_threads: int = 1) -> Call:
    """``target = source``, of one shape, up to 8 dimensions and any strides: ``CopyCall``."""
    words = binding.CopyCall().sizes
    sizes, read, written = (
        type(words)(*numbers) for numbers in (target.shape, source.stride(), target.stride())
    )
    arguments = binding.CopyCall(
        len(target.shape), sizes, read, written, address(source), address(target), element_bytes,
        num_threads,
    )  # fmt: skip
    return Call("hotloop_copy", arguments, source, target)


def add_count(count: Tensor, addend: int) -> Call:
    """``count``, one int64, grows by ``addend``."""
    return Call("hotloop_add_count", binding.AddCountCall(address(count), addend), count)


def draw(out: Tensor, state: Tensor, probability: float, value: float = 1.0) -> Call:
    """``out``, dense: ``value`` with this probability, else 0, as torch's generator draws it.

    Args:
        state: of ``torch.Generator.get_state``; it goes on.
    """
    arguments = binding.DrawCall(_count(out), address(out), address(state), probability, value)
    return Call("hotloop_draw", arguments, out, state)


def embedding(table: Tensor, indices: Tensor, out: Tensor, *, num_threads: int = 1) -> Call:
    """``out[..., cols]``, dense: the rows of ``table`` at int64 ``indices``, dense."""
    arguments = binding.EmbeddingCall(
        _count(indices), *table.shape, address(indices), address(table), table.stride()[0],
        address(out), num_threads,
    )  # fmt: skip
    return Call("hotloop_embedding", arguments, table, indices, out)


def embedding_gradient(
    gradient: Tensor,
    indices: Tensor,
    out: Tensor,
    *,
    padding_index: int = -1,
    num_threads: int = 1,
) -> Call:
    """``out [rows, cols]``: the gradient of a table, from that of its rows; all dense."""
    arguments = binding.EmbeddingGradientCall(
        _count(indices), *out.shape, address(indices), padding_index, address(gradient),
        out.shape[1], address(out), num_threads,
    )  # fmt: skip
    return Call("hotloop_embedding_gradient", arguments, gradient, indices, out)


def elementwise(
    operations: Sequence[Operation],
    tensors: Sequence[Tensor],
    shape: Sequence[int],
    *,
    num_threads: int = 1,
) -> Call:
    """Runs ``operations`` for each element of ``shape``: ``ElementwiseCall``.

    Args:
        shape: of at most three dimensions.
        tensors: what is loaded and stored, by number; of at most as many dimensions, and repeated
            to ``shape`` as torch does. What is stored has that shape.
    """
    made = (binding.ElementwiseOperation * len(operations))(
        *(binding.ElementwiseOperation(OPERATIONS.index(o.name), *o[1:]) for o in operations)
    )
    whole = [1] * (3 - len(shape)) + list(shape)
    places = (binding.ElementwiseTensor * len(tensors))(
        *(binding.ElementwiseTensor(address(t), *_strides_in(t, whole)) for t in tensors)
    )
    arguments = binding.ElementwiseCall(
        *whole, ctypes.addressof(made), len(made), ctypes.addressof(places), len(places),
        num_threads,
    )  # fmt: skip
    call = Call("hotloop_elementwise", arguments, *tensors)
    call.hold(made, places)
    return call


def random(
    key: Tensor, out: Tensor, streams: tuple[int, int], kind: str, a: float, b: float
) -> Call:
    """``out`` drawn from ``key``, int64 ``[1]``, in the order of its memory: ``RandomCall``.

    Args:
        out: dense.
        streams: 64-bit words; the second is for ``"normal"`` alone.
        kind: ``"uniform"`` from a to b, ``"below"`` (1 where a number is below a), ``"normal"``.
    """
    number = ("uniform", "below", "normal").index(kind)
    arguments = binding.RandomCall(_count(out), number, address(key), *streams, a, b, address(out))
    return Call("hotloop_random", arguments, key, out)


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor lies; ``None`` for none."""
    return None if tensor is None else tensor.data_ptr()


def _count(tensor: Tensor) -> int:
    return math.prod(tensor.shape)


def _strides_in(tensor: Tensor, shape: Sequence[int]) -> list[int]:
    """Strides of a tensor that is repeated to a shape of three dimensions.

    Raises:
        ValueError: it cannot be.
    """
    sizes, strides = [1, 1, 1, *tensor.shape], [0, 0, 0, *tensor.stride()]
    if any(size != 1 for size in sizes[:-3]) or any(
        size not in (1, whole) for size, whole in zip(sizes[-3:], shape, strict=True)
    ):
        raise ValueError(f"a tensor must fit {tuple(shape)}; got {tuple(tensor.shape)}")
    return [0 if n == 1 else s for n, s in zip(sizes[-3:], strides[-3:], strict=True)]


def _rows(tensor: Tensor) -> tuple[int, int]:
    return math.prod(tensor.shape[:-1]), tensor.shape[-1]


def _channels(tensor: Tensor) -> tuple[int, int]:
    """Rows and columns of a matrix, or of images whose channels are adjacent."""
    cols = tensor.shape[1]
    return math.prod(tensor.shape) // cols, cols


def _matrix(tensor: Tensor) -> Any:
    return binding.Matrix(tensor.data_ptr(), *tensor.stride())


def _image_strides(tensor: Tensor) -> Any:
    return binding.ImageStrides(*tensor.stride())


def _convolution_shape(x: Tensor, filters: Tensor, padding: tuple[int, int]) -> Any:
    return binding.ConvolutionShape(*x.shape, filters.shape[0], *filters.shape[2:], *padding)
