"""A graph convolutional network on a drawn citation graph: 2,708 papers of 7 subjects."""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import nn


class GraphConvolution(nn.Module):
    """Neighbours' features, averaged and mapped."""

    def __init__(self, fan_in, fan_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(fan_in, fan_out))
        self.bias = nn.Parameter(torch.zeros(fan_out))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x, adjacency):
        """``[nodes, fan_in]`` to ``[nodes, fan_out]``."""
        return torch.spmm(adjacency, torch.mm(x, self.weight)) + self.bias


class GCN(nn.Module):
    """Two convolutions with dropout."""

    def __init__(self, features, hidden, classes):
        super().__init__()
        self.gc1 = GraphConvolution(features, hidden)
        self.gc2 = GraphConvolution(hidden, classes)

    def forward(self, x, adjacency):
        """Log probabilities."""
        x = F.dropout(F.relu(self.gc1(x, adjacency)), 0.5, self.training)
        return F.log_softmax(self.gc2(x, adjacency), dim=1)


def make_graph(nodes, features, classes):
    """Features, labels, and the normalised adjacency of a graph that prefers its own class."""
    generator = torch.Generator().manual_seed(9)
    labels = torch.randint(classes, (nodes,), generator=generator)
    likely = torch.rand(classes, features, generator=generator) * 0.04
    x = (torch.rand(nodes, features, generator=generator) < likely[labels]).float()
    pairs = torch.randint(nodes, (2, 12 * nodes), generator=generator)
    same = labels[pairs[0]] == labels[pairs[1]]
    keep = same | (torch.rand(len(same), generator=generator) < 0.05)
    own = torch.arange(nodes).expand(2, -1)
    pairs = torch.cat([pairs[:, keep], pairs[:, keep].flip(0), own], dim=1)
    ones, shape = torch.ones(pairs.shape[1]), (nodes, nodes)
    adjacency = torch.sparse_coo_tensor(pairs, ones, shape, check_invariants=True).coalesce()
    degree = torch.sparse.sum(adjacency, 1).to_dense()
    row, column = adjacency.indices()
    values = adjacency.values() / (degree[row] * degree[column]).sqrt()
    normalised = torch.sparse_coo_tensor(
        adjacency.indices(), values, shape, is_coalesced=True, check_invariants=True
    )
    return x / x.sum(1, keepdim=True).clamp(min=1), labels, normalised


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=200)
    args = parser.parse_args()
    torch.manual_seed(42)
    x, labels, adjacency = make_graph(2708, 1433, 7)
    train = torch.arange(len(x)) % 4 == 0
    model = GCN(x.shape[1], args.hidden, 7)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-4)
    started = time.perf_counter()
    for epoch in range(args.epochs):
        model.train()
        optimizer.zero_grad()
        output = model(x, adjacency)
        loss = F.nll_loss(output[train], labels[train])
        loss.backward()
        optimizer.step()
        if epoch % 10 == 0:
            print(f"epoch {epoch} loss {loss.item():.6f}")
    seconds = time.perf_counter() - started
    model.eval()
    found = model(x, adjacency).argmax(1)
    print(f"test accuracy {(found[~train] == labels[~train]).float().mean():.4f}")
    print(f"trained {args.epochs} epochs in {seconds:.3f} s")


if __name__ == "__main__":
    main()
