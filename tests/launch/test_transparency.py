"""A script cannot tell ``hotloop run`` from plain Python: paths, codes, signals, streams."""

import signal
import subprocess
import sys

import pytest

from support.processes import both, environment, finish, launched, plain, signalled, write


@pytest.fixture(autouse=True)
def _quiet_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))


LOOK = """
    import os, sys
    print(sys.argv, sys.path, __name__, __file__, __spec__, __package__, __builtins__)
    print(sys.flags, sys.warnoptions, sorted(sys.modules["__main__"].__dict__))
    print([type(f).__name__ for f in sys.meta_path if "hotloop" not in type(f).__module__])
    print("torch" in sys.modules, sorted(n for n in sys.modules if n.startswith("script")))
"""


def test_arguments_and_paths(tmp_path):
    script = write(tmp_path, LOOK)
    expected, found = both(tmp_path, script, "--off", "x", "--", "-m", "a b")
    assert expected[0] == 0
    assert found == expected


def test_a_relative_script_and_modules_beside_it(tmp_path):
    write(tmp_path, "VALUE = 5", "beside.py")
    write(tmp_path, LOOK + "\n    import beside; print(beside.VALUE, beside.__file__)")
    expected, found = both(tmp_path, "script.py")
    assert "5" in expected[1]
    assert found == expected


def test_a_module_and_its_arguments(tmp_path):
    write(tmp_path, "", "package/__init__.py")
    write(tmp_path, LOOK, "package/__main__.py")
    expected, found = both(tmp_path, "-m", "package", "--quiet", "-m", "x")
    assert expected[0] == 0
    assert found == expected


def test_a_folder_with_a_main(tmp_path):
    write(tmp_path, LOOK, "folder/__main__.py")
    expected, found = both(tmp_path, "folder")
    assert expected[0] == 0
    assert found == expected


@pytest.mark.parametrize(
    "text",
    [
        "pass",
        "raise SystemExit(7)",
        "raise SystemExit('said')",
        "raise ValueError('here')",
        "import os; os._exit(9)",
        "def f(:",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import atexit; atexit.register(print, 'late'); print('early'); raise SystemExit(3)",
    ],
)
def test_exit_codes_and_tracebacks(tmp_path, text):
    script = write(tmp_path, text)
    expected, found = both(tmp_path, script)
    assert found == expected


def test_a_module_that_is_not_there(tmp_path):
    expected, found = both(tmp_path, "-m", "no_such_module_here")
    assert expected[0] == 1
    assert found == expected


def test_standard_streams(tmp_path):
    script = write(
        tmp_path,
        """
        import sys
        for line in sys.stdin:
            sys.stdout.write(line.upper())
            print(len(line), file=sys.stderr)
        print(sys.stdin.isatty(), sys.stdout.isatty(), sys.stdout.line_buffering)
        """,
    )
    expected, found = both(tmp_path, script, stdin="one\ntwo\n")
    assert "ONE\nTWO" in expected[1]
    assert found == expected


def test_a_reader_that_goes_away(tmp_path):
    script = write(tmp_path, "for i in range(100000): print(i)")
    codes = []
    for command in (plain(script), launched(script)):
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment(tmp_path)
        )
        process.stdout.readline()
        process.stdout.close()
        codes.append(process.wait(60))
    assert codes[0] == codes[1]


SLEEPER = "import time\nprint('ready', flush=True)\ntime.sleep(60)\n"
HANDLER = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print('caught', flush=True), sys.exit(4)))
print('ready', flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (SLEEPER, signal.SIGTERM),
        (SLEEPER, signal.SIGINT),
        (SLEEPER, signal.SIGHUP),
        (HANDLER, signal.SIGTERM),
    ],
)
def test_signals_are_the_scripts(tmp_path, text, number):
    # Under nohup a process and its children ignore SIGHUP.
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)
    script = write(tmp_path, text)
    expected = signalled(plain(script), tmp_path, number)
    assert signalled(launched(script), tmp_path, number) == expected
    assert expected[0] != 0


def test_no_parent_stays_behind(tmp_path):
    script = write(tmp_path, "import os; print(os.getpid())")
    process = subprocess.Popen(
        launched(script), stdout=subprocess.PIPE, text=True, env=environment(tmp_path)
    )
    assert int(process.communicate(timeout=60)[0]) == process.pid


def test_the_debugger_works(tmp_path):
    script = write(tmp_path, "x = 41\nx += 1\nprint('x is', x)\n")
    expected, found = both(tmp_path, "-m", "pdb", script, stdin="next\np x\nnext\np x\nquit\n")
    assert "42" in expected[1]
    assert found == expected


def test_a_users_sitecustomize_still_runs(tmp_path):
    write(tmp_path, "import builtins; builtins.MINE = __file__", "site/sitecustomize.py")
    script = write(
        tmp_path, "import sys; print(MINE, sys.modules['sitecustomize'].__file__, sys.path)"
    )
    expected, found = both(tmp_path, script, PYTHONPATH=str(tmp_path / "site"))
    assert "sitecustomize" in expected[1]
    assert found == expected


def test_a_users_sitecustomize_that_fails(tmp_path):
    write(tmp_path, "raise ValueError('mine')", "site/sitecustomize.py")
    script = write(tmp_path, "print('runs')")
    expected, found = both(tmp_path, script, PYTHONPATH=str(tmp_path / "site"))
    assert "mine" in expected[2]
    # The command is a Python program too, and says so once for itself.
    assert found == (*expected[:2], 2 * expected[2])


def test_a_script_named_like_a_room_of_ours(tmp_path):
    write(tmp_path, "NAME = 'theirs'", "launch.py")
    script = write(tmp_path, "import launch; print(launch.NAME)")
    expected, found = both(tmp_path, script)
    assert found == expected


def test_damaged_settings_leave_the_script_alone(tmp_path):
    startup = finish(launched("x.py", options=("--dry-run",)), write(tmp_path, "", "x.py").parent)
    folder = next(
        line.split("=", 1)[1].split(":")[0]
        for line in startup[1].splitlines()
        if line.startswith("export PYTHONPATH=")
    )
    script = write(tmp_path, "print('runs')")
    code, out, err = finish(plain(script), tmp_path, PYTHONPATH=folder, HOTLOOP_RUN="{")
    assert (code, out) == (0, "runs\n")
    assert "runs without it" in err
    other = '{"prefix": "/another/environment"}'
    assert finish(plain(script), tmp_path, PYTHONPATH=folder, HOTLOOP_RUN=other)[2] == ""


def test_hotloop_from_the_working_folder_only(tmp_path):
    """As `python -m hotloop` in a checkout: the script's process does not have it on its path."""
    env = environment(tmp_path)
    source = env.pop("PYTHONPATH")
    script = write(tmp_path, "import sys; print('hotloop' in sys.modules)\nimport torch")
    done = subprocess.run(
        [sys.executable, "-m", "hotloop", "run", "--off", "matmul", str(script)],
        cwd=source, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stdout == "True\n"
    assert "report" in done.stderr
