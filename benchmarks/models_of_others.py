"""Models of timm and Transformers: train through `compile_step`, answer through
`compile_inference`, each beside eager PyTorch.

    python benchmarks/models_of_others.py [--models resnet18,bert] [--rounds 5] [--out FILE]

Needs timm (with torchvision) and Transformers: docs/step.md says in which environment. Weights are
random, batches small; each model has a process of its own, with empty caches. `difference`: of
losses and answers from eager's, over their largest value; of weights over how far ten steps have
moved them, of optimizer state over its norm. `rounding` (with `--double`): the same of eager in
float32 from eager in float64. Seconds are those of whole calls, eager and hotloop in turn.
"""

import argparse
import copy
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from about import about
from torch import nn
from torch.nn import functional as F

import hotloop
from hotloop.files import write_text_atomically
from hotloop.measure import Turns, there_and_back
from hotloop.memory.tree import call, flatten

COMPARED, SLICE_S = 10, 0.4
IMAGES = {
    "resnet18": "resnet18",
    "mobilenetv3_small": "mobilenetv3_small_100",
    "vit_tiny": "vit_tiny_patch16_224",
    "convnext_atto": "convnext_atto",
    "efficientnet_b0": "efficientnet_b0",
}
TEXTS = ("bert", "gpt2", "t5", "llama")
ROWS_OF_IMAGES, PIXELS, ROWS, TOKENS, VOCABULARY = 8, 128, 16, 64, 1000


def text_model(name: str) -> nn.Module:
    """Two layers of 128, two heads, 1,000 words."""
    import transformers

    if name == "bert":
        return transformers.BertForSequenceClassification(
            transformers.BertConfig(
                vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=2,
                num_attention_heads=2, intermediate_size=512, num_labels=3,
            )
        )  # fmt: skip
    if name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=128, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
        return transformers.GPT2LMHeadModel(config)
    if name == "t5":
        config = transformers.T5Config(
            vocab_size=VOCABULARY, d_model=128, d_kv=64, d_ff=512, num_layers=2, num_heads=2,
            decoder_start_token_id=0,
        )  # fmt: skip
        return transformers.T5ForConditionalGeneration(config)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=344, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def build(name: str) -> nn.Module:
    """A model with random weights, the same in each process."""
    torch.manual_seed(0)
    if name in IMAGES:
        import timm

        size = {"img_size": PIXELS} if name == "vit_tiny" else {}
        return timm.create_model(IMAGES[name], pretrained=False, num_classes=10, **size)
    return text_model(name)


def batches(name: str) -> list[tuple[Any, ...]]:
    """`(x, y)` of an image model, `(x,)` of a text model, whose answer has the loss."""
    g = torch.Generator().manual_seed(1)
    made: list[tuple[Any, ...]] = []
    for _ in range(COMPARED):
        if name in IMAGES:
            labels = torch.randint(0, 10, (ROWS_OF_IMAGES,), generator=g)
            means = (labels.float() / 10).view(-1, 1, 1, 1)
            made.append(
                (means + torch.randn(ROWS_OF_IMAGES, 3, PIXELS, PIXELS, generator=g), labels)
            )
            continue
        tokens = torch.randint(2, VOCABULARY, (ROWS, TOKENS), generator=g)
        lengths = torch.randint(TOKENS // 2, TOKENS, (ROWS, 1), generator=g)
        mask = (torch.arange(TOKENS) < lengths).long()
        labels = tokens[:, 0] % 3 if name == "bert" else tokens.masked_fill(mask == 0, -100)
        made.append(({"input_ids": tokens, "attention_mask": mask, "labels": labels},))
    return made


def loss_in_answer(answer: Any) -> torch.Tensor:
    """Transformers' models compute it."""
    return answer.loss


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)


def plain_step(model: nn.Module, loss_fn: Any, optimizer: Any, x: Any, *y: Any) -> torch.Tensor:
    """One step as tutorials write it."""
    optimizer.zero_grad()
    loss = loss_fn(call(model, x), *y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def run(step: Callable[..., Any], data: list[Any]) -> tuple[list[float], list[float]]:
    """The losses, and when each step was done."""
    losses, began, ends = [], time.perf_counter(), []
    for batch in data:
        losses.append(float(step(*batch)))
        ends.append(time.perf_counter() - began)
    return losses, ends


def apart(found: Any, wanted: Any) -> float:
    """Largest difference over the largest value."""
    pairs = zip(flatten(found)[0], flatten(wanted)[0], strict=True)
    worst = 0.0
    for one, other in pairs:
        a, b = one.detach().double(), other.detach().double()
        size = max(b.abs().max().item(), 1e-30) if b.numel() else 1.0
        worst = max(worst, (a - b).abs().max().item() / size if b.numel() else 0.0)
    return worst


def norm(tensors: Iterable[torch.Tensor]) -> float:
    return sum(t.detach().double().square().sum().item() for t in tensors) ** 0.5


def weights_apart(found: nn.Module, wanted: nn.Module, before: nn.Module) -> float:
    """How far weights and buffers are apart, over how far training has moved them."""
    triples = [
        (a.double(), b.double(), c.double())
        for a, b, c in zip(
            *(module.state_dict().values() for module in (found, wanted, before)), strict=True
        )
        if b.is_floating_point()
    ]
    return norm(a - b for a, b, _ in triples) / norm(b - c for _, b, c in triples)


def states_apart(ours: tuple[nn.Module, Any], theirs: tuple[nn.Module, Any]) -> float:
    """The same of what the optimizers keep of the weights; the worst kind."""
    kinds: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for a, b in zip(ours[0].parameters(), theirs[0].parameters(), strict=True):
        for key, value in theirs[1].state[b].items():
            kinds.setdefault(key, []).append((ours[1].state[a][key].double(), value.double()))
    return max(norm(a - b for a, b in kind) / norm(b for _, b in kind) for kind in kinds.values())


def in_turn(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Seconds of a call and eager's over hotloop's, medians."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for played in Turns(
        ways, rounds=rounds, order=there_and_back, warm_calls=1, span_s=SLICE_S, least_readings=2
    ):
        for way, turn in played.items():
            seconds[way].append(turn.median_s)
    gains = [a / b for a, b in zip(seconds["eager"], seconds["hotloop"], strict=True)]
    return {
        "seconds": {way: statistics.median(found) for way, found in seconds.items()},
        "gain": {
            "median": statistics.median(gains), "min": min(gains), "max": max(gains), "n": rounds,
        },
    }  # fmt: skip


def in_double(model: nn.Module, loss_fn: Any, data: list[Any]) -> tuple[nn.Module, list[float]]:
    """The same steps in float64."""

    def doubled(tree: Any) -> Any:
        if isinstance(tree, torch.Tensor):
            return tree.double() if tree.is_floating_point() else tree
        if isinstance(tree, dict):
            return {name: doubled(part) for name, part in tree.items()}
        return tree

    model = copy.deepcopy(model).double()
    optimizer = optimizer_of(model)
    torch.manual_seed(2)
    losses = [float(plain_step(model, loss_fn, optimizer, *map(doubled, b))) for b in data]
    return model, losses


def train(name: str, rounds: int, double: bool) -> dict[str, Any]:
    """Ten steps of both, compared; then both in turn."""
    model, data = build(name).train(), batches(name)
    loss_fn: Any = F.cross_entropy if name in IMAGES else loss_in_answer
    twin, before = copy.deepcopy(model), copy.deepcopy(model)
    exact = in_double(model, loss_fn, data) if double else None
    mine, theirs = optimizer_of(model), optimizer_of(twin)
    step = hotloop.compile_step(model, loss_fn, mine, data[0])

    def eager(*batch: Any) -> torch.Tensor:
        return plain_step(twin, loss_fn, theirs, *batch)

    torch.manual_seed(2)
    plain_losses, plain_ends = run(eager, data)
    drawn = torch.get_rng_state()
    torch.manual_seed(2)
    losses, ends = run(step, data)
    row: dict[str, Any] = {
        "path": step.path,
        "reason": step.reason,
        "random_numbers": torch.equal(drawn, torch.get_rng_state()),
        "difference": {
            "losses": apart(torch.tensor(losses), torch.tensor(plain_losses)),
            "weights": weights_apart(model, twin, before),
            "optimizer_state": states_apart((model, mine), (twin, theirs)),
        },
        "steps_done_s": {
            "eager": [round(end, 3) for end in plain_ends],
            "hotloop": [round(end, 3) for end in ends],
        },
    }
    if exact is not None:
        row["rounding"] = {
            "losses": apart(torch.tensor(plain_losses), torch.tensor(exact[1])),
            "weights": weights_apart(twin, exact[0], before),
        }
    given = endless(data)
    return row | in_turn(
        {"eager": lambda: eager(*next(given)), "hotloop": lambda: step(*next(given))}, rounds
    )


def endless(data: list[Any]) -> Iterator[Any]:
    while True:
        yield from data


def answer(name: str, rounds: int) -> dict[str, Any]:
    """The runner's answers beside eager's, of one row and of the batch."""
    model, (x, *_) = build(name).eval(), batches(name)[0]
    if isinstance(x, dict):
        x = {key: value for key, value in x.items() if key != "labels"}
        if name == "t5":
            x["decoder_input_ids"] = x["input_ids"]
        if name != "bert":
            x["use_cache"] = False
    one = (
        {k: v[:1] if isinstance(v, torch.Tensor) else v for k, v in x.items()}
        if isinstance(x, dict)
        else x[:1]
    )
    rows: dict[str, Any] = {}
    began = time.perf_counter()
    batch_sizes = [1, ROWS_OF_IMAGES if name in IMAGES else ROWS]
    with (
        hotloop.compile_inference(
            model, x, batch_sizes=batch_sizes, budget_s=20.0, cache=False
        ) as runner,
        torch.inference_mode(),
    ):
        ready_s = time.perf_counter() - began
        for size, given in zip(batch_sizes, (one, x), strict=True):
            wanted, found = call(model, given), call(runner, given)
            rows[str(size)] = {
                "engine": runner.report.winners[size].engine,
                "difference": apart(flat(found), flat(wanted)),
                **in_turn(
                    {
                        "eager": lambda g=given: call(model, g),
                        "hotloop": lambda g=given: call(runner, g),
                    },
                    rounds,
                ),
            }
        table = runner.report.text()
    return {"ready_s": round(ready_s, 2), "batch_sizes": rows, "race": table}


def flat(result: Any) -> list[torch.Tensor]:
    values = [result] if isinstance(result, torch.Tensor) else result.values()
    return [t for value in values for t in flatten(value)[0]]


def child(name: str, rounds: int, double: bool, threads: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    row: dict[str, Any] = {"train": train(name, rounds, double)}
    print(json.dumps(row), flush=True)
    row["answer"] = answer(name, rounds)
    print(json.dumps(row), flush=True)


def line(name: str, row: dict[str, Any]) -> str:
    """What is printed of a model."""
    trained = row["train"]
    gain, apart_by = trained["gain"], trained["difference"]
    third = {way: ends[2] for way, ends in trained["steps_done_s"].items()}
    rounding = f" (rounding {trained['rounding']['weights']:.0e})" if "rounding" in trained else ""
    told = [
        f"{name:<18}{trained['path']:<9} gain {gain['median']:.2f} ({gain['min']:.2f}-"
        f"{gain['max']:.2f}), three steps {third['hotloop']:.2f} s for {third['eager']:.2f}, "
        f"apart: losses {apart_by['losses']:.0e}, weights {apart_by['weights']:.0e}{rounding}"
    ]
    for size, found in row.get("answer", {}).get("batch_sizes", {}).items():
        told.append(
            f"{'':<18}answers {size:>3} by {found['engine']:<12} gain "
            f"{found['gain']['median']:.2f}, apart {found['difference']:.0e}"
        )
    if trained["path"] == "plain":
        told.append(f"{'':<18}{trained['reason']}")
    return "\n".join(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join((*IMAGES, *TEXTS)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--double", action="store_true", help="compare with float64 too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.rounds, args.double, args.threads)
        return
    document = about() | {"rows": ROWS, "tokens": TOKENS, "rows_of_images": ROWS_OF_IMAGES}
    for library in ("timm", "torchvision", "transformers"):
        document["versions"][library] = importlib.metadata.version(library)
    document["models"] = {}
    for name in args.models.split(","):
        command = [sys.executable, __file__, "--child", name, "--rounds", str(args.rounds)]
        command += ["--threads", str(args.threads)]
        with tempfile.TemporaryDirectory() as caches:
            env = os.environ | {"XDG_CACHE_HOME": caches, "TRANSFORMERS_VERBOSITY": "error"}
            done = subprocess.run(
                command + ["--double"] * args.double,
                env=env, stdout=subprocess.PIPE, text=True, check=False,
            )  # fmt: skip
        made = done.stdout.splitlines()
        document["models"][name] = row = json.loads(made[-1]) if made else {"failed": True}
        print(line(name, row) if made else f"{name}: failed", flush=True)
        if args.out is not None:
            write_text_atomically(args.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
