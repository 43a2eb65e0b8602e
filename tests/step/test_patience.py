"""Which shapes of batch are worth a program: costs and gains decide; the first come at once."""

import copy
import math

import pytest
import torch
from torch import nn

import hotloop
from hotloop import kernels
from hotloop.step.patience import NEVER, Patience

if not kernels.is_available():
    pytest.skip(kernels.unavailable_reason(), allow_module_level=True)


def after(plain_s, overhead_s, build_s, *program_s):
    patience = Patience()
    patience.note_build(plain_s, overhead_s, build_s)
    for seconds in program_s:
        patience.note_run(seconds)
    return patience


def test_two_shapes_are_recorded_at_once_and_others_wait_for_a_verdict():
    patience = Patience()
    assert [patience.allows(0, begun) for begun in (0, 1, 2)] == [True, True, False]
    assert not patience.allows(10**9, 2)


def test_a_shape_waits_until_twice_its_cost_could_have_been_saved():
    patience = after(1.0, 0.25, 0.5, 0.9, 0.75, 0.8)  # 1 s is paid, 0.25 s a step saved.
    assert patience.steps == 8
    assert not patience.allows(7, 2)
    assert patience.allows(8, 2)


@pytest.mark.parametrize("program_s", [1.0, 1.5])
def test_programs_that_are_no_faster_are_made_for_no_other_shape(program_s):
    assert after(1.0, 0.1, 0.1, *[program_s] * 3).steps == NEVER


def test_a_verdict_stays():
    patience = after(1.0, 0.25, 0.5, 0.75, 0.75, 0.75)
    patience.note_build(1.0, 100.0, 100.0)
    for _ in range(3):
        patience.note_run(math.inf)
    assert patience.steps == 8


def test_runs_of_another_shape_say_nothing():
    patience = Patience()
    patience.note_build(1.0, 0.25, 0.5, "long")
    for _ in range(2):
        patience.note_run(0.75, "long")
        patience.note_run(0.01, "short")
    patience.note_build(0.1, 0.25, 0.5, "short")  # Nor does its program.
    assert patience.steps is None
    patience.note_run(0.75, "long")
    assert patience.steps == 8


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.read = nn.Embedding(20, 8), nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.read(self.embed(x))[0][:, -1])


def test_sequences_of_many_lengths_train_as_in_plain_pytorch_and_after_a_checkpoint():
    torch.manual_seed(0)
    lengths = [5, 3, *torch.randint(1, 9, (60,)).tolist()]
    batches = [(torch.randint(20, (4, n)), torch.randint(3, (4,))) for n in lengths]
    plain = Words()
    models = [plain, copy.deepcopy(plain), copy.deepcopy(plain)]
    optimizers = [torch.optim.Adam(m.parameters()) for m in models]

    def step_of(number):
        return hotloop.compile_step(
            models[number], nn.functional.cross_entropy, optimizers[number], batches[0]
        )

    step, first = step_of(1), step_of(2)
    for number, (x, y) in enumerate(batches):
        optimizers[0].zero_grad()
        loss = nn.functional.cross_entropy(plain(x), y)
        loss.backward()
        optimizers[0].step()
        torch.testing.assert_close(step(x, y), loss.detach(), rtol=1e-4, atol=1e-6)
        if number < 40:
            first(x, y)
        if number == 39:  # Another process goes on, with no measurements of its own.
            progress = first.progress
            state = optimizers[2].state_dict()
            optimizers[2] = torch.optim.Adam(models[2].parameters())
            optimizers[2].load_state_dict(state)
            resumed = step_of(2)
            resumed.go_on(progress)
        if number >= 40:
            resumed(x, y)
            assert resumed._recorded.progress()["patience"] == progress["patience"]
    for ours, again, wanted in zip(
        models[1].parameters(), models[2].parameters(), plain.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(again, wanted, rtol=1e-4, atol=1e-5)
