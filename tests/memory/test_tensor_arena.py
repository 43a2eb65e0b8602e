"""The arena in use: installed and removed, outlived, shared by threads, forked, and its effect."""

import gc
import os
import platform
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from hotloop.errors import PlanError, RunError
from hotloop.memory import tensor_arena as module
from hotloop.memory.arena import transparent_huge_pages
from hotloop.memory.tensor_arena import TensorArena, tensor_arena

MIB = 1024**2
LARGE = 300_000  # float32 elements: well over the threshold

needs_arena = pytest.mark.usefixtures("arena_available")


@pytest.fixture
def empty():
    """Nothing lives in the arena before, nor after."""
    check_empty()
    yield
    check_empty()


def check_empty() -> None:
    if tensor_arena().stats().num_live:
        gc.collect()
    assert tensor_arena().stats().num_live == 0, "a test left tensors in the arena"


def run_python(code: str, *, timeout_s: float = 240) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout_s
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@needs_arena
def test_large_tensors_come_from_it_and_small_ones_do_not(empty):
    with tensor_arena() as arena:
        assert arena.installed
        assert arena.reason is None
        large, small, none = torch.ones(LARGE), torch.ones(100), torch.ones(0)
        assert arena.offset(large) == 0
        assert arena.offset(small) is None
        assert arena.offset(none) is None
        assert large.data_ptr() % 4096 == 0
        assert large.sum() == LARGE
        del large, small, none
    assert not arena.installed
    assert arena.offset(torch.ones(LARGE)) is None


@needs_arena
def test_after_an_exception_tensors_are_the_systems(empty):
    def fail() -> None:
        with tensor_arena() as arena:
            assert arena.offset(torch.ones(LARGE)) == 0
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert tensor_arena().offset(torch.ones(LARGE)) is None


@needs_arena
def test_contexts_nest_and_the_first_one_rules(empty):
    with tensor_arena() as outer:
        with tensor_arena(threshold_bytes=1), outer as same:
            assert same is outer
            assert outer.offset(torch.ones(100)) is None
        assert outer.installed
        assert outer.offset(torch.ones(LARGE)) == 0
    assert outer.offset(torch.ones(LARGE)) is None


@needs_arena
def test_tensors_outlive_it_and_new_ones_do_not_enter(empty):
    with tensor_arena() as arena:
        kept = torch.arange(LARGE)
    assert arena.offset(kept) == 0
    copy = kept.clone()
    assert arena.offset(copy) is None
    junk = [torch.full((LARGE,), -1) for _ in range(10)]
    assert all(arena.offset(t) is None for t in junk)
    assert torch.equal(kept, torch.arange(LARGE))
    assert torch.equal(kept, copy)
    # Whoever holds the last tensor may hold it as an array.
    array = kept.numpy()
    del kept
    assert array[-1] == LARGE - 1
    assert arena.stats().num_live == 1
    del array
    assert arena.stats().num_live == 0


@needs_arena
def test_storage_resized_inside_and_after(empty):
    outside = torch.ones(LARGE)
    with tensor_arena() as arena:
        tensor = torch.arange(LARGE)
        tensor.resize_(2 * LARGE)
        assert arena.offset(tensor) is not None
        assert torch.equal(tensor[:LARGE], torch.arange(LARGE))
        outside.resize_(2 * LARGE)
        assert outside[:LARGE].sum() == LARGE
    tensor.resize_(4 * LARGE)
    assert arena.offset(tensor) is None
    assert torch.equal(tensor[:LARGE], torch.arange(LARGE))
    tensor.untyped_storage().resize_(0)


@needs_arena
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_onednn_tensors_are_freed_on_the_other_side(empty):
    # oneDNN asks torch's allocator too, through functions of its own.
    before = torch.randn(LARGE).to_mkldnn()
    with tensor_arena() as arena:
        del before
        inside = torch.randn(LARGE).to_mkldnn()
        assert arena.stats().num_live == 1
    value = inside.to_dense()
    assert arena.offset(value) is None
    del inside
    assert arena.stats().num_live == 0


@needs_arena
def test_what_does_not_fit_goes_to_the_system(empty):
    with tensor_arena(capacity_bytes=4 * MIB) as arena:
        before = arena.stats()
        assert before.capacity_bytes == 4 * MIB
        first = torch.ones(3 * MIB, dtype=torch.uint8)
        second = torch.ones(3 * MIB, dtype=torch.uint8)
        huge = torch.ones(16 * MIB, dtype=torch.uint8)
        assert [arena.offset(t) for t in (first, second, huge)] == [0, None, None]
        assert arena.stats().num_fallbacks - before.num_fallbacks == 2
        assert second.sum() == first.sum() == 3 * MIB
        with pytest.raises(RuntimeError, match="memory"):
            torch.empty(2**62, dtype=torch.uint8)
        del first, second, huge


@needs_arena
def test_counters_and_peaks(empty):
    with tensor_arena() as arena:
        arena.reset_peak()
        before = arena.stats()
        a, b = (torch.empty(MIB, dtype=torch.uint8) for _ in range(2))
        del a
        now = arena.stats()
        assert (now.live_bytes, now.num_live, now.free_bytes) == (MIB, 1, MIB)
        assert (now.top_bytes, now.peak_top_bytes, now.peak_live_bytes) == (2 * MIB,) * 3
        assert now.num_allocations - before.num_allocations == 2
        assert now.touched_bytes >= 2 * MIB
        assert now.reserved_bytes >= now.capacity_bytes > 0
        del b
        arena.reset_peak()
        assert arena.stats().peak_top_bytes == 0


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@needs_arena
@pytest.mark.parametrize("huge_pages", ["never", "try"])
def test_freed_pages_stay_until_the_end_and_are_given_back_then(empty, huge_pages):
    with tensor_arena(huge_pages=huge_pages) as arena:
        start = resident_bytes()
        hole = torch.ones(64 * MIB, dtype=torch.uint8)
        kept = torch.ones(LARGE)
        end = torch.ones(64 * MIB, dtype=torch.uint8)
        del hole, end
        assert resident_bytes() - start > 120 * MIB
    assert resident_bytes() - start < 16 * MIB
    assert arena.stats().touched_bytes == arena.stats().top_bytes
    assert kept.sum() == LARGE


@needs_arena
def test_threads_share_it_without_overlap(empty):
    failures = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        mine: list[torch.Tensor] = []
        for i in range(400):
            if mine and draw.random() < 0.5:
                tensor = mine.pop(draw.randrange(len(mine)))
                if not (tensor == tensor[0]).all() or tensor[0] // 1000 != seed:
                    failures.append(seed)
            else:
                mine.append(torch.full((draw.randrange(20_000, 60_000),), seed * 1000 + i))

    with tensor_arena() as arena:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    assert arena.stats().top_bytes == 0


@needs_arena
def test_contexts_overlap_in_threads(empty):

    def enter_and_leave(_: int) -> int:
        with tensor_arena() as arena:
            return 1 if arena.offset(torch.ones(LARGE)) is not None else 0

    with ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(enter_and_leave, range(200))) == 200
    assert tensor_arena().offset(torch.ones(LARGE)) is None


@needs_arena
def test_forked_children_allocate_and_the_interpreter_ends_with_tensors_inside():
    run_python(
        """
import os, threading, torch
from hotloop.memory.tensor_arena import tensor_arena
torch.set_num_threads(1)
done = False
def allocate():
    while not done:
        torch.empty(100_000)
with tensor_arena() as arena:
    kept = torch.arange(100_000)
    thread = threading.Thread(target=allocate)
    thread.start()
    for _ in range(30):
        child = os.fork()
        if child == 0:
            fresh = [torch.empty(100_000) for _ in range(20)]
            inside = all(arena.offset(t) is not None for t in fresh)
            os._exit(0 if inside and int(kept[-1]) == 99_999 else 3)
        status = os.waitpid(child, 0)[1]
        assert os.waitstatus_to_exitcode(status) == 0, status
    done = True
    thread.join()
arena = tensor_arena()
arena.__enter__()
more = torch.ones(300_000), torch.ones(300_000).to_mkldnn()
"""
    )


def small_net(seed: int = 0):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.Flatten(),
        torch.nn.Linear(16 * 13 * 13, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10),
    )  # fmt: skip
    x, y = torch.randn(64, 1, 28, 28), torch.randint(0, 10, (64,))
    return net, torch.optim.Adam(net.parameters(), lr=0.01), x, y


def train(steps: int = 5) -> list[torch.Tensor]:
    net, optimizer, x, y = small_net()
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return [p.detach() for p in net.parameters()]


@needs_arena
@pytest.mark.parametrize("huge_pages", ["never", "try"])
def test_training_ends_at_the_same_bits(empty, huge_pages):
    plain = train()
    with tensor_arena(huge_pages=huge_pages) as arena:
        inside = train()
        assert any(arena.offset(p) is not None for p in inside)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


FAULTS = """
import resource, torch
torch.set_num_threads(1)
from hotloop.memory.tensor_arena import tensor_arena
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Conv2d(1, 64, 3), torch.nn.ReLU())
x = torch.randn(64, 1, 50, 50)  # activations of 36 MiB: glibc always maps these anew
optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
def step():
    optimizer.zero_grad()
    net(x).square().mean().backward()
    optimizer.step()
def usage():
    u = resource.getrusage(resource.RUSAGE_SELF)
    return u.ru_minflt, u.ru_maxrss
def measure(steps):
    for _ in range(5):
        step()
    faults, rss = usage()
    for _ in range(steps):
        step()
    faults_after, rss_after = usage()
    print((faults_after - faults) / steps, (rss_after - rss) * 1024)
with tensor_arena():
    measure(15)
    optimizer.zero_grad()
measure(3)
"""


@needs_arena
def test_no_page_is_faulted_in_the_steady_state_and_memory_is_flat():
    inside, outside = run_python(FAULTS).splitlines()
    faults, growth = map(float, inside.split())
    assert faults < 50
    assert growth < 2 * MIB
    if platform.libc_ver()[0] == "glibc":
        assert float(outside.split()[0]) > 1000, "the test above proves nothing"


@needs_arena
def test_little_address_space_means_a_small_range_and_none_means_none():
    output = run_python(
        """
import os, resource, torch
from hotloop.memory.tensor_arena import tensor_arena
assert tensor_arena.available()
torch.ones(10)
used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
for spare in (32 << 20, 1 << 30):
    resource.setrlimit(resource.RLIMIT_AS, (used + spare, resource.RLIM_INFINITY))
    with tensor_arena() as arena:
        assert torch.ones(300_000).sum() == 300_000
        print(arena.installed, arena.stats().reserved_bytes, arena.reason)
"""
    )
    none, little = output.splitlines()
    assert none.startswith("False 0 the system did not reserve")
    installed, reserved, reason = little.split()
    assert (installed, reason) == ("True", "None")
    assert 256 * MIB <= int(reserved) <= 512 * MIB


def test_where_it_is_not_available_the_context_changes_nothing(monkeypatch):
    monkeypatch.setattr(module, "unavailable_reason", lambda: "no kernels")
    assert not TensorArena.available()
    assert TensorArena.unavailable_reason() == "no kernels"
    with tensor_arena() as arena, arena.recording() as events:
        tensor = torch.ones(LARGE)
        assert not arena.installed
        assert arena.reason == "no kernels"
        assert arena.offset(tensor) is None
        arena.reset_peak()
        arena.trim()
    assert arena.stats().num_allocations == 0
    assert events == []


def test_huge_pages_is_one_of_three_and_required_ones_must_be_possible(monkeypatch):
    with pytest.raises(PlanError, match="never, try or require"):
        tensor_arena(huge_pages="yes")
    monkeypatch.setattr(module, "transparent_huge_pages", lambda: "never")
    with pytest.raises(PlanError, match="require"):
        tensor_arena(huge_pages="require")
    assert tensor_arena(huge_pages="try").reason is None


@needs_arena
@pytest.mark.skipif(
    transparent_huge_pages() not in ("always", "madvise"), reason="no transparent huge pages"
)
def test_huge_pages_are_used_when_asked(empty):
    def advised() -> int:
        lines = Path("/proc/self/smaps").read_text().splitlines()
        return sum(" hg" in line for line in lines if line.startswith("VmFlags"))

    with tensor_arena(huge_pages="never"):
        before = advised()
    with tensor_arena(huge_pages="try"):
        assert advised() > before
    with tensor_arena(huge_pages="never"):
        assert advised() == before


@needs_arena
def test_a_recording_that_overflows_says_so(empty):
    def overflow(arena: TensorArena) -> None:
        with arena.recording(max_events=3):
            for _ in range(4):
                torch.empty(LARGE)

    with tensor_arena() as arena:
        with pytest.raises(RunError, match="max_events"):
            overflow(arena)
        with arena.recording() as events:
            torch.empty(LARGE)
        assert events == [(0, 4 * LARGE), (0, None)]
