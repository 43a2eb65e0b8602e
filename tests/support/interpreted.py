"""A captured step without the compiler: its graph, run node by node.

What only the compiler could break needs the compiler, seconds of it for each graph; everything
else about the compiled path is the same here: what was captured, hotloop's kernels and the order
they are called in, what is bound, what the optimizer's state becomes.
"""

import pytest
import torch
from torch import fx

from hotloop.kernels import binding, calls
from hotloop.graph import operators
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


class Nodes(fx.Interpreter):
    """Runs a captured graph; hotloop's operators by the kernels a compiled step would call."""

    def call_function(self, target, args, kwargs):
        name = getattr(target, "__name__", "")
        if str(target).startswith("hotloop."):
            return getattr(self, name.split(".")[0].rstrip("_012"))(*args)
        return super().call_function(target, args, kwargs)

    def gemm(self, a, b, bias, mask, act, bfloat16=False):
        out = a.new_empty(a.shape[0], b.shape[1])
        given = {"relu": bool(act), "num_threads": 2, "bfloat16": bfloat16}
        calls.product(a, b, out, bias, mask, **given)()
        return out

    def gemm_bf16(self, *args):
        return self.gemm(*args, bfloat16=True)

    def gemm_bf16_update(self, *args):
        self.gemm_update(*args, bfloat16=True)

    def onednn(self, a, b, bias):
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")

    def pool(self, x, kh, kw, relu, last):
        out, argmax = operators._fake_pool(x, kh, kw, relu, last)
        calls.max_pool(x, out, argmax, kernel=(kh, kw), relu=bool(relu), num_threads=2)()
        return out, argmax

    def pool_backward(self, g, argmax, h, w, kh, kw):
        gx = operators._dense([*argmax.shape[:2], h, w], argmax, g.dtype)
        calls.max_pool_gradient(g, argmax, gx, kernel=(kh, kw), num_threads=2)()
        return gx

    def conv3x3(self, x, w, bias, ph, pw, relu):
        out = operators._dense(operators._convolved(x, w, ph, pw), x, x.dtype, True)
        given = {"padding": (ph, pw), "relu": bool(relu), "num_threads": 2}
        calls.convolve3x3(x, w, bias, out, **given)()
        return out

    def conv3x3_pool(self, x, w, bias, ph, pw, relu, last):
        out, argmax = operators._fake_conv_pool(x, w, bias, ph, pw, relu, last)
        given = {"padding": (ph, pw), "relu": bool(relu), "num_threads": 2}
        calls.convolve3x3(x, w, bias, out, argmax, **given)()
        return out, argmax

    def conv3x3_input_gradient(self, x, g, w, argmax, mask, ph, pw):
        out = operators._dense(list(x.shape), x, x.dtype, True)
        given = {"padding": (ph, pw), "num_threads": 2}
        calls.convolve3x3_input_gradient(g, w, out, argmax, mask, **given)()
        return out

    def conv3x3_weight_gradient(self, x, g, w, argmax, ph, pw, last):
        out = operators._dense(list(w.shape), w, w.dtype, bool(last)), w.new_empty(len(w))
        given = {"padding": (ph, pw), "num_threads": 2}
        calls.convolve3x3_filter_gradient(x, g, *out, argmax, **given)()
        return list(out)

    def update(self, w, g, *rest):
        *states, control, scale, group = rest
        assert w.stride() == g.stride()
        factor = 1.0 if scale is None else scale.item()
        calls.update(w, g, states, self.rule(control, group), scale=factor, num_threads=2)()

    def gemm_update(self, w, a, b, *rest, bfloat16=False):
        *states, control, group = rest
        if w.stride(1) != 1:
            w, a, b, states = w.t(), b.t(), a.t(), [state.t() for state in states]
        given = {"num_threads": 2, "bfloat16": bfloat16}
        calls.product_update(a, b, w, states, self.rule(control, group), **given)()

    @staticmethod
    def rule(control, group):
        row = dict(zip(COLUMNS, control[group].tolist(), strict=False))
        return binding.UpdateRule(**row | {n: int(row[n]) for n in ("kind", "first_step")})


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
