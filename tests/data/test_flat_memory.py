import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys
import torch
from hotloop.data import GlobalSampler, load_mnist
from hotloop.memory import MemoryPool

torch.set_num_threads(1)  # Two of these run at once.

def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024

# Both runs warm the same code first, so that only the data differs.
load_mnist("train", prefer="shipped", num_samples=10_100).close()
data = load_mnist("train", prefer="shipped", num_samples=int(sys.argv[1]))
packed = status("VmRSS")
pool = MemoryPool(data.layouts(64), 2)
for batch, indices in enumerate(GlobalSampler(data.num_samples, 64, seed=0).batches(0)):
    buffer = pool.acquire()
    buffer.num_rows = len(indices)
    data.gather(indices, *buffer.rows(), training=True)
    pool.release(buffer)
print(json.dumps({"packed": packed, "gathered": status("VmRSS"), "peak": status("VmHWM"),
                  "storage": data.storage_bytes, "resident": data.resident_bytes}))
"""


def memory_of(*counts):
    running = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(count)], stdout=subprocess.PIPE)
        for count in counts
    ]
    outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0] * len(counts)
    return [json.loads(output) for output in outputs]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_resident_memory_is_flat_from_10000_to_100000_samples():
    few, many = memory_of(10_000, 100_000)
    assert many["storage"] > 78_000_000 > 20_000_000 > few["storage"]
    assert many["resident"] == 800_000
    for key in ("packed", "gathered", "peak"):
        # 5 % of a training process of 600 MB.
        assert many[key] - few[key] < 30_000_000, (key, few, many)
