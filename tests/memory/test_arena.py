"""The mapping below the pool: alignment, first touch, huge pages and their outcome."""

import mmap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hotloop.errors import InputError, PlanError
from hotloop.memory import arena as arena_module
from hotloop.memory.arena import Arena, mapped_huge_bytes, transparent_huge_pages

HUGE = 2 * 1024**2
THP = transparent_huge_pages() in ("always", "madvise")


@given(st.integers(1, 100_000), st.sampled_from([1, 64, 4096, 65536]))
def test_an_arena_is_zeroed_aligned_and_of_the_size_asked(num_bytes, align_bytes):
    block = Arena(num_bytes, align_bytes=align_bytes).block
    assert block.shape == (num_bytes,)
    assert block.data_ptr() % align_bytes == 0
    assert not block.any()
    block.fill_(255)
    assert block.sum() == 255 * num_bytes


def test_every_page_is_resident_before_use(tmp_path):
    statm = "/proc/self/statm"
    try:
        with open(statm) as file:
            before = int(file.read().split()[1])
    except OSError:
        pytest.skip("no /proc on this system")
    kept = Arena(64 * 1024**2)
    with open(statm) as file:
        grown = (int(file.read().split()[1]) - before) * mmap.PAGESIZE
    assert grown >= 60 * 1024**2
    assert kept.block.numel() == 64 * 1024**2


@pytest.mark.skipif(not THP, reason="no transparent huge pages on this system")
def test_huge_pages_are_counted_for_this_mapping_alone():
    first, second = (Arena(2 * HUGE + 5, huge_pages="try") for _ in range(2))
    for each in (first, second):
        assert each.huge_page_bytes in (0, HUGE, 2 * HUGE)
        assert each.huge_pages_backed == (each.huge_page_bytes == 2 * HUGE)
    plain = Arena(2 * HUGE)
    assert (plain.huge_page_bytes, plain.huge_pages_backed) == (0, False)


@pytest.mark.parametrize("mode", ["never", None])
def test_required_huge_pages_that_the_machine_does_not_allow_are_an_error(monkeypatch, mode):
    monkeypatch.setattr(arena_module, "transparent_huge_pages", lambda: mode)
    with pytest.raises(PlanError, match="transparent huge pages set to madvise") as caught:
        Arena(4 * HUGE, huge_pages="require")
    assert "\n" not in str(caught.value)


def test_required_huge_pages_for_a_small_pool_are_an_error(monkeypatch):
    monkeypatch.setattr(arena_module, "transparent_huge_pages", lambda: "madvise")
    with pytest.raises(PlanError, match="at least one page of"):
        Arena(4096, huge_pages="require")


@pytest.mark.parametrize(("found", "backed"), [(0, False), (HUGE, False), (2 * HUGE, True)])
def test_the_outcome_is_what_the_kernel_counted(monkeypatch, found, backed):
    monkeypatch.setattr(arena_module, "transparent_huge_pages", lambda: "madvise")
    monkeypatch.setattr(arena_module, "_huge_page_bytes", lambda: HUGE)
    monkeypatch.setattr(arena_module, "mapped_huge_bytes", lambda start, end: found)
    assert Arena(2 * HUGE + 1, huge_pages="try").huge_pages_backed is backed
    if backed:
        assert Arena(2 * HUGE + 1, huge_pages="require").huge_pages_backed
    else:
        with pytest.raises(PlanError, match="every page of the pool"):
            Arena(2 * HUGE + 1, huge_pages="require")


def test_an_outcome_the_kernel_does_not_tell_is_unknown(monkeypatch):
    monkeypatch.setattr(arena_module, "mapped_huge_bytes", lambda start, end: None)
    asked = Arena(2 * HUGE, huge_pages="try")
    assert asked.huge_page_bytes is None
    assert asked.huge_pages_backed is None


SMAPS = """\
55e000-55f000 r--p 00000000 00:00 1 /bin/true
AnonHugePages:      4096 kB
07f000000-07f400000 rw-p 00000000 00:00 0
Rss:                4096 kB
AnonHugePages:      2048 kB
VmFlags: rd wr mr mw me ac hg
"""


def test_smaps_is_read_for_the_exact_mapping_only(tmp_path):
    smaps = tmp_path / "smaps"
    smaps.write_text(SMAPS)
    assert mapped_huge_bytes(0x7F000000, 0x7F400000, smaps) == HUGE
    assert mapped_huge_bytes(0x7F000000, 0x7F200000, smaps) is None
    assert mapped_huge_bytes(0x7F000000, 0x7F400000, tmp_path / "missing") is None
    smaps.write_text("7f000000-7f400000 rw-p\nAnonHugePages:\n")
    assert mapped_huge_bytes(0x7F000000, 0x7F400000, smaps) is None


@pytest.mark.parametrize(
    ("text", "mode"),
    [("always [madvise] never\n", "madvise"), ("[always] madvise never\n", "always"), ("", None)],
)
def test_the_setting_of_the_machine_is_the_bracketed_word(monkeypatch, tmp_path, text, mode):
    monkeypatch.setattr(arena_module, "_THP", tmp_path)
    assert transparent_huge_pages() is None
    (tmp_path / "enabled").write_text(text)
    assert transparent_huge_pages() == mode


def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match="at least 1 byte"):
        Arena(0)
    with pytest.raises(PlanError, match="never, try or require"):
        Arena(64, huge_pages="maybe")
    with pytest.raises(InputError, match="must have the memory"):
        Arena(2**60)


def test_a_view_keeps_the_memory_alive():
    tail = Arena(1 << 20).block[-8:].view(torch.int64)
    tail.fill_(7)
    assert tail.item() == 7
