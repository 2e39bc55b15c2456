"""Kinds of models that nothing here was tuned on: TEKFAC as it is beside AdamW at three rates.

    python -m benchmarks.strangers --mnist mnist.npz

Small models of a dozen kinds, as people write them: a diffusion model, a segmentation, two encoders
compared by contrast, sequences to sequences, a graph, a field of sines, a factorisation, tables of
numbers, an actor with a critic, distillation, key points, a transformer. Each trains for some
hundred steps with TEKFAC's defaults and with AdamW at 1e-3, 3e-3 and 1e-2. A row has the training
loss, a mean over the last tenth of the steps (of the graph the loss on nodes without a label, of
the actor how many steps its pole stays up) and processor seconds. A constant rate, one thread.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tekfac
from benchmarks.gauntlet.sources import Sources

ADAMW = (1e-3, 3e-3, 1e-2)


@dataclass
class Problem:
    """A model and what trains it.

    Attributes:
        model: the network.
        loss: of a fresh batch.
        steps: how many.
        likelihood: what its outputs mean.
        judged: what stands in the table; None for the training loss.
        better: whether more of it is better.
    """

    model: nn.Module
    loss: Callable[[], Tensor]
    steps: int
    likelihood: Any = "categorical"
    judged: Callable[[], float] | None = None
    better: bool = False


@dataclass(frozen=True)
class Images:
    """Digits, ``x`` from 0 to 1, and a stream of random numbers for batches."""

    x: Tensor
    y: Tensor
    stream: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(1))

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(self.x), (size,), generator=self.stream)
        return self.x[rows], self.y[rows]

    def noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.stream)


class UNet(nn.Module):
    """Two halvings and two doublings; with the time of a diffusion or without."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.time = nn.Linear(32, 2 * width)
        self.down = nn.ModuleList(
            [
                nn.Conv2d(1, width, 3, padding=1),
                nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
                nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1),
            ]
        )
        self.up = nn.ModuleList(
            [
                nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2),
                nn.ConvTranspose2d(2 * width, width, 2, stride=2),
            ]
        )
        self.merge = nn.Conv2d(4 * width, 2 * width, 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(4, n * width) for n in (2, 4, 2))
        self.last = nn.Conv2d(2 * width, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        a = F.silu(self.down[0](x))
        b = F.silu(self.norms[0](self.down[1](a)))
        if t is not None:
            angles = 100 * t[:, None] * torch.exp(-torch.arange(16) / 3)
            b = b + self.time(torch.cat([angles.sin(), angles.cos()], 1))[:, :, None, None]
        c = F.silu(self.norms[1](self.down[2](b)))
        d = F.silu(self.norms[2](self.merge(torch.cat([self.up[0](c), b], 1))))
        out: Tensor = self.last(torch.cat([self.up[1](d), a], 1))
        return out


def diffusion(images: Images) -> Problem:
    model = UNet()

    def loss() -> Tensor:
        x, _ = images.batch(32)
        t, noise = torch.rand(32, generator=images.stream), images.noise(x)
        kept, added = (f(t * math.pi / 2)[:, None, None, None] for f in (torch.cos, torch.sin))
        return F.mse_loss(model(kept * (2 * x - 1) + added * noise, t), noise)

    return Problem(model, loss, 200, "gaussian")


def segmentation(images: Images) -> Problem:
    model = UNet()

    def loss() -> Tensor:
        x, _ = images.batch(16)
        return F.binary_cross_entropy_with_logits(model(x + images.noise(x)), (x > 0.5).float())

    return Problem(model, loss, 150, "bernoulli")


def encoder(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * channels * 36, out),
    )


class Contrast(nn.Module):
    """Similarities of all pairs of two views."""

    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoder(16, 64) for _ in range(2))
        self.scale = nn.Parameter(torch.tensor(2.6))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = (
            F.normalize(encode(view), dim=1)
            for encode, view in zip(self.encoders, (x, y), strict=True)
        )
        return self.scale.exp() * a @ b.T


def contrast(images: Images) -> Problem:
    model, pairs = Contrast(), torch.arange(64)

    def loss() -> Tensor:
        x, _ = images.batch(64)
        views = (view + 0.3 * images.noise(view) for view in (x, x.roll(2, 3)))
        similar = model(*views)
        return (F.cross_entropy(similar, pairs) + F.cross_entropy(similar.T, pairs)) / 2

    return Problem(model, loss, 200, tekfac.Categorical(dim=-1))


class Sequences(nn.Module):
    """An encoder's last state begins a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 32)
        self.encoder = nn.GRU(32, 64, batch_first=True)
        self.decoder = nn.GRU(32, 64, batch_first=True)
        self.head = nn.Linear(64, 12)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        _, state = self.encoder(self.table(x))
        out: Tensor = self.head(self.decoder(self.table(y), state)[0])
        return out


def sequences(images: Images) -> Problem:
    """Rows of different lengths, backwards; 0 is padding."""
    model = Sequences()

    def loss() -> Tensor:
        x = torch.randint(2, 12, (64, 8), generator=images.stream)
        lengths = torch.randint(3, 9, (64,), generator=images.stream)
        x = torch.where(torch.arange(8) < lengths[:, None], x, 0)
        pairs = zip(x, lengths.tolist(), strict=True)
        wanted = torch.stack([torch.cat([row[:n].flip(0), row[n:]]) for row, n in pairs])
        given = torch.cat([torch.ones(64, 1, dtype=torch.long), wanted[:, :-1]], 1)
        return F.cross_entropy(model(x, given).flatten(0, 1), wanted.flatten(), ignore_index=0)

    return Problem(model, loss, 300)


class Graph(nn.Module):
    """Three layers of graph convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(50, 64), nn.Linear(64, 64), nn.Linear(64, 5)])

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.dropout(F.relu(adjacency @ layer(x)), 0.3, self.training)
        out: Tensor = adjacency @ self.layers[-1](x)
        return out


def graph(images: Images) -> Problem:
    """500 nodes of five groups, of which a tenth have labels."""
    model, made = Graph(), torch.Generator().manual_seed(5)
    y = torch.arange(500) % 5
    likely = torch.where(y[:, None] == y, 0.04, 0.006)
    edges = torch.rand(500, 500, generator=made) < likely
    adjacency = (edges | edges.T | torch.eye(500, dtype=torch.bool)).float()
    root = adjacency.sum(1).sqrt()
    adjacency /= root[:, None] * root
    centres = torch.randn(5, 50, generator=made)
    x = torch.randn(500, 50, generator=made) + 0.4 * centres[y]
    known = torch.rand(500, generator=made) < 0.1

    def loss() -> Tensor:
        return F.cross_entropy(model(x, adjacency)[known], y[known])

    def others() -> float:
        model.eval()
        with torch.no_grad():
            found = F.cross_entropy(model(x, adjacency)[~known], y[~known]).item()
        model.train()
        return found

    return Problem(model, loss, 60, judged=others)


class Sines(nn.Module):
    """A field of brightness: SIREN (Sitzmann et al., 2020)."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(d, 128) for d in (2, 128, 128)]
        for number, layer in enumerate(layers):
            bound = 0.5 if number == 0 else math.sqrt(6 / 128) / 30
            nn.init.uniform_(layer.weight, -bound, bound)
        self.layers, self.last = nn.ModuleList(layers), nn.Linear(128, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sin(30 * layer(x))
        out: Tensor = self.last(x)
        return out


def sines(images: Images) -> Problem:
    """Four digits side by side, every point in every batch."""
    model = Sines()
    picture = torch.cat(list(images.x[:4, 0]), 1)
    axes = [torch.linspace(-1, 1, n) for n in picture.shape]
    points = torch.cartesian_prod(*axes)
    return Problem(
        model, lambda: F.mse_loss(model(points)[:, 0], picture.flatten()), 150, "gaussian"
    )


class Factors(nn.Module):
    """Two tables, their products, and a perceptron on both."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(500, 16), nn.Embedding(300, 16)])
        self.offsets = nn.ModuleList([nn.Embedding(500, 1), nn.Embedding(300, 1)])
        self.mixed = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        a, b = self.tables[0](user), self.tables[1](item)
        offset = self.offsets[0](user) + self.offsets[1](item)
        out: Tensor = (a * b).sum(1) + (offset + self.mixed(torch.cat([a, b], 1)))[:, 0]
        return out


def factors(images: Images) -> Problem:
    """A noisy matrix of rank four, 256 entries a batch."""
    model, made = Factors(), torch.Generator().manual_seed(5)
    users, items = (torch.randn(n, 4, generator=made) for n in (500, 300))

    def loss() -> Tensor:
        u, i = (torch.randint(n, (256,), generator=images.stream) for n in (500, 300))
        entries = (users[u] * items[i]).sum(1)
        return F.mse_loss(model(u, i), entries + 0.1 * images.noise(entries))

    return Problem(model, loss, 500, "gaussian")


def table(images: Images) -> Problem:
    """Yes or no of thirty columns, with batch norm and dropout."""
    made = torch.Generator().manual_seed(5)
    x, weights = torch.randn(5000, 30, generator=made), torch.randn(30, 8, generator=made)
    y = ((x @ weights).sin().sum(1) > 0).float()
    layers: list[nn.Module] = [nn.BatchNorm1d(30)]
    for width in (30, 128):
        layers += [nn.Linear(width, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.1)]
    model = nn.Sequential(*layers, nn.Linear(128, 1))

    def loss() -> Tensor:
        rows = torch.randint(5000, (128,), generator=images.stream)
        return F.binary_cross_entropy_with_logits(model(x[rows])[:, 0], y[rows])

    return Problem(model, loss, 300, "bernoulli")


def units(images: Images) -> Problem:
    """A number of twelve columns, whose units differ by a factor of 10⁵; as they are."""
    made = torch.Generator().manual_seed(5)
    z, weights = torch.randn(3000, 12, generator=made), torch.randn(12, generator=made)
    x = z * torch.logspace(-2, 3, 12) + torch.logspace(-1, 4, 12)
    y = 50 * z @ weights + 200 + 5 * z[:, 0] * z[:, 1]
    model = nn.Sequential(
        nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
    )

    def loss() -> Tensor:
        rows = torch.randint(3000, (64,), generator=images.stream)
        return F.mse_loss(model(x[rows])[:, 0], y[rows])

    return Problem(model, loss, 400, "gaussian")


class ActorCritic(nn.Module):
    """Which way to push, and what is to be had from here."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        self.actor, self.critic = nn.Linear(64, 2), nn.Linear(64, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.body(x)
        return self.actor(seen), self.critic(seen)


class Poles:
    """Sixteen poles on carts, each begun again when it falls (Barto, Sutton, Anderson, 1983)."""

    def __init__(self, stream: torch.Generator) -> None:
        self.stream = stream
        self.state = self._fresh(16)
        self.age = torch.zeros(16)
        self.lengths: list[float] = []

    def _fresh(self, count: int) -> Tensor:
        return torch.rand(count, 4, generator=self.stream) / 10 - 0.05

    def push(self, right: Tensor) -> Tensor:
        """Take a step; which of them fell."""
        _, speed, angle, turn = self.state.T
        force = 20.0 * right - 10.0
        cos, sin = angle.cos(), angle.sin()
        pull = (force + 0.05 * turn**2 * sin) / 1.1
        bend = (9.8 * sin - cos * pull) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
        moved = speed, pull - 0.05 * bend * cos / 1.1, turn, bend
        self.state = self.state + 0.02 * torch.stack(moved, 1)
        self.age += 1
        over = (self.state[:, 0].abs() > 2.4) | (self.state[:, 2].abs() > 0.2095)
        over |= self.age >= 500
        self.lengths += self.age[over].tolist()
        self.state[over], self.age[over] = self._fresh(int(over.sum())), 0.0
        return over


def poles(images: Images) -> Problem:
    """PPO: 64 steps of sixteen carts, then three times over them in batches of 256."""
    model, carts = ActorCritic(), Poles(images.stream)
    memory: list[tuple[Tensor, ...]] = []
    batches: list[Tensor] = []

    @torch.no_grad()
    def collect() -> tuple[Tensor, ...]:
        seen = []
        for _ in range(64):
            state = carts.state
            logits, value = model(state)
            action = torch.multinomial(logits.softmax(1), 1, generator=images.stream)[:, 0]
            chance = logits.log_softmax(1)[torch.arange(16), action]
            seen.append((state, action, chance, value[:, 0], carts.push(action).float()))
        ahead, advantage, advantages = model(carts.state)[1][:, 0], torch.zeros(16), []
        for *_, value, over in reversed(seen):
            advantage = 1 + 0.99 * (1 - over) * (ahead + 0.95 * advantage) - value
            ahead = value
            advantages.append(advantage)
        state, action, chance, value, _ = (torch.cat(each) for each in zip(*seen, strict=True))
        gained = torch.cat(advantages[::-1])
        return state, action, chance, gained, gained + value

    def loss() -> Tensor:
        if not batches:
            memory[:] = [collect()]
            for _ in range(3):
                batches.extend(torch.randperm(1024, generator=images.stream).split(256))
        rows = batches.pop()
        state, action, chance, gained, total = (each[rows] for each in memory[0])
        logits, value = model(state)
        chances = logits.log_softmax(1)
        ratio = (chances[torch.arange(256), action] - chance).exp()
        gained = (gained - gained.mean()) / gained.std()
        clipped = torch.min(ratio * gained, ratio.clamp(0.8, 1.2) * gained).mean()
        entropy = -(chances.exp() * chances).sum(1).mean()
        found: Tensor = 0.005 * F.mse_loss(value[:, 0], total) - clipped - 0.01 * entropy
        return found

    def length() -> float:
        return sum(carts.lengths[-30:]) / 30

    # 0.005 of a squared error is that of variance 100.
    likelihoods = [tekfac.Categorical(masked=False), tekfac.Gaussian(variance=100)]
    return Problem(model, loss, 600, likelihoods, length, better=True)


def distillation(images: Images) -> Problem:
    """A random network's softened answers; Hinton's loss, at a temperature of 2."""
    teacher = encoder(32, 10).requires_grad_(False)
    model = encoder(8, 10)

    def loss() -> Tensor:
        x, _ = images.batch(64)
        wanted = (40 * teacher(x) / 2).softmax(1)
        return 4 * F.kl_div(F.log_softmax(model(x) / 2, 1), wanted, reduction="batchmean")

    return Problem(model, loss, 200)


def key_points(images: Images) -> Problem:
    """Where a digit's ink is and how far it spreads, in pixels, by a smoothed absolute error."""
    model = nn.Sequential(encoder(16, 64), nn.ReLU(), nn.Linear(64, 4))
    ink = images.x[:, 0] / images.x[:, 0].sum((1, 2), keepdim=True)
    places = torch.arange(28.0)
    sides = [ink.sum(1), ink.sum(2)]
    means = [(side * places).sum(1) for side in sides]
    squares = [(side * places**2).sum(1) for side in sides]
    spreads = [(s - m**2).clamp_min(0).sqrt() for s, m in zip(squares, means, strict=True)]
    wanted = torch.stack([*means, *spreads], 1)

    def loss() -> Tensor:
        rows = torch.randint(len(wanted), (64,), generator=images.stream)
        return F.smooth_l1_loss(model(images.x[rows]), wanted[rows])

    return Problem(model, loss, 300, "gaussian")


class Patches(nn.Module):
    """torch's own transformer on patches of 7 × 7."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(49, 64)
        self.places = nn.Parameter(torch.zeros(16, 64))
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unfold(2, 7, 7).unfold(3, 7, 7).reshape(len(x), 16, 49)
        out: Tensor = self.head(self.body(self.patch(x) + self.places).mean(1))
        return out


def patches(images: Images) -> Problem:
    """Digits, with smoothed labels and dropout."""
    model = Patches()

    def loss() -> Tensor:
        x, y = images.batch(64)
        return F.cross_entropy(model(x), y, label_smoothing=0.1)

    return Problem(model, loss, 200)


PROBLEMS: dict[str, Callable[[Images], Problem]] = {
    problem.__name__: problem
    for problem in (
        diffusion,
        segmentation,
        contrast,
        sequences,
        graph,
        sines,
        factors,
        table,
        units,
        poles,
        distillation,
        key_points,
        patches,
    )
}


def train(
    make: Callable[[Problem], torch.optim.Optimizer], problem: Problem
) -> tuple[float, float]:
    """What stands in the table, and processor seconds of training."""
    optimizer = make(problem)
    losses, start = [], time.process_time()
    for _ in range(problem.steps):
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    seconds = time.process_time() - start
    last = losses[-max(1, problem.steps // 10) :]
    return problem.judged() if problem.judged else sum(last) / len(last), seconds


def adamw(lr: float) -> Callable[[Problem], torch.optim.Optimizer]:
    return lambda problem: torch.optim.AdamW(problem.model.parameters(), lr=lr)


def tekfac_as_it_is(problem: Problem) -> torch.optim.Optimizer:
    return tekfac.TEKFAC(problem.model, likelihood=problem.likelihood)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train all, and print a row for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mnist", help="a file; without it scikit-learn's digits, enlarged")
    parser.add_argument("--problems", default=",".join(PROBLEMS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, help="in place of each problem's own")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)
    sources = Sources({"mnist": options.mnist} if options.mnist else {}, Path("runs/gauntlet"))
    data = sources.dataset("mnist")
    x, y = data.x_train[:6000].float(), data.y_train[:6000]
    x = (x - x.min()) / (x.max() - x.min())
    makers = {f"AdamW {lr:g}": adamw(lr) for lr in ADAMW} | {"TEKFAC": tekfac_as_it_is}
    print(f"| problem | steps | {' | '.join(makers)} | seconds, TEKFAC / AdamW |")
    print(f"| --- | --- |{' --- |' * len(makers)} --- |")
    for name in options.problems.split(","):
        ends: dict[str, list[tuple[float, float]]] = {label: [] for label in makers}
        for seed in range(options.seeds):
            for label, make in makers.items():
                torch.manual_seed(seed)
                problem = PROBLEMS[name](Images(x, y))
                problem.steps = options.steps or problem.steps
                ends[label].append(train(make, problem))
        found = {label: sum(end for end, _ in each) / len(each) for label, each in ends.items()}
        best = (max if problem.better else min)(found.values())
        cells = [f"**{end:.3g}**" if end == best else f"{end:.3g}" for end in found.values()]
        spent = {label: sum(seconds for _, seconds in each) for label, each in ends.items()}
        ratio = (
            spent["TEKFAC"]
            * len(ADAMW)
            / sum(spent[label] for label in makers if label != "TEKFAC")
        )
        print(f"| {name} | {problem.steps} | {' | '.join(cells)} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
