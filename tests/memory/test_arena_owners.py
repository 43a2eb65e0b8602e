"""Memory that one part of torch allocates and another one frees, in the arena and beside it."""

import gc
import threading

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from hotloop.memory.tensor_arena import tensor_arena

LARGE = 300_000  # float32 elements: well over the threshold

pytestmark = pytest.mark.usefixtures("arena_available")


@pytest.fixture(autouse=True)
def nothing_left():
    gc.collect()
    start = tensor_arena().stats().num_live
    yield
    gc.collect()
    assert tensor_arena().stats().num_live == start


def test_storages_change_hands():
    outside = torch.full((LARGE,), 1.0)
    with tensor_arena() as arena:
        inside = torch.full((LARGE,), 2.0)
        outside.set_(inside.untyped_storage(), 0, (LARGE,))
        assert arena.offset(outside) == arena.offset(inside)
        del inside
        parameter = torch.nn.Parameter(torch.full((LARGE,), 3.0))
        torch.utils.swap_tensors(parameter, torch.nn.Parameter(torch.full((LARGE,), 4.0)))
        parameter.data = torch.full((LARGE,), 5.0)
    assert outside.sum() == 2 * LARGE
    assert parameter.sum() == 5 * LARGE
    parameter.data = torch.empty(0)
    outside.untyped_storage().resize_(8 * LARGE)
    assert outside.sum() == 2 * LARGE


def test_freed_by_a_thread_that_did_not_make_it_and_after_the_context():
    with tensor_arena() as arena:
        held = [torch.full((LARGE,), i) for i in range(20)]
        made_there: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: made_there.append(torch.ones(LARGE)))
        thread.start()
        thread.join()
        assert arena.offset(made_there[0]) is not None
        made_there.clear()
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()


def test_memory_of_numpy_goes_back_to_numpy():
    before = torch.from_numpy(np.ones(LARGE))
    with tensor_arena() as arena:
        del before
        shared = torch.from_numpy(np.arange(LARGE))
        assert arena.offset(shared) is None
        view = torch.arange(LARGE).numpy()
        buffer = torch.frombuffer(bytearray(4 * LARGE), dtype=torch.float32)
        del buffer
    assert shared[-1] == view[-1] == LARGE - 1


def test_shared_memory_is_not_the_arenas():
    with tensor_arena() as arena:
        tensor = torch.ones(LARGE)
        assert arena.offset(tensor) is not None
        tensor.share_memory_()
        assert arena.offset(tensor) is None
    assert tensor.sum() == LARGE


class _Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((LARGE,), float(index))


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_of_a_loader_have_an_arena_of_their_own(workers):
    with tensor_arena() as arena:
        loader = torch.utils.data.DataLoader(_Rows(), batch_size=2, num_workers=workers)
        sums = [float(batch.sum()) for batch in loader]
        kept = torch.ones(LARGE)
        assert arena.offset(kept) is not None
    assert sums == [LARGE * (2.0 * i + 1) for i in range(0, 8, 2)]


def test_kernels_that_allocate_for_themselves_give_it_all_back():
    with tensor_arena():
        q, k, v = (torch.randn(2, 8, 256, 64, requires_grad=True) for _ in range(3))
        torch.nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()
        image = torch.randn(8, 16, 64, 64, requires_grad=True)
        torch.nn.functional.conv2d(image, torch.randn(32, 16, 3, 3)).sum().backward()
        torch.linalg.svd(torch.randn(256, 256))
        torch.fft.rfft2(torch.randn(8, 256, 256))
        torch.sparse.mm(torch.eye(1000).to_sparse(), torch.randn(1000, 200))
        torch.nn.LSTM(64, 256)(torch.randn(50, 32, 64))[0].sum().backward()
        torch.sort(torch.randn(LARGE))


def test_the_profiler_of_torch_sees_what_is_allocated():
    with (
        tensor_arena(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen,
    ):
        torch.empty(LARGE)
    assert any(e.cpu_memory_usage == 4 * LARGE for e in seen.events())


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_functions_allocate_in_it_and_outlive_it():
    compiled = torch.compile(lambda x: (x * 2).relu() @ x.t())
    x = torch.randn(500, 500, requires_grad=True)
    with tensor_arena() as arena:
        made = compiled(x)
        assert arena.offset(made) is not None
    made.sum().backward()
    assert torch.allclose(made, (x * 2).relu() @ x.t(), atol=1e-3)
    torch.compiler.reset()
