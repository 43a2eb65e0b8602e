"""The kernel's counters against work whose cost is known."""

import mmap

import pytest

from hotloop.monitor import peak_resident_bytes, reset_peak_resident, resident_bytes
from hotloop.monitor.process import ProcessUsage

SIZE = 64 * 2**20


def touched(size):
    memory = mmap.mmap(-1, size)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    for at in range(0, size, 4096):
        memory[at] = 1
    return memory


def test_resident_memory_grows_by_what_is_touched():
    before = resident_bytes()
    memory = touched(SIZE)
    assert resident_bytes() - before == pytest.approx(SIZE, rel=0.1)
    memory.close()
    assert resident_bytes() - before < SIZE / 2


def test_the_peak_stays_until_it_is_reset():
    touched(SIZE).close()
    peak = peak_resident_bytes()
    assert peak >= resident_bytes() + SIZE / 2
    if not reset_peak_resident():
        pytest.skip("this kernel does not reset the peak")
    assert peak_resident_bytes() < peak - SIZE / 2


def test_faults_are_counted_one_a_page():
    start = ProcessUsage.now()
    memory = touched(SIZE)
    used = ProcessUsage.now() - start
    memory.close()
    assert used.minor_faults == pytest.approx(SIZE / 4096, rel=0.1)
    assert used.user_s + used.system_s > 0
