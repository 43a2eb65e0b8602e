"""An LSTM that predicts the next word, updated by hand as the word language model example does."""

import argparse
import math
import time

import torch
from torch import nn


class Model(nn.Module):
    """Embedding, LSTM, decoder."""

    def __init__(self, words, width, layers):
        super().__init__()
        self.drop = nn.Dropout(0.2)
        self.encoder = nn.Embedding(words, width)
        self.rnn = nn.LSTM(width, width, layers, dropout=0.2)
        self.decoder = nn.Linear(width, words)
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)

    def forward(self, tokens, hidden):
        """Log probabilities ``[length * batch, words]``."""
        output, hidden = self.rnn(self.drop(self.encoder(tokens)), hidden)
        decoded = self.decoder(self.drop(output))
        return nn.functional.log_softmax(decoded.view(-1, decoded.size(-1)), dim=1), hidden


def make_text(words, count):
    """Words as frequent as in speech (Zipf), every second one chosen by the word before."""
    generator = torch.Generator().manual_seed(3)
    weights = 1 / torch.arange(1, words + 1, dtype=torch.float)
    text = torch.multinomial(weights, count, replacement=True, generator=generator)
    text[1::2] = (text[::2][: len(text[1::2])] * 7 + 3) % words
    return text


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--words", type=int, default=5000)
    parser.add_argument("--width", type=int, default=200)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--bptt", type=int, default=35)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=5.0)
    args = parser.parse_args()
    torch.manual_seed(1111)
    text = make_text(args.words, args.batch_size * (args.bptt * args.steps + 1))
    data = text.view(args.batch_size, -1).t().contiguous()
    model = Model(args.words, args.width, args.layers)
    criterion = nn.NLLLoss()
    shape = (args.layers, args.batch_size, args.width)
    hidden = (torch.zeros(shape), torch.zeros(shape))
    started = time.perf_counter()
    for step in range(args.steps):
        at = step * args.bptt
        tokens = data[at : at + args.bptt]
        targets = data[at + 1 : at + 1 + args.bptt].reshape(-1)
        model.zero_grad()
        hidden = tuple(h.detach() for h in hidden)
        output, hidden = model(tokens, hidden)
        loss = criterion(output, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        for p in model.parameters():
            p.data.add_(p.grad, alpha=-args.lr)
        if step % 5 == 0:
            print(f"step {step} loss {loss.item():.6f} perplexity {math.exp(loss.item()):.2f}")
    count = args.steps * args.bptt * args.batch_size
    print(f"trained {count} words in {time.perf_counter() - started:.3f} s")


if __name__ == "__main__":
    main()
