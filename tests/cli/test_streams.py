"""Output that a terminal cannot show ends no command; names beyond ASCII in another locale."""

import os
import subprocess
import sys

import pytest

CODE = """
import sys
from hotloop.cli.streams import write_any_character
write_any_character()
print("\\u00dcbung", "\\u6570", sys.argv[1])
print("\\u00e9", file=sys.stderr)
"""


@pytest.mark.parametrize("encoding", ["ascii", "ascii:strict", "latin-1", "utf-8"])
def test_what_cannot_be_shown_is_an_escape(encoding):
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, "l\u00e4uf".encode()],
        env={**environment, "PYTHONIOENCODING": encoding}, capture_output=True, check=True,
    )  # fmt: skip
    words, name = {
        "latin-1": b"\xdcbung \\u6570", "utf-8": "\u00dcbung \u6570".encode()
    }.get(encoding, b"\\xdcbung \\u6570"), "l\u00e4uf".encode()  # fmt: skip
    assert done.stdout.split() == [*words.split(), name]
    assert done.stderr
