"""The kernel's small text formats, and files that cannot be read."""

from hypothesis import given
from hypothesis import strategies as st

from hotloop.machine.affinity import format_cpus
from hotloop.machine.probe.tree import Tree, parse_cpu_list, parse_int, parse_size


@given(st.sets(st.integers(0, 500)))
def test_cpu_list_round_trip(cpu_ids):
    assert parse_cpu_list(format_cpus(cpu_ids)) == tuple(sorted(cpu_ids))


def test_cpu_lists():
    assert parse_cpu_list("0-2,7\n") == (0, 1, 2, 7)
    assert parse_cpu_list("") == ()
    for text in (None, "a", "3-1", "-1", "0-999999999999", "1-2-3", "0x3"):
        assert parse_cpu_list(text) is None


@given(st.text())
def test_parsers_never_raise(text):
    for parse in (parse_cpu_list, parse_int, parse_size):
        parse(text)


def test_sizes_and_integers():
    assert parse_size("48K") == 48 * 1024
    assert parse_size("32M") == 32 * 1024**2
    assert parse_size("512") == 512
    assert parse_int("-5\n") == -5
    for text in ("K", "1.5M", "", None):
        assert parse_size(text) is None
        assert parse_int(text) is None


def test_unreadable_is_none_or_empty(tmp_path):
    tree = Tree(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for path in ("/missing", "/folder", "/loop", "/nul\0byte"):
        assert tree.text(path) is None
        assert tree.number(path) is None
        assert tree.names(path) == []
    assert tree.exists("/loop")
    assert not tree.exists("/nul\0byte")
    assert not tree.is_folder("/nul\0byte")


def test_numbered_entries_in_order_of_number(tmp_path):
    for name in ("cpu10", "cpu2", "cpu0", "cpufreq", "xcpu1", "cpu"):
        (tmp_path / name).mkdir()
    assert Tree(tmp_path).numbered("/", "cpu") == [0, 2, 10]


def test_only_slash_is_live(tmp_path):
    assert Tree("/").is_live
    assert not Tree(tmp_path).is_live
