"""Programs that people train, each beside the same loop in plain PyTorch."""

import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from hotloop import Arguments, kernels
from support import THOROUGH
from support.beside_loop import train_both

if not kernels.is_available():
    pytest.skip(kernels.unavailable_reason(), allow_module_level=True)

ROWS, WIDTH, WORDS = 8, 16, 40
STEPS = 30 if THOROUGH else 12


def adamw(parameters):
    # A large eps: where a gradient is rounding alone, Adam would make whole steps of it.
    return torch.optim.AdamW(parameters, lr=3e-3, eps=1e-3)


def tokens(g, *shape, low=0):
    return torch.randint(low, WORDS, shape, generator=g)


def mask_of(g, length):
    lengths = torch.randint(2, length + 1, (ROWS, 1), generator=g)
    return torch.arange(length) < lengths


class Bert(nn.Module):
    """A classifier with an attention mask; the loss is in the answer."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(64, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, input_ids, attention_mask, labels=None):
        x = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        x = self.encoder(x, src_key_padding_mask=attention_mask == 0)
        logits = self.head(x[:, 0])
        return {"logits": logits, "loss": F.cross_entropy(logits, labels)}


def bert(n, g):
    labels = torch.randint(0, 4, (ROWS,), generator=g)
    mask = mask_of(g, 12).long()
    return ({"input_ids": tokens(g, ROWS, 12), "attention_mask": mask, "labels": labels},)


class Gpt(nn.Module):
    """Causal attention; scores for each place."""

    def __init__(self):
        super().__init__()
        self.words, self.qkv = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, x):
        h = self.words(x)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(h).chunk(3, -1))
        h = h + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.head(self.norm(h))


def next_word(scores, y):
    return F.cross_entropy(scores.flatten(0, 1), y.flatten(), ignore_index=-100)


def gpt(lengths):
    def batch(n, g):
        length = lengths[n % len(lengths)]
        x = tokens(g, ROWS, length + 1)
        y = x[:, 1:].clone()
        y[~mask_of(g, length)] = -100
        return x[:, :-1], y

    return batch


class Translator(nn.Module):
    """Teacher forcing: the decoder gets the right words, or now and then its own."""

    def __init__(self, forced=1.0):
        super().__init__()
        self.words, self.forced = nn.Embedding(WORDS, WIDTH), forced
        self.encoder, self.decoder = (
            nn.GRU(WIDTH, WIDTH, batch_first=True),
            nn.GRUCell(WIDTH, WIDTH),
        )
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, source, target):
        state = self.encoder(self.words(source))[1][0]
        word, scores = target[:, 0], []
        for place in range(1, target.shape[1]):
            state = self.decoder(self.words(word), state)
            scores.append(self.head(state))
            own = self.forced < 1.0 and random.random() >= self.forced
            word = scores[-1].argmax(1) if own else target[:, place]
        return torch.stack(scores, 1)


def translation(n, g):
    target = tokens(g, ROWS, 6)
    return (tokens(g, ROWS, 5), target), target[:, 1:]


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.item = nn.Linear(10, WIDTH), nn.EmbeddingBag(WORDS, WIDTH)

    def forward(self, query, good, bad):
        return self.query(query).tanh(), self.item(good), self.item(bad)


def towers(n, g):
    query = torch.randn(ROWS, 10, generator=g)
    return (Arguments(query, good=tokens(g, ROWS, 3), bad=tokens(g, ROWS, 3)),)


class Vae(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.mean, self.spread = nn.Linear(20, 12), nn.Linear(12, 4), nn.Linear(12, 4)
        self.up = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 20))

    def forward(self, x):
        h = F.relu(self.down(x))
        mean, log_var = self.mean(h), self.spread(h)
        return self.up(mean + torch.randn_like(mean) * (0.5 * log_var).exp()), mean, log_var


def elbo(answer, x):
    made, mean, log_var = answer
    divergence = -0.5 * (1 + log_var - mean.square() - log_var.exp()).sum(1).mean()
    return F.binary_cross_entropy_with_logits(made, x, reduction="none").sum(1).mean() + divergence


def vae(n, g):
    x = torch.rand(ROWS, 20, generator=g)
    return x, x


class PackedLstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.rnn, self.head = nn.LSTM(WIDTH, WIDTH, batch_first=True), nn.Linear(WIDTH, 3)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(self.words(x), lengths, True, enforce_sorted=False)
        return self.head(self.rnn(packed)[1][0][-1])


def sentences(n, g):
    lengths = torch.randint(1, 8, (ROWS,), generator=g)
    return (tokens(g, ROWS, 7), lengths), torch.randint(0, 3, (ROWS,), generator=g)


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.up, self.last = nn.ConvTranspose2d(16, 8, 2, 2), nn.Conv2d(16, 3, 1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        wide = F.relu(self.norm(self.first(x)))
        low = self.up(F.relu(self.deep(F.max_pool2d(wide, 2))))
        return self.last(torch.cat([wide, low], 1))


def masks(n, g):
    y = torch.randint(0, 3, (4, 12, 12), generator=g)
    y[torch.rand(y.shape, generator=g) < 0.2] = 255
    return torch.rand(4, 3, 12, 12, generator=g), y


class Tabular(nn.Module):
    def __init__(self):
        super().__init__()
        self.columns = nn.ModuleList(nn.Embedding(n, 4) for n in (5, 9))
        self.body = nn.Sequential(nn.Linear(8 + 3, 24), nn.BatchNorm1d(24), nn.ReLU())
        self.head = nn.Linear(24, 1)

    def forward(self, categories, numbers):
        parts = [column(categories[:, n]) for n, column in enumerate(self.columns)]
        return self.head(self.body(torch.cat([*parts, numbers], 1))).squeeze(1)


def tabular(n, g):
    categories = torch.randint(0, 5, (ROWS, 2), generator=g).to(torch.int32)
    numbers = torch.randn(ROWS, 3, generator=g, dtype=torch.float64).float()
    return {"categories": categories, "numbers": numbers}, torch.rand(ROWS, generator=g).round()


class Queue(nn.Module):
    """Contrast with what earlier batches left in a buffer."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(10, WIDTH)
        self.register_buffer("queue", F.normalize(torch.randn(24, WIDTH), dim=1))

    def forward(self, one, other):
        q, k = (F.normalize(self.encoder(view), dim=1) for view in (one, other))
        scores = torch.cat([(q * k.detach()).sum(1, keepdim=True), q @ self.queue.clone().T], 1)
        with torch.no_grad():
            self.queue.copy_(torch.cat([k, self.queue[:-ROWS]]))
        return scores / 0.2


def two_views(n, g):
    x = torch.randn(ROWS, 10, generator=g)
    noise = torch.randn(2, ROWS, 10, generator=g) / 5
    return (x + noise[0], x + noise[1]), torch.zeros(ROWS, dtype=torch.int64)


class Tasks(nn.Module):
    """A body and two heads."""

    def __init__(self):
        super().__init__()
        self.body, self.heads = (
            nn.Linear(10, WIDTH),
            nn.ModuleList([nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 1)]),
        )

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return [head(h) for head in self.heads]


class Uncertain(nn.Module):
    """Weights of the tasks that are learned."""

    def __init__(self):
        super().__init__()
        self.log_var = nn.Parameter(torch.zeros(2))

    def forward(self, answer, y):
        losses = F.cross_entropy(answer[0], y["label"]), F.mse_loss(answer[1][:, 0], y["size"])
        return (torch.exp(-self.log_var) * torch.stack(losses)).sum() + self.log_var.sum()


def two_tasks(n, g):
    x = torch.randn(ROWS, 10, generator=g)
    return x, {"label": torch.randint(0, 3, (ROWS,), generator=g), "size": x.sum(1)}


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(10, 10), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x)


def rows(n, g):
    return torch.randn(ROWS, 10, generator=g), torch.randint(0, 3, (ROWS,), generator=g)


class Gnn(nn.Module):
    """A sparse adjacency in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("adjacency", (torch.rand(ROWS, ROWS) > 0.5).float().to_sparse())
        self.first, self.second = nn.Linear(10, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x):
        return self.second(torch.sparse.mm(self.adjacency, F.relu(self.first(x))))


def triplet(answer):
    return F.triplet_margin_loss(*answer)


def in_answer(answer):
    return answer["loss"]


CROSS, COMPILED, PLAIN = F.cross_entropy, "compiled", "plain"
# Model, loss, batches, and where it ends.
PROGRAMS = {
    "a BERT": (Bert, in_answer, bert, COMPILED),
    "a GPT": (Gpt, next_word, gpt([16]), COMPILED),
    "a GPT, some lengths": (Gpt, next_word, gpt([16, 24, 16, 31]), COMPILED),
    "a translator": (Translator, lambda s, y: CROSS(s.transpose(1, 2), y), translation, COMPILED),
    "a translator, forced at times": (
        lambda: Translator(0.5), lambda s, y: CROSS(s.transpose(1, 2), y), translation, PLAIN,
    ),
    "two towers": (Towers, triplet, towers, COMPILED),
    "a VAE": (Vae, elbo, vae, COMPILED),
    "a packed LSTM": (PackedLstm, CROSS, sentences, PLAIN),
    "a U-Net": (UNet, nn.CrossEntropyLoss(ignore_index=255), masks, COMPILED),
    "a table": (Tabular, F.binary_cross_entropy_with_logits, tabular, COMPILED),
    "a queue": (Queue, CROSS, two_views, COMPILED),
    "tasks with learned weights": (Tasks, Uncertain(), two_tasks, COMPILED),
    "checkpoints of activations": (Checkpointed, CROSS, rows, COMPILED),
    "a sparse graph": (Gnn, CROSS, rows, PLAIN),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name):
    make, loss_fn, make_batch, path = PROGRAMS[name]
    torch.manual_seed(0)
    model = make()
    g = torch.Generator().manual_seed(1)
    batches = [make_batch(number, g) for number in range(STEPS)]
    course = train_both(model, loss_fn, adamw, batches)
    assert course.path == path, course.reason
