"""Transformers' ``Trainer`` by another name: the same logs, with accumulated gradients.

pip install 'hotloop[transformers]'
"""

import tempfile

import torch
import transformers

from hotloop.integrations.transformers import HotloopTrainer


class Sentences(torch.utils.data.Dataset):
    """Random tokens whose first one gives the class."""

    def __init__(self, count):
        self.tokens = torch.randint(1, 100, (count, 24), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        tokens = self.tokens[index]
        return {"input_ids": tokens, "labels": tokens[0] % 3}


def train(kind, folder):
    """Train a small BERT; the losses that were logged."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=128, max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    arguments = transformers.TrainingArguments(
        output_dir=folder, per_device_train_batch_size=8, gradient_accumulation_steps=2,
        label_smoothing_factor=0.1, num_train_epochs=1, logging_steps=1, save_strategy="no",
        report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    trainer = kind(model=model, args=arguments, train_dataset=Sentences(480))
    trainer.train()
    print(getattr(trainer, "hotloop_reason", "Transformers alone"))
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        expected = train(transformers.Trainer, folder)
        losses = train(HotloopTrainer, folder)
    difference = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    print(f"{len(losses)} losses, the last {losses[-1]:.4f}; greatest difference {difference:.1e}")
    assert difference < 1e-3


if __name__ == "__main__":
    main()
