"""An unmodified ``LightningModule`` on hotloop's step: Lightning's losses, logs and state."""

import warnings

import pytest
import torch
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pl = pytest.importorskip("lightning.pytorch", reason="the extra lightning")
    from hotloop.integrations.lightning import HotloopStrategy, reads_batch_idx

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own.
STEPS = 30


class Net(pl.LightningModule):
    """A classifier that logs what people log."""

    def __init__(self, optimizer=torch.optim.Adam, **options):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 4))
        self.optimizer, self.options = optimizer, options

    def forward(self, x):
        return self.body(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        loss = nn.functional.cross_entropy(logits, y)
        self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        self.log_dict({"accuracy": (logits.argmax(1) == y).float().mean(), "one": 1.0})
        return loss

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters(), **self.options)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.7)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Seen(pl.Callback):
    """What callbacks see after each batch."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        logged = {k: float(v) for k, v in trainer.callback_metrics.items()}
        found = {k: float(v) for k, v in (outputs or {}).items()}
        self.rows.append((found | logged, trainer.global_step, getattr(module, "norm", 0.0)))


def data(count=STEPS * 16 + 5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 12, generator=generator)
    y = x[:, :4].argmax(1)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)


def fit(module, strategy, epochs=1, loaders=(), given=None, **options):
    """Train and give the trainer."""
    given = given or {}
    torch.manual_seed(3)
    options["callbacks"] = [Seen(), *options.get("callbacks", [])]
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, strategy=strategy, max_epochs=epochs, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        **options,
    )  # fmt: skip
    trainer.fit(module, *(loaders or (data(),)), **given)
    return trainer


def both(make, epochs=1, **options):
    """The same run by Lightning and by hotloop: the modules, trainers and the strategy."""
    runs = []
    strategy = Kept()
    for chosen in ("auto", strategy):
        torch.manual_seed(1)
        module = make()
        runs.append((module, fit(module, chosen, epochs, **options)))
    return (*runs, strategy)


class Kept(HotloopStrategy):
    """Remembers path and reason beyond the end of the fit."""

    def teardown(self):
        self.kept = self.path, self.reason
        super().teardown()


def assert_alike(plain, fast):
    (a, at), (b, bt) = plain, fast
    rows = [next(c.rows for c in t.callbacks if isinstance(c, Seen)) for t in (at, bt)]
    assert len(rows[0]) == len(rows[1]) > 0
    for (values, step, norm), (others, other_step, other_norm) in zip(*rows, strict=True):
        assert others == pytest.approx(values, rel=1e-4, abs=1e-6)
        assert other_step == step
        assert other_norm == pytest.approx(norm, rel=1e-4)
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-3, atol=1e-5, msg=name)
    ours, theirs = (t.optimizers[0].state_dict() for t in (bt, at))
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.Adam, {"lr": 1e-2}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    ],
)
def test_losses_logs_schedule_and_state_are_lightnings(optimizer, options):
    plain, fast, strategy = both(lambda: Net(optimizer, **options), epochs=2)
    assert strategy.kept[0] == "compiled", strategy.kept
    assert_alike(plain, fast)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_clip_val": 0.05},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    ],
)
def test_clipping(options):
    plain, fast, strategy = both(lambda: Net(lr=1e-2), **options)
    assert strategy.kept[0] == "compiled", strategy.kept
    assert_alike(plain, fast)


class ReadsEpoch(Net):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, 0) * (1 + self.current_epoch)


def test_what_a_step_reads_of_the_trainer_is_as_it_is_now():
    plain, fast, strategy = both(lambda: ReadsEpoch(lr=1e-2), epochs=4)
    assert strategy.kept[0] == "compiled", strategy.kept
    assert_alike(plain, fast)


class ReadsStep(Net):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, 0) / (1 + self.global_step)


class ReadsIndex(Net):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) / (1 + batch_idx)


class ReturnsMore(Net):
    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, 0), "rows": batch[0].sum()}


class Skips(Net):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, 0)
        return None if batch[0].sum() > 5 else loss


class LooksAtGradients(Net):
    def on_before_optimizer_step(self, optimizer):
        self.norm = sum(float(p.grad.norm()) for p in self.parameters())


class OwnOptimizerStep(Net):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 + batch_idx)
        optimizer.step(closure=optimizer_closure)


class ReadsTheOptimizer(Net):
    def training_step(self, batch, batch_idx):
        self.log("rate", self.optimizers().param_groups[0]["lr"])
        return super().training_step(batch, 0)


class CountsSteps(Net):
    def __init__(self, **options):
        super().__init__(**options)
        self.count = 0

    def training_step(self, batch, batch_idx):
        self.count += 1
        return super().training_step(batch, 0) * (1 + 0.1 * self.count)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (ReadsStep, "global_step"),
        (ReadsIndex, "batch_idx"),
        (ReturnsMore, "rows"),
        (Skips, ""),
        (LooksAtGradients, "on_before_optimizer_step"),
        (OwnOptimizerStep, "optimizer_step"),
        (ReadsTheOptimizer, "trainer."),
        (CountsSteps, "count"),
    ],
)
def test_what_no_program_can_stand_in_for_is_lightnings_own(kind, reason):
    plain, fast, strategy = both(lambda: kind(lr=1e-2))
    assert strategy.kept[0] == "plain"
    assert reason in strategy.kept[1]
    assert_alike(plain, fast)


def test_accumulated_batches_are_lightnings_own():
    plain, fast, strategy = both(lambda: Net(lr=1e-2), accumulate_grad_batches=2)
    assert "accumulated" in strategy.kept[1]
    assert_alike(plain, fast)


def test_a_callback_that_looks_at_gradients():
    class Norms(pl.Callback):
        def on_after_backward(self, trainer, module):
            module.norm = float(module.body[0].weight.grad.norm())

    plain, fast, strategy = both(lambda: Net(lr=1e-2), callbacks=[Norms()])
    assert "Norms has on_after_backward" in strategy.kept[1]
    assert_alike(plain, fast)


def test_layers_that_a_callback_thaws():
    class Thaw(pl.Callback):
        def on_train_epoch_start(self, trainer, module):
            module.body[0].requires_grad_(trainer.current_epoch > 0)

    def make():
        return Net(torch.optim.SGD, lr=0.1)

    plain, fast, strategy = both(make, epochs=2, callbacks=[Thaw()])
    assert strategy.kept[0] == "compiled", strategy.kept
    assert_alike(plain, fast)


def test_a_checkpoint_goes_on_either_way(tmp_path):
    torch.manual_seed(1)
    trainer = fit(Net(lr=1e-2), HotloopStrategy())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    ends = []
    for strategy in ("auto", HotloopStrategy()):
        module = Net(lr=1e-2)
        given = {"ckpt_path": tmp_path / "one.ckpt", "weights_only": False}
        ends.append((module, fit(module, strategy, epochs=2, given=given)))
    assert_alike(*ends)


class Validated(Net):
    def validation_step(self, batch, batch_idx):
        self.log("val", nn.functional.cross_entropy(self(batch[0]), batch[1]))


def test_by_name_and_validation_between():
    ends = []
    for strategy in ("auto", "hotloop"):
        torch.manual_seed(1)
        module = Validated(lr=1e-2)
        loaders = data(), data(count=40, seed=1)
        trainer = fit(module, strategy, 2, loaders, val_check_interval=10, num_sanity_val_steps=1)
        ends.append((module, trainer))
    assert ends[1][1].strategy.strategy_name == "hotloop"
    assert_alike(*ends)


def test_the_module_is_left_as_it_was():
    plain, (module, trainer), _ = both(lambda: Net(lr=1e-2))
    assert vars(module).keys() == vars(plain[0]).keys()
    assert module.trainer is trainer


@pytest.mark.parametrize(
    ("body", "reads"),
    [
        (lambda self, batch, batch_idx: batch, False),
        (lambda self, batch: batch, False),
        (lambda self, batch, index: index, True),
        (lambda self, batch, index: [index for _ in batch], True),
        (lambda self, batch, index: locals(), True),
        (lambda self, *args: args, True),
        (lambda self, batch, index=0: (lambda: index)(), True),
    ],
)
def test_whether_a_step_reads_its_index(body, reads):
    assert reads_batch_idx(body) is reads
