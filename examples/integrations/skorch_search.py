"""A grid search over a network's width and learning rate, each fit on hotloop's step.

pip install 'hotloop[skorch]'
"""

import numpy as np
import torch
from sklearn.model_selection import GridSearchCV
from torch import nn

from hotloop.integrations.skorch import HotloopClassifier


class Body(nn.Module):
    """Two layers and probabilities."""

    def __init__(self, width=32):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, 3))

    def forward(self, X):
        """Probabilities of three classes."""
        return self.layers(X).softmax(-1)


def main() -> None:
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=(600, 20)).astype(np.float32)
    y = x[:, :3].argmax(1).astype(np.int64)
    net = HotloopClassifier(Body, max_epochs=5, batch_size=32, verbose=0, train_split=False)
    search = GridSearchCV(net, {"lr": [0.01, 0.1], "module__width": [16, 64]}, cv=3)
    search.fit(x, y)
    best = search.best_estimator_
    print(f"best {search.best_params_}: accuracy {search.best_score_:.3f}; {best.hotloop_reason}")
    assert best.hotloop_path == "compiled"


if __name__ == "__main__":
    main()
