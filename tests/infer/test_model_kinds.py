"""Models that exports get wrong: no parameters, other dtypes, sizes made from the batch's."""

import pytest
import torch
from torch import nn

import hotloop
from hotloop.errors import HotloopError

QUICK = {"budget_s": 0.3, "cache": False}


def compiled(model, example, **options):
    return hotloop.compile_inference(model, example, **{**QUICK, **options})


def eager(model, *args):
    with torch.no_grad():
        return model(*args)


# ---- Nothing to learn ---------------------------------------------------------------------------


class Preprocess(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x):
        return (x - self.mean).softmax(-1)


class Norm(nn.Module):
    def forward(self, x):
        return torch.sqrt(x.square().sum(-1, keepdim=True) + 1)


class Ranks(nn.Module):
    """Whole numbers and booleans come out."""

    def forward(self, x):
        return x.argsort(-1), x > 0


@pytest.mark.parametrize("make", [Preprocess, Norm, Ranks, nn.Identity, nn.Flatten])
def test_a_module_without_parameters(make):
    model, x = make().eval(), torch.randn(4, 3)
    with compiled(model, x, batch_sizes=[4], engines=["eager", "onnxruntime", "hotloop"]) as runner:
        for rows in (1, 4):
            torch.testing.assert_close(runner(x[:rows]), eager(model, x[:rows]))


# ---- Dtypes -------------------------------------------------------------------------------------


class Inside(nn.Module):
    """float32 in and out, another dtype between."""

    def __init__(self, dtype):
        super().__init__()
        self.layer = nn.Linear(6, 3).to(dtype)

    def forward(self, x):
        return self.layer(x.to(self.layer.weight.dtype)).float()


class Rotary(nn.Module):
    """A complex buffer, as the first rotary embeddings had."""

    def __init__(self):
        super().__init__()
        angles = torch.outer(torch.arange(5.0), torch.tensor([1.0, 0.1, 0.01]))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))

    def forward(self, x):
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * self.turns
        return torch.view_as_real(pairs).flatten(2)


class Spectrum(nn.Module):
    """Complex numbers come out."""

    def forward(self, x):
        return torch.fft.rfft(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("engines", [None, ["onnxruntime"]])
def test_models_of_other_dtypes(dtype, whole, engines):
    model = (nn.Linear(6, 3).to(dtype) if whole else Inside(dtype)).eval()
    x = torch.randn(4, 6).to(dtype if whole else torch.float32)
    try:
        runner = compiled(model, x, batch_sizes=[4], engines=engines)
    except HotloopError:  # What an engine cannot take it refuses; the race goes on.
        if engines is None:
            raise
        return
    with runner:
        got, want = runner(x), eager(model, x)
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want)
        if dtype is torch.bfloat16 and whole:
            with pytest.raises(HotloopError):
                runner(x.float().numpy())


@pytest.mark.parametrize(("make", "shape"), [(Rotary, (2, 5, 6)), (Spectrum, (2, 8))])
def test_complex_numbers(make, shape):
    model, x = make().eval(), torch.randn(shape)
    with compiled(model, x, batch_sizes=[2]) as runner:
        torch.testing.assert_close(runner(x), eager(model, x))
        torch.testing.assert_close(runner(x[:1]), eager(model, x[:1]))


# ---- What is made from the batch's size ---------------------------------------------------------


class Stated(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(5, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        state = torch.zeros(1, x.size(0), 8)
        return self.head(self.rnn(x, (state, torch.zeros_like(state)))[0][:, -1])


class Picks(nn.Module):
    """The last real step of each row."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x):
        last = (x[..., 0] > 0).int().cumsum(1).argmax(1)
        return self.layer(x)[torch.arange(x.shape[0]), last]


class Merges(Picks):
    def forward(self, x):
        batch, steps, width = x.shape
        return self.layer(x.reshape(batch * steps, width)).view(batch, steps, 3).mean(1)


class Counts(Picks):
    """A Python number of the batch in the arithmetic."""

    def forward(self, x):
        return self.layer(x.mean(1)) / x.shape[0] + len(x) ** 0.5


class Loops(Picks):
    """One row at a time."""

    def forward(self, x):
        return torch.stack([self.layer(row).amax(0) for row in x])


class Against(Picks):
    """Each row against all others: the batch twice in the answer."""

    def forward(self, x):
        rows = self.layer(x.mean(1))
        return rows @ rows.T


@pytest.mark.parametrize("make", [Stated, Picks, Merges, Counts, Loops, Against])
@pytest.mark.parametrize("rows", [1, 4])
def test_any_batch_size_whatever_the_examples_was(make, rows):
    torch.manual_seed(1)
    model, x = make().eval(), torch.randn(11, 6, 5)
    with compiled(
        model, x[:rows], batch_sizes=sorted({1, rows}), engines=["eager", "onnxruntime"]
    ) as runner:
        for n in (1, 2, 4, 7, 11):
            torch.testing.assert_close(runner(x[:n]), eager(model, x[:n]), rtol=1e-4, atol=1e-5)
