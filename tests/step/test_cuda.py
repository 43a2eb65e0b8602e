"""The step on a GPU; what can be tested without one is."""

import copy
from collections.abc import Iterator

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
        # The gradient of a bias before batch norm is rounding alone, which Adam makes a step of.
        nn.Conv2d(1, 8, 3, bias=False),
        nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10),
    )  # fmt: skip


def _batches(count: int, device: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        y = torch.randint(0, 10, (32,), generator=draw)
        x = torch.randn(32, 1, 8, 8, generator=draw) + y.view(-1, 1, 1, 1)
        made.append((x.to(device), y.to(device)))
    return made


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """PyTorch's default takes TF32 for convolutions on a GPU, and adds in any order."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


@needs_gpu
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("compile", ["auto", "always"])
def test_a_graph_trains_as_pytorch_does(kind: type[torch.optim.Optimizer], compile: str) -> None:
    model = _net().cuda()
    plain = copy.deepcopy(model)
    optimizer, follower = kind(model.parameters(), lr=1e-2), kind(plain.parameters(), lr=1e-2)
    batches = _batches(50, "cpu")
    plan = hotloop.Plan.from_dict({"step": {"compile": compile}})
    step = hotloop.compile_step(model, nn.functional.cross_entropy, optimizer, batches[0], plan)
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
        # Where a gradient is near zero Adam makes steps of its rounding (docs/step.md).
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    kind(plain.parameters(), lr=1e-2).load_state_dict(optimizer.state_dict())
    assert step._compiled.not_fused is None


@needs_gpu
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("pinned", [False, True])
def test_many_steps_in_one_call_are_the_steps_one_by_one(
    kind: type[torch.optim.Optimizer], pinned: bool
) -> None:
    model = _net().cuda()
    twin = copy.deepcopy(model)
    optimizer, follower = kind(model.parameters(), lr=1e-2), kind(twin.parameters(), lr=1e-2)
    batches = _batches(12, "cpu")
    loss_fn = nn.functional.cross_entropy
    one = hotloop.compile_step(model, loss_fn, optimizer, batches[0])
    many = hotloop.compile_step(twin, loss_fn, follower, batches[0])
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    if pinned:
        x, y = x.pin_memory(), y.pin_memory()
    rates = [[1e-2 / (1 + number // 3)] for number in range(12)]
    expected = []
    for (a, b), (rate,) in zip(batches, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        expected.append(one(a, b).item())
    got: list[float] = []
    for start in (0, 4, 8):
        rows = slice(start * 32, (start + 4) * 32)
        losses = many.many(x[rows], y[rows], 4, rates[start : start + 4])
        assert losses is not None
        got += losses.tolist()
    assert got == pytest.approx(expected, rel=1e-4)
    assert follower.param_groups[0]["lr"] == 1e-2
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@needs_gpu
def test_page_locked_batches_may_be_filled_again_at_once() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(1 << 14, 10)).cuda()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    follower = torch.optim.SGD(plain.parameters(), lr=1e-3)
    x, y = torch.empty(256, 1 << 14).pin_memory(), torch.zeros(256, dtype=torch.long)
    loss_fn = nn.functional.cross_entropy
    step = hotloop.compile_step(model, loss_fn, optimizer, (x.fill_(0.0), y))
    for number in range(10):
        losses = step(x.fill_(number / 10), y)
        x.fill_(float("nan"))
        follower.zero_grad()
        expected = loss_fn(plain(torch.full_like(x, number / 10).cuda()), y.cuda())
        expected.backward()
        follower.step()
        assert losses.item() == pytest.approx(expected.item(), rel=1e-4)


@needs_gpu
def test_micro_batches_on_a_gpu_add_up() -> None:
    model = _net().cuda().eval()
    plain = copy.deepcopy(model)
    batches = _batches(10, "cpu")
    loss_fn = nn.functional.cross_entropy
    plan = hotloop.Plan.from_dict({"memory": {"micro_batch_size": 8}})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    follower = torch.optim.Adam(plain.parameters(), lr=1e-2)
    step = hotloop.compile_step(model, loss_fn, optimizer, batches[0], plan)
    for x, y in batches:
        follower.zero_grad()
        expected = loss_fn(plain(x.cuda()), y.cuda())
        expected.backward()
        follower.step()
        assert step(x, y).item() == pytest.approx(expected.item(), rel=1e-4)
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@needs_gpu
def test_bfloat16_on_a_gpu_learns_as_float32() -> None:
    batches = _batches(60, "cpu")
    last = {}
    for precision in ("float32", "bfloat16"):
        model = _net().cuda()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        plan = hotloop.Plan.from_dict({"step": {"precision": precision}})
        step = hotloop.compile_step(model, nn.functional.cross_entropy, optimizer, batches[0], plan)
        last[precision] = [step(x, y).item() for x, y in batches][-10:]
        assert step.path == "compiled"
    assert sum(last["bfloat16"]) == pytest.approx(sum(last["float32"]), rel=0.2)


@needs_gpu
def test_a_trainer_on_a_gpu_learns_what_it_learns_on_the_cpu() -> None:
    x, y = (torch.cat(t) for t in zip(*_batches(20, "cpu"), strict=True))
    reports = {}
    for device in ("cpu", "cuda"):
        model = _net().to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        trainer = hotloop.Trainer(model, nn.functional.cross_entropy, optimizer)
        reports[device] = trainer.fit((x, y), batch_size=32, epochs=3, validation=(x, y))
        assert next(model.parameters()).device.type == device
    assert reports["cuda"].path == "compiled"
    for there, here in zip(reports["cuda"].history, reports["cpu"].history, strict=True):
        assert there.train_loss == pytest.approx(here.train_loss, rel=1e-3)
        assert there.validation_loss == pytest.approx(here.validation_loss, rel=1e-3)


@needs_gpu
def test_a_graph_stands_on_its_own_when_others_have_gone() -> None:
    """Workspaces of cuBLAS that an earlier graph had made are not the next one's."""
    x, y = torch.randn(64, 256), torch.randint(0, 10, (64,))
    losses = []
    for _ in range(3):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 10)).cuda()
        optimizer = torch.optim.Adam(model.parameters())
        step = hotloop.compile_step(model, nn.functional.cross_entropy, optimizer, (x, y))
        made = [step(x, y).item() for _ in range(4)]
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        losses.append([*made, *(step(x, y).item() for _ in range(4))])
        del step
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


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
