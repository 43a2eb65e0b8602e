"""Graphs of ``torch.export`` run as they are, with the operators of ``graph.layers`` in PyTorch."""

import torch
from torch import fx
from torch.nn import functional as F

from hotloop.graph import layers
from hotloop.graph.from_export import graph_of

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "tanh_gelu": lambda x: F.gelu(x, approximate="tanh"),
}


def _linear(x, weight, bias, addend, activation):
    y = F.linear(x, weight, bias)
    return ACTIVATIONS[activation](y if addend is None else y + addend)


def _convolution(x, weight, bias, addend, stride, padding, activation, pooled):
    y = F.conv2d(x, weight, bias, stride, padding)
    y = ACTIVATIONS[activation](y if addend is None else y + addend)
    return F.max_pool2d(y, 2) if pooled else y


def _max_pool(x, kernel, stride, padding, activation):
    return ACTIVATIONS[activation](F.max_pool2d(x, kernel, stride, padding))


def _pointwise(x, addend, activation):
    return ACTIVATIONS[activation](x if addend is None else x + addend)


_IN_TORCH = {
    layers.linear: _linear,
    layers.convolution: _convolution,
    layers.max_pool: _max_pool,
    layers.pointwise: _pointwise,
}


def exported(model, *inputs):
    """The graph of a model for any batch size, and the tensors behind its placeholders."""
    dynamic = tuple({0: torch.export.Dim.AUTO} for _ in inputs)
    program = torch.export.export(model.eval(), inputs, dynamic_shapes=dynamic, strict=False)
    return graph_of(program)


class _Interpreter(fx.Interpreter):
    def call_function(self, target, args, kwargs):
        return super().call_function(_IN_TORCH.get(target, target), args, kwargs)


def answer(graph, constants, *inputs):
    """What a graph gives for inputs."""
    given = iter(inputs)
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    tensors = [constants[n] if n in constants else next(given) for n in placeholders]
    with torch.no_grad():
        return _Interpreter(fx.GraphModule({}, graph)).run(*tensors)[0]
