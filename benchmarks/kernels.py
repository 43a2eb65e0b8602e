"""Each numeric kernel of two builds of the library, in turns, at the shapes of the models in docs/.

    python benchmarks/kernels.py x86-64-v3 x86-64-v4
    python benchmarks/kernels.py old/libhotloop-x86-64-v4.so new/libhotloop-x86-64-v4.so

A and B are levels or files; both must be built from the present binding. Both work on the same
memory. Above 1: B is faster. ``--results FILE`` keeps the figures.
"""

import argparse
import ctypes
import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from about import about

from hotloop import kernels
from hotloop.kernels import LEVELS, binding, calls, loader
from hotloop.kernels.calls import Call
from hotloop.measure import least_seconds

Cases = Iterator[tuple[str, Call]]
_LAST = torch.channels_last


def opened(name: str) -> ctypes.CDLL:
    """The library of a level, or the one in a file."""
    levels = {level.name: level for level in LEVELS}
    if name in levels:
        return loader.load(levels[name])
    loaded = ctypes.CDLL(name)
    binding.declare(loaded)
    return loaded


def images(*shape: int) -> torch.Tensor:
    """Random, channels adjacent."""
    return torch.randn(*shape).contiguous(memory_format=_LAST)


def rule(kind: int) -> binding.UpdateRule:
    """0 SGD, 3 Adam."""
    return binding.UpdateRule(
        kind=kind, lr=1e-5, beta1=0.9, beta2=0.999, eps=1e-8, bias_correction1=0.1,
        bias_correction2_sqrt=0.03, momentum=0.9,
    )  # fmt: skip


def perceptron(name: str, widths: list[int], batch: int, threads: int) -> Cases:
    """A training step: forward, both gradients, Adam."""
    for k, n in itertools.pairwise(widths):
        x, w, g = torch.randn(batch, k), torch.randn(n, k), torch.randn(batch, n)
        label = f"{name} {k}-{n}"
        out, gx = torch.empty(batch, n), torch.empty(batch, k)
        shared = {"num_threads": threads}
        yield (
            f"{label} forward",
            calls.product(x, w.t(), out, torch.randn(n), relu=True, **shared),
        )
        yield f"{label} input gradient", calls.product(g, w, gx, mask=x, **shared)
        for kind, states in ((0, 0), (3, 2)):
            held = [torch.full((n, k), 0.1) for _ in range(states)]
            yield (
                f"{label} gradient and {'SGD' if kind == 0 else 'Adam'}",
                calls.product_update(g.t(), x, w, held, rule(kind), **shared),
            )


def convolution(
    name: str, x: torch.Tensor, outputs: int, threads: int, *, pooled: bool = False,
    size: int = 3, padding: int = 1,
) -> Cases:  # fmt: skip
    """Forward and both gradients of square filters."""
    n, c, h, w = x.shape
    filters, bias = torch.randn(outputs, c, size, size), torch.randn(outputs)
    half, less = 2 if pooled else 1, size - 1 - 2 * padding
    out = images(n, outputs, (h - less) // half, (w - less) // half)
    argmax = None
    if pooled:
        argmax = torch.randint(0, 4, (n, *out.shape[2:], outputs), dtype=torch.uint8)
    shared = {"padding": (padding, padding), "num_threads": threads}
    label = f"{name} {c}-{outputs} at {h}"
    forward = calls.convolve(x, filters, bias, out, argmax, relu=True, **shared)
    yield f"{label} forward", forward
    g = images(*out.shape)
    if c > 1:
        gx = torch.empty_like(x)
        yield (
            f"{label} input gradient",
            calls.convolve_input_gradient(g, filters, gx, argmax, x, **shared),
        )
    made = torch.empty_like(filters), torch.empty_like(bias)
    yield (
        f"{label} filter gradient",
        calls.convolve_filter_gradient(x, g, *made, argmax, **shared),
    )


def pooling(threads: int) -> Cases:
    """The cnn's pooling by itself."""
    x, out = images(64, 64, 28, 28), images(64, 64, 14, 14)
    argmax = torch.zeros(64, 14, 14, 64, dtype=torch.uint8)
    shared = {"kernel": (2, 2), "num_threads": threads}
    yield "pooling forward", calls.max_pool(x, out, argmax, relu=True, **shared)
    yield "pooling gradient", calls.max_pool_gradient(out, argmax, torch.empty_like(x), **shared)
    x, out = x.contiguous(), torch.empty(out.shape)
    indices = torch.empty(out.shape, dtype=torch.int64)
    steps = {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0), "num_threads": threads}
    yield "pooling of planes", calls.pool_planes(x, out, indices, **steps)


def cases(threads: int) -> Cases:
    """Of small, big, cnn, ResNet-18 and the encoder."""
    yield from perceptron("small", [784, 256, 128, 10], 64, threads)
    yield from perceptron("big", [784, 3072, 3072, 10], 64, threads)
    yield from perceptron("encoder", [256, 768], 512, threads)
    yield from perceptron("encoder", [256, 1024, 256], 512, threads)
    yield from convolution("cnn", images(64, 1, 28, 28), 32, threads)
    yield from convolution("cnn", images(64, 32, 28, 28), 64, threads, pooled=True)
    lenet = {"pooled": True, "size": 5, "padding": 0}
    yield from convolution("mnist_99", images(128, 1, 28, 28), 16, threads, **lenet)
    yield from convolution("mnist_99", images(128, 16, 12, 12), 32, threads, **lenet)
    for channels, side in ((64, 56), (128, 28), (256, 14), (512, 7)):
        yield from convolution("ResNet-18", images(8, channels, side, side), channels, threads)
    yield from pooling(threads)


def main() -> None:
    """Race, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("a", metavar="A")
    parser.add_argument("b", metavar="B")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0, help="most for each kernel")
    parser.add_argument("--only", default="", help="kernels whose name has this")
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    kernels.use_torch()
    pair = {"a": opened(args.a), "b": opened(args.b)}
    torch.manual_seed(0)
    rows = []
    for name, call in cases(args.threads):
        if args.only not in name:
            continue
        made = {key: functools.partial(call.by, loaded) for key, loaded in pair.items()}
        once = least_seconds(made, rounds=2, limit_s=0.2).seconds["a"]
        repeats = max(1, int(3e-4 / once))
        timing = least_seconds(made, repeats, rounds=60, limit_s=args.seconds)
        ratio = timing.seconds["a"] / timing.seconds["b"]
        rows.append({"kernel": name, "a_s": timing.seconds["a"], "b_s": timing.seconds["b"],
                     "ratio": ratio, "quiet": timing.quiet})  # fmt: skip
        a_us, b_us = (1e6 * timing.seconds[key] for key in "ab")
        busy = "" if timing.quiet else "  (busy neighbours)"
        print(f"{name:40} A {a_us:10.1f} us  B {b_us:10.1f} us  A/B {ratio:.3f}{busy}", flush=True)
    if args.results:
        document = about() | {"a": args.a, "b": args.b, "num_threads": args.threads, "rows": rows}
        args.results.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
