"""A perceptron on MNIST: --hidden 256 128, or --hidden 3072 3072 for 12 million weights."""

import argparse
import itertools
import time

import torch
from digits import Digits
from torch import nn
from torch.utils.data import DataLoader


def build(hidden):
    widths = [784, *hidden, 10]
    layers = [nn.Flatten()]
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 128])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--samples", type=int, default=10_000)
    args = parser.parse_args()
    torch.manual_seed(1)
    data = Digits(count=args.samples)
    loader = DataLoader(data, batch_size=args.batch_size, shuffle=True)
    model = build(args.hidden)
    loss_fn = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for epoch in range(args.epochs):
        started = time.perf_counter()
        for batch, (x, y) in enumerate(loader):
            pred = model(x)
            loss = loss_fn(pred, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if batch % 10 == 0:
                print(f"epoch {epoch} batch {batch} loss {loss.item():.6f}")
        print(f"trained {len(data)} samples in {time.perf_counter() - started:.3f} s")


if __name__ == "__main__":
    main()
