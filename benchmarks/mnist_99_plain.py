"""MNIST to 99 % in PyTorch as people write it: ``python mnist_99_plain.py IDX_FOLDER SEED``."""

import gzip
import json
import sys
from pathlib import Path

import numpy
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from mnist_99 import net

EPOCHS, BATCH_SIZE, LEARNING_RATE = 2, 128, 0.01


def load(folder: Path, part: str) -> TensorDataset:
    """Images scaled to 0..1 and normalized as usual, and labels."""
    images = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())
    x = torch.from_numpy(numpy.frombuffer(images, numpy.uint8, offset=16).copy())
    y = torch.from_numpy(numpy.frombuffer(labels, numpy.uint8, offset=8).copy())
    return TensorDataset((x.view(-1, 1, 28, 28).float() / 255 - 0.1307) / 0.3081, y.to(torch.int64))


def main(folder: Path, seed: int) -> None:
    torch.set_num_threads(2)
    torch.manual_seed(seed)
    loader = DataLoader(load(folder, "train"), batch_size=BATCH_SIZE, shuffle=True)
    model, loss_fn = net(), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=LEARNING_RATE, total_steps=EPOCHS * len(loader)
    )
    for _ in range(EPOCHS):
        model.train()
        for x, y in loader:
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            optimizer.step()
            scheduler.step()
        model.eval()
        correct = 0
        with torch.no_grad():
            for x, y in DataLoader(load(folder, "t10k"), batch_size=BATCH_SIZE):
                correct += int((model(x).argmax(1) == y).sum())
    print(json.dumps({"validation_accuracy": correct / 10_000}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
