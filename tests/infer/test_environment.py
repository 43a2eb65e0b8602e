"""Libraries and paths in containers: no home folder, another locale than UTF-8."""

import os
import subprocess
import sys

import pytest

from hotloop.errors import MissingExtraError, ModelError, RunError
from hotloop.infer.engine import import_library, utf8_path


def test_a_library_that_cannot_be_loaded_is_told_apart_from_one_that_is_missing(
    tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "no_home_here.py").write_text("raise RuntimeError('no home\\nmore lines')")
    with pytest.raises(RunError, match=r"no_home_here is installed .* got no home") as told:
        import_library("no_home_here", "a model", "extra")
    assert "\n" not in str(told.value)
    with pytest.raises(MissingExtraError, match="not_installed_here"):
        import_library("not_installed_here", "a model", "extra")


def test_a_path_is_utf8_for_libraries_in_any_locale():
    assert utf8_path("/a/m\u00f6del 模型.onnx") == "/a/m\u00f6del 模型.onnx"
    with pytest.raises(ModelError, match="must be UTF-8"):
        utf8_path(os.fsdecode(b"/a/m\xff.onnx"))
    code = (
        "import os, sys; from hotloop.infer.engine import utf8_path;"
        "given = os.fsdecode(bytes.fromhex(sys.argv[1]));"
        "print(ascii(utf8_path(given)), ascii(utf8_path('\\u00f6')))"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, "/m\u00f6".encode().hex()],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [r"'/m\xf6'", r"'\xf6'"]
