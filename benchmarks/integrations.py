"""Lightning, Transformers and skorch, and these on hotloop's step, in turn: seconds of a fit.

    python benchmarks/integrations.py [--rounds 5] [--out benchmarks/results/integrations.json]

Needs the frameworks (`scripts/integrations` makes an environment that has them). Each fit is a new
model on the same data; what it records in its first steps is part of its time.
"""

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from about import about
from torch import nn

from hotloop.files import write_text_atomically
from hotloop.measure import Turns, there_and_back


def perceptron(width=512):
    return nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10))


def convolutions():
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3),
        nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4608, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def samples(count):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 784, generator=generator)
    return x, x[:, :10].argmax(1)


def with_lightning(make, strategy, count):
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.body = make()

        def training_step(self, batch, batch_idx):
            loss = nn.functional.cross_entropy(self.body(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(*samples(count))
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, strategy=strategy(), max_epochs=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=64))


def with_skorch(make, kind, count):
    x, y = (t.numpy() for t in samples(count))

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = make()

        def forward(self, X):
            return self.body(X).softmax(-1)

    torch.manual_seed(0)
    options = {"optimizer": torch.optim.Adam, "lr": 1e-3, "train_split": None, "verbose": 0}
    kind(Body, max_epochs=2, batch_size=64, **options).fit(x, y.astype(np.int64))


def with_transformers(name, kind, count, folder):
    import transformers

    sizes = {"vocab_size": 1000, "hidden_size": 128, "num_hidden_layers": 2}
    torch.manual_seed(0)
    if name == "bert":
        config = transformers.BertConfig(
            **sizes, num_attention_heads=2, intermediate_size=512, num_labels=3
        )
        model = transformers.BertForSequenceClassification(config)
    else:
        config = transformers.GPT2Config(
            vocab_size=1000, n_embd=128, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
        model = transformers.GPT2LMHeadModel(config)
    tokens = torch.randint(1, 1000, (count, 64), generator=torch.Generator().manual_seed(0))
    rows = [
        {"input_ids": t, "attention_mask": torch.ones_like(t),
         "labels": t[0] % 3 if name == "bert" else t}
        for t in tokens
    ]  # fmt: skip
    arguments = transformers.TrainingArguments(
        output_dir=folder, per_device_train_batch_size=16, num_train_epochs=1, save_strategy="no",
        report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=50,
    )  # fmt: skip
    kind(model=model, args=arguments, train_dataset=rows).train()


def candidates(folder):
    """Of each row the framework's fit and hotloop's."""
    import skorch
    import transformers

    from hotloop.integrations.lightning import HotloopStrategy
    from hotloop.integrations.skorch import HotloopClassifier
    from hotloop.integrations.transformers import HotloopTrainer

    nets = {"perceptron": (perceptron, 12_800), "convolutions": (convolutions, 6_400)}
    for name, (make, count) in nets.items():
        yield (
            f"lightning, {name}",
            {
                "framework": lambda m=make, c=count: with_lightning(m, lambda: "auto", c),
                "hotloop": lambda m=make, c=count: with_lightning(m, HotloopStrategy, c),
            },
        )
        yield (
            f"skorch, {name}",
            {
                "framework": lambda m=make, c=count: with_skorch(m, skorch.NeuralNetClassifier, c),
                "hotloop": lambda m=make, c=count: with_skorch(m, HotloopClassifier, c),
            },
        )
    for name in ("bert", "gpt2"):
        yield (
            f"transformers, {name}",
            {
                "framework": lambda n=name: with_transformers(
                    n, transformers.Trainer, 1600, folder
                ),
                "hotloop": lambda n=name: with_transformers(n, HotloopTrainer, 1600, folder),
            },
        )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    document = about()
    rows = document["fits"] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, ways in candidates(folder):
            if args.only not in name:
                continue
            seconds = {way: [] for way in ways}
            for played in Turns(ways, rounds=args.rounds, order=there_and_back, warm_calls=0):
                for way, turn in played.items():
                    seconds[way] += turn.seconds
            gains = [a / b for a, b in zip(*seconds.values(), strict=True)]
            rows[name] = {
                "seconds": seconds, "gain": statistics.median(gains), "gains": sorted(gains),
                "load_average": os.getloadavg()[0], "at_s": time.time(),
            }  # fmt: skip
            print(f"{name:<26} gain {rows[name]['gain']:.2f} ({min(gains):.2f}-{max(gains):.2f})")
    if args.out is not None:
        write_text_atomically(args.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
