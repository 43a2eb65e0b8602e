"""The load generator: open loop, a stall seen whole, every request accounted for."""

import json
import math
import random
import select
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotloop.bench import load
from hotloop.bench.histogram import LatencyHistogram
from hotloop.bench.load import LoadReport, capacity_per_s, generate, ramp
from hotloop.bench.requests import encode, request_bytes, target_of
from hotloop.cli.main import main
from hotloop.errors import InputError, MissingExtraError, RunError
from support.stall_server import SmallServer


def requests(port, body=b"{}"):
    return [request_bytes("127.0.0.1", port, "/predict", body, {})]


def run(server, **values):
    values = {"rate_per_s": 200.0, "duration_s": 0.5, "arrivals": "fixed"} | values
    return generate("127.0.0.1", server.port, requests(server.port), **values)


# --- the histogram


@given(st.lists(st.floats(0, 3000, allow_nan=False), min_size=1, max_size=200), st.floats(0, 1))
def test_quantiles_are_never_below_and_at_most_one_percent_above(times, share):
    histogram = LatencyHistogram()
    for value in times:
        histogram.add(value)
    exact = sorted(times)[max(0, math.ceil(share * len(times)) - 1)]
    told = histogram.quantile_s(share)
    assert exact * (1 - 1e-9) <= told + 1e-12
    assert told <= exact * 1.008 + 1.1e-6
    assert histogram.count == len(times) == sum(count for _, count in histogram.buckets())
    assert (histogram.min_s, histogram.max_s) == (min(times), max(times))


@given(st.lists(st.floats(0, 100), max_size=50), st.lists(st.floats(0, 100), max_size=50))
def test_merged_histograms_are_the_histogram_of_all(left, right):
    a, b, both = LatencyHistogram(), LatencyHistogram(), LatencyHistogram()
    for value in left:
        a.add(value)
        both.add(value)
    for value in right:
        b.add(value)
        both.add(value)
    a.merge(b)
    assert a.buckets() == both.buckets()
    assert a.count == both.count
    assert a.quantile_s(0.9) == both.quantile_s(0.9)


def test_what_is_longer_than_the_range_is_in_the_last_bucket():
    histogram = LatencyHistogram()
    histogram.add(1e9)
    histogram.add(-1e-3)
    assert histogram.count == 2
    assert histogram.max_s == 1e9
    assert histogram.quantile_s(0.5) == pytest.approx(1e-6)


def test_an_empty_histogram_knows_nothing():
    empty = LatencyHistogram()
    assert empty.quantile_s(0.5) is None
    assert empty.mean_s is None
    assert empty.chart() == []
    json.dumps(empty.to_dict(), allow_nan=False)


# --- open loop


def test_every_request_is_sent_and_answered_over_few_connections():
    with SmallServer(lambda _: (200, 0.0)) as server:
        report = run(server, rate_per_s=400.0)
        assert report.scheduled == 200
        assert report.outcomes == {"200": 200}
        assert report.latency.count == report.service.count == report.lag.count == 200
        assert len(server.bodies) == 200
        assert server.connections - 1 == report.connections  # One looked whether it listens.
        assert report.connections < 100  # Connections are used again.
        assert report.generator_cpu_share > 0


def test_a_stall_is_seen_whole_and_a_closed_loop_would_have_missed_it():
    """The server stops once for 0.4 s; 200 requests a second fall due meanwhile."""

    def stalls_once(number):
        return 200, 0.4 if number == 20 else 0.0

    with SmallServer(stalls_once) as server:
        report = run(server, duration_s=1.0, max_connections=1)
    assert report.outcomes == {"200": 200}
    # Those due during the stall waited for what was left of it: about 80 of 200 requests.
    slow = report.latency.above(0.1)
    assert slow >= 40
    assert report.latency.quantile_s(0.9) > 0.2
    # Counted from sending, one request was slow and all others were quick.
    assert report.service.above(0.1) < slow / 4
    assert report.service.quantile_s(0.9) < 0.2

    with SmallServer(stalls_once) as server:
        closed = LatencyHistogram()
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            for _ in range(200):
                started = time.perf_counter()
                client.sendall(requests(server.port)[0])
                client.recv(65536)
                closed.add(time.perf_counter() - started)
    assert closed.count == 200
    assert closed.above(0.1) == 1  # The very same server, and one slow request in 200.


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's stamps are Linux' own")
def test_the_kernel_says_when_an_answer_came():
    with SmallServer(lambda _: (200, 0.0)) as server:
        plain, stamped = run(server), run(server, stamped=True)
    assert plain.came.count == 0
    assert stamped.came.count == stamped.service.count == 100
    # It came before it was read; the clocks agree to less than a millisecond.
    assert stamped.came.total_s <= stamped.service.total_s + 100 * 1e-3
    assert stamped.came.total_s > 0


def test_a_reader_that_is_late_is_told_from_a_server_that_is(monkeypatch):
    epoll = select.epoll

    class LateEpoll:
        """Looks at its sockets 50 ms after they have something to say."""

        def __init__(self):
            self.inner = epoll()

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.inner.close()

        def poll(self, wait):
            time.sleep(0.05)
            return self.inner.poll(wait)

    with SmallServer(lambda _: (200, 0.0)) as server:
        monkeypatch.setattr(load.select, "epoll", LateEpoll)
        report = run(server, stamped=True)
    assert report.outcomes == {"200": 100}
    assert report.service.quantile_s(0.5) > 0.03
    assert report.came.quantile_s(0.5) < report.service.quantile_s(0.5) / 2


def test_requests_are_sent_while_the_server_stalls():
    with SmallServer(lambda number: (200, 0.5 if number == 0 else 0.0)) as server:
        report = run(server, duration_s=0.4)
    assert report.outcomes == {"200": 80}
    assert report.connections > 40  # Each went out on a connection of its own.
    assert report.lag.quantile_s(0.5) < 0.2


def test_it_runs_where_select_cannot_take_the_descriptor(monkeypatch):
    monkeypatch.setattr(load, "_SELECT_LIMIT", 0)
    with SmallServer(lambda _: (200, 0.0)) as server:
        report = run(server)
    assert report.outcomes == {"200": 100}


def test_each_ending_is_counted():
    endings = [(200, 0.0), (429, 0.0), (503, 0.0), (504, 0.0), (None, 0.0), (-1, 0.0)]
    with SmallServer(lambda number: endings[number % 6]) as server:
        report = run(server, rate_per_s=120.0, timeout_s=0.3)
    assert report.scheduled == 60
    assert report.outcomes == {
        "200": 10, "429": 10, "503": 10, "504": 10, "connection error": 10, "unanswered": 10,
    }  # fmt: skip
    assert report.latency.count == 10
    assert report.others.count == 30


def test_what_no_connection_was_free_for_is_told():
    with SmallServer(lambda _: (-1, 0.0)) as server:
        report = run(server, max_connections=2, timeout_s=1.0)
    assert sum(report.outcomes.values()) == report.scheduled == 100
    assert report.outcomes["not sent"] >= 90
    assert report.outcomes["unanswered"] >= 2
    assert report.latency.count == 0
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_server_that_goes_away_is_connection_errors():
    server = SmallServer(lambda _: (200, 0.0))
    with server:
        timer = threading.Timer(0.25, server.__exit__)
        timer.start()
        report = run(server, duration_s=0.6)
        timer.join()
    assert report.outcomes["connection error"] > 10
    assert sum(report.outcomes.values()) == report.scheduled


def test_an_answer_that_is_no_http_is_a_connection_error():
    listener = socket.create_server(("127.0.0.1", 0))

    def talk():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                if connection.recv(100):
                    connection.sendall(b"SSH-2.0-none\r\n")

    threading.Thread(target=talk, daemon=True).start()
    port = listener.getsockname()[1]
    with listener:
        report = generate("127.0.0.1", port, requests(port), rate_per_s=50, duration_s=0.2)
    assert set(report.outcomes) == {"connection error"}


def test_a_large_request_is_sent_in_pieces():
    body = random.Random(0).randbytes(8_000_000)
    with SmallServer(lambda _: (200, 0.0)) as server:
        report = generate(
            "127.0.0.1", server.port, requests(server.port, body), rate_per_s=10, duration_s=0.3
        )
        assert set(report.outcomes) == {"200"}
        assert all(got == body for _, got in server.bodies)


@pytest.mark.parametrize("arrivals", ["poisson", "fixed"])
def test_due_times_have_the_rate(arrivals):
    times = load._due_times(1000.0, arrivals, random.Random(1))
    gaps = numpy.diff([next(times) for _ in range(20_001)])
    assert gaps.mean() == pytest.approx(1e-3, rel=0.03)
    # Exponential gaps are as wide as their mean; even ones have no width.
    assert gaps.std() == pytest.approx(1e-3 if arrivals == "poisson" else 0, rel=0.05, abs=1e-9)


def test_nothing_listens():
    with pytest.raises(RunError, match="must listen"):
        generate("127.0.0.1", 1, [b""], rate_per_s=1, duration_s=1)


@pytest.mark.parametrize("name", ["rate_per_s", "duration_s", "timeout_s", "max_connections"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_numbers_must_be_above_zero(name, value):
    values = {"rate_per_s": 1, "duration_s": 1} | {name: value}
    with pytest.raises(InputError, match="above 0"):
        generate("127.0.0.1", 1, [b""], **values)


def test_without_the_parser_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "httptools", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'hotloop\[serve\]'"):
        generate("127.0.0.1", 1, [b""], rate_per_s=1, duration_s=1)


def test_the_ramp_ends_after_two_steps_that_fall_short():
    asked = []

    def at(rate):
        asked.append(rate)
        report = LoadReport(
            rate, 1.0, 1.0, "fixed", 1, int(rate), {}, *(LatencyHistogram() for _ in range(5)),
            connections=1, generator_cpu_share=0.1, timeout_s=1.0,
        )  # fmt: skip
        report.latency.count = int(min(rate, 500 if len(asked) == 2 else 1000))
        return report

    reports = ramp(at, first_per_s=400, factor=1.5)
    assert asked == pytest.approx([400, 600, 900, 1350, 2025])  # 600 fell short once, by chance.
    assert capacity_per_s(reports) == 1000


# --- requests


class _Protocol(BaseHTTPRequestHandler):
    """As much of the Open Inference Protocol as a client needs."""

    protocol_version = "HTTP/1.1"
    seen: list = []  # noqa: RUF012
    model = {  # noqa: RUF012
        "name": "m",
        "inputs": [
            {"name": "x", "datatype": "FP32", "shape": [-1, 2, 3]},
            {"name": "k", "datatype": "INT64", "shape": [-1]},
        ],
    }

    def log_message(self, *_):
        pass

    def _answer(self, document, status=200):
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        if self.path == "/stats":
            self._answer({"model": self.model})
        elif self.path == "/v2/models/m":
            self._answer(self.model)
        else:
            self._answer({}, 404)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        type(self).seen.append((self.path, dict(self.headers), body))
        self._answer({})


@pytest.fixture
def protocol():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Protocol)
    _Protocol.seen = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("fmt", ["binary", "json", "predict"])
@pytest.mark.parametrize("path", ["", "/v2/models/m", "/v2/models/m/infer"])
def test_requests_fit_the_model(protocol, fmt, path):
    target = target_of(protocol + path, fmt=fmt, rows=4, headers={"Authorization": "Bearer t"})
    report = generate(target.host, target.port, target.requests, rate_per_s=50, duration_s=0.2,
                      samples_per_request=target.rows)  # fmt: skip
    assert set(report.outcomes) == {"200"}
    assert report.to_dict()["samples_per_s"] == pytest.approx(4 * report.answered_per_s)
    assert len(set(target.requests)) == 8
    for where, headers, body in _Protocol.seen:
        assert headers["Authorization"] == "Bearer t"
        if fmt == "predict":
            assert where == "/predict"
            assert numpy.shape(json.loads(body)["inputs"]["x"]) == (4, 2, 3)
            continue
        assert where == "/v2/models/m/infer"
        head = int(headers.get("Inference-Header-Content-Length", len(body)))
        x, k = json.loads(body[:head])["inputs"]
        assert (x["shape"], k["shape"]) == ([4, 2, 3], [4])
        if fmt == "json":
            assert len(x["data"]) == 24
        else:
            assert len(body) - head == x["parameters"]["binary_data_size"] + 32 == 4 * 24 + 32


def test_a_model_that_is_not_there(protocol):
    with pytest.raises(RunError, match="status 404"):
        target_of(protocol + "/v2/models/none")


@pytest.mark.parametrize(
    "url", ["https://127.0.0.1:1", "127.0.0.1:80", "http://[::1", "http://h:x"]
)
def test_urls_that_cannot_be_used(url):
    with pytest.raises((InputError, RunError)):
        target_of(url)


def test_a_header_cannot_smuggle_a_line():
    with pytest.raises(InputError, match="one line"):
        request_bytes("h", 1, "/", b"", {"A": "b\r\nC: d"})


def test_text_is_not_load():
    spec = {"name": "x", "datatype": "BYTES", "shape": [-1]}
    with pytest.raises(InputError, match="formats are"):
        encode("xml", [(spec, numpy.zeros(1))])


def test_the_command_prints_outcomes_and_latency(protocol, capsys, tmp_path):
    out = tmp_path / "load.json"
    flags = ["--rate", "100", "--duration-s", "0.3", "--out", str(out)]
    assert main(["bench", "load", protocol, *flags]) == 0
    printed = capsys.readouterr().out
    assert "p99" in printed
    document = json.loads(out.read_text())
    assert sum(document["outcomes"].values()) == document["scheduled"] > 10
    assert document["latency"]["count"] == document["outcomes"]["200"]


def test_the_command_finds_the_capacity(protocol, capsys):
    flags = ["--ramp", "--rate", "200", "--duration-s", "0.1", "--max-steps", "2", "--json"]
    assert main(["bench", "load", protocol, *flags]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["steps"]) == 2
    assert document["capacity_per_s"] == max(s["answered_per_s"] for s in document["steps"])


@pytest.mark.parametrize(
    "flags",
    [["--rate", "0"], ["--rows", "0"], ["--token-file", "none"], ["--ramp", "--factor", "1"]],
)
def test_bad_flags_are_one_line(protocol, capsys, flags):
    assert main(["bench", "load", protocol, *flags]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_no_server_is_one_line(capsys):
    assert main(["bench", "load", "http://127.0.0.1:1"]) == 1
    assert "hotloop serve" in capsys.readouterr().err
