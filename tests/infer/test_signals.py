"""What engines do to the process they are loaded into."""

import subprocess
import sys

import pytest

pytest.importorskip("openvino")

# Signals arrive on the thread's alternate stack, if it has one. The plugin's is freed some time
# after a model was compiled; that it is not set any more can be seen at once.
SCRIPT = """
import ctypes, sys
import numpy, openvino
from openvino import opset13 as ops
from hotloop.infer import load_engine
from hotloop.infer.engines.signal_stack import _Stack

def stack():
    found = _Stack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found)) == 0
    return found.address, found.flags, found.size_bytes

p = ops.parameter([-1, 8], numpy.float32)
model = openvino.Model([ops.matmul(p, ops.constant(numpy.ones((8, 4), "f")), False, False)], [p])
openvino.save_model(model, sys.argv[1])
before = stack()
engine = load_engine(sys.argv[1])
engine.run([numpy.ones((2, 8), "f")])
assert stack() == before, (before, stack())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="sigaltstack is read as Linux lays it out")
@pytest.mark.parametrize("options", [[], ["-X", "faulthandler"]], ids=["no stack", "a stack"])
def test_the_signal_stack_stays_when_openvino_compiles(tmp_path, options):
    command = [sys.executable, *options, "-c", SCRIPT, str(tmp_path / "model.xml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
