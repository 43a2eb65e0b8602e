"""``Recipe``: what a run computes (data, model, optimizer, schedule), from flags or a file."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, InputError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..data import PackedDataset
    from ..plan import Plan
    from ..sealed import Sealed, SealingKey
    from ..train.trials import Source, Work

ZOO = ("cnn", "small", "big")
SCHEDULES = ("none", "cosine", "onecycle")
LOSSES = ("auto", "cross_entropy", "mse")
# Learning rates that the optimizers' papers and PyTorch's defaults start from.
LEARNING_RATES = {"adam": 1e-3, "adamw": 1e-3, "sgd": 0.05, "rmsprop": 1e-3, "adagrad": 1e-2}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is computed. Two runs of one recipe give the same weights, whatever the plan.

    Attributes:
        dataset: ``"mnist"``, or ``"file"`` for ``data``.
        data: for ``"mnist"`` the folder with its IDX files, else the path of the data.
        test_data: path of the validation data; MNIST and IDX folders have their own.
        label_column: of a table.
        image_size: side in pixels that images of a folder are resized to; ``None``: as they are.
        samples: how many training samples; ``None``: all.
        download: whether MNIST may be fetched.
        model: ``cnn``, ``small``, ``big`` or ``package.module:factory``.
        loss: ``auto`` is cross entropy for whole-number targets, else mean squared error.
        optimizer, learning_rate, weight_decay, momentum: of ``torch.optim``.
        schedule: ``none``, ``cosine`` or ``onecycle``, over all steps of the run.
        augment: transforms such as ``affine``; empty: none.
        batch_size, epochs, seed, target_accuracy: see ``Trainer.fit``.
    """

    dataset: str = "mnist"
    data: str | None = None
    test_data: str | None = None
    label_column: str | None = None
    image_size: int | None = None
    samples: int | None = None
    download: bool = True
    model: str = "cnn"
    loss: str = "auto"
    optimizer: str = "adam"
    learning_rate: float | None = None
    weight_decay: float = 0.0
    momentum: float = 0.9
    schedule: str = "none"
    augment: str = ""
    batch_size: int = 64
    epochs: int = 5
    seed: int = 0
    target_accuracy: float | None = None

    def __post_init__(self) -> None:
        if self.dataset == "file" and self.data is None:
            raise InputError(
                "hotloop needs data", next_step="name mnist, or pass --data with a file or folder"
            )
        for name, value in (
            ("--learning-rate", self.learning_rate),
            ("--weight-decay", self.weight_decay),
            ("--momentum", self.momentum),
        ):
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} must be a number of at least 0", got=value)
        for name, count in (
            ("--batch-size", self.batch_size),
            ("--epochs", self.epochs),
            ("--samples", self.samples),
            ("--image-size", self.image_size),
        ):
            if count is not None and count < 1:
                raise InputError(f"{name} must be at least 1", got=count)

    def save(self, path: Path) -> None:
        """Write as JSON.

        Raises:
            StorageError: the file cannot be written.
        """
        from ..files import write_text_atomically

        write_text_atomically(path, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read what ``save`` wrote.

        Raises:
            InputError: missing, damaged, or of another version.
        """
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{path} must be the recipe of a run",
                got=f"{type(error).__name__}: {error}",
                next_step="name the folder of a run, or repeat its options with --out",
            ) from None

    def open_data(
        self, *, mmap_above_bytes: int, key: SealingKey | None = None
    ) -> tuple[PackedDataset, PackedDataset | None]:
        """Training and validation data, packed.

        Args:
            key: of sealed data; no other is taken then.

        Raises:
            DataError: missing, damaged, or of no known kind.
        """
        from ..data import open_dataset

        train = self.open_training_data(mmap_above_bytes=mmap_above_bytes, key=key)
        shared = self._opening(mmap_above_bytes, key)
        if self.test_data is not None:
            return train, open_dataset(_place(self.test_data, key), split="test", **shared)
        if self.dataset == "mnist":
            return train, open_dataset("mnist", split="test", **shared)
        return train, None

    def open_training_data(
        self, *, mmap_above_bytes: int, key: SealingKey | None = None
    ) -> PackedDataset:
        """The training data alone; see ``open_data``."""
        from ..data import open_dataset, parse_transforms

        added = parse_transforms(self.augment) if self.augment else ()
        source = "mnist" if self.dataset == "mnist" else _place(self.data or "", key)
        shared = self._opening(mmap_above_bytes, key)
        train = open_dataset(source, num_samples=self.samples, **shared)
        if added:
            train = train.with_transforms((*train.transforms, *added), seed=self.seed)
        return train

    def _opening(self, mmap_above_bytes: int, key: SealingKey | None) -> dict[str, Any]:
        folder: dict[str, Any] = {}
        if self.dataset == "mnist":
            if key is not None and self.data is None:
                raise InputError(
                    "with a key the data must be sealed",
                    got="mnist from the package or the cache",
                    next_step="seal a folder with its IDX files, and pass it with --data",
                )
            folder["folder"] = _place(self.data, key) if self.data else None
        return {
            "seed": self.seed,
            "mmap_above_bytes": mmap_above_bytes,
            "label_column": self.label_column,
            "image_size": (self.image_size,) * 2 if self.image_size else None,
            "allow_download": self.download,
            **folder,
        }

    def build_model(self) -> nn.Module:
        """The model, its weights drawn from the seed.

        Raises:
            ModelError: the factory cannot be used.
        """
        import torch

        from ..train.zoo import build_model
        from .factory import load_model

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return build_model(self.model) if self.model in ZOO else load_model(self.model)

    def build_loss(self, dataset: PackedDataset) -> Any:
        """The loss function."""
        from torch.nn import functional

        floating = dataset.target_dtype.is_floating_point
        name = self.loss if self.loss != "auto" else ("mse" if floating else "cross_entropy")
        return {"mse": functional.mse_loss, "cross_entropy": functional.cross_entropy}[name]

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer, in PyTorch's fused form where it has one for the CPU.

        Raises:
            InputError: the model has nothing to train.
        """
        import torch

        parameters = [p for p in model.parameters() if p.requires_grad]
        if not parameters:
            raise InputError("the model must have trainable parameters", got=type(model).__name__)
        rate = self.learning_rate
        lr = LEARNING_RATES[self.optimizer] if rate is None else rate
        decay = self.weight_decay
        match self.optimizer:
            case "adam":
                return torch.optim.Adam(parameters, lr, weight_decay=decay, fused=True)
            case "adamw":
                return torch.optim.AdamW(parameters, lr, weight_decay=decay, fused=True)
            case "sgd":
                return torch.optim.SGD(
                    parameters, lr, momentum=self.momentum, weight_decay=decay, fused=True
                )
            case "rmsprop":
                return torch.optim.RMSprop(parameters, lr, weight_decay=decay)
            case _:
                return torch.optim.Adagrad(parameters, lr, weight_decay=decay, fused=True)

    def build_scheduler(self, optimizer: torch.optim.Optimizer, num_samples: int) -> Any:
        """The schedule over all steps, stepped once a step; ``None``: a constant rate."""
        from torch.optim import lr_scheduler

        steps = self.epochs * -(-num_samples // self.batch_size)
        rate = float(optimizer.param_groups[0]["lr"])
        if self.schedule == "cosine":
            return lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        if self.schedule == "onecycle":
            # One step more than the run has: the schedule is stepped after the last one too.
            return lr_scheduler.OneCycleLR(
                optimizer, max_lr=rate, total_steps=steps + 1, cycle_momentum=False
            )
        return None


def _place(path: str, key: SealingKey | None) -> str | Sealed:
    from ..sealed import Sealed

    return path if key is None else Sealed(path, key)


def trained_model(folder: Path) -> tuple[Recipe, nn.Module]:
    """Recipe and model of a run's folder (or of its ``checkpoints``), newest checkpoint.

    Raises:
        CheckpointError: there is none, or one of another model.
    """
    from ..train import CheckpointStore

    run = folder if (folder / "recipe.json").is_file() else folder.parent
    recipe = Recipe.load(run / "recipe.json")
    checkpoints = run / "checkpoints"
    found = CheckpointStore(checkpoints).latest() if checkpoints.is_dir() else None
    if found is None:
        raise CheckpointError("the run must have a checkpoint", got=folder)
    model = recipe.build_model()
    try:
        model.load_state_dict(dict(found.tensors["model"]))
    except RuntimeError as error:
        raise CheckpointError("the checkpoint must be of the recipe's model", got=error) from None
    return recipe, model


def trial_work(arguments: dict[str, Any], plan: Plan) -> Work:
    """In a trial's process: a trainer by a recipe, see ``train.trials``.

    The schedule is stretched: a trial trains on past the end of the run.
    """
    from ..train import Trainer
    from ..train.trials import Work
    from ..train.tuned import parts_fingerprint

    recipe = Recipe(**{**arguments["recipe"], "batch_size": arguments["batch_size"]})
    rate = recipe.learning_rate
    rate = LEARNING_RATES[recipe.optimizer] if rate is None else rate
    recipe = dataclasses.replace(recipe, learning_rate=rate * arguments["lr_factor"])
    data = recipe.open_training_data(mmap_above_bytes=plan.memory.mmap_above_bytes)
    model = recipe.build_model()
    optimizer = recipe.build_optimizer(model)
    stretched = dataclasses.replace(recipe, epochs=10**6)
    trainer = Trainer(
        model,
        recipe.build_loss(data),
        optimizer,
        plan,
        scheduler=stretched.build_scheduler(optimizer, data.num_samples),
        scheduler_interval="step",
    )
    fingerprint = parts_fingerprint(trainer.parts, recipe.batch_size, data.example())
    return Work(trainer, data, recipe.batch_size, recipe.seed, fingerprint)


def trial_source(recipe: Recipe) -> Source:
    """Trials of this recipe, see ``train.trials``."""
    from ..train.trials import Source

    arguments = {"recipe": dataclasses.asdict(recipe)}
    return Source("hotloop.cli.recipe:trial_work", arguments, recipe.batch_size)


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is computed."""
    group = parser.add_argument_group("recipe", "what is computed")
    default = Recipe()
    group.add_argument(
        "dataset",
        nargs="?",
        choices=("mnist",),
        default=None,
        help="a data set by name; without one, --data names a file or folder",
    )
    group.add_argument(
        "--data",
        metavar="PATH",
        help=".npz, .parquet, .arrow, .feather or .csv file, IDX folder, or folder of images by "
        "class; with mnist: its IDX folder",
    )
    group.add_argument("--test-data", metavar="PATH", help="validation data of the same kind")
    group.add_argument("--label-column", metavar="NAME", help="target column of a table")
    group.add_argument(
        "--image-size", type=int, metavar="N", help="resize images of a folder to N x N pixels"
    )
    group.add_argument("--samples", type=int, metavar="N", help="training samples (default: all)")
    group.add_argument(
        "--no-download",
        dest="download",
        action="store_false",
        help="never fetch MNIST; use what is here",
    )
    group.add_argument(
        "--model", default=default.model, metavar="NAME", help="cnn, small, big or module:factory"
    )
    group.add_argument("--loss", choices=LOSSES, default=default.loss)
    group.add_argument("--optimizer", choices=tuple(LEARNING_RATES), default=default.optimizer)
    group.add_argument("--learning-rate", "--lr", type=float, metavar="X")
    group.add_argument("--weight-decay", type=float, default=default.weight_decay, metavar="X")
    group.add_argument(
        "--momentum", type=float, default=default.momentum, metavar="X", help="of sgd"
    )
    group.add_argument("--schedule", choices=SCHEDULES, default=default.schedule)
    group.add_argument(
        "--augment", default=default.augment, metavar="NAMES", help="transforms, such as affine"
    )
    group.add_argument("--batch-size", type=int, default=default.batch_size, metavar="N")
    group.add_argument("--epochs", type=int, default=default.epochs, metavar="N")
    group.add_argument("--seed", type=int, default=default.seed, metavar="N")
    group.add_argument(
        "--target-accuracy", type=float, metavar="X", help="stop when reached, such as 0.99"
    )


def recipe_from_flags(args: argparse.Namespace) -> Recipe:
    """The recipe that the flags describe.

    Raises:
        InputError: a value outside its rule, or no data named.
    """
    names = {f.name for f in dataclasses.fields(Recipe)}
    values = {name: value for name, value in vars(args).items() if name in names}
    if values["dataset"] is None:
        values["dataset"] = "file"
    return Recipe(**values)
