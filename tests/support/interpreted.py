"""A captured step without the compiler: its graph, run node by node.

What only the compiler could break needs the compiler, seconds of it for each graph; everything
else about the compiled path is the same here: what was captured, hotloop's kernels and the order
they are called in, what is bound, what the optimizer's state becomes.
"""

import ctypes

import pytest
import torch
from torch import fx

from hotloop.step import convolutions, operators, routes
from hotloop.step.convolutions import Convolution
from hotloop.step.program import UpdateRule, kernels
from hotloop.step.updates import COLUMNS


def load(step):
    """Stands for ``CompiledStep.load``."""
    step._program = Interpreted(step.captured.graph)


def backends(names=None, *, compiled=()):
    """Values of ``backend``, or of ``(name, backend)``: all interpreted in each check, all compiled
    in the full one, and the names in ``compiled`` compiled in each."""
    if names is None:
        return ["interpreted", pytest.param("compiled", marks=pytest.mark.full)]
    full = [name for name in names if name not in compiled]
    return [
        *((name, "interpreted") for name in names),
        *((name, "compiled") for name in compiled),
        *(pytest.param(name, "compiled", marks=pytest.mark.full) for name in full),
    ]


def address(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def integers(*values):
    return [ctypes.c_int64(v) for v in values]


class Nodes(fx.Interpreter):
    """Runs a captured graph; hotloop's operators by the kernels a compiled step would call."""

    def call_function(self, target, args, kwargs):
        name = getattr(target, "__name__", "")
        if str(target).startswith("hotloop."):
            return getattr(self, name.split(".")[0].rstrip("_012"))(*args)
        return super().call_function(target, args, kwargs)

    def gemm(self, a, b, bias, mask, act):
        out = a.new_empty(a.shape[0], b.shape[1])
        routes.gemm(a, b, out, bias, mask, act=act, num_threads=2)
        return out

    def onednn(self, a, b, bias):
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")

    def pool(self, x, kh, kw, relu, last):
        out, places = operators._fake_pool(x, kh, kw, relu, last)
        kernels().hotloop_pool_f32(
            (ctypes.c_int64 * 12)(*x.shape, kh, kw, relu, last, *x.stride()),
            address(x), address(out), address(places), ctypes.c_int32(2),
        )  # fmt: skip
        return out, places

    def pool_backward(self, g, places, h, w, kh, kw):
        gx = operators._dense([*places.shape[:2], h, w], places, g.dtype)
        kernels().hotloop_pool_backward_f32(
            (ctypes.c_int64 * 12)(*gx.shape, kh, kw, 0, 0, *gx.stride()),
            address(g), (ctypes.c_int64 * 4)(*g.stride()),
            address(places), address(gx), ctypes.c_int32(2),
        )  # fmt: skip
        return gx

    def conv3x3(self, x, w, bias, ph, pw, relu):
        work = self.convolution("convolution", x, w, ph, pw)
        out = operators._dense(list(work.out), x, x.dtype, True)
        convolutions.run(work, x, w, None, bias, [out], relu=bool(relu))
        return out

    def conv3x3_pool(self, x, w, bias, ph, pw, relu, last):
        out, places = operators._fake_conv_pool(x, w, bias, ph, pw, relu, last)
        work = self.convolution("convolution", x, w, ph, pw)
        convolutions.run(work, x, w, None, bias, [out], relu=bool(relu), places=places)
        return out, places

    def conv3x3_input_gradient(self, x, g, w, places, mask, ph, pw):
        out = operators._dense(list(x.shape), x, x.dtype, True)
        work = self.convolution("input gradient", x, w, ph, pw)
        convolutions.run(work, x, w, g, None, [out], mask=mask, places=places)
        return out

    def conv3x3_weight_gradient(self, x, g, w, places, ph, pw, last):
        out = [operators._dense(list(w.shape), w, w.dtype, bool(last)), w.new_empty(len(w))]
        work = self.convolution("weight gradient", x, w, ph, pw)
        convolutions.run(work, x, w, g, None, out, places=places)
        return out

    @staticmethod
    def convolution(part, x, w, ph, pw):
        return Convolution(part, tuple(x.shape), tuple(w.shape), (ph, pw), 2)

    def update(self, w, g, *rest):
        *states, control, scale, group = rest
        first, second = [*states, None, None][:2]
        assert w.stride() == g.stride()
        factor = 1.0 if scale is None else scale.item()
        kernels().hotloop_update_f32(
            *integers(w.numel()), address(w), address(g), address(first), address(second),
            ctypes.byref(self.rule(control, group)), ctypes.c_float(factor), ctypes.c_int32(2),
        )  # fmt: skip

    def gemm_update(self, w, a, b, *rest):
        *states, control, group = rest
        first, second = [*states, None, None][:2]
        if w.stride(1) != 1:
            w, a, b = w.t(), b.t(), a.t()
        kernels().hotloop_gemm_update_f32(
            *integers(a.shape[0], b.shape[1], a.shape[1]),
            address(a), *integers(*a.stride()), address(b), *integers(*b.stride()),
            address(w), *integers(w.stride(0)), address(first), address(second),
            *integers(w.stride(0)), address(None), ctypes.byref(self.rule(control, group)),
            ctypes.c_float(1.0), ctypes.c_int32(2),
        )  # fmt: skip

    @staticmethod
    def rule(control, group):
        row = dict(zip(COLUMNS, control[group].tolist(), strict=False))
        return UpdateRule(**row | {n: int(row[n]) for n in ("kind", "first_step")})


class Interpreted:
    """Stands for ``Program``: the same inputs, without the compiler."""

    def __init__(self, graph):
        self.graph = graph

    def bind(self, tensors, control, counters):
        self.tensors, self.control, self.counters = tensors, control, counters

    def run(self, x, y, tables, steps=1):
        losses, nodes = [], Nodes(self.graph)
        batches = zip(x.chunk(steps), y.chunk(steps), tables, strict=True)
        for part_x, part_y, table in batches:
            self.control.copy_(table)
            with torch.no_grad():
                (loss,) = nodes.run(*self.tensors, part_x, part_y)
            losses.append(loss.reshape(1).clone())
            for counter in self.counters:
                counter += 1
        return torch.cat(losses)
