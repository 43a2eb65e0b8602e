"""Transformers' ``Trainer`` with hotloop's programs: the same logs, weights and state."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the extra transformers")
pytest.importorskip("accelerate", reason="the extra transformers")
import hotloop  # noqa: E402
from hotloop.integrations.transformers import HotloopTrainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # Transformers' own.


def bert():
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def gpt():
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


class Sentences(torch.utils.data.Dataset):
    """Tokens with a mask; labels of the sentence, or the tokens themselves."""

    def __init__(self, count, language):
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(1, 64, (count, 16), generator=generator)
        self.lengths = torch.randint(4, 17, (count,), generator=generator)
        self.language = language

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        tokens = self.tokens[index]
        mask = (torch.arange(16) < self.lengths[index]).long()
        labels = torch.where(mask.bool(), tokens, -100) if self.language else tokens[0] % 3
        return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def trained(kind, make, tmp_path, language=False, count=30 * 8, **options):
    torch.manual_seed(0)
    model = make()
    settings = {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 8, "num_train_epochs": 1,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "learning_rate": 1e-3, "seed": 1,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(**(settings | options))
    trainer = kind(model=model, args=arguments, train_dataset=Sentences(count, language))
    trainer.train()
    return trainer


def assert_alike(fast, plain, steps=30):
    logs = [[row for row in t.state.log_history if "loss" in row] for t in (fast, plain)]
    assert len(logs[0]) == len(logs[1]) == steps
    for row, wanted in zip(*logs, strict=True):
        assert row.keys() == wanted.keys()
        for name in ("loss", "grad_norm", "learning_rate"):
            assert row[name] == pytest.approx(wanted[name], rel=2e-3, abs=1e-5), name
    for (name, p), q in zip(
        fast.model.state_dict().items(), plain.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-4, msg=name)
    assert (
        fast.optimizer.state_dict()["state"].keys() == plain.optimizer.state_dict()["state"].keys()
    )


@pytest.mark.parametrize(
    ("make", "language", "options"),
    [
        (bert, False, {}),
        (bert, False, {"label_smoothing_factor": 0.1}),
        (gpt, True, {}),
        (gpt, True, {"label_smoothing_factor": 0.1}),
        (gpt, True, {"optim": "sgd", "learning_rate": 0.1}),
    ],
)
def test_logs_and_weights_are_transformers(make, language, options, tmp_path):
    fast = trained(HotloopTrainer, make, tmp_path, language, **options)
    assert fast.hotloop_path == "compiled", fast.hotloop_reason
    assert_alike(fast, trained(transformers.Trainer, make, tmp_path, language, **options))


@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.1}])
@pytest.mark.parametrize(("make", "language"), [(bert, False), (gpt, True)])
def test_gradient_accumulation(make, language, options, tmp_path):
    options = options | {"gradient_accumulation_steps": 4, "num_train_epochs": 4}
    count = 30 * 8 + 8 * 2
    fast = trained(HotloopTrainer, make, tmp_path, language, count=count, **options)
    assert fast.hotloop_path == "compiled", fast.hotloop_reason
    plain = trained(transformers.Trainer, make, tmp_path, language, count=count, **options)
    assert_alike(fast, plain, steps=32)


class OwnLoss(HotloopTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        share = 1.0 if self.state.global_step < 15 else 0.5
        loss = share * torch.nn.functional.cross_entropy(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


def test_a_loss_of_the_users_own_that_reads_the_state(tmp_path):
    class Plain(transformers.Trainer):
        compute_loss = OwnLoss.compute_loss

    fast = trained(OwnLoss, bert, tmp_path)
    assert_alike(fast, trained(Plain, bert, tmp_path))


def test_a_loss_function_given_by_the_user(tmp_path):
    def loss_of(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits, labels, label_smoothing=0.2)

    def with_loss(kind):
        return lambda **given: kind(compute_loss_func=loss_of, **given)

    fast = trained(with_loss(HotloopTrainer), bert, tmp_path)
    assert fast.hotloop_path == "compiled", fast.hotloop_reason
    assert_alike(fast, trained(with_loss(transformers.Trainer), bert, tmp_path))


# ---- Without their Trainer ---------------------------------------------------------------------


@pytest.mark.parametrize("make", [bert, gpt])
@pytest.mark.parametrize("whole", [False, True])
def test_a_loop_of_ones_own(make, whole):
    data = Sentences(80, language=make is gpt)
    batches = [
        torch.utils.data.default_collate([data[k] for k in range(n, n + 8)])
        for n in range(0, 80, 8)
    ]
    torch.manual_seed(0)
    models = [make().train() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, eps=1e-4) for m in models]

    def train(model, optimizer, batch):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    mine, theirs = zip(models, optimizers, strict=True)
    if whole:
        step = hotloop.compile_step(lambda batch: train(*mine, batch))
    else:
        step = hotloop.compile_step(
            mine[0], lambda answer: answer.loss, mine[1], example=(batches[0],)
        )
    losses = []
    for way in (step, lambda batch: train(*theirs, batch)):
        torch.manual_seed(1)
        losses.append([way(batch).item() for batch in batches])
    assert step.path == "compiled", step.reason
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-5, atol=0)
    for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_setting_that_changes_counts():
    data = Sentences(8, language=False)
    batch = torch.utils.data.default_collate([data[k] for k in range(8)])
    torch.manual_seed(0)
    model = bert().eval()
    step = hotloop.compile_step(
        model, lambda answer: answer.loss, torch.optim.SGD(model.parameters(), 0.0), (batch,)
    )
    before = [step(batch).item() for _ in range(4)]
    assert step.path == "compiled", step.reason
    model.config.problem_type = "multi_label_classification"
    labels = torch.nn.functional.one_hot(batch["labels"], 3).float()
    found = [step(batch | {"labels": labels}).item() for _ in range(4)]
    expected = model(**batch | {"labels": labels}).loss.item()
    assert found == pytest.approx([expected] * 4)
    assert before[0] == pytest.approx(before[-1])
