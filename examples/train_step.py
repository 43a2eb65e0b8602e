"""The train step alone, in a loop of one's own: the same numbers as plain PyTorch."""

import copy

import torch
from torch import nn

import hotloop


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 1))
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    x, y = torch.randn(64, 32), torch.randn(64, 1)

    plan = hotloop.Plan().replace({"memory.micro_batch_size": 16})
    step = hotloop.compile_step(model, nn.functional.mse_loss, optimizer, example=(x, y), plan=plan)
    for _ in range(20):
        loss = step(x, y)
        plain_optimizer.zero_grad()
        plain_loss = nn.functional.mse_loss(plain(x), y)
        plain_loss.backward()
        plain_optimizer.step()
    difference = abs(loss.item() - plain_loss.item())
    print(f"loss {loss.item():.6f}, plain {plain_loss.item():.6f}, difference {difference:.1e}")
    assert difference < 1e-5


if __name__ == "__main__":
    main()
