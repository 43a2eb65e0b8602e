import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotloop import errors, units


def test_message_has_rule_value_and_next_step_on_one_line():
    error = errors.PlanError("queue_size must be at least 1", got="0\n1", next_step="pass 4.")
    assert str(error) == "queue_size must be at least 1; got 0 1. Next: pass 4."
    assert error.exit_code == 2
    assert isinstance(error, ValueError)


def test_a_failure_while_running_exits_with_1():
    assert errors.StorageError("the disk is full").exit_code == 1


def test_a_missing_extra_answers_with_the_install_line():
    text = str(errors.MissingExtraError("reading Parquet", "pyarrow", "parquet"))
    assert "pip install 'hotloop[parquet]'" in text


def test_the_drawn_tree_is_the_real_one():
    drawn = errors.__doc__ or ""
    real = [
        n
        for n, v in vars(errors).items()
        if isinstance(v, type) and v.__module__ == errors.__name__
    ]
    assert all(name in drawn for name in real)


@pytest.mark.parametrize(
    ("text", "count"),
    [("4096", 4096), ("512MiB", 512 << 20), ("1.5 GiB", 3 << 29), ("2G", 2 << 30), ("1GB", 10**9)],
)
def test_sizes_are_read(text, count):
    assert units.parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "-1", "1 parsec", "MiB", "1e9", "nan"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(errors.InputError, match="a size is a number and a unit"):
        units.parse_bytes(text)


@given(st.integers(0, 2**50))
def test_a_printed_size_reads_back_within_its_digits(count):
    back = units.parse_bytes(units.format_bytes(count).replace(" ", ""))
    assert abs(back - count) <= 0.006 * count


def test_printed_forms():
    assert units.format_bytes(None) == "unknown"
    assert units.format_bytes(1536) == "1.50 KiB"
    assert units.format_seconds(0.0032) == "3.20 ms"
    assert units.format_seconds(125) == "2 min 05 s"
    assert units.format_seconds(3720) == "1 h 02 min"
    assert units.format_rate(350e9, "FLOP") == "350 GFLOP/s"
    assert units.format_rate(12300, "samples") == "12,300 samples/s"
    assert units.format_share(0.371) == "37 %"
