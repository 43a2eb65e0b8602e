"""The monitor against work whose cost is known, and against files of other machines."""

import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

from hotloop.errors import InputError, MissingExtraError, RunError, StorageError
from hotloop.machine import Machine
from hotloop.machine.probe.cgroup import read_throttling
from hotloop.machine.probe.tree import Tree
from hotloop.monitor import PerformanceMonitor, PerformanceReport
from hotloop.monitor.cache_stats import cache_stats
from hotloop.monitor.cpu_counters import CpuSnapshot
from hotloop.monitor.hot_spots import HotSpots
from hotloop.monitor.memory_counters import MemorySnapshot
from hotloop.monitor.perf_events import HARDWARE_EVENTS, SOFTWARE_EVENTS, HardwareCounters
from hotloop.monitor.prometheus import MetricsServer, prometheus_text
from hotloop.monitor.recorder import StepRecorder, batch_length
from hotloop.monitor.sinks import JsonLines, TensorBoardLog, json_line

LINUX = sys.platform == "linux"


def spin(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_cpu_time_of_threads_is_counted():
    with PerformanceMonitor(look_every_s=0.02) as monitor:
        thread = threading.Thread(target=spin, args=(0.3,), name="spinner")
        thread.start()
        spin(0.1)
        time.sleep(0.05)
        thread.join()
    report = monitor.collect_metrics()
    assert 0.38 < report.cpu.user_s + report.cpu.system_s < 1.0
    assert report.duration_s >= 0.15
    assert len(report.samples) >= 2
    assert report.sampling_s < 0.5
    if report.cpu.cores and report.cpu.cores[0].own is not None:
        # A thread that ends between two looks takes what it used since with it.
        own = sum(core.own for core in report.cpu.cores) * report.duration_s
        assert 0 < own <= 1.1 * (report.cpu.user_s + report.cpu.system_s)


def test_a_child_counts_as_ours_and_a_stranger_does_not():
    code = "import time\nend = time.process_time() + 0.4\nwhile time.process_time() < end: pass"
    with PerformanceMonitor() as monitor:
        subprocess.run([sys.executable, "-c", code], check=True)
    report = monitor.collect_metrics()
    if report.cpu.children_s is None:
        pytest.skip("this kernel shows no processes")
    assert report.cpu.children_s >= 0.35
    assert os.getpid() not in {other.process for other in report.cpu.others}


def test_phases_of_a_watched_loop():
    def batches():
        for _ in range(4):
            time.sleep(0.02)
            yield [0] * 8, [0] * 8

    with PerformanceMonitor(look_every_s=None) as monitor:
        for _ in monitor.watch(batches()):
            time.sleep(0.01)
            monitor.lap("compute")
            time.sleep(0.005)
            monitor.lap("update")
            time.sleep(0.03)
            monitor.lap("checkpoint")
    step = monitor.collect_metrics().step
    assert (step.steps, step.calls, step.samples, step.checkpoints) == (4, 4, 32, 4)
    assert step.data_wait_s >= 0.08
    assert step.compute_s >= 0.04
    assert step.update_s >= 0.02
    assert step.checkpoint_s >= 0.12
    # A checkpoint inside the loop is not part of the call.
    assert 0.015 <= step.median_call_s < step.slowest_call_s + 1e-9
    assert step.samples_per_s == pytest.approx(32 / step.train_s)
    assert step.train_s < step.data_wait_s + step.compute_s + step.update_s + 1e-9


def test_workers_times_are_taken_out_of_compute():
    recorder = StepRecorder()
    recorder.record(64, steps=2, data_wait_s=0.1, compute_s=1.0)
    times = recorder.times(workers_wait_s=0.2, workers_update_s=0.3)
    assert (times.compute_s, times.synchronize_s, times.update_s) == pytest.approx((0.5, 0.2, 0.3))
    # Workers cannot have waited for longer than the calls took.
    times = recorder.times(workers_wait_s=4.0, workers_update_s=4.0)
    assert times.train_s == pytest.approx(1.1)


def test_the_median_is_of_the_last_calls():
    recorder = StepRecorder()
    for call in range(5000):
        recorder.record(1, compute_s=1.0 if call < 900 else 2.0)
    assert recorder.times().median_call_s == 2.0
    assert recorder.times().calls == 5000


@pytest.mark.parametrize(
    ("batch", "count"),
    [([1, 2, 3], 3), (([1, 2], [3, 4]), 2), ({"x": [1, 2, 3]}, 3), (7, 1), ([], 0), ({}, 0)],
)
def test_the_length_of_a_batch(batch, count):
    assert batch_length(batch) == count


def test_nothing_before_the_start_and_the_same_after_the_end():
    monitor = PerformanceMonitor(look_every_s=None)
    assert not monitor.has_report
    with pytest.raises(RunError, match="started first"):
        monitor.collect_metrics()
    with monitor, pytest.raises(RunError, match="stopped before"):
        monitor.start()
    once = monitor.collect_metrics()
    monitor.describe(batch_size=3)
    again = monitor.collect_metrics()
    assert (once.duration_s, again.work.batch_size) == (again.duration_s, 3)
    assert monitor.stop() == again
    assert PerformanceReport.from_dict(json.loads(json.dumps(again.to_dict()))) == again
    with pytest.raises(TypeError):
        monitor.describe(batchsize=3)


def test_an_observer_that_fails_ends_sampling_and_not_the_run():
    monitor = PerformanceMonitor(look_every_s=0.01)
    monitor.every(0.0, lambda: 1 / 0)
    with monitor:
        time.sleep(0.1)
    assert monitor.collect_metrics().notes == (
        "sampling ended: ZeroDivisionError: division by zero",
    )


def test_a_hot_function_is_named():
    spots = HotSpots()
    stop = threading.Event()

    def slow_transform():
        while not stop.is_set():
            sum(i for i in range(100))

    waiting = threading.Thread(target=stop.wait, daemon=True)
    busy = threading.Thread(target=slow_transform, name="loader", daemon=True)
    waiting.start()
    busy.start()
    for _ in range(20):
        spots.look("data_wait")
        time.sleep(0.001)
    stop.set()
    found = {spot.thread: spot for spot in spots.found()}
    assert found["loader"].function.endswith("slow_transform")
    assert found["loader"].share >= 0.8
    assert found["loader"].file == __file__
    assert waiting.name not in found


# Files of another machine.


def write(root, files):
    for path, text in files.items():
        target = root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


def stat(number, name, parent, ticks, cpu=0, started=5):
    fields = ["S", parent, *[0] * 9, ticks, ticks // 4, 0, 0, 20, 0, 1, 0, started, *[0] * 16, cpu]
    return f"{number} ({name}) " + " ".join(map(str, fields))


def tree_at(root, *, tenths, throttled, faults=0, swapped=0):
    """A machine of two CPUs after so many tenths of a second of this process on CPU 0."""
    own = stat(9, "py thon)", 1, 8 * tenths)
    own = own.split(") ")[0] + ") " + own.split(") ", 1)[1]
    write(
        root,
        {
            "/proc/self/stat": own,
            "/proc/9/stat": own,
            "/proc/10/stat": stat(10, "worker", 9, 80),
            "/proc/77/stat": stat(77, "hog", 1, 5 * tenths, cpu=1),
            "/proc/self/task/9/stat": own,
            "/proc/self/task/9/schedstat": f"{tenths * 100_000_000} {tenths * 10_000_000} 5",
            "/proc/self/task/9/sched": f"se.nr_migrations   :   {tenths * 3}",
            "/proc/self/task/9/status": "Cpus_allowed_list:\t0-1\nvoluntary_ctxt_switches:\t7\n",
            "/proc/self/status": "VmRSS:\t2048 kB\nVmHWM:\t4096 kB\nVmSwap:\t8 kB\n"
            "Cpus_allowed_list:\t0-1\n",
            "/proc/self/smaps_rollup": "Anonymous:  1024 kB\nAnonHugePages:  512 kB\n",
            "/proc/self/numa_maps": "7f00 default anon=4 N0=6 N1=2 kernelpagesize_kB=4\n",
            "/proc/self/cgroup": "0::/job\n",
            "/proc/self/mountinfo": "30 1 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
            "/sys/fs/cgroup/job/cpu.max": "150000 100000",
            "/sys/fs/cgroup/job/cpu.stat": f"nr_periods {10 * tenths}\nnr_throttled {throttled}\n"
            f"throttled_usec {throttled * 50_000}\n",
            "/proc/stat": f"cpu0 {10 * tenths} 0 0 0 0 0 0 0\ncpu1 {5 * tenths} 0 0 "
            f"{3 * tenths} 0 0 0 {2 * tenths}\n",
            "/proc/vmstat": f"pswpin {swapped}\npswpout 0\n",
            "/proc/meminfo": "MemTotal: 1000000 kB\nMemAvailable: 500000 kB\n",
            "/proc/pressure/cpu": f"some avg10=0 total={tenths * 20_000}\nfull total=0\n",
            "/sys/devices/system/cpu/online": "0-1",
            "/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1800000",
            "/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "3600000",
            "/sys/devices/system/node/node0/cpulist": "0-1",
            "/sys/devices/system/node/node1/cpulist": "2-3",
        },
    )


@pytest.fixture
def elsewhere(tmp_path):
    """A report of ten seconds on the machine above."""
    tree_at(tmp_path, tenths=10, throttled=4, swapped=0)
    monitor = PerformanceMonitor(root=tmp_path, look_every_s=None)
    monitor.start()
    tree_at(tmp_path, tenths=110, throttled=94, swapped=100)
    return monitor.stop()


def test_processors_of_another_machine(elsewhere):
    cpu = elsewhere.cpu
    ticks = os.sysconf("SC_CLK_TCK")
    assert cpu.user_s == pytest.approx(800 / ticks)
    assert cpu.cpu_quota == 1.5
    assert (cpu.periods, cpu.throttled_periods) == (1000, 90)
    assert cpu.throttled_s == pytest.approx(4.5)
    assert cpu.migrations == 300
    assert cpu.run_delay_s == pytest.approx(1.0)
    assert [o.name for o in cpu.others] == ["hog"]
    assert cpu.others[0].cpu == 1
    assert cpu.steal_s == pytest.approx(200 / ticks)
    assert cpu.cores[1].steal == pytest.approx(0.2)
    assert cpu.frequency_hz == 1.8e9
    assert cpu.max_frequency_hz == 3.6e9
    assert cpu.threads[0].name == "py thon)"
    assert cpu.threads[0].cpu_ids == (0, 1)


def test_memory_of_another_machine(elsewhere):
    memory = elsewhere.memory
    assert (memory.resident_bytes, memory.peak_resident_bytes) == (2 * 2**20, 4 * 2**20)
    assert memory.huge_page_share == 0.5
    assert memory.numa_local_share == 0.75
    assert memory.swap_bytes == 8192
    assert memory.swap_in_bytes == 100 * os.sysconf("SC_PAGE_SIZE")
    assert memory.available_bytes == 500_000 * 1024


def test_a_machine_that_tells_nothing(tmp_path):
    with PerformanceMonitor(root=tmp_path, look_every_s=0.01) as monitor:
        time.sleep(0.05)
    report = monitor.collect_metrics()
    cpu, memory = report.cpu, report.memory
    assert (cpu.run_delay_s, cpu.migrations, cpu.others_s, cpu.periods) == (None,) * 4
    assert (memory.resident_bytes, memory.swap_bytes, memory.numa_local_share) == (None,) * 3
    assert monitor.suggest_optimizations() == []


def test_damaged_files_are_unknown(tmp_path):
    tree_at(tmp_path, tenths=10, throttled=4)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            path.write_bytes(b"\xff(((( 12 )) -3 \n: kB\n" * 3)
    snapshot = CpuSnapshot.read(Tree(tmp_path), (0, 1))
    assert (snapshot.tasks, snapshot.processes, snapshot.throttling) == ({}, {}, None)
    assert MemorySnapshot.read(Tree(tmp_path)).resident_bytes is None


def test_throttling_of_v1_is_in_nanoseconds(tmp_path):
    write(
        tmp_path,
        {
            "/proc/self/cgroup": "1:cpu:/job\n",
            "/proc/self/mountinfo": "30 1 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n",
            "/sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "50000",
            "/sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000",
            "/sys/fs/cgroup/cpu/job/cpu.stat": "nr_periods 5\nnr_throttled 2\n"
            "throttled_time 3000000000\n",
        },
    )
    throttling = read_throttling(Tree(tmp_path))
    assert (throttling.periods, throttling.throttled_periods, throttling.throttled_s) == (5, 2, 3.0)


# Counters of the hardware, and caches.


@pytest.mark.skipif(not LINUX, reason="perf events are Linux'")
def test_counters_go_through_the_same_calls_as_the_kernels_own():
    counters, reason = HardwareCounters.open(SOFTWARE_EVENTS)
    if counters is None:
        pytest.skip(f"perf_event_open: {reason}")
    before = counters.read()["page_faults"]
    size = 16 * 2**20
    memory = bytearray(size)
    assert counters.read()["page_faults"] - before >= 0
    assert memory[::4096] == bytes(size // 4096)
    counters.close()
    counters.close()


@pytest.mark.skipif(not LINUX, reason="perf events are Linux'")
def test_hardware_counters_or_a_reason():
    counters, reason = HardwareCounters.open(HARDWARE_EVENTS)
    assert (counters is None) == (reason is not None)
    if counters is not None:
        spin(0.05)
        assert counters.read().get("cycles", 1) > 0
        counters.close()


def test_caches_are_labelled_measured_or_modelled():
    from hotloop.machine import Cache

    caches = (
        *(Cache(1, kind, 32 * 1024, 64, (n,)) for n in (0, 1) for kind in ("data", "instruction")),
        Cache(2, "unified", 2**20, 64, (0,)),
        Cache(2, "unified", 2**20, 64, (1,)),
        Cache(3, "unified", 2**25, 64, (0, 1)),
    )
    machine = Machine(usable_cpus=2, cpu_ids=(0, 1), caches=caches)
    modelled = cache_stats(
        machine, counted=None, reason="none here", step_bytes=3 * 2**19, num_threads=2
    )
    assert (modelled.source, modelled.reason) == ("modelled", "none here")
    assert [level.working_set_bytes for level in modelled.levels] == [
        3 * 2**18, 3 * 2**18, 3 * 2**19,
    ]  # fmt: skip
    assert [level.fits for level in modelled.levels] == [False, True, True]
    counts = {"l1_misses": 5, "l1_references": 9, "ll_misses": 1, "ll_references": 2, "cycles": 7}
    counted = cache_stats(machine, counted=counts, reason=None, step_bytes=None, num_threads=None)
    assert (counted.source, counted.cycles) == ("measured", 7)
    assert [level.misses for level in counted.levels] == [5, None, 1]
    assert [level.fits for level in counted.levels] == [None] * 3


# Where reports go.


def test_prometheus_text_is_the_format(elsewhere):
    text = prometheus_text(elsewhere)
    typed = [line.split()[2:] for line in text.splitlines() if line.startswith("# TYPE")]
    values = [line for line in text.splitlines() if not line.startswith("#")]
    assert len({name for name, _ in typed}) == len(typed)
    assert {kind for _, kind in typed} == {"counter", "gauge"}
    for line in values:
        name, _, value = line.rpartition(" ")
        float(value)
        assert name.split("{")[0] in {n for n, _ in typed}
    assert "hotloop_cpu_throttled_periods_total 90" in values
    assert 'hotloop_phase_seconds_total{phase="data_wait"} 0.0' in values
    assert 'hotloop_core_busy{cpu="1"}' in text
    assert "None" not in text


def test_metrics_are_served_on_loopback_alone():
    monitor = PerformanceMonitor(look_every_s=None)
    with MetricsServer(monitor, 0) as server:
        assert server._server.server_address[0] == "127.0.0.1"
        url = f"http://127.0.0.1:{server.port}"
        with urllib.request.urlopen(f"{url}/metrics") as answer:
            assert answer.read() == b""
        with monitor:
            monitor.record(64, compute_s=0.1)
            with urllib.request.urlopen(f"{url}/metrics") as answer:
                assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
                assert b"hotloop_steps_total 1\n" in answer.read()
        with pytest.raises(urllib.error.HTTPError, match="404") as refused:
            urllib.request.urlopen(f"{url}/")
        refused.value.close()
        with pytest.raises(InputError, match="--metrics-port"):
            MetricsServer(monitor, server.port)
    with pytest.raises(InputError, match="must be free"):
        MetricsServer(monitor, 99_999)


def test_json_lines_are_appended(tmp_path, elsewhere):
    monitor = PerformanceMonitor(look_every_s=0.01)
    lines = JsonLines(tmp_path / "deep" / "metrics.jsonl", monitor)
    monitor.every(0.02, lines.write)
    with monitor:
        monitor.record(64, compute_s=0.1)
        time.sleep(0.15)
    lines.close()
    read = [json.loads(line) for line in lines.path.read_text().splitlines()]
    assert len(read) >= 3
    assert read[-1]["step"]["samples"] == 64
    assert read[0]["time_s"] < read[-1]["time_s"]
    assert "samples" not in read[0]
    assert json.loads(json_line(elsewhere, 1.0))["now"] is None
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="--metrics-file"):
        JsonLines(tmp_path / "file" / "metrics.jsonl", monitor)


def test_event_files_read_back(tmp_path):
    pytest.importorskip("tensorboardX", reason="the extra tensorboard is not installed")
    from tensorboardX.proto import event_pb2

    monitor = PerformanceMonitor(look_every_s=None)
    log = TensorBoardLog(tmp_path, monitor)
    with monitor:
        monitor.record(64, steps=3, data_wait_s=0.1, compute_s=0.3)
        log.write()
    log.close()
    data = next(tmp_path.glob("events.out.tfevents.*")).read_bytes()
    found, at = {}, 0
    while at < len(data):
        # A record: length, its checksum, the event, its checksum.
        size = int.from_bytes(data[at : at + 8], "little")
        event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
        at += size + 16
        found |= {v.tag: (event.step, v.simple_value) for v in event.summary.value}
    assert found["phase/data_wait_share"] == (3, pytest.approx(0.25))


def test_a_missing_extra_answers_with_the_pip_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'hotloop\[tensorboard\]'"):
        TensorBoardLog(tmp_path, PerformanceMonitor(look_every_s=None))
