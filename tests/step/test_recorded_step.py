"""The recorded step against plain PyTorch: the same losses, weights and optimizer state."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hotloop
from hotloop import kernels
from hotloop.train.zoo import build_model
from support import THOROUGH
from support.beside_plain import same_losses, with_program

if not kernels.is_available():
    pytest.skip(kernels.unavailable_reason(), allow_module_level=True)

STEPS = 100 if THOROUGH else 20


class Residual(nn.Module):
    # No bias before a batch norm: its gradient is only rounding, which Adam makes whole steps.
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.norm2(self.conv(x)))
        return self.head(x.mean((2, 3)))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.embed = nn.Linear(28, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x.squeeze(1))).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(28, 32, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.gru(x.squeeze(1)[:, :8])[0][:, -1])


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Linear(784, 32)
        self.bias = nn.Parameter(torch.zeros(784))

    def forward(self, x):
        hidden = torch.tanh(self.down(x.flatten(1)))
        return torch.sigmoid(hidden @ self.down.weight + self.bias)  # Tied.


def reconstruction(output, target):
    return F.mse_loss(output, target)


MODELS = {
    "small": lambda: build_model("small"),
    "big": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(784, 600), nn.ReLU(), nn.Linear(600, 600), nn.ReLU(),
        nn.Linear(600, 10),
    ),
    "cnn": lambda: build_model("cnn"),
    "residual": Residual,
    "transformer": Encoder,
    "gru": Recurrent,
    "autoencoder": Autoencoder,
}  # fmt: skip


def batches(count, size=16, reconstruct=False):
    generator = torch.Generator().manual_seed(3)
    # Something to learn: on pure noise Adam's course is chaotic, and float32 against float64
    # plain PyTorch differ by 1e-3 after a hundred steps.
    prototypes = torch.rand(10, 1, 28, 28, generator=generator)
    for _ in range(count):
        y = torch.randint(0, 10, (size,), generator=generator)
        x = prototypes[y] + 0.3 * torch.rand(size, 1, 28, 28, generator=generator)
        yield x, (x.flatten(1) if reconstruct else y)


def both(model, make_optimizer, **options):
    plain = copy.deepcopy(model)
    return plain, make_optimizer(plain.parameters()), make_optimizer(model.parameters()), options


@pytest.mark.parametrize("name", MODELS)
def test_steps_are_plain_pytorchs(name):
    torch.manual_seed(0)
    model = MODELS[name]().train()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    plain_optimizer = torch.optim.Adam(plain.parameters(), lr=3e-4)
    reconstruct = name == "autoencoder"
    loss_fn = reconstruction if reconstruct else F.cross_entropy
    data = list(batches(20 if name == "cnn" else STEPS, reconstruct=reconstruct))
    step = hotloop.compile_step(model, loss_fn, optimizer, example=data[0])
    assert step.path == "plain"
    losses, expected = [], []
    for number, (x, y) in enumerate(data):
        torch.manual_seed(number)  # Dropout draws alike.
        losses.append(step(x, y).item())
        torch.manual_seed(number)
        plain_optimizer.zero_grad()
        loss = loss_fn(plain(x), y)
        loss.backward()
        plain_optimizer.step()
        expected.append(loss.item())
        assert step.path == ("compiled" if number > 0 else "plain"), step.reason
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-4, atol=1e-6)
    for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        # A third of one step of Adam, which moves each weight by up to lr = 3e-4 a step.
        assert (a - b).abs().float().mean() < 1e-4
    # States load both ways, and the next step agrees.
    plain_optimizer.load_state_dict(optimizer.state_dict())
    plain.load_state_dict(model.state_dict())
    optimizer.load_state_dict(copy.deepcopy(plain_optimizer.state_dict()))
    x, y = data[0]
    torch.manual_seed(0)
    first = step(x, y)
    torch.manual_seed(0)
    torch.testing.assert_close(first, loss_fn(plain(x), y).detach(), rtol=1e-5, atol=1e-6)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, dampening=0.1, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, lr_decay=0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "asgd": lambda p: torch.optim.ASGD(p, lr=1e-2),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_with_groups_schedulers_and_clipping(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 33), nn.Tanh(), nn.Linear(33, 5))
    plain = copy.deepcopy(model)
    groups = [
        [{"params": m[0].parameters()}, {"params": m[2].parameters(), "lr": 5e-3}]
        for m in (model, plain)
    ]
    optimizer, plain_optimizer = (OPTIMIZERS[name](g) for g in groups)
    schedules = [
        torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (optimizer, plain_optimizer)
    ]
    x, y = torch.randn(20, 12), torch.randint(0, 5, (20,))
    step = hotloop.compile_step(
        model, F.cross_entropy, optimizer, (x, y), clip_norm=0.5, clip_value=0.2
    )
    for _ in range(12):
        loss = step(x, y)
        plain_optimizer.zero_grad()
        expected = F.cross_entropy(plain(x), y)
        expected.backward()
        nn.utils.clip_grad_value_(plain.parameters(), 0.2)
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        plain_optimizer.step()
        for schedule in schedules:
            schedule.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    assert step.path == "compiled", step.reason
    assert ("keeps its own step" in step.reason) == (name == "asgd")
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_many_steps_in_one_call_are_the_same_steps():
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(12, 33), nn.ReLU(), nn.Linear(33, 5))
    many = copy.deepcopy(one)
    count = 40  # With an audit among them.
    x, y = torch.randn(count * 20, 12), torch.randint(0, 5, (count * 20,))
    steps = [
        hotloop.compile_step(m, F.cross_entropy, torch.optim.Adam(m.parameters()), (x[:20], y[:20]))
        for m in (one, many)
    ]
    losses = torch.stack([steps[0](x[i : i + 20], y[i : i + 20]) for i in range(0, len(x), 20)])
    assert torch.equal(losses, steps[1].many(x, y, count))
    for a, b in zip(one.parameters(), many.parameters(), strict=True):
        assert torch.equal(a, b)
    assert steps[1].optimizer.state[many[0].weight]["step"] == count


@pytest.mark.parametrize("padding", [0, 4])
def test_many_steps_on_padded_rows(padding):
    """As the buffers of a run have them, where rows begin at lines of the cache."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 33), nn.ReLU(), nn.Linear(33, 5))
    plain = copy.deepcopy(model)
    x, y = torch.randn(8 * 20, 12 + padding)[:, :12], torch.randint(0, 5, (8 * 20,))
    step = hotloop.compile_step(
        model, F.cross_entropy, torch.optim.SGD(model.parameters(), lr=0.1), (x[:20], y[:20])
    )
    losses = step.many(x, y, 8)
    assert step.path == "compiled", step.reason
    optimizer, expected = torch.optim.SGD(plain.parameters(), lr=0.1), []
    for a, b in zip(x.split(20), y.split(20), strict=True):
        optimizer.zero_grad()
        loss = F.cross_entropy(plain(a), b)
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    torch.testing.assert_close(losses, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_micro_batches_make_the_update_of_the_whole_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 33), nn.ReLU(), nn.Linear(33, 5))
    plain = copy.deepcopy(model)
    x, y = torch.randn(64, 12), torch.randint(0, 5, (64,))
    plan = hotloop.Plan().replace({"memory.micro_batch_size": 16})
    step = hotloop.compile_step(
        model, F.cross_entropy, torch.optim.Adam(model.parameters()), (x, y), plan
    )
    plain_optimizer = torch.optim.Adam(plain.parameters())
    same_losses(step, plain, plain_optimizer, x, y, steps=5)
    assert step.path == "compiled", step.reason
    assert "accumulated" in step.reason
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_another_batch_size_a_replaced_weight_and_another_mode_stay_right():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(12, 33, bias=False), nn.BatchNorm1d(33), nn.ReLU(), nn.Linear(33, 5)
    )
    plain = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters())
    plain_optimizer = torch.optim.Adam(plain.parameters())
    x, y = torch.randn(20, 12), torch.randint(0, 5, (20,))
    step = hotloop.compile_step(model, F.cross_entropy, optimizer, (x, y))
    for number in range(14):
        n = 7 if number in (3, 5, 11) else 20
        if number == 6:
            for m in (model, plain):
                m[0].weight.data = m[0].weight.data.clone() * 0.5
        if number == 9:
            assert step.path == "compiled", step.reason
            model.eval(), plain.eval()
        loss = step(x[:n], y[:n])
        plain_optimizer.zero_grad()
        expected = F.cross_entropy(plain(x[:n]), y[:n])
        expected.backward()
        plain_optimizer.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 5)

    def forward(self, x):
        return self.linear(x if x.sum() > 0 else -x)


def hooked():
    model = nn.Linear(12, 5)
    model.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("make", "reason"), [(Branching, "reads a tensor's value"), (hooked, "has hooks")]
)
def test_what_cannot_be_recorded_trains_on_the_plain_path(make, reason):
    torch.manual_seed(0)
    model = make()
    plain, x, y = copy.deepcopy(model), torch.randn(20, 12), torch.randint(0, 5, (20,))
    step = hotloop.compile_step(model, F.cross_entropy, torch.optim.SGD(model.parameters()), (x, y))
    same_losses(step, plain, torch.optim.SGD(plain.parameters()), x, y, steps=5)
    assert step.path == "plain"
    assert reason in step.reason


def test_weights_in_double_precision_get_their_gradients_from_a_program():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 33), nn.Tanh(), nn.Linear(33, 5)).double()
    plain, x, y = copy.deepcopy(model), torch.randn(20, 12).double(), torch.randint(0, 5, (20,))
    optimizer, plain_optimizer = (
        torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, plain)
    )
    step = hotloop.compile_step(model, F.cross_entropy, optimizer, (x, y))
    same_losses(step, plain, plain_optimizer, x, y, steps=6)
    assert step.path == "compiled", step.reason
    assert "torch makes the update" in step.reason
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_operations_tell_where_the_time_goes():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(128, 10)
    )
    optimizer = torch.optim.Adam(model.parameters())
    x, y = torch.randn(16, 1, 8, 8), torch.randint(0, 10, (16,))
    step = with_program(model, F.cross_entropy, optimizer, x, y)
    found = {}
    for work in step.operations():
        row = work.to_dict(step_s=1.0, ceiling_flop_per_s=1e12)
        found[row["kind"], row["shape"]] = row
        assert row["s"] > 0
        assert row["time_share"] == row["count"] * row["s"]
        assert row["share_of_ceiling"] == row["flop_per_s"] / 1e12
        assert row["candidates_s"][row["kernel"]] == row["s"]
    flop = {key: row["flop_per_s"] * row["s"] for key, row in found.items()}
    image = "[16, 4, 6, 6] by [8, 4, 3, 3]"
    one = 2 * 16 * 8 * 16 * 4 * 9
    assert flop["convolution", image] == pytest.approx(one)
    assert flop["convolution backward", image] == pytest.approx(2 * one)
    # The gradient of the first image is nobody's.
    first = "[16, 1, 8, 8] by [4, 1, 3, 3]"
    assert flop["convolution backward", first] == pytest.approx(flop["convolution", first])
    assert flop["product and update", "10 x 16 x 128"] == pytest.approx(2 * 10 * 16 * 128)
    assert flop["product", "16 x 128 x 10 nt"] == pytest.approx(2 * 16 * 128 * 10)
    # Bytes: each operand and each result once; updated weights and Adam's two states both ways.
    size = {key: row["modelled_bytes"] / 4 for key, row in found.items()}
    x, w, out = 16 * 4 * 36, 8 * 4 * 9, 16 * 8 * 16
    assert size["convolution", image] == x + w + out
    assert size["convolution backward", image] == out + 2 * (x + w)
    x, w, out = 16 * 64, 4 * 9, 16 * 4 * 36
    assert size["convolution backward", first] == out + x + w
    assert size["product and update", "10 x 16 x 128"] == 10 * 16 + 16 * 128 + 6 * 10 * 128
    assert size["product", "16 x 128 x 10 nt"] == 16 * 128 + 128 * 10 + 16 * 10


def test_a_loss_of_one_hot_labels_is_a_program():
    torch.manual_seed(0)
    model = nn.Linear(8, 5)
    plain = copy.deepcopy(model)
    optimizers = [torch.optim.Adam(m.parameters()) for m in (model, plain)]

    def loss_fn(output, labels):
        return F.mse_loss(output, F.one_hot(labels, 5).float())

    x, y = torch.randn(16, 8), torch.randint(0, 5, (16,))
    step = hotloop.compile_step(model, loss_fn, optimizers[0], (x, y))
    for _ in range(6):
        x, y = torch.randn(16, 8), torch.randint(0, 5, (16,))
        loss = step(x, y)
        optimizers[1].zero_grad()
        expected = loss_fn(plain(x), y)
        expected.backward()
        optimizers[1].step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    assert step.path == "compiled", step.reason


@pytest.mark.parametrize("micro", [None, 8])
def test_a_batch_that_is_its_own_target(micro):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 12))
    plain = copy.deepcopy(model)
    optimizers = [torch.optim.Adam(m.parameters()) for m in (model, plain)]
    plan = hotloop.Plan().replace({"memory.micro_batch_size": micro})
    x = torch.randn(16, 12)
    step = hotloop.compile_step(model, F.mse_loss, optimizers[0], (x, x), plan)
    for number in range(8):
        x = torch.randn(16, 12)
        # Another tensor of the same values is another shape of batch.
        loss = step(x, x.clone() if number == 6 else x)
        optimizers[1].zero_grad()
        expected = F.mse_loss(plain(x), x)
        expected.backward()
        optimizers[1].step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    assert step.path == "compiled", step.reason
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


KEPT = [1.0] * 20_000


def scaled(x):
    return x * KEPT[-1]


def test_the_audit_finds_what_no_guard_sees():
    class Scaling(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(12, 5)

        def forward(self, x):
            return scaled(self.linear(x))

    torch.manual_seed(0)
    KEPT[-1] = 1.0
    model = Scaling()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = torch.randn(16, 12), torch.randint(0, 5, (16,))
    step = hotloop.compile_step(model, F.cross_entropy, optimizer, (x, y))
    for _ in range(4):
        step(x, y)
    assert step.path == "compiled", step.reason
    KEPT[-1] = 3.0  # In so long a list guards look at the length alone.
    for _ in range(14):
        step(x, y)
    assert step.path == "compiled", step.reason
    # After 16 programs one step runs plain, and is recorded.
    loss = step(x, y)
    assert step.path == "plain"
    assert "audit" in step.reason
    plain = copy.deepcopy(model)
    expected = F.cross_entropy(plain(x), y)
    torch.testing.assert_close(step(x, y), expected.detach())
    assert torch.isfinite(loss)


class WritesItsCopy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.head = nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, x):
        h = self.linear(x)
        copied = torch.empty_like(h).copy_(h.detach())
        copied.zero_()
        return self.head(h + copied)


def test_a_copy_that_is_written_is_a_copy():
    torch.manual_seed(0)
    model = WritesItsCopy()
    plain = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain)]
    x, y = torch.randn(16, 12), torch.randint(0, 5, (16,))
    step = hotloop.compile_step(model, F.cross_entropy, optimizers[0], (x, y))
    same_losses(step, plain, optimizers[1], x, y, steps=6)
    assert step.path == "compiled", step.reason


def test_a_step_that_nobody_holds_gives_its_memory_back_at_once():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.randn(4, 8), torch.randint(3, (4,))
    step = hotloop.compile_step(
        model, nn.functional.cross_entropy, torch.optim.SGD(model.parameters(), lr=0.1), (x, y)
    )
    for _ in range(4):
        step(x, y)
    assert step.path == "compiled"
    gone = weakref.ref(step._recorded._block)
    gc.disable()
    try:
        del step
        assert gone() is None
    finally:
        gc.enable()
