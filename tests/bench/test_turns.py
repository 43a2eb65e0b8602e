"""Turns: who is asked when, and what happens to a peer that fails."""

import pytest

from hotloop.bench.turns import need, start_peer, summary, take_turns
from hotloop.errors import RunError


class Fake:
    """A peer that answers what it was told; fails at a given turn."""

    def __init__(self, name, log, fails_at=None):
        self.name, self.log, self.fails_at = name, log, fails_at
        self.told = "ready"
        self.closed = 0

    def tell(self, **values):
        self.told = values["turn"]

    def answer(self, limit_s):
        self.log.append((self.name, self.told))
        if self.told == self.fails_at:
            raise RunError(f"{self.name} must run")
        return {"at": self.told}

    def close(self):
        self.closed += 1


def race(fails=None, rounds=3):
    log, made = [], {}

    def start(peer):
        if fails and fails.get(peer) == "start":
            raise RunError("not installed: pip install x")
        made[peer] = Fake(peer, log, (fails or {}).get(peer))
        return made[peer]

    told = take_turns(["a", "b", "c"], start, rounds, prepare_s=1, turn_s=1, say=lambda line: None)
    return told, log, made


def test_each_warms_up_alone_and_rounds_begin_one_later():
    told, log, made = race()
    assert log[:6] == [("a", "ready"), ("a", 0), ("b", "ready"), ("b", 0), ("c", "ready"), ("c", 0)]
    assert [peer for peer, at in log if at == 1] == ["a", "b", "c"]
    assert [peer for peer, at in log if at == 2] == ["b", "c", "a"]
    assert [peer for peer, at in log if at == 3] == ["c", "a", "b"]
    assert [answer["at"] for answer in told["b"].answers] == [0, 1, 2, 3]
    assert all(child.closed == 1 for child in made.values())


@pytest.mark.parametrize("when", ["start", "ready", 0, 2])
def test_a_peer_that_fails_is_named_and_the_others_go_on(when):
    told, log, made = race({"b": when})
    assert told["b"].missing
    assert told["a"].missing is None
    assert len(told["c"].answers) == 4
    if when != "start":
        assert made["b"].closed == 1
        last = (
            max(at for peer, at in log if peer == "b" and at != "ready") if when != "ready" else 0
        )
        assert last == (0 if when == "ready" else when)


def test_all_are_closed_when_the_race_is_broken_off():
    made = []

    def start(peer):
        made.append(Fake(peer, [], None))
        return made[-1]

    def say(line):
        if "round 2" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take_turns(["a", "b"], start, 3, prepare_s=1, turn_s=1, say=say)
    assert [child.closed for child in made] == [1, 1]


def test_a_process_that_ends_is_told_with_its_last_words(tmp_path):
    child = start_peer(
        "hotloop.bench.infer_peer", "nobody", {"folder": str(tmp_path), "threads": 1}
    )
    with pytest.raises(RunError, match="nobody must run; got exit code 1, KeyError"):
        child.answer(60)
    child.close()


def test_a_library_that_is_not_there_is_named_with_its_extra():
    need("json")
    with pytest.raises(RunError, match=r"pip install 'hotloop\[peers\]' \(or no_such_library\)"):
        need("json", "no_such_library")


def test_a_summary():
    assert summary([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "n": 3}
