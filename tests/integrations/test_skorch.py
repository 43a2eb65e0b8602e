"""skorch's nets on hotloop's step: the same history, weights and search results."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

skorch = pytest.importorskip("skorch", reason="the extra skorch")
from hotloop.integrations.skorch import (  # noqa: E402
    HotloopBinaryClassifier,
    HotloopClassifier,
    HotloopNet,
    HotloopRegressor,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # skorch's and scikit-learn's own.
ROWS = 30 * 16 + 7


class Body(nn.Module):
    def __init__(self, width=24, outputs=3, probabilities=True):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(10, width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, outputs)
        )
        self.probabilities = probabilities

    def forward(self, X):
        found = self.layers(X)
        return found.softmax(-1) if self.probabilities else found


def samples(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(ROWS, 10)).astype(np.float32)
    return x, x[:, :3].argmax(1).astype(np.int64)


def fitted(kind, y=None, **options):
    torch.manual_seed(0)
    settings = {"module": Body, "max_epochs": 3, "batch_size": 16, "verbose": 0, "lr": 0.1}
    net = kind(**(settings | options))
    x, labels = samples()
    return net.fit(x, labels if y is None else y)


def assert_alike(net, plain):
    for name in ("train_loss", "valid_loss"):
        found, wanted = net.history[:, name], plain.history[:, name]
        np.testing.assert_allclose(found, wanted, rtol=1e-4, err_msg=name)
    losses, expected = (
        [b["train_loss"] for e in n.history[:, "batches"] for b in e if "train_loss" in b]
        for n in (net, plain)
    )
    assert len(losses) > 60
    np.testing.assert_allclose(losses, expected, rtol=1e-3, atol=1e-6)
    for p, q in zip(net.module_.parameters(), plain.module_.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


REGRESSION = {"module__outputs": 1, "module__probabilities": False}


@pytest.mark.parametrize(
    ("kind", "theirs", "options"),
    [
        (HotloopClassifier, "NeuralNetClassifier", {}),
        (HotloopClassifier, "NeuralNetClassifier", {"optimizer": torch.optim.Adam, "lr": 0.01}),
        (HotloopRegressor, "NeuralNetRegressor", REGRESSION),
        (HotloopBinaryClassifier, "NeuralNetBinaryClassifier", REGRESSION),
        (
            HotloopNet,
            "NeuralNet",
            {"criterion": nn.CrossEntropyLoss, "module__probabilities": False},
        ),
    ],
)
def test_history_and_weights_are_skorchs(kind, theirs, options):
    y = samples()[0][:, :1] if kind is HotloopRegressor else None
    if kind is HotloopBinaryClassifier:
        y = (samples()[1] > 0).astype(np.float32)
        options = options | {"module": Flat}
    net = fitted(kind, y, **options)
    plain = fitted(getattr(skorch, theirs), y, **options)
    assert net.hotloop_path == "compiled", net.hotloop_reason
    assert_alike(net, plain)


class Flat(Body):
    def forward(self, X):
        return super().forward(X).squeeze(-1)


def test_clipping_by_a_callback():
    clip = ("clip", skorch.callbacks.GradientNormClipping(gradient_clip_value=0.05))
    net = fitted(HotloopClassifier, callbacks=[clip])
    assert net.hotloop_path == "compiled", net.hotloop_reason
    assert_alike(net, fitted(skorch.NeuralNetClassifier, callbacks=[clip]))


def test_a_schedule_by_batches():
    rates = skorch.callbacks.LRScheduler("StepLR", step_size=5, gamma=0.8, step_every="batch")
    net = fitted(HotloopClassifier, callbacks=[("rates", rates)])
    assert net.hotloop_path == "compiled", net.hotloop_reason
    assert_alike(net, fitted(skorch.NeuralNetClassifier, callbacks=[("rates", rates)]))


class LooksAtGradients(skorch.callbacks.Callback):
    def on_grad_computed(self, net, named_parameters, **kwargs):
        net.history.record_batch("norm", float(sum(p.grad.norm() for _, p in named_parameters)))


class LooksAtPredictions(skorch.callbacks.Callback):
    def on_batch_end(self, net, batch, training, y_pred, **kwargs):
        net.history.record_batch("mean", float(y_pred.mean()))


@pytest.mark.parametrize(
    "callback",
    [
        LooksAtGradients(),
        LooksAtPredictions(),
        skorch.callbacks.EpochScoring("accuracy", on_train=True, name="train_accuracy"),
    ],
)
def test_callbacks_that_look_into_the_step_keep_it_skorchs(callback):
    net = fitted(HotloopClassifier, callbacks=[("mine", callback)])
    assert net.hotloop_path == "plain"
    assert "callback mine" in net.hotloop_reason
    assert_alike(net, fitted(skorch.NeuralNetClassifier, callbacks=[("mine", callback)]))


class Penalized(HotloopClassifier):
    """A loss of the user's own, with a factor that changes."""

    rate = 1e-3

    def get_loss(self, y_pred, y_true, X=None, training=False):
        loss = super().get_loss(y_pred, y_true, X=X, training=training)
        return loss + self.rate * sum(p.square().sum() for p in self.module_.parameters())

    def on_epoch_end(self, net, **kwargs):
        super().on_epoch_end(net, **kwargs)
        self.rate = self.rate * 10


def test_a_loss_of_the_users_own_and_what_it_reads():
    net = fitted(Penalized)
    assert net.hotloop_path == "compiled", net.hotloop_reason

    class Plain(skorch.NeuralNetClassifier):
        rate = 1e-3

        def get_loss(self, y_pred, y_true, X=None, training=False):
            loss = super().get_loss(y_pred, y_true, X=X, training=training)
            return loss + self.rate * sum(p.square().sum() for p in self.module_.parameters())

        def on_epoch_end(self, net, **kwargs):
            super().on_epoch_end(net, **kwargs)
            self.rate = self.rate * 10

    assert_alike(net, fitted(Plain))


def test_grid_search():
    from sklearn.model_selection import GridSearchCV

    found = []
    for kind in (skorch.NeuralNetClassifier, HotloopClassifier):
        torch.manual_seed(0)
        net = kind(Body, max_epochs=3, batch_size=16, verbose=0, train_split=False)
        grid = {"lr": [0.01, 0.2], "module__width": [8, 24]}
        search = GridSearchCV(net, grid, cv=3, scoring="accuracy", error_score="raise")
        search.fit(*samples())
        found.append(search)
    plain, fast = found
    assert fast.best_estimator_.hotloop_path == "compiled"
    assert fast.best_params_ == plain.best_params_
    np.testing.assert_allclose(
        fast.cv_results_["mean_test_score"], plain.cv_results_["mean_test_score"], atol=0.01
    )


def test_a_fitted_net_can_be_copied_pickled_and_trained_on():
    net = fitted(HotloopClassifier)
    plain = fitted(skorch.NeuralNetClassifier)
    x, y = samples()
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), net):
        np.testing.assert_allclose(other.predict_proba(x), plain.predict_proba(x), atol=1e-4)
    again = pickle.loads(pickle.dumps(net))
    torch.manual_seed(9)
    again.partial_fit(x, y)
    torch.manual_seed(9)
    plain.partial_fit(x, y)
    assert again.hotloop_path == "compiled", again.hotloop_reason
    assert_alike(again, plain)


def test_parameters_that_are_set_make_a_new_step():
    nets = []
    for kind in (HotloopClassifier, skorch.NeuralNetClassifier):
        net = fitted(kind)
        torch.manual_seed(1)
        net.set_params(module__width=12, optimizer__momentum=0.9)
        net.fit(*samples())
        nets.append(net)
    assert nets[0].hotloop_path == "compiled", nets[0].hotloop_reason
    assert_alike(*nets)
