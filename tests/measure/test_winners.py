"""The cache of winners: what is kept, for whom, and what damage does."""

import json
import subprocess
import sys

import pytest

from hotloop.cli.main import main
from hotloop.measure import Winner, winners
from hotloop.measure.winners import add, clear, forget, listed, recall, recall_all

TORCH = {"torch": "2.13.0"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "hotloop"


def winner(question="product/64/784", answer="mkl", versions=TORCH, **changes):
    return Winner(question=question, answer=answer, versions=versions, **changes)


def test_what_was_added_is_recalled_with_its_seconds():
    assert recall("product/64/784", TORCH) is None
    assert add([winner(seconds={"mkl": 1e-3, "onednn": 2e-3}, quiet=False)])
    found = recall("product/64/784", TORCH)
    assert (found.answer, found.seconds["onednn"], found.quiet) == ("mkl", 2e-3, False)
    assert found.saved_at_s > 1.7e9


def test_another_question_version_or_machine_is_another():
    add([winner()], "here")
    assert recall("product/64/784", TORCH, "here").answer == "mkl"
    assert recall("product/64", TORCH, "here") is None
    assert recall("product/64/784", {"torch": "2.14.0"}, "here") is None
    assert recall("product/64/784", {**TORCH, "numpy": "2.0"}, "here") is None
    assert recall("product/64/784", TORCH, "there") is None
    assert recall("product/64/784", TORCH) is None


def test_versions_do_not_push_each_other_out():
    add([winner(answer="old")])
    add([winner(answer="new", versions={"torch": "2.14.0"})])
    assert recall("product/64/784", TORCH).answer == "old"
    assert recall("product/64/784", {"torch": "2.14.0"}).answer == "new"


def test_all_of_one_kind():
    add([winner("run/1"), winner("run/2"), winner("running/3"), winner("run/4", versions={})])
    assert [w.question for w in recall_all("run", TORCH)] == ["run/1", "run/2"]


def test_a_new_answer_replaces_the_old_and_forgetting_is_of_one():
    add([winner(), winner("other")])
    add([winner(answer="onednn")])
    assert recall("product/64/784", TORCH).answer == "onednn"
    forget("product/64/784", TORCH)
    forget("product/64/784", TORCH)
    assert [w.question for _, w in listed()] == ["other"]


def test_clearing_is_of_all_machines():
    add([winner()], "here")
    add([winner(), winner("other")], "there")
    assert sorted(machine for machine, _ in listed()) == ["here", "there", "there"]
    assert clear() == 3
    assert (listed(), clear()) == ([], 0)
    assert recall("product/64/784", TORCH, "here") is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: text[:-1] + "}",
        lambda text: text.replace("\t", " "),
        lambda text: text.replace("\t", "\t" + "[" * 100_000),
        lambda text: text.replace("winners 2", "winners 99"),
        lambda text: text.replace("784 |", "783 |"),
        lambda text: "\ufeff" + text,
    ],
)
def test_a_damaged_file_is_none_and_is_written_anew(folder, damage):
    add([winner()], "here")
    path = folder / "winners-here.tsv"
    good = path.read_text()
    assert damage(good) != good
    path.write_text(damage(good))
    assert recall("product/64/784", TORCH, "here") is None
    assert add([winner(answer="onednn")], "here")
    assert recall("product/64/784", TORCH, "here").answer == "onednn"


@pytest.mark.parametrize(
    "change",
    [
        {"question": 3},
        {"versions": {"torch": 2}},
        {"versions": None},
        {"seconds": {"mkl": "fast"}},
        {"seconds": {"mkl": float("nan")}},
        {"quiet": "yes"},
        {"saved_at_s": None},
        {"more": 1},
    ],
)
def test_a_damaged_entry_costs_only_itself(folder, change):
    add([winner(), winner("other")], "here")
    path = folder / "winners-here.tsv"
    first, damaged, other = path.read_text().splitlines()
    key, text = damaged.split("\t")
    damaged = f"{key}\t{json.dumps(json.loads(text) | change)}"
    path.write_text("\n".join([first, damaged, "", "text", "\t", other, "torn | \t{"]))
    assert [w.question for _, w in listed()] == ["other"]


def test_a_folder_that_cannot_be_written_only_means_measuring_again(folder):
    (folder / "winners-here.tsv").mkdir(parents=True)
    assert not add([winner()], "here")
    assert recall("product/64/784", TORCH, "here") is None
    assert clear() == 0


def test_what_a_torn_line_follows_is_kept(folder):
    add([winner(), winner("other")], "here")
    path = folder / "winners-here.tsv"
    path.write_text(path.read_text()[:-9])
    assert add([winner("third")], "here")
    assert {w.question for _, w in listed()} == {"product/64/784", "third"}


def test_the_oldest_go_first_and_the_file_stays_short(folder, monkeypatch):
    monkeypatch.setattr(winners, "MOST", 3)
    for number in range(20):
        add([winner(f"product/{number}")], "here")
        assert len((folder / "winners-here.tsv").read_text().splitlines()) <= 2 * 3 + 1
    assert [w.question for _, w in reversed(listed())] == [f"product/{n}" for n in (17, 18, 19)]


def test_two_processes_lose_nothing_of_each_other():
    code = (
        "import sys\n"
        "from hotloop.measure import Winner, winners\n"
        "for number in range(40):\n"
        "    question = f'{sys.argv[1]}/{number}'\n"
        "    winners.add([Winner(question=question, answer=number)], 'here')\n"
    )
    children = [subprocess.Popen([sys.executable, "-c", code, name]) for name in "ab"]
    assert [child.wait(120) for child in children] == [0, 0]
    assert len(recall_all("a", {}, "here")) == len(recall_all("b", {}, "here")) == 40


def test_what_another_process_wrote_is_seen():
    assert recall("late", {}, "here") is None
    code = (
        "from hotloop.measure import Winner, winners\n"
        "winners.add([Winner(question='late', answer=7)], 'here')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert recall("late", {}, "here").answer == 7


def test_installed_versions():
    found = winners.versions_of("torch", "no-such-library")
    assert list(found) == ["torch"]
    assert winners.versions_text({"torch": "2", "numpy": "1"}) == "numpy 1, torch 2"


def test_the_command_shows_and_clears(capsys):
    add([winner(seconds={"mkl": 2e-3, "onednn": 1e-3}, quiet=False)], "here")
    add([winner("plan/ab", {"knobs": {"cpu.num_threads": 2}})], "there")
    assert main(["machine", "--cache"]) == 0
    text = capsys.readouterr().out
    assert "product/64/784: mkl" in text
    # The fastest first.
    assert text.index("onednn") < text.index("2.00 ms  mkl")
    assert "machine here, torch 2.13.0, beside a busy neighbour" in text
    assert "2 winners in " in text
    assert main(["machine", "--cache", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["winners"]
    assert {row["machine"]: row["answer"] for row in rows}["here"] == "mkl"
    assert rows[0]["saved_at_s"] >= rows[1]["saved_at_s"]
    assert main(["machine", "--clear-cache"]) == 0
    assert "forgot 2 winners" in capsys.readouterr().out
    assert main(["machine", "--clear-cache", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"winners": 0, "ceilings": 0}


@pytest.mark.parametrize(
    "others", [["--clear-cache"], ["--ceilings"], ["--remeasure"], ["--root", "/proc"]]
)
def test_the_cache_is_asked_for_alone(others, capsys):
    assert main(["machine", "--cache", *others]) == 2
    assert "stand alone" in capsys.readouterr().err
