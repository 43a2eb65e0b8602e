"""What is read before and after it is written: passes move it, and the order stays right."""

import copy

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import hotloop
from hotloop import kernels
from hotloop.graph import native
from hotloop.graph.ordering import settle

needs_kernels = pytest.mark.skipif(not kernels.is_available(), reason="no kernels here")
_aten = torch.ops.aten


def written_between():
    """A buffer, what reads it before a write, the write, and what reads it after."""
    graph = fx.Graph()
    val = torch.empty(4, device="meta")
    buffer = graph.placeholder("buffer_0")
    buffer.meta |= {"input": ("buffer", 0), "val": val}
    early = graph.call_function(_aten.neg.default, (buffer,))
    write = graph.call_function(_aten.mul_.Tensor, (buffer, 2.0))
    after = graph.call_function(native.version, (buffer, write))
    after.meta |= {"aliases": True, "val": val}
    late = graph.call_function(_aten.neg.default, (after,))
    graph.output((early, late))
    return graph, early, write, after, late


def test_a_reader_goes_before_the_write_that_ends_its_value():
    graph, early, write, after, late = written_between()
    late.append(early)  # As a pass may do.
    assert settle(graph)
    order = list(graph.nodes)
    assert order.index(early) < order.index(write) < order.index(after) < order.index(late)


def test_one_operation_that_reads_both_values_has_no_order():
    graph, early, _, after, _ = written_between()
    with graph.inserting_after(after):
        both = graph.call_function(_aten.add.Tensor, (early.args[0], after))
    (output,) = (n for n in graph.nodes if n.op == "output")
    output.args = ((both,),)
    assert not settle(graph)


class Centred(nn.Module):
    """Takes from its input a mean that it moves; batch norm that is used twice."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.register_buffer("mean", torch.ones(8))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        before = x - self.mean
        with torch.no_grad():
            self.mean.mul_(0.5).add_(x.mean(0), alpha=0.5)
            self.calls.add_(1)
        after = self.norm(x - self.mean) + self.norm(2 * x)
        return self.head(before * 2 + torch.tanh(before) + after) / self.calls


@needs_kernels
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_a_buffer_that_is_read_written_and_read_again_is_as_in_pytorch(clip_norm):
    torch.manual_seed(0)
    model = Centred()
    twin = copy.deepcopy(model)
    optimizer, plain = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin))
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(16, 8, generator=generator), torch.arange(16) % 3
    step = hotloop.compile_step(model, F.cross_entropy, optimizer, (x, y), clip_norm=clip_norm)
    for _ in range(8):
        x = torch.randn(16, 8, generator=generator)
        loss = step(x, y)
        plain.zero_grad()
        expected = F.cross_entropy(twin(x), y)
        expected.backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(twin.parameters(), clip_norm)
        plain.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    assert step.path == "compiled", step.reason
    for one, other in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
