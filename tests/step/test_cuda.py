"""The step on a GPU; what can be tested without one is."""

import copy

import pytest
import torch
from torch import nn

import hotloop
from hotloop.errors import ModelError
from hotloop.step.cuda import page_locked

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)
    )


def _batches(count: int, device: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        y = torch.randint(0, 10, (32,), generator=draw)
        x = torch.randn(32, 1, 8, 8, generator=draw) + y.view(-1, 1, 1, 1)
        made.append((x.to(device), y.to(device)))
    return made


@needs_gpu
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_a_graph_trains_as_pytorch_does(kind: type[torch.optim.Optimizer]) -> None:
    model = _net().cuda()
    plain = copy.deepcopy(model)
    optimizer, follower = kind(model.parameters(), lr=1e-2), kind(plain.parameters(), lr=1e-2)
    batches = _batches(50, "cpu")
    step = hotloop.compile_step(model, nn.functional.cross_entropy, optimizer, batches[0])
    assert step.path == "compiled", step.reason
    for number, (x, y) in enumerate(batches):
        for group in [*optimizer.param_groups, *follower.param_groups]:
            group["lr"] = 1e-2 / (1 + number // 10)
        follower.zero_grad()
        expected = nn.functional.cross_entropy(plain(x.cuda()), y.cuda())
        expected.backward()
        follower.step()
        assert step(x, y).item() == pytest.approx(expected.item(), rel=1e-4)
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    kind(plain.parameters(), lr=1e-2).load_state_dict(optimizer.state_dict())


@needs_gpu
def test_a_trainer_on_a_gpu_learns() -> None:
    model = _net().cuda()
    x, y = (torch.cat(t) for t in zip(*_batches(20, "cpu"), strict=True))
    report = hotloop.Trainer(
        model, nn.functional.cross_entropy, torch.optim.Adam(model.parameters())
    ).fit((x, y), batch_size=32, epochs=3, validation=(x, y))
    assert report.path == "compiled"
    assert report.history[-1].train_loss < 1.0
    assert next(model.parameters()).device.type == "cuda"


def test_a_model_on_two_kinds_of_device_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2, device="meta"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    example = torch.zeros(2, 4), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ModelError, match="all on one CUDA device"):
        hotloop.compile_step(model, nn.functional.cross_entropy, optimizer, example)


def test_memory_is_locked_only_for_a_gpu() -> None:
    block = torch.zeros(64, dtype=torch.uint8)
    with page_locked(block, torch.device("cpu")):
        assert block.sum() == 0
