"""Train functions that people write, each with all that it trains, made anew from one seed."""

import copy
import itertools
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class Program:
    """A function, what it trains, and arguments for each of its calls."""

    function: object
    modules: list
    optimizers: list
    tensors: list = field(default_factory=list)
    schedulers: list = field(default_factory=list)
    num_calls: int = 30

    def state(self):
        """All that a call may change, as one flat list of tensors and numbers."""
        found = [v.clone() for m in self.modules for v in m.state_dict().values()]
        found += [t.clone() for t in self.tensors]
        for optimizer in self.optimizers:
            state = optimizer.state_dict()
            found += [v for s in state["state"].values() for v in s.values() if v is not None]
            found += [g["lr"] for g in state["param_groups"]]
        for scheduler in self.schedulers:
            found += [scheduler.last_epoch, *scheduler.get_last_lr()]
        return found


def mlp(*widths, last=None, activation=nn.ReLU):
    layers = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1], *([last] if last is not None else []))


def batch(number, rows=16, width=12):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(rows, width, generator=generator)
    return x, (x[:, :3].sum(1) > 0).long(), torch.randn(rows, 4, generator=generator)


def gan():
    maker, judge = mlp(8, 32, 12), mlp(12, 32, 1, activation=lambda: nn.LeakyReLU(0.2))
    opt_g = torch.optim.Adam(maker.parameters(), lr=2e-3, betas=(0.5, 0.999))
    opt_d = torch.optim.Adam(judge.parameters(), lr=1e-3, betas=(0.5, 0.999))
    bce = nn.BCEWithLogitsLoss()

    def train(real, _y, _t):
        ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)
        fake = maker(torch.randn(len(real), 8))
        opt_d.zero_grad()
        loss_d = bce(judge(real), ones) + bce(judge(fake.detach()), zeros)
        loss_d.backward()
        opt_d.step()
        opt_g.zero_grad()
        loss_g = bce(judge(fake), ones)
        loss_g.backward()
        opt_g.step()
        return {"d": loss_d, "g": loss_g}

    return Program(train, [maker, judge], [opt_g, opt_d])


def gan_of_images():
    maker = nn.Sequential(
        nn.Linear(8, 16 * 4 * 4, bias=False), nn.Unflatten(1, (16, 4, 4)),
        nn.BatchNorm2d(16), nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 1, 3, padding=1), nn.Tanh(),
    )  # fmt: skip
    judge = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(8, 16, 3, 2, 1, bias=False),
        nn.BatchNorm2d(16), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(16 * 4 * 4, 1),
    )  # fmt: skip
    opt_g = torch.optim.Adam(maker.parameters(), lr=1e-3, betas=(0.5, 0.999))
    opt_d = torch.optim.Adam(judge.parameters(), lr=1e-3, betas=(0.5, 0.999))

    def train(x, _y, _t):
        real = x.repeat(1, 6)[:, :64].view(-1, 1, 8, 8)
        judge.zero_grad()
        score = judge(real)
        loss_real = F.binary_cross_entropy_with_logits(score, torch.ones_like(score))
        loss_real.backward()
        fake = maker(torch.randn(len(x), 8))
        score = judge(fake.detach())
        loss_fake = F.binary_cross_entropy_with_logits(score, torch.zeros_like(score))
        loss_fake.backward()
        opt_d.step()
        maker.zero_grad()
        score = judge(fake)
        loss = F.binary_cross_entropy_with_logits(score, torch.ones_like(score))
        loss.backward()
        opt_g.step()
        return loss_real, loss_fake, loss

    return Program(train, [maker, judge], [opt_g, opt_d])


def gradient_penalty():
    maker, critic = mlp(8, 32, 12), mlp(12, 32, 1, activation=nn.Tanh)
    opt_g = torch.optim.RMSprop(maker.parameters(), lr=1e-3)
    opt_c = torch.optim.RMSprop(critic.parameters(), lr=1e-3)

    def train(real, _y, _t):
        for _ in range(2):
            fake = maker(torch.randn(len(real), 8)).detach()
            mix = torch.rand(len(real), 1)
            between = (mix * real + (1 - mix) * fake).requires_grad_()
            (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
            penalty = ((slope.norm(2, dim=1) - 1) ** 2).mean()
            loss_c = critic(fake).mean() - critic(real).mean() + 10 * penalty
            opt_c.zero_grad()
            loss_c.backward()
            opt_c.step()
        loss_g = -critic(maker(torch.randn(len(real), 8))).mean()
        opt_g.zero_grad()
        loss_g.backward()
        opt_g.step()
        return [loss_c, loss_g, penalty]

    return Program(train, [maker, critic], [opt_g, opt_c])


def clipped_critic():
    """Weights of the critic are clipped in place after each update."""
    maker, critic = mlp(8, 24, 12), mlp(12, 24, 1)
    opt_g = torch.optim.RMSprop(maker.parameters(), lr=1e-3)
    opt_c = torch.optim.RMSprop(critic.parameters(), lr=1e-3)

    def train(real, _y, _t):
        fake = maker(torch.randn(len(real), 8))
        opt_c.zero_grad()
        loss_c = critic(fake.detach()).mean() - critic(real).mean()
        loss_c.backward()
        opt_c.step()
        for p in critic.parameters():
            p.data.clamp_(-0.05, 0.05)
        opt_g.zero_grad()
        loss_g = -critic(fake).mean()
        loss_g.backward()
        opt_g.step()
        return loss_c, loss_g

    return Program(train, [maker, critic], [opt_g, opt_c])


def actor_and_critic():
    actor, critic = mlp(12, 32, 2), mlp(12, 32, 1)
    opt_a = torch.optim.Adam(actor.parameters(), lr=1e-3)
    opt_c = torch.optim.SGD(critic.parameters(), lr=1e-2, momentum=0.9)

    def train(state, action, reward):
        value = critic(state).squeeze(1)
        returns = reward.sum(1)
        loss_c = F.mse_loss(value, returns)
        opt_c.zero_grad()
        loss_c.backward()
        nn.utils.clip_grad_norm_(critic.parameters(), 0.5)
        opt_c.step()
        advantage = (returns - value).detach()
        logs = F.log_softmax(actor(state), 1)
        chosen = logs.gather(1, action[:, None]).squeeze(1)
        entropy = -(logs.exp() * logs).sum(1).mean()
        loss_a = -(chosen * advantage).mean() - 0.01 * entropy
        opt_a.zero_grad()
        loss_a.backward()
        norm = nn.utils.clip_grad_norm_(actor.parameters(), 0.5)
        opt_a.step()
        return loss_a, loss_c, norm

    return Program(train, [actor, critic], [opt_a, opt_c])


def distillation():
    teacher, student = mlp(12, 64, 2).eval(), mlp(12, 16, 2)
    for p in teacher.parameters():
        p.requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)

    def train(x, y, _t, temperature=2.0):
        with torch.no_grad():
            wanted = F.softmax(teacher(x) / temperature, 1)
        logits = student(x)
        soft = F.kl_div(F.log_softmax(logits / temperature, 1), wanted, reduction="batchmean")
        loss = 0.5 * F.cross_entropy(logits, y) + 0.5 * temperature**2 * soft
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return Program(train, [teacher, student], [optimizer])


class Averaged:
    """A method as the function; an average of the weights that each call moves."""

    def __init__(self):
        # No bias before a batch norm: its gradient is only rounding, which Adam makes whole steps.
        first = nn.Linear(12, 16, bias=False)
        self.model = nn.Sequential(first, nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 2))
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.decay = 0.9

    def train(self, x, y, _t):
        loss = F.cross_entropy(self.model(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for mean, now in zip(self.average.parameters(), self.model.parameters(), strict=True):
                mean.mul_(self.decay).add_(now, alpha=1 - self.decay)
            for mean, now in zip(self.average.buffers(), self.model.buffers(), strict=True):
                mean.copy_(now)
        with torch.no_grad():
            agreed = (self.average(x).argmax(1) == y).float().mean()
        return loss, agreed


def average_of_weights():
    owner = Averaged()
    return Program(owner.train, [owner.model, owner.average], [owner.optimizer])


def several_backwards():
    """Gradients of three losses into one update; of the last one by a scheduled rate."""
    model = mlp(12, 32, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)

    def train(x, y, _t):
        optimizer.zero_grad()
        total = 0
        for part_x, part_y in zip(x.chunk(2), y.chunk(2), strict=True):
            loss = F.cross_entropy(model(part_x), part_y) / 2
            loss.backward()
            total = total + loss.detach()
        extra = 1e-3 * sum(p.square().sum() for p in model.parameters())
        extra.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        return total, extra

    return Program(train, [model], [optimizer], schedulers=[scheduler])


def zeroed_after():
    """Gradients are let go at the end, to zeros; dropout; a rate for each group; NAdam."""
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 2))
    groups = [{"params": model[0].parameters(), "lr": 1e-3}, {"params": model[3].parameters()}]
    optimizer = torch.optim.NAdam(groups, lr=3e-3)
    scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5),
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95),
        ],
        milestones=[5],
    )

    def train(x, y, _t):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=False)
        return loss.detach()

    return Program(train, [model], [optimizer], schedulers=[scheduler])


def queue_of_keys():
    """A contrastive loss with a momentum encoder and a queue that each call moves on."""
    query, key = mlp(12, 24, 8), mlp(12, 24, 8).requires_grad_(False)
    queue = F.normalize(torch.randn(8, 64), dim=0)
    optimizer = torch.optim.SGD(query.parameters(), lr=0.05)

    def train(x, _y, _t):
        with torch.no_grad():
            for k, q in zip(key.parameters(), query.parameters(), strict=True):
                k.data.mul_(0.99).add_(q.data, alpha=0.01)
            keys = F.normalize(key(x + 0.1 * torch.randn_like(x)), dim=1)
        queries = F.normalize(query(x), dim=1)
        same = (queries * keys).sum(1, keepdim=True)
        others = queries @ queue.clone()
        logits = torch.cat([same, others], 1) / 0.2
        loss = F.cross_entropy(logits, torch.zeros(len(x), dtype=torch.long))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            queue.copy_(torch.cat([keys.T, queue[:, : -len(keys)]], 1))
        return loss

    return Program(train, [query, key], [optimizer], [queue])


def deep_q():
    """A target network that follows softly; Huber loss; values clipped."""
    online = mlp(12, 32, 4)
    target = copy.deepcopy(online).requires_grad_(False)
    optimizer = torch.optim.AdamW(online.parameters(), lr=1e-3, amsgrad=False)

    def train(state, action, reward):
        with torch.no_grad():
            best = online(state + 0.1).argmax(1, keepdim=True)
            wanted = reward[:, :1] + 0.9 * target(state + 0.1).gather(1, best)
        value = online(state).gather(1, action[:, None])
        loss = F.smooth_l1_loss(value, wanted)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_value_(online.parameters(), 0.1)
        optimizer.step()
        with torch.no_grad():
            for t, o in zip(target.parameters(), online.parameters(), strict=True):
                t.lerp_(o, 0.05)
        return loss

    return Program(train, [online, target], [optimizer])


def frozen_in_turn():
    """The judge is frozen while the maker learns, by requires_grad, as cycle GANs do."""
    maker, judge = mlp(12, 24, 12), mlp(12, 24, 1)
    opt_g = torch.optim.Adamax(maker.parameters(), lr=1e-3)
    opt_d = torch.optim.Adagrad(judge.parameters(), lr=1e-2)

    def learnable(module, on):
        for p in module.parameters():
            p.requires_grad_(on)

    def train(x, _y, _t):
        made = maker(x)
        learnable(judge, False)
        opt_g.zero_grad()
        loss_g = F.softplus(-judge(made)).mean() + F.l1_loss(made, x)
        loss_g.backward()
        opt_g.step()
        learnable(judge, True)
        opt_d.zero_grad()
        loss_d = F.softplus(-judge(x)).mean() + F.softplus(judge(made.detach())).mean()
        loss_d.backward()
        opt_d.step()
        return {"losses": (loss_g, loss_d), "steps": 1}

    return Program(train, [maker, judge], [opt_g, opt_d])


def learned_weights():
    """Two tasks whose weights in the loss are learned by an optimizer of their own."""
    trunk, heads = mlp(12, 32, 16, last=nn.ReLU()), nn.ModuleList([nn.Linear(16, 2),
                                                                   nn.Linear(16, 4)])  # fmt: skip
    logs = nn.Parameter(torch.zeros(2))
    opt = torch.optim.Adam([*trunk.parameters(), *heads.parameters()], lr=1e-3)
    opt_w = torch.optim.SGD([logs], lr=0.01)

    def train(x, y, t):
        h = trunk(x)
        losses = torch.stack([F.cross_entropy(heads[0](h), y), F.mse_loss(heads[1](h), t)])
        loss = (torch.exp(-logs) * losses + logs).sum()
        for o in (opt, opt_w):
            o.zero_grad()
        loss.backward()
        for o in (opt, opt_w):
            o.step()
        return loss, losses

    return Program(train, [trunk, heads], [opt, opt_w], [logs])


def recurrent():
    """A state that comes back and goes in again; an LSTM; gradients by value."""
    model, head = nn.LSTM(4, 16, batch_first=True), nn.Linear(16, 2)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=3e-3)

    def train(x, y, _t):
        out, (h, _) = model(x.view(-1, 3, 4))
        loss = F.cross_entropy(head(out[:, -1]), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss, h.detach()

    return Program(train, [model, head], [optimizer])


PROGRAMS = {
    made.__name__: made
    for made in (
        gan, gan_of_images, gradient_penalty, clipped_critic, actor_and_critic, distillation,
        average_of_weights, several_backwards, zeroed_after, queue_of_keys, deep_q, frozen_in_turn,
        learned_weights, recurrent,
    )
}  # fmt: skip
