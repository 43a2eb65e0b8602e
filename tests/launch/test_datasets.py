"""Batches read at once are those of the loader, to the bit and in its order, or are not taken."""

import importlib
import itertools
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, random_split

from hotloop.launch import datasets, loaders
from hotloop.launch.choice import Choice

# torchvision's classes as far as a loader sees them; the package itself needs another torch.
STAND_IN = {
    "datasets/mnist.py": """
        class MNIST:
            def __init__(self, data, targets, transform=None, target_transform=None):
                self.data, self.targets = data, targets
                self.transform, self.target_transform = transform, target_transform

            def __len__(self):
                return len(self.data)

            def __getitem__(self, index):
                image, target = self.data[index], int(self.targets[index])
                image = image.numpy() if hasattr(image, "numpy") else image
                if self.transform is not None:
                    image = self.transform(image)
                if self.target_transform is not None:
                    target = self.target_transform(target)
                return image, target

        class FashionMNIST(MNIST):
            pass
        """,
    "datasets/cifar.py": """
        class CIFAR10:
            def __init__(self, data, targets, transform):
                self.data, self.targets, self.transform = data, targets, transform
                self.target_transform = None

            def __len__(self):
                return len(self.data)

            def __getitem__(self, index):
                return self.transform(self.data[index]), self.targets[index]
        """,
    "transforms/transforms.py": """
        import torch

        class Compose:
            def __init__(self, transforms):
                self.transforms = transforms

            def __call__(self, value):
                for transform in self.transforms:
                    value = transform(value)
                return value

        class ToTensor:
            def __call__(self, image):
                image = image[..., None] if image.ndim == 2 else image
                tensor = torch.from_numpy(image.transpose(2, 0, 1).copy())
                return tensor.to(torch.get_default_dtype()).div(255)

        class Normalize:
            def __init__(self, mean, std):
                self.mean, self.std = mean, std

            def __call__(self, tensor):
                mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
                return tensor.clone().sub_(mean).div_(std)

        class Lambda:
            def __init__(self, function):
                self.function = function

            def __call__(self, value):
                return self.function(value)
        """,
}


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """A package named torchvision, for the time of these tests."""
    root = tmp_path_factory.mktemp("packages")
    for name, text in STAND_IN.items():
        path = root / "torchvision" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    before = {n: m for n, m in sys.modules.items() if n.split(".")[0] == "torchvision"}
    for name in before:
        del sys.modules[name]
    sys.path.insert(0, str(root))
    names = "datasets.mnist", "datasets.cifar", "transforms.transforms"
    yield [importlib.import_module(f"torchvision.{name}") for name in names]
    sys.path.remove(str(root))
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture
def at_once(monkeypatch):
    """Loaders that read at once wherever they can."""
    monkeypatch.setattr(Choice, "next", lambda self: True)
    loaders.install()
    loaders.reads.at_once = 0
    yield loaders.reads
    loaders.remove()


def epochs(dataset, **options):
    """Two epochs and the random state behind them, which a model's dropout also moves."""
    torch.manual_seed(3)
    options = {"batch_size": 7, "shuffle": True, **options}
    batches = []
    for batch in itertools.chain(*(DataLoader(dataset, **options) for _ in range(2))):
        torch.rand(3)
        batches.append(batch)
    return batches, torch.get_rng_state()


def check(dataset, reads, taken=True, **options):
    found, state = epochs(dataset, **options)
    assert reads.at_once == (len(found) if taken else 0)
    loaders.remove()
    wanted, wanted_state = epochs(dataset, **options)
    assert len(found) == len(wanted)
    assert all(map(datasets.is_same, found, wanted))
    assert torch.equal(state, wanted_state)


def tensors():
    return torch.randn(40, 3, 2), torch.arange(40), torch.rand(40, dtype=torch.float64)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_tensor_datasets(at_once, count):
    check(TensorDataset(*tensors()[:count]), at_once)


def test_subsets_and_samplers(at_once):
    data = TensorDataset(*tensors())
    check(random_split(data, [25, 15])[0], at_once)
    for options in ({"drop_last": True}, {"shuffle": False}, {"sampler": [5, 3, 3]}):
        loaders.install()
        at_once.at_once = 0
        check(Subset(Subset(data, range(30)), np.arange(3, 20).tolist()), at_once,
              **({"shuffle": False} | options))  # fmt: skip


def test_rows_that_are_written_between_batches_are_seen(at_once):
    data = TensorDataset(torch.arange(20.0))
    loader = DataLoader(data, batch_size=10)
    for batch in loader:
        assert batch[0][-1] in (9, -1)
        data.tensors[0][:] = -1
    assert at_once.at_once == 2


@pytest.mark.parametrize(
    "dataset",
    [
        TensorDataset(torch.randn(20, 3, requires_grad=True)),
        TensorDataset(torch.sparse_coo_tensor([[0, 1]], [1.0, 2.0], (20,), check_invariants=True)),
        TensorDataset(torch.nn.Parameter(torch.randn(20, 3), requires_grad=False)),
        [(torch.tensor(i), i) for i in range(20)],
    ],
)
def test_other_rows_are_read_sample_by_sample(at_once, dataset):
    for _ in DataLoader(dataset, batch_size=5):
        pass
    assert at_once.at_once == 0


def test_other_loaders_are_left_alone(at_once):
    data = TensorDataset(*tensors())
    check(data, at_once, taken=False, batch_size=None, shuffle=False)
    loaders.install()
    check(data, at_once, taken=False, collate_fn=lambda samples: samples[0])
    loaders.install()
    check(data, at_once, taken=False, sampler=torch.arange(12), shuffle=False)


def test_an_index_outside_gives_the_loaders_own_error(at_once):
    loader = DataLoader(TensorDataset(torch.arange(4)), sampler=[9], batch_size=1)
    with pytest.raises(IndexError, match="index 9 is out of bounds"):
        next(iter(loader))


# Image sets ---------------------------------------------------------------------------------------


def images(vision, *steps, kind="MNIST", **options):
    mnist, _, transforms = vision
    data = torch.randint(256, (30, 5, 4), dtype=torch.uint8)
    made = transforms.Compose([transforms.ToTensor(), *steps])
    return getattr(mnist, kind)(data, torch.arange(30) % 10, made, **options)


@pytest.mark.parametrize("kind", ["MNIST", "FashionMNIST"])
def test_images_in_bytes(at_once, vision, kind):
    normalize = vision[2].Normalize((0.1307,), (0.3081,))
    check(images(vision, normalize, kind=kind), at_once)


def test_images_with_three_channels_and_a_list_of_targets(at_once, vision):
    transforms = vision[2]
    data = np.random.default_rng(0).integers(256, size=(30, 5, 4, 3), dtype=np.uint8)
    steps = [transforms.ToTensor(), transforms.Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))]
    check(vision[1].CIFAR10(data, list(range(30)), transforms.Compose(steps)), at_once)


def test_what_follows_is_called_image_by_image_in_order(at_once, vision):
    seen = []

    def cut_and_draw(image):
        seen.append(image.sum().item())
        return image.flatten() + torch.rand(())

    check(images(vision, vision[2].Lambda(cut_and_draw)), at_once)
    assert len(seen) == 120  # Two epochs twice, and no call of which it could know.
    assert seen[:60] == seen[60:]


def test_a_transform_that_changes_between_batches(at_once, vision):
    data = images(vision, vision[2].Normalize((0.1,), (0.3,)))
    loader = iter(DataLoader(data, batch_size=10))
    next(loader)
    data.transform.transforms[1].mean = (0.9,)
    assert torch.equal(next(loader)[0][0], data[10][0])
    data.transform.transforms.pop()
    assert torch.equal(next(loader)[0][0], data[20][0])
    assert at_once.at_once == 1


def test_images_that_are_not_recognised(at_once, vision):
    mnist, _, transforms = vision

    class Mine(mnist.MNIST):
        def __getitem__(self, index):
            return super().__getitem__(index)[0], index

    class ToTensor(transforms.ToTensor):
        pass

    plain = images(vision)
    for data in (
        Mine(plain.data, plain.targets, transforms.ToTensor()),
        mnist.MNIST(plain.data, plain.targets, ToTensor()),
        images(vision, target_transform=lambda target: target + 1),
        mnist.MNIST(plain.data.int(), plain.targets, transforms.Lambda(torch.from_numpy)),
    ):
        loaders.install()
        check(data, at_once, taken=False)


# Straight data sets -------------------------------------------------------------------------------


class Rows(Dataset):
    def __init__(self):
        self.images, self.labels = (
            torch.randint(256, (30, 4, 5), dtype=torch.uint8),
            torch.arange(30),
        )
        self.labels = self.labels % 3

    def __len__(self):
        return len(self.images)


class Straight(Rows):
    def __getitem__(self, index):
        """A sample."""
        image = self.images[index].float().div(255).sub(0.1307).div(0.3081)
        return image.unsqueeze(0), self.labels[index]


class Written(Rows):
    def __getitem__(self, i):
        x, y = 2.0 * (self.images[i].double() / 255 - 0.5), self.labels[i]
        return x.view(-1), y.float() + -1.5, self.images[i].reshape(2, 10)


class Alone(Rows):
    def __getitem__(self, i):
        return 1 - self.images[i].float().clamp(3, 200).sqrt()


@pytest.mark.parametrize("kind", [Straight, Written, Alone])
def test_straight_arithmetic_on_rows(at_once, kind):
    check(kind(), at_once)


class Branch(Rows):
    def __getitem__(self, i):
        if i == 17:
            return self.images[i] * 0
        return self.images[i]


class Draws(Rows):
    def __getitem__(self, i):
        return self.images[i] + torch.rand(())


class Exponential(Rows):
    def __getitem__(self, i):  # Not rounded alike in vectors and by itself.
        return self.images[i].float().exp()


class Counts(Rows):
    count = 0

    def __getitem__(self, i):
        self.count = self.count + 1
        return self.images[i]


class Sums(Rows):
    def __getitem__(self, i):
        return self.images[i].float().sum()


class Property(Rows):
    @property
    def rows(self):
        return self.images

    def __getitem__(self, i):
        return self.rows[i]


class Neighbour(Rows):
    def __getitem__(self, i):
        return self.images[i - 1]


class Swapped(Rows):
    def __getitem__(self, i):
        self = self.images[i]
        return self


@pytest.mark.parametrize(
    "kind", [Branch, Draws, Exponential, Counts, Sums, Property, Neighbour, Swapped]
)
def test_what_is_not_straight(at_once, kind):
    check(kind(), at_once, taken=False)


def test_a_method_whose_source_is_not_what_runs(at_once, monkeypatch):
    monkeypatch.setattr(datasets.straight.inspect, "getsource", lambda function: (
        "def __getitem__(self, index):\n    return self.labels[index]\n"
    ))  # fmt: skip
    check(Straight(), at_once, taken=False)


def test_attributes_are_read_for_each_batch(at_once):
    data = Straight()
    loader = iter(DataLoader(data, batch_size=10))
    next(loader)
    data.images = data.images.flip(1)
    assert torch.equal(next(loader)[0][0], data[10][0])
    assert at_once.at_once == 2
