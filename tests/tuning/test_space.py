"""The choices for a machine, the rules of the learning rate, the plan file, what is remembered."""

import dataclasses
import tomllib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hotloop
from hotloop.errors import InputError
from hotloop.machine import Machine
from hotloop.machine.probe.topology import Core
from hotloop.measure import winners
from hotloop.tuning import (
    BATCH_SIZE,
    knobs_of,
    learning_rate_factor,
    plan_with_comments,
    space_of,
    text_of,
)
from hotloop.tuning.remembered import forget, recall, remember


def machine_of(cpus, *, sockets=1, huge="madvise"):
    cores = tuple(
        Core(socket=i * sockets // cpus, node=i * sockets // cpus, cpu_ids=(i,), kind=None)
        for i in range(cpus)
    )
    probed = Machine(usable_cpus=cpus, cpu_ids=tuple(range(cpus)), cores=cores)
    return dataclasses.replace(
        probed, memory=dataclasses.replace(probed.memory, transparent_huge_pages=huge)
    )


PRESENT = hotloop.Plan().replace({"cpu.num_threads": 1})


def choices(machine, present=PRESENT, **options):
    groups = space_of(machine, present, batch_size=64, **options)
    return {group.name: group.choices for group in groups}


@given(cpus=st.integers(1, 256), sockets=st.integers(1, 2), precision=st.booleans())
def test_every_choice_is_a_plan_that_holds_on_the_machine(cpus, sockets, precision):
    machine = machine_of(cpus, sockets=sockets)
    found = choices(machine, allow_precision=precision, batch_sizes=(32, 64, 128))
    assert found["batch size"] == ({BATCH_SIZE: 32}, {BATCH_SIZE: 128})
    assert ("precision" in found) == precision
    for name, group in found.items():
        assert len({text_of(c) for c in group}) == len(group)
        for choice in group:
            if name == "batch size":
                continue
            plan = PRESENT.replace(choice)
            workers = plan.parallel.num_workers
            assert plan.cpu.num_threads <= cpus
            assert workers is None or 2 <= workers <= cpus
            assert len(plan.cpu.thread_affinity.cpus(machine, workers or 1)) in (0, workers or 1)
    threads = {c["cpu.num_threads"] for c in found["cores"] if "cpu.num_threads" in c}
    assert {1, cpus} <= threads
    assert ({"cpu.thread_affinity": "spread"} in found["affinity"]) == (sockets == 2 and cpus > 2)


def test_what_cannot_matter_says_so():
    groups = {g.name: g for g in space_of(machine_of(2, huge="never"), PRESENT, batch_size=64)}
    assert "no transparent huge pages" in groups["huge pages"].unless({})
    groups = {
        g.name: g
        for g in space_of(machine_of(2), PRESENT, batch_size=64, makes_many=lambda c: not c)
    }
    assert groups["huge pages"].unless({}) is None
    assert "no queue" in groups["queue"].unless({})
    assert groups["queue"].unless({"step.compile": "off"}) is None


def test_what_is_not_resolved_or_below_one_is_refused():
    with pytest.raises(InputError, match="resolved"):
        choices(machine_of(2), hotloop.Plan.auto())
    with pytest.raises(InputError, match="at least 1"):
        choices(machine_of(2), batch_sizes=(0,))


def test_rules_of_the_learning_rate():
    assert learning_rate_factor("linear", 64, 256) == 4
    assert learning_rate_factor("sqrt", 64, 256) == 2
    assert learning_rate_factor("none", 64, 256) == 1


@given(
    comments=st.dictionaries(
        st.sampled_from(sorted(knobs_of(PRESENT))), st.text(max_size=200), max_size=10
    ),
    heading=st.lists(st.text(max_size=150), max_size=3),
    workers=st.one_of(st.none(), st.integers(1, 64)),
    nodes=st.lists(st.integers(0, 7), max_size=4),
)
def test_a_file_with_any_comments_reads_back_as_the_plan(comments, heading, workers, nodes):
    plan = PRESENT.replace({"parallel.num_workers": workers, "numa.node_assignments": tuple(nodes)})
    text = plan_with_comments(plan, comments, heading)
    assert hotloop.Plan.from_dict(tomllib.loads(text)) == plan


def test_what_is_remembered_is_recalled_only_as_it_was_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert recall("machine", "model") is None
    assert remember("machine", "model", {"cpu.num_threads": 3}, "1.2 times")
    assert recall("machine", "model") == ({"cpu.num_threads": 3}, "1.2 times")
    assert recall("machine", "other") is None
    assert recall("other", "model") is None
    with monkeypatch.context() as patch:
        patch.setattr("hotloop.measure.winners._version", lambda library: "0.1")
        assert recall("machine", "model") is None
    ((machine, kept),) = winners.listed()
    for damaged in ({}, [], None, {"knobs": 3, "proof": ""}, {"proof": "1.2 times"}):
        winners.add([replace(kept, answer=damaged)], machine)
        assert recall("machine", "model") is None
    forget("machine", "model")
    forget("machine", "model")
    assert winners.listed() == []
