"""``hotloop report``: what it prints, the page it writes, and what it refuses."""

import json
import subprocess
import sys

import pytest

from hotloop.cli import report as command
from hotloop.cli.main import main
from hotloop.machine import Machine
from hotloop.train.report import FORMAT
from support import report_samples as samples


def run(capsys, *argv):
    """Exit code, stdout, stderr of ``hotloop report``."""
    code = main(["report", *(str(a) for a in argv)])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(samples.full_report()))
    return tmp_path


def test_a_folder_gives_tables_and_a_page(folder, capsys):
    page = folder / "pages" / "report.html"
    code, out, err = run(capsys, folder, "--html", page)
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    for line in (
        "MNIST train: 4,096 real digits, batch 64: epochs done after 256 steps",
        "throughput 3,743 samples/s",
        "arithmetic 268 GFLOP/s: 63 % of the measured ceiling, 429 GFLOP/s",
        "convolution [64, 32, 26, 26] by [64, 32, 3, 3] onednn 477 GFLOP/s 111 % 17 %",
        "everything else 265 ms 3 %",
        "Working memory 48.2 MiB",
        "prediction is off by -3.7%",
        "1 1 116 0 3.90 s 290 ms 190 ms 81 %",
        "placement Each worker is pinned to a CPU of its own: 0-1.",
        f"page {page}",
    ):
        assert line in lines, line
    assert "proven here" in out
    assert not any(line != line.rstrip() for line in out.splitlines())
    assert page.read_text().startswith("<!DOCTYPE html>")


def test_json_is_the_report_with_its_machine(folder, capsys):
    code, out, _ = run(capsys, folder / "report.json", "--json", "--html", folder / "r.html")
    document = json.loads(out)
    assert code == 0
    assert "curve" not in document
    assert document["samples_per_s"] == 3743.0
    assert document["machine"]["cores"]
    assert document["optimizations"][1]["state"] == "proven"
    assert document["html"] == str(folder / "r.html")


def test_an_older_report_of_this_machine_gets_its_topology(tmp_path, capsys, monkeypatch):
    here = Machine.probe()
    report = samples.report()
    report["machine"] = {"fingerprint": here.fingerprint(), "cpu_model": here.cpu_model}
    (tmp_path / "report.json").write_text(json.dumps(report))
    _, out, _ = run(capsys, tmp_path, "--json")
    machine = json.loads(out)["machine"]
    assert machine["cores"] == here.to_dict()["cores"]
    # Of another machine, nothing is added.
    report["machine"]["fingerprint"] = "0" * 16
    (tmp_path / "report.json").write_text(json.dumps(report))
    _, out, _ = run(capsys, tmp_path, "--json")
    assert json.loads(out)["machine"] == report["machine"]


def refused(capsys, *argv, expect):
    code, _, err = run(capsys, *argv)
    assert code == 2
    (line,) = err.splitlines()
    assert expect in line


def test_what_is_no_report_is_refused_in_one_line(tmp_path, folder, capsys):
    other = tmp_path / "other"
    other.mkdir()
    refused(capsys, other, expect="folder of a run")
    refused(capsys, tmp_path / "none.json", expect="No such file")
    for text, expect in (
        ("{", "must hold a report as JSON"),
        ("[" * 100_000, "must hold a report as JSON"),
        ("[1]", "got a list"),
        ('{"model": "m"}', "got no format"),
        ('{"format": 99}', "format 1; got 99"),
    ):
        (other / "report.json").write_text(text)
        refused(capsys, other, expect=expect)
    (other / "report.json").write_bytes(b"\xff\xfe\x00")
    refused(capsys, other, expect="must hold a report as JSON")
    refused(capsys, folder, "--html", folder, expect="a file of its own")
    refused(capsys, folder, "--html", folder / "report.json", expect="a file of its own")
    assert json.loads((folder / "report.json").read_text())["format"] == 1


def test_a_report_cannot_command_the_terminal(folder, capsys):
    report = samples.full_report()
    report["data"] = "\x1b]0;owned\x07[bold]digits[/bold]\x1b[2J"
    report["notes"] = ["[link=file:///etc]x[/link]", "\x9b31m red"]
    report["operations"][0]["shape"] = "\x1b[31m"
    (folder / "report.json").write_text(json.dumps(report))
    _, out, _ = run(capsys, folder)
    assert not {"\x1b", "\x07", "\x9b"} & set(out)
    assert "[bold]digits[/bold]" in out
    assert "[link=file:///etc]x[/link]" in out


def test_a_report_with_next_to_nothing_is_still_one(folder, capsys):
    (folder / "report.json").write_text('{"format": 1}')
    code, out, _ = run(capsys, folder, "--html", folder / "r.html")
    assert code == 0
    assert "not measured" in out


def test_no_torch_is_loaded(folder):
    code = (
        "import sys\nfrom hotloop.cli.main import main\n"
        f"assert main(['report', {str(folder)!r}, '--html', {str(folder / 'r.html')!r}]) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_format_is_the_one_that_training_writes():
    assert command.FORMAT == FORMAT
