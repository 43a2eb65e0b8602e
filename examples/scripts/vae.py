"""A variational autoencoder on MNIST: 784-400-20-400-784."""

import argparse
import time

import torch
import torch.nn.functional as F
from digits import Digits
from torch import nn, optim


class VAE(nn.Module):
    """Two layers down, two up, a normal distribution of 20 numbers between."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(784, 400)
        self.fc21 = nn.Linear(400, 20)
        self.fc22 = nn.Linear(400, 20)
        self.fc3 = nn.Linear(20, 400)
        self.fc4 = nn.Linear(400, 784)

    def encode(self, x):
        """Mean and logarithm of the variance."""
        h1 = F.relu(self.fc1(x))
        return self.fc21(h1), self.fc22(h1)

    def reparameterize(self, mu, logvar):
        """A sample, differentiable in both."""
        std = torch.exp(0.5 * logvar)
        return mu + torch.randn_like(std) * std

    def decode(self, z):
        """Pixels between 0 and 1."""
        return torch.sigmoid(self.fc4(F.relu(self.fc3(z))))

    def forward(self, x):
        """Reconstruction, mean, logarithm of the variance."""
        mu, logvar = self.encode(x.view(-1, 784))
        return self.decode(self.reparameterize(mu, logvar)), mu, logvar


def loss_function(recon_x, x, mu, logvar):
    bce = F.binary_cross_entropy(recon_x, x.view(-1, 784), reduction="sum")
    kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return bce + kld


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--samples", type=int, default=20_000)
    args = parser.parse_args()
    torch.manual_seed(1)
    data = Digits(count=args.samples)
    loader = torch.utils.data.DataLoader(data, batch_size=args.batch_size, shuffle=True)
    model = VAE()
    optimizer = optim.Adam(model.parameters(), lr=1e-3)
    for epoch in range(1, args.epochs + 1):
        started = time.perf_counter()
        model.train()
        for batch, (images, _) in enumerate(loader):
            x = (images * 0.3081 + 0.1307).clamp(0, 1)
            optimizer.zero_grad()
            recon, mu, logvar = model(x)
            loss = loss_function(recon, x, mu, logvar)
            loss.backward()
            optimizer.step()
            if batch % 10 == 0:
                print(f"epoch {epoch} batch {batch} loss {loss.item() / len(x):.6f}")
        print(f"trained {len(data)} samples in {time.perf_counter() - started:.3f} s")


if __name__ == "__main__":
    main()
