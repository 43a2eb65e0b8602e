"""What torch and the script's children find after ``hotloop run`` set them up."""

import json
import os
import shlex
import subprocess

import pytest

from support.processes import environment, finish, launched, plain, write

FACTS = """
import json, os, subprocess, sys, importlib.util
importlib.util.find_spec("torch")  # As libraries do that only want to know.
import torch
with open(os.devnull) as none:
    child = subprocess.run(["env"], stdin=none, capture_output=True, text=True).stdout
python = subprocess.run(
    [sys.executable, "-c", "import torch; print(torch.get_num_threads())"],
    capture_output=True, text=True,
)
print(json.dumps({
    "threads": torch.get_num_threads(),
    "child": sorted(n for n in (line.split("=")[0] for line in child.splitlines())
                    if "THREADS" in n or "MALLOC" in n or "GLIBC" in n),
    "own": os.environ.get("OMP_NUM_THREADS"),
    "python": python.stdout.strip(), "python_err": python.stderr,
    "finders": [type(f).__module__ for f in sys.meta_path
                if type(f).__module__.split(".")[0] == "hotloop"],
    "loader": type(torch.__spec__.loader).__name__,
    "instance": sorted(vars(torch.__spec__.loader)),
    "cpus": sorted(os.sched_getaffinity(0)),
    "adam": torch.optim.Adam.step.__module__,
}))
"""


def facts(tmp_path, *options, **more):
    script = write(tmp_path, FACTS)
    code, out, err = finish(launched(script, options=("--quiet", *options)), tmp_path, **more)
    assert code == 0, err
    assert err == ""
    return json.loads(out)


def test_threads_are_set_and_the_environment_is_the_users(tmp_path):
    found = facts(tmp_path, "--num-threads", "1", "--affinity", "0")
    assert found["threads"] == 1
    assert found["child"] == []
    assert found["own"] is None
    assert found["python"] == "1"
    assert found["python_err"] == ""
    assert found["finders"] == []
    assert found["loader"] == "SourceFileLoader"
    assert found["instance"] == ["name", "path"]
    assert found["cpus"] == [0]


def test_what_the_user_set_stays(tmp_path):
    found = facts(tmp_path, OMP_NUM_THREADS="1", MALLOC_ARENA_MAX="2")
    assert (found["threads"], found["own"]) == (1, "1")
    assert found["child"] == ["MALLOC_ARENA_MAX", "OMP_NUM_THREADS"]


def test_a_script_that_sets_its_threads_itself(tmp_path):
    script = write(
        tmp_path,
        "import os; os.environ['OMP_NUM_THREADS'] = '1'\n"
        "import torch; print(torch.get_num_threads(), os.environ['OMP_NUM_THREADS'])",
    )
    code, out, _ = finish(launched(script, options=("--quiet", "--num-threads", "2")), tmp_path)
    assert (code, out) == (0, "1 1\n")


def test_dry_run_changes_nothing_and_its_text_can_be_run(tmp_path):
    script = write(tmp_path, "print('ran')\nimport torch\nprint(torch.get_num_threads())")
    options = ("--dry-run", "--num-threads", "1", "--report", str(tmp_path / "report.json"))
    code, text, err = finish(launched(script, "a b", options=options), tmp_path)
    assert (code, err) == (0, "")
    assert not (tmp_path / "report.json").exists()
    assert "MALLOC_TRIM_THRESHOLD_" in text or "# allocator: " in text
    assert "ran\n" not in text
    done = subprocess.run(
        ["sh", "-c", text], env=environment(tmp_path), capture_output=True, text=True, check=False
    )
    assert done.stdout == "ran\n1\n"
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["script"][-1] == "a b"
    assert report["num_threads"] == 1


@pytest.mark.parametrize("name", ["threads", "allocator", "matmul", "optimizer"])
def test_each_change_can_be_left_out(tmp_path, name):
    script = write(tmp_path, "")
    for options in (("--off", name), ("--off", f"numa,{name}")):
        code, text, _ = finish(
            launched(script, options=("--dry-run", "--json", *options)), tmp_path
        )
        assert code == 0
        rows = {row["name"]: row for row in json.loads(text)["changes"]}
        assert rows[name]["made"] is False
        assert rows[name]["environment"] == {}


def test_all_off_is_plain_python(tmp_path):
    script = write(
        tmp_path,
        "import torch, sys\n"
        "print(sys.modules['torch.optim.adam'].adam.__module__)\n"
        "print(torch._C._dispatch_dump('aten::mm'))\n",
    )
    names = "threads,affinity,numa,allocator,huge-pages,matmul,optimizer"
    off = finish(launched(script, options=("--quiet", "--off", names)), tmp_path)
    on = finish(launched(script), tmp_path)
    expected = finish(plain(script), tmp_path)
    assert off == expected
    assert on[1] != expected[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--off", "speed", "s.py"], "--off must be of"),
        (["--num-threads", "0", "s.py"], "--num-threads must be at least 1"),
        (["--nproc", "100000", "s.py"], "--nproc must be at most"),
        (["--rounds", "0", "s.py"], "--rounds"),
        (["--affinity", "4000", "s.py"], "CPU 4000"),
        (["--numa-policy", "bind", "--numa-nodes", "77", "s.py"], "77"),
        (["--numa-policy", "near", "s.py"], "--numa-policy"),
        (["missing.py"], "missing.py"),
        ([], "script"),
    ],
)
def test_bad_usage_is_one_line(tmp_path, options, words):
    write(tmp_path, "print('ran')", "s.py")
    code, out, err = finish(launched(options=options), tmp_path)
    assert code == 2
    assert out == ""
    assert words in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.full
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two processes need two CPUs")
def test_ranks_have_cores_of_their_own(tmp_path):
    script = write(
        tmp_path,
        """
        import os, sys, time
        import torch
        import torch.distributed as dist
        dist.init_process_group("gloo")
        total = torch.ones(1)
        dist.all_reduce(total)
        rank = dist.get_rank()
        with open(f"rank{rank}", "w") as file:
            cpus = sorted(os.sched_getaffinity(0))
            print(int(total), torch.get_num_threads(), *cpus, file=file)
        dist.destroy_process_group()
        """,
    )
    report = tmp_path / "report.json"
    code, _, err = finish(
        launched(script, options=("--quiet", "--nproc", "2", "--report", str(report))), tmp_path
    )
    assert code == 0, err
    lines = [(tmp_path / f"rank{rank}").read_text().split() for rank in range(2)]
    assert [line[0] for line in lines] == ["2", "2"]
    cpus = [set(line[2:]) for line in lines]
    assert not cpus[0] & cpus[1]
    assert cpus[0] | cpus[1] == {str(c) for c in os.sched_getaffinity(0)}
    assert [int(line[1]) for line in lines] == [1, 1] or len(os.sched_getaffinity(0)) > 2
    assert json.loads(report.read_text())["rank"] == 0


def test_shell_quoting_of_the_dry_run(tmp_path):
    script = write(tmp_path, "import sys; print(sys.argv[1:])", "with space.py")
    _, text, _ = finish(launched(script, "it's", "$HOME", options=("--dry-run",)), tmp_path)
    command = text.strip().splitlines()[-1]
    assert shlex.split(command)[-2:] == ["it's", "$HOME"]
