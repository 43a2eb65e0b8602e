"""Estimators with fit and predict, as scikit-learn has them, on tensors: PCA, k-means, k-NN."""

import argparse
import time

import torch
from digits import load


class PCA:
    """Projection onto the directions of greatest variance."""

    def __init__(self, n_components):
        self.n_components = n_components

    def fit(self, x):
        """x ``[n, features]``."""
        self.mean_ = x.mean(0)
        centred = x - self.mean_
        _, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
        self.components_ = vectors[:, -self.n_components :].flip(1)
        return self

    def transform(self, x):
        """``[n, n_components]``."""
        return (x - self.mean_) @ self.components_


class KMeans:
    """Lloyd's iterations from chosen rows."""

    def __init__(self, n_clusters, max_iter=20):
        self.n_clusters, self.max_iter = n_clusters, max_iter

    def fit(self, x):
        """x ``[n, features]``."""
        centres = x[torch.randperm(len(x))[: self.n_clusters]].clone()
        for _ in range(self.max_iter):
            nearest = self.distances(x, centres).argmin(1)
            sums = torch.zeros_like(centres).index_add_(0, nearest, x)
            counts = torch.bincount(nearest, minlength=self.n_clusters).clamp(min=1)
            centres = sums / counts[:, None]
        self.cluster_centers_ = centres
        self.inertia_ = self.distances(x, centres).amin(1).clamp(min=0).mean().item()
        return self

    @staticmethod
    def distances(x, y):
        """Squared, ``[len(x), len(y)]``."""
        return (x * x).sum(1, keepdim=True) - 2 * x @ y.T + (y * y).sum(1)


class KNeighborsClassifier:
    """The commonest class among the nearest rows."""

    def __init__(self, n_neighbors):
        self.n_neighbors = n_neighbors

    def fit(self, x, y):
        """x ``[n, features]``, y ``[n]``."""
        self.x_, self.y_ = x, y
        return self

    def predict(self, x):
        """Class of each row, a thousand rows at a time."""
        found = []
        for rows in x.split(1000):
            near = KMeans.distances(rows, self.x_).topk(self.n_neighbors, largest=False).indices
            found.append(self.y_[near].mode(1).values)
        return torch.cat(found)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--queries", type=int, default=2_000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(1)
    x, y = load(count=args.samples)
    queries, wanted = load(train=False, count=args.queries)
    x, queries = (t.flatten(1).float() / 255 for t in (x, queries))
    with torch.inference_mode():
        started = time.perf_counter()
        for number in range(args.rounds):
            pca = PCA(100).fit(x)
            kmeans = KMeans(64).fit(pca.transform(x))
            found = KNeighborsClassifier(5).fit(x, y).predict(queries)
            accuracy = (found == wanted).float().mean()
            print(f"round {number} loss {kmeans.inertia_:.6f} accuracy {accuracy:.4f}")
        print(f"predicted {args.rounds * len(queries)} in {time.perf_counter() - started:.3f} s")


if __name__ == "__main__":
    main()
