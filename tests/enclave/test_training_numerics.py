"""A training export against plain PyTorch: losses, weights, states, the order of samples."""

import copy
import functools

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hotloop import kernels
from hotloop.data import GlobalSampler, Normalize, open_dataset
from hotloop.enclave.training import export_training, load_training
from hotloop.enclave.training.samples import Samples, order
from hotloop.errors import InputError, ModelError
from hotloop.train.zoo import build_model
from support import THOROUGH

pytestmark = pytest.mark.skipif(
    not kernels.is_available(), reason=kernels.unavailable_reason() or ""
)

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.05),
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, dampening=0.1),
    "Nesterov": lambda p: torch.optim.SGD(p, 0.05, 0.9, nesterov=True, weight_decay=1e-3),
    "Adam": lambda p: torch.optim.Adam(p, weight_decay=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p),
    "NAdam": lambda p: torch.optim.NAdam(p),
    "RAdam": lambda p: torch.optim.RAdam(p),
    "Adamax": lambda p: torch.optim.Adamax(p),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "RMSprop": lambda p: torch.optim.RMSprop(p),
    "Adagrad": lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.1, lr_decay=0.1),
}


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5))


def points(seed, count=24):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, 20, generator=draw), torch.randint(5, (count,), generator=draw)


@functools.cache
def shipped():
    return open_dataset("mnist", split="train", allow_download=False)


def digits(seed, count):
    """Digits, whose losses fall: on noise a rounding soon makes another run."""
    data = shipped()
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randint(data.num_samples, (count,), generator=draw)
    x, y = torch.empty(count, 1, 28, 28), torch.empty(count, dtype=torch.int64)
    data.gather(rows, x, y)
    return x, y


def torch_step(model, optimizer, loss_fn, x, y):
    optimizer.zero_grad()
    loss = loss_fn(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def run_beside(model, optimizer, folder, batches, loss_fn=None, **options):
    """Losses of torch and of the export on the same batches; the export, trained."""
    loss_fn = loss_fn or nn.CrossEntropyLoss()
    export_training(model, loss_fn, optimizer, batches[0], folder, **options)
    run = load_training(folder)
    losses = []
    for x, y in batches:
        expected = torch_step(model, optimizer, loss_fn, x, y)
        losses.append((expected, run.step(x.numpy(), y.numpy())))
    return numpy.array(losses).T, run


def assert_same_weights(model, run, **near):
    for name, value in model.state_dict().items():
        numpy.testing.assert_allclose(run.tensors[name], value.numpy(), **near)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_makes_the_steps_of_torch(name, tmp_path):
    model = perceptron()
    optimizer = OPTIMIZERS[name](model.parameters())
    (expected, got), run = run_beside(
        model, optimizer, tmp_path / "export", [points(n) for n in range(40)]
    )
    numpy.testing.assert_allclose(got, expected, rtol=2e-5)
    # Adadelta divides by its first, tiny steps, and passes on their rounding.
    assert_same_weights(model, run, rtol=1e-3, atol=1e-4 if name == "Adadelta" else 2e-5)


@pytest.mark.parametrize(
    ("name", "steps", "size", "near"),
    [("small", 100, 64, 2e-5), ("cnn", 40 if THOROUGH else 15, 64, 1e-3), ("big", 3, 8, 2e-5)],
)
def test_the_zoo_trains_as_in_torch(name, steps, size, near, tmp_path):
    torch.manual_seed(1)
    model = build_model(name)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    batches = [digits(n, size) for n in range(steps)]
    (expected, got), run = run_beside(model, optimizer, tmp_path / "export", batches)
    numpy.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)
    # Where two pixels of a window are as good as alike, pooling takes the one or the other: after
    # 76 steps of the cnn, losses are up to 1 % apart.
    assert_same_weights(model, run, rtol=1e-3, atol=near)


def test_several_groups_and_frozen_weights(tmp_path):
    model = perceptron()
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [{"params": [model[0].weight]}, {"params": model[2].parameters(), "lr": 0.02}], lr=0.01
    )
    (expected, got), run = run_beside(
        model, optimizer, tmp_path / "export", [points(n) for n in range(20)]
    )
    numpy.testing.assert_allclose(got, expected, rtol=2e-5)
    assert_same_weights(model, run, rtol=1e-3, atol=2e-5)


def test_a_loss_that_is_a_mean_of_squares(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 3))
    batches = [(points(n)[0], torch.randn(24, 3)) for n in range(20)]
    optimizer = torch.optim.Adam(model.parameters())
    loss_fn = nn.MSELoss()
    (expected, got), run = run_beside(model, optimizer, tmp_path / "e", batches, loss_fn)
    numpy.testing.assert_allclose(got, expected, rtol=2e-5)
    x, y = batches[3]
    with torch.no_grad():
        wanted = loss_fn(model(x), y).item()
    found = run.evaluate(Samples(x.numpy(), y.numpy()))
    assert found.loss == pytest.approx(wanted, rel=1e-4)
    assert found.accuracy is None


def test_an_evaluation_is_that_of_the_model_as_it_stands(tmp_path):
    model = perceptron()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    _, run = run_beside(model, optimizer, tmp_path / "export", [points(n) for n in range(10)])
    x, y = points(99, 61)  # Two whole batches, and the rest one by one.
    with torch.no_grad():
        answer = model(x)
    found = run.evaluate(Samples(x.numpy(), y.numpy()))
    assert found.loss == pytest.approx(nn.functional.cross_entropy(answer, y).item(), rel=1e-4)
    assert found.accuracy == pytest.approx((answer.argmax(1) == y).float().mean().item())
    before = {name: array.copy() for name, array in run.tensors.items()}
    run.evaluate(Samples(x.numpy(), y.numpy()))
    assert all((run.tensors[name] == before[name]).all() for name in before)


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_schedule_is_that_of_torch(interval, tmp_path):
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)
    x, y = points(0, 48)
    export_training(
        model, nn.CrossEntropyLoss(), optimizer, (x[:24], y[:24]), tmp_path / "export",
        scheduler=scheduler, scheduler_interval=interval, schedule_length=6,
    )  # fmt: skip
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert scheduler.last_epoch == 0
    run = load_training(tmp_path / "export")
    run.fit(Samples(x.numpy(), y.numpy()), epochs=3, shuffle=False)
    for _ in range(3):
        for rows in (slice(0, 24), slice(24, 48)):
            torch_step(model, optimizer, nn.CrossEntropyLoss(), x[rows], y[rows])
            if interval == "step":
                scheduler.step()
        if interval == "epoch":
            scheduler.step()
    assert_same_weights(model, run, rtol=1e-3, atol=2e-5)


def test_the_users_model_and_random_numbers_stay_as_they_are(tmp_path):
    model = perceptron()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters())
    state = torch.get_rng_state()
    export_training(model, nn.CrossEntropyLoss(), optimizer, points(0), tmp_path / "export")
    assert torch.equal(torch.get_rng_state(), state)
    assert not optimizer.state
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    run = load_training(tmp_path / "export")
    assert_same_weights(model, run, rtol=0, atol=0)


# ---- What is refused ---------------------------------------------------------------------------


class Sorted(nn.Module):
    def forward(self, x):
        return torch.sort(x, dim=1).values


def test_operations_of_torch_are_named_with_their_lines(tmp_path):
    model = nn.Sequential(nn.Linear(20, 5), Sorted())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ModelError, match=r"aten\.sort.*test_training_numerics\.py:\d+"):
        export_training(model, nn.CrossEntropyLoss(), optimizer, points(0), tmp_path / "e")
    assert not (tmp_path / "e").exists()
    assert not list(tmp_path.iterdir())


def test_an_optimizer_with_its_own_step_is_refused(tmp_path):
    model = perceptron()
    optimizer = torch.optim.Adam(model.parameters(), amsgrad=True)
    with pytest.raises(ModelError, match="amsgrad"):
        export_training(model, nn.CrossEntropyLoss(), optimizer, points(0), tmp_path / "e")


def test_an_optimizer_that_has_made_steps_is_refused(tmp_path):
    model = perceptron()
    optimizer = torch.optim.Adam(model.parameters())
    torch_step(model, optimizer, nn.CrossEntropyLoss(), *points(0))
    with pytest.raises(ModelError, match="no step"):
        export_training(model, nn.CrossEntropyLoss(), optimizer, points(0), tmp_path / "e")


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    model = perceptron()
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(InputError, match="new folder"):
        export_training(model, nn.CrossEntropyLoss(), optimizer, points(0), tmp_path)


# ---- Data --------------------------------------------------------------------------------------


@given(
    count=st.integers(1, 300), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 1000)
)  # fmt: skip
def test_the_order_is_that_of_the_sampler(count, seed, epoch):
    expected = GlobalSampler(count, 1, seed=seed).order(epoch)
    assert order(count, seed, epoch).tolist() == expected.tolist()


def test_the_order_of_sixty_thousand():
    expected = GlobalSampler(60_000, 64, seed=3).order(2)
    assert (order(60_000, 3, 2) == expected.numpy()).all()


@pytest.mark.parametrize("normalize", [None, (0.1307, 0.3081), ((0.5, 0.4, 0.3), (0.2, 0.3, 0.1))])
@pytest.mark.parametrize("dtype", ["uint8", "float32", "bool"])
def test_values_have_the_bits_of_a_packed_dataset(normalize, dtype):
    draw = numpy.random.default_rng(0)
    x = draw.integers(0, 2 if dtype == "bool" else 256, (40, 3, 5, 4)).astype(dtype)
    y = draw.integers(0, 9, 40).astype("int32")
    transforms = () if normalize is None else (Normalize(*normalize),)
    packed = open_dataset((x, y), transforms=transforms)
    rows = torch.randint(40, (16,))
    wanted_x, wanted_y = torch.empty(16, 3, 5, 4), torch.empty(16, dtype=torch.int64)
    packed.gather(rows, wanted_x, wanted_y)
    terms = None
    if normalize is not None:
        terms = tuple(v if isinstance(v, tuple) else (v,) for v in normalize)
    samples = Samples(x, y, terms)
    got_x, got_y = numpy.empty((16, 3, 5, 4), "float32"), numpy.empty(16, "int64")
    samples.put(rows.numpy(), 0, got_x)
    samples.put(rows.numpy(), 1, got_y)
    assert got_x.tobytes() == wanted_x.numpy().tobytes()
    assert got_y.tolist() == wanted_y.tolist()
