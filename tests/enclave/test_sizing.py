"""Sizes by hand: each kind's rows and steps, and the largest batch that fits."""

import pytest

from hotloop.enclave.needs import Needs, largest_size, mapped_files
from hotloop.enclave.sizing import KINDS, size_enclave
from hotloop.errors import BudgetError, InputError
from hotloop.units import KIB, MIB


def needs(total=400 * MIB, threads=6, mapped=500 * MIB, resident=120 * MIB, phase="train"):
    return Needs(
        phase=phase, batch_size=64, micro_batch_size=64,
        components=(("Model parameters", 5 * MIB), ("Working memory", None),
                    ("Runtime base", total - 5 * MIB)),
        threads=threads, mapped_files_bytes=mapped, mapped_resident_bytes=resident,
        needs_torch=True,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_rows_add_up_and_the_size_has_the_reserve(kind):
    size = size_enclave(needs(), kind, tmp_bytes=7 * MIB, image_bytes=300 * MIB)
    rows = [count or 0 for _, count in size.table()[:-2]]
    assert sum(rows) == size.needed_bytes
    assert size.size_bytes >= size.needed_bytes * 1.03 - 1
    assert ("Files in memory", 7 * MIB) in size.overhead
    assert size.threads >= 6 + 4
    assert size.to_dict()["program_bytes"] == 400 * MIB


def test_gramine_counts_each_thread_whole_libraries_and_a_power_of_two():
    size = size_enclave(needs(), "gramine-sgx", malloc_arenas=3)
    rows = dict(size.overhead)
    assert size.threads == 6 + 4 + 3  # With a reserve, and Gramine's own three.
    assert rows["Stacks of threads"] == 13 * (2 * MIB + (32 + 256 + 64 + 4 + 4 + 32) * KIB)
    assert rows["Libraries, whole"] == 380 * MIB
    assert rows["Arenas of the C library"] == 2 * 64 * MIB
    assert size.size_bytes == 1024 * MIB
    assert size_enclave(needs(), "gramine-sgx", edmm=True).size_bytes == 1024 * MIB


def test_nitro_goes_in_steps_of_2_mib_and_is_four_times_its_image():
    small = size_enclave(needs(total=6 * MIB, resident=0), "nitro")
    assert small.size_bytes % (2 * MIB) == 0
    assert small.size_bytes >= 64 * MIB
    large = size_enclave(needs(), "nitro", image_bytes=601 * MIB + 1)
    assert large.size_bytes == 2406 * MIB


@pytest.mark.parametrize("kind", ["sev-snp", "tdx"])
def test_an_encrypted_guest_has_bounce_buffers_and_page_records_of_its_own_size(kind):
    for total in (100 * MIB, 4096 * MIB, 40_000 * MIB):
        size = size_enclave(needs(total=total), kind)
        rows = dict(size.overhead)
        assert rows["Bounce buffers"] == pytest.approx(
            min(max(0.06 * size.needed_bytes, 64 * MIB), 1024 * MIB), rel=1e-3
        )
        assert rows["Page records"] == pytest.approx(size.needed_bytes / 64, rel=1e-3)
        assert size.size_bytes % MIB == 0


def test_the_image_s_pages_are_not_counted_twice():
    rows = dict(size_enclave(needs(resident=120 * MIB), "tdx", image_bytes=300 * MIB).overhead)
    assert rows["Files of the image"] == 180 * MIB


def test_what_does_not_fit_is_refused_with_the_largest_that_does():
    size = size_enclave(needs(), "sandbox")
    size.require_fit(size.size_bytes, None)
    with pytest.raises(BudgetError, match="--micro-batch-size 17"):
        size.require_fit(size.size_bytes - 1, 17)
    with pytest.raises(BudgetError, match="use a smaller model"):
        size.require_fit(MIB, None)


def test_an_unknown_kind_is_refused():
    with pytest.raises(InputError, match="got 'sgx'"):
        size_enclave(needs(), "sgx")


def test_the_largest_size_is_found():
    for most in (1, 2, 7, 64):
        for limit in range(most + 2):
            expected = min(limit, most) or None
            assert largest_size(lambda size, limit=limit: size <= limit, most) == expected


def test_mapped_files_are_more_whole_than_resident():
    whole, resident = mapped_files()
    assert whole > resident > MIB
