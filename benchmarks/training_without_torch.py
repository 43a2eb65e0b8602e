"""An export of ``hotloop export --training`` beside ``Trainer.fit``: processor seconds, memory.

Each run is a process of its own; the two take turns. Processor seconds of the steps alone, medians
of the rounds; memory is the peak of the whole process. Writes
``results/training-without-torch.json``.

    python benchmarks/training_without_torch.py [--rounds 3] [--models cnn,small]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

BATCH, EPOCHS = 64, 1
RESULTS = Path(__file__).parent / "results" / "training-without-torch.json"

SHARED = """
import json, sys, time
from pathlib import Path

def peak_bytes():
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if "VmHWM" in line)

def tell(state, cpu_s, wall_s):
    record = state[0]
    print(json.dumps({"train_loss": record, "cpu_s": cpu_s, "wall_s": wall_s,
                      "peak_bytes": peak_bytes(), "torch": "torch" in sys.modules}))
"""

EXPORTED = (
    SHARED
    + """
from hotloop.enclave.training import load_training
from hotloop.enclave.training.samples import open_samples
run = load_training(sys.argv[1], num_threads=int(sys.argv[3]))
samples = open_samples("mnist", "train", None)
run.fit(samples, 1, seed=1)  # Warm, as the other one is.
began = time.process_time(), time.perf_counter()
run.fit(samples, 1 + int(sys.argv[2]), seed=1)
tell([run.state.history[-1].train_loss], time.process_time() - began[0],
     time.perf_counter() - began[1])
"""
)

TRAINER = (
    SHARED
    + """
import torch
from torch import nn
import hotloop
from hotloop.train.zoo import build_model
torch.manual_seed(0)
model = build_model(sys.argv[1])
optimizer = torch.optim.Adam(model.parameters())
plan = hotloop.Plan.from_dict({"cpu": {"num_threads": int(sys.argv[3])}})
data = hotloop.load_mnist("train", prefer="shipped")
began = []
def note(losses):
    note.steps += len(losses)
    if note.steps >= 157 and not began:
        began.append((time.process_time(), time.perf_counter()))
note.steps = 0
report = hotloop.Trainer(model, nn.CrossEntropyLoss(), optimizer, plan).fit(
    data, batch_size=64, epochs=1 + int(sys.argv[2]), seed=1, monitor=False, on_losses=note)
tell([report.history[-1].train_loss], time.process_time() - began[0][0],
     time.perf_counter() - began[0][1])
"""
)


def run(code, *words):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def exported(name, folder):
    import torch
    from torch import nn

    from hotloop.enclave.training import export_training
    from hotloop.train.zoo import build_model

    torch.manual_seed(0)
    model = build_model(name)
    x, y = torch.randn(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))
    optimizer = torch.optim.Adam(model.parameters())
    export_training(model, nn.CrossEntropyLoss(), optimizer, (x, y), folder, num_samples=10_000)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", default="cnn,small")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    results = {}
    for name in args.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "export"
            exported(name, path)
            rounds = []
            for _ in range(args.rounds):
                rounds.append(
                    (run(TRAINER, name, EPOCHS, args.threads),
                     run(EXPORTED, path, EPOCHS, args.threads))
                )  # fmt: skip
        results[name] = {
            who: {
                key: statistics.median(pair[number][key] for pair in rounds)
                for key in ("cpu_s", "wall_s", "peak_bytes", "train_loss")
            }
            for number, who in enumerate(("trainer", "export"))
        }
        print(name, json.dumps(results[name]))
    RESULTS.write_text(
        json.dumps(
            {"batch": BATCH, "threads": args.threads, "rounds": args.rounds, "models": results},
            indent=2,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
