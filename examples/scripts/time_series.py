"""A GRU that forecasts the next value of noisy sums of sines."""

import argparse
import time

import torch
from torch import nn


class Forecaster(nn.Module):
    """GRU over the window, one linear layer on its last state."""

    def __init__(self, hidden):
        super().__init__()
        self.rnn = nn.GRU(1, hidden, batch_first=True)
        self.out = nn.Linear(hidden, 1)

    def forward(self, x):
        """``[batch, window, 1]`` to ``[batch]``."""
        output, _ = self.rnn(x)
        return self.out(output[:, -1]).squeeze(-1)


def make_series(count, window):
    """Windows ``[count, window, 1]`` and the value after each."""
    generator = torch.Generator().manual_seed(5)
    t = torch.arange(window + 1.0)
    phase = 6.28 * torch.rand(count, 2, 1, generator=generator)
    speed = 0.05 + 0.3 * torch.rand(count, 2, 1, generator=generator)
    series = torch.sin(speed * t + phase).sum(1)
    series += 0.05 * torch.randn(series.shape, generator=generator)
    return series[:, :-1, None].contiguous(), series[:, -1].contiguous()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--window", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--samples", type=int, default=5_000)
    args = parser.parse_args()
    torch.manual_seed(1)
    x, y = make_series(args.samples, args.window)
    data = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(data, batch_size=args.batch_size, shuffle=True)
    model = Forecaster(args.hidden)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for epoch in range(1, args.epochs + 1):
        started = time.perf_counter()
        for batch, (window, target) in enumerate(loader):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(window), target)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if batch % 5 == 0:
                print(f"epoch {epoch} batch {batch} loss {loss.item():.6f}")
        print(f"trained {len(data)} samples in {time.perf_counter() - started:.3f} s")


if __name__ == "__main__":
    main()
