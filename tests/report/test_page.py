"""The page of a report: what it shows, what it says is not known, and that text stays text."""

import base64
import copy
import hashlib
import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotloop.machine import Machine
from hotloop.report import render_page
from hotloop.report.document import Document, printable
from support import examples
from support import report_samples as samples
from support.page_reader import read_page

TAGS = """
    html head meta title link style body header main nav section p h1 h2 h3 a ul ol li dl dt dd
    div span strong code table caption thead tbody tr th td figure figcaption
    svg desc text path line rect circle
"""
ATTRIBUTES = """
    charset http-equiv content name rel href lang id class aria-label aria-labelledby aria-hidden
    role scope tabindex viewbox width height x y x1 x2 y1 y2 cx cy r rx d text-anchor transform
"""
TAGS, ATTRIBUTES = set(TAGS.split()), set(ATTRIBUTES.split())


def page_of(report, machine=None):
    return read_page(render_page(report, machine))


def section(page, key):
    return next(s for s in page.all("section") if s.attributes["id"] == key)


def rows_of(part, caption):
    """Cells of the table with that caption."""
    (table,) = [t for t in part.all("table") if t.all("caption")[0].text == caption]
    return [[cell.words() for cell in row.all("th", "td")] for row in table.all("tr")]


def facts_of(part):
    return {
        pair.all("dt")[0].text: pair.all("dd")[0].words()
        for facts in part.of_class("facts")
        for pair in facts.all("div")
    }


def require_safe(page):
    """Only what this package makes: no script, no address to elsewhere, no handler, no style."""
    for element in page.all():
        assert element.name in TAGS, element.name
        assert set(element.attributes) <= ATTRIBUTES, element.attributes
        href = element.attributes.get("href", "#")
        assert href.startswith("#") or href == "data:,", href
    assert len(page.all("style")) == 1


def test_a_full_report_has_every_section_and_its_figures():
    page = page_of(samples.full_report())
    titles = [s.all("h2")[0].text for s in page.all("section")]
    assert titles == [
        "What would help next", "Where the time went", "The step against the machine",
        "Memory, predicted and measured", "How it learned", "Balance of the workers",
        "Processor and caches", "The machine", "The plan", "Notes",
    ]  # fmt: skip
    links = [a.attributes["href"][1:] for a in page.all("nav")[0].all("a")]
    assert links == [s.attributes["id"] for s in page.all("section")]
    values = [v.words() for v in page.of_class("value")]
    assert values == ["3,743 samples/s", "63 %", "426 MiB", "95.31 %"]
    assert "predicted 410 MiB, off by -3.7 %" in page.words()
    assert page.all("title")[0].text == "DigitNet: hotloop report"

    times = rows_of(section(page, "time"), "The whole call, by phase")
    assert times[1] == ["steps", "4.37 s", "48 %"]
    assert times[-1] == ["in all", "9.02 s", ""]
    memory = rows_of(section(page, "memory"), "Memory by component")
    assert memory[1] == ["Model parameters", "4.58 MiB", "4.58 MiB"]
    assert memory[3] == ["Gradient buffers", "4.58 MiB", "–"]
    assert memory[-1] == ["in all", "410 MiB", "426 MiB"]
    epochs = rows_of(section(page, "learning"), "Epochs")
    assert epochs[1] == ["1", "0.9000", "0.5300", "85.00%", "0.001", "1.10 s", "3,723"]
    workers = rows_of(section(page, "workers"), "Workers")
    assert workers[2][:3] == ["worker 1, CPU 1", "116", "0"]
    assert "Slower than at their best: worker 1, CPU 1." in section(page, "workers").words()
    counters = facts_of(section(page, "counters"))
    assert counters["context switches"] == "1,581, 377 of them forced"
    caches = rows_of(section(page, "counters"), "Caches, modelled")
    assert caches[3] == ["L3", "32.0 MiB", "66.6 MiB", "no", "not measured"]
    plan = facts_of(section(page, "plan"))
    assert (plan["num_threads"], plan["limit_bytes"]) == ("2", "none")
    assert "the last batch of each epoch" in section(page, "notes").words()


def test_pages_load_nothing_and_forbid_it():
    page = page_of(samples.full_report())
    require_safe(page)
    (policy,) = [m for m in page.all("meta") if "http-equiv" in m.attributes]
    assert policy.attributes["http-equiv"] == "Content-Security-Policy"
    digest = base64.b64encode(hashlib.sha256(page.all("style")[0].text.encode()).digest()).decode()
    assert policy.attributes["content"].startswith(
        f"default-src 'none'; style-src 'sha256-{digest}';"
    )
    style = page.all("style")[0].text
    assert "url(" not in style
    assert "@import" not in style


def test_every_picture_has_words_and_every_name_is_there_once():
    page = page_of(samples.full_report())
    ids = [e.attributes["id"] for e in page.all() if "id" in e.attributes]
    assert len(set(ids)) == len(ids)
    pictures = [e for e in page.all("svg") if e.attributes.get("aria-hidden") != "true"]
    assert len(pictures) > 15
    for picture in pictures:
        assert picture.attributes["role"] == "img"
        named = picture.attributes.get("aria-labelledby", "").split()
        assert picture.attributes.get("aria-label") or named
        assert set(named) <= set(ids)
    for part in page.all("section"):
        if part.all("figure"):
            assert part.all("table"), f"{part.attributes['id']}: a chart without a table"
    levels = [int(e.name[1]) for e in page.all("h1", "h2", "h3")]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    for table in page.all("table"):
        assert table.all("caption")[0].text
        assert all(cell.attributes["scope"] in ("col", "row") for cell in table.all("th"))


def test_an_older_report_says_what_it_does_not_know():
    report = samples.report()
    for work in report["operations"]:
        del work["flop"], work["modelled_bytes"]
    report["machine"] = {"fingerprint": "1500db188c4f135b", "cpu_model": "AMD EPYC",
                         "usable_cpus": 2, "memory_total_bytes": 2**34}  # fmt: skip
    page = page_of(report)
    words = page.words()
    assert "This report has no suggestions recorded." in words
    assert "Memory over time: not measured" in words
    assert "Only in the table, without recorded bytes: 8." in words
    assert "Memory bandwidth: not measured" in words
    assert "Sockets, nodes, cores and caches are not recorded" in words
    assert not [e for e in page.of_class("mark") if e.attributes["class"].startswith("mark")]
    assert facts_of(section(page, "machine"))["memory"] == "16.0 GiB"
    shapes = rows_of(section(page, "roofline"), "Operations of a step, each timed alone")
    assert shapes[1][6] == "not recorded"


def test_an_empty_report_invents_nothing():
    page = page_of({})
    require_safe(page)
    assert [v.words() for v in page.of_class("value")] == ["not measured"] * 4
    digits = [c for c in page.all("body")[0].words() if c.isdigit()]
    assert not digits


def test_workers_without_figures_and_runs_without_workers():
    report = samples.report()
    assert not [s for s in page_of(report).all("section") if s.attributes["id"] == "workers"]
    report["plan"]["parallel"]["num_workers"] = 2
    report["operations"], report["path"] = [], "parallel"
    page = page_of(report)
    assert "2 workers; what each did is not recorded" in section(page, "workers").words()
    assert "operations of workers overlap" in section(page, "roofline").words()


# Suggestions


def test_suggestions_are_shown_with_evidence_change_and_proof():
    page = page_of(samples.full_report())
    cards = page.of_class("card")
    assert [c.of_class("badge")[0].text for c in cards] == [
        "proven here", "hypothesis, not measured here", "measured: slower",
    ]  # fmt: skip
    first = facts_of(cards[0])
    assert first["change"] == "checkpoint.every_steps: 8 → none hotloop train mnist"
    assert first["results"] == "stay exact"
    assert first["expected"] == "+2 % (the time they took)"
    assert "1.021 times as fast (95 % interval 1.014 to 1.029, 18 pairs)" in first["measured"]
    assert "losses equal to the last bit" in first["measured"]
    second = facts_of(cards[1])
    assert "work.precision = float32, held against bfloat16" in cards[1].words()
    assert second["results"] == "may differ: check the accuracy"
    assert "measured" not in second
    lead = page.of_class("lead")[0].words()
    assert "A checkpoint every 8 steps is too often" in lead
    assert "Proven here: 1.021 times" in lead


@pytest.mark.parametrize(
    ("said", "proof", "shown"),
    [
        ("proven", None, "hypothesis, not measured here"),
        ("proven", (1.2, 0.99, 1.4), "measured: no clear difference"),
        ("proven", (1.2, 1.01, 1.4), "proven here"),
        ("regression", (0.9, 0.8, 1.1), "measured: no clear difference"),
        ("regression", (0.9, 0.8, 0.99), "measured: slower"),
        ("hypothesis", (1.02, 0.9, 1.1), "measured: no clear difference"),
        ("hypothesis", (1.2, 1.1, 1.4), "hypothesis, not measured here"),
        ("wonderful", (1.2, 1.1, 1.4), "hypothesis, not measured here"),
    ],
)
def test_nothing_is_called_proven_without_its_interval(said, proof, shown):
    report = samples.full_report()
    suggestion = report["optimizations"][0]
    suggestion["state"] = said
    keys = ("median_ratio", "low", "high")
    suggestion["proof"] = None if proof is None else dict(zip(keys, proof, strict=True))
    report["optimizations"] = [suggestion]
    assert page_of(report).of_class("badge")[0].text == shown


def test_what_was_measured_to_bring_nothing_is_no_lead_and_nothing_found_is_said():
    report = samples.full_report()
    _, proven, slower = report["optimizations"]
    unclear = {**proven, "state": "hypothesis", "proof": {**proven["proof"], "low": 0.98}}
    for only in (slower, unclear):
        report["optimizations"] = [only]
        page = page_of(report)
        assert not page.of_class("lead")
        assert len(page.of_class("card")) == 1
    report["optimizations"] = []
    assert "Nothing was found that would help." in page_of(report).words()


# Hostile and damaged reports

HOSTILE = st.one_of(
    st.sampled_from(
        [
            "<script>alert(1)</script>", "</title><script>alert(1)</script>",
            '"><img src=x onerror=alert(1)>', "' onmouseover='alert(1)", "</style><style>*{}",
            "<!--", "]]>", "&lt;b&gt;", "javascript:alert(1)", "\x1b[2Jgone", "a\x00b", "\ud800",
            "\u202egnp.exe", "{{7*7}}", "<svg onload=alert(1)>", "</svg><iframe src=//evil>",
        ]
    ),
    st.text(max_size=40),
)  # fmt: skip


def paths_of(value, here=()):
    """Paths of all leaves and branches below a JSON value."""
    yield here
    children = value.items() if isinstance(value, dict) else ()
    children = enumerate(value) if isinstance(value, list) else children
    for key, child in children:
        yield from paths_of(child, (*here, key))


def small_report():
    """All keys, but short lists: places to damage are not all in the curve."""
    report = samples.full_report()
    report["curve"] = report["curve"][:6]
    report["performance"]["samples"] = report["performance"]["samples"][:4]
    report["operations"] = report["operations"][:3]
    return report


SMALL = small_report()
PATHS = sorted({path for path in paths_of(SMALL) if path}, key=str)


def put(document, path, value):
    for key in path[:-1]:
        document = document[key]
    document[path[-1]] = value


def filled(value, texts):
    """The same with every text, and every key that is not the package's own, replaced."""
    if isinstance(value, str):
        return next(texts)
    if isinstance(value, list):
        return [filled(item, texts) for item in value]
    if isinstance(value, dict):
        return {key: filled(item, texts) for key, item in value.items()}
    return value


def endless(words):
    while True:
        yield from words


@given(st.lists(HOSTILE, min_size=1, max_size=8))
@settings(max_examples=examples(60))
def test_text_stays_text(words):
    report = filled(SMALL, endless(words))
    report["plan"]["cpu"] = {word: word for word in words}
    report["time_s"] = dict.fromkeys(words, 1.0)
    report["budget"] = {f"{word}_bytes": 5 for word in words}
    report["versions"] = {word: word for word in words}
    page = page_of(report)
    require_safe(page)
    shown = page.words()
    assert all(printable(note) in shown for note in report["notes"])


def test_text_that_would_command_a_browser_or_a_terminal_is_taken_out():
    assert printable("a\x1b[31m\u202eb\n\tc\x00\ud800") == "a[31mb c\ufffd"
    page = render_page({**samples.report(), "model": "a\x00\x1b\u202e\ud800z"})
    assert not {"\x00", "\x1b", "\u202e", "\ud800"} & set(page)
    assert page.encode()


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -(10**400), 2**63, 1e308, -1e308, 5e-324, -0.0])
    | st.floats()
    | HOSTILE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(HOSTILE, inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(st.tuples(st.sampled_from(PATHS), JSON), min_size=1, max_size=12))
@settings(max_examples=examples(250))
def test_a_damaged_report_still_gives_a_page(changes):
    report = copy.deepcopy(SMALL)
    for path, value in changes:
        try:
            put(report, path, value)
        except (TypeError, KeyError, IndexError, AttributeError):
            continue  # An earlier change took the place away.
    page = page_of(report)
    require_safe(page)
    text = render_page(report)
    assert "nan" not in [w.lower() for e in page.all("path") for w in e.attributes["d"].split()]
    assert text.encode()


@given(JSON)
@settings(max_examples=examples(60))
def test_any_json_is_a_page(value):
    require_safe(page_of(value))


def test_a_renderer_changes_nothing_and_repeats_itself():
    report = samples.full_report()
    before = json.dumps(report)
    assert render_page(report) == render_page(report)
    assert json.dumps(report) == before


def test_numbers_are_read_only_where_they_are_numbers():
    document = Document({"a": True, "b": "3", "c": float("nan"), "d": 10**400, "e": -1, "f": 2.5})
    assert [document.number(key) for key in "abcdefg"] == [None, None, None, None, -1, 2.5, None]
    assert (document.amount("e"), document.count("f"), document.count("e")) == (None, None, None)
    assert document.flag("a") is True
    assert document.text("b") == "3"


# Size


def test_a_machine_of_many_cores_stays_a_small_page():
    report = samples.full_report()
    machine = samples.machine(sockets=2, cores=96, smt=2)
    page = page_of(report, machine)
    assert len(page.of_class("cpu")) == 384
    assert len(page.of_class("socket")) == 2
    assert len(render_page(report, machine)) < 250_000
    report["machine"] = samples.machine(sockets=8, cores=100)
    page = page_of(report)
    assert len(page.of_class("core")) == 512
    assert "288 more cores are not drawn." in page.words()


def test_this_machine_is_drawn_as_it_is():
    here = Machine.probe()
    page = page_of({}, here.to_dict())
    drawn = sorted(int(c.of_class("name")[0].text.split()[1]) for c in page.of_class("cpu"))
    assert drawn == sorted(cpu for core in here.cores for cpu in core.cpu_ids)
    away = sorted(int(c.of_class("name")[0].text.split()[1]) for c in page.of_class("away"))
    assert away == sorted(set(drawn) - set(here.cpu_ids))
