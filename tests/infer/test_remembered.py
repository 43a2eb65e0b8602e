"""What names a race of engines."""

from typing import Any

import numpy
import pytest
import torch
from torch import nn

from hotloop import compile_inference


class Counted(nn.Module):
    """Has state that is no tensor."""

    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.layer, self.extra = nn.Linear(4, 2), extra

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@pytest.mark.parametrize(
    "extra", [{"step": 3}, "text", None, [1, 2.5], numpy.arange(3), torch.arange(3)], ids=repr
)
def test_a_model_with_extra_state_answers(extra: Any) -> None:
    model, x = Counted(extra).eval(), torch.randn(3, 4)
    runner = compile_inference(model, example=x, engines=["eager"])
    torch.testing.assert_close(runner(x), model(x).detach())
