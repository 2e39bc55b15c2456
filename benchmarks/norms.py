"""What curvature would gain norm layers, and what TEKFAC's settings do, on the gauntlet's tasks.

    python -m benchmarks.norms --cifar10 cifar10.npz

trains with TEKFAC, a third as long as the gauntlet's final runs. Scales and shifts of norm layers
are trained by Adam, as the package does it, or by their own Fisher matrix, estimated here as
docs/fisher.md has it: for each channel the 2×2 matrix of scale and shift (``unit``; Osawa et al.,
2020), its diagonal (``diagonal``), or the diagonal with scales and shifts as two layers, each
damped and bounded by itself (``separate``). A contender is a rule and settings,
``unit,lr=0.001,power=0.5``: of the norm layers' own step. ``adam`` and ``adamw`` take the
settings of the gauntlet's ``tekfac`` and ``adamw``, and ``adam`` a learning rate of the norm layers
besides: ``adam,norm_lr=0.003``, or 0, with which they stay as they are drawn.

All contenders of a task and a seed train side by side, a step of each in turn. It prints held-out
losses at thirds of the run and processor seconds, and these as a ratio to the first contender's.
"""

from __future__ import annotations

import argparse
import inspect
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import tekfac
from benchmarks.gauntlet import optimizers
from benchmarks.gauntlet.runner import SCHEDULE, evaluate
from benchmarks.gauntlet.search import SEARCH_LENGTH
from benchmarks.gauntlet.sources import Sources
from benchmarks.gauntlet.tasks import TASKS
from benchmarks.gauntlet.tasks.task import Task, shrunk
from tekfac.optimizer.intervals import STATISTICS, decay_at, is_due

CONTENDERS = ("adam", "adam,norm_lr=0", "adam,norm_lr=0.003", "unit", "diagonal", "separate")
NORMS = (nn.LayerNorm, nn.modules.batchnorm._BatchNorm)
# TEKFAC's defaults, which the norm layers' own step takes, too.
LR, MOMENTUM, DECAY, EVERY = (
    inspect.signature(tekfac.TEKFAC).parameters[name].default
    for name in ("lr", "momentum", "factor_decay", "factor_every")
)


@dataclass(frozen=True)
class Heard(tekfac.Categorical):
    """A likelihood that tells when labels are drawn, and how many."""

    hear: Callable[[int], None] = lambda terms: None

    def sample(self, output: Tensor, generator: torch.Generator) -> Tensor:
        self.hear(int(self.terms(output, None).sum()))
        return super().sample(output, generator)


@dataclass(eq=False)
class Norm:
    """A norm layer's Fisher matrix, a 2×2 block for each channel.

    Attributes:
        module: the layer.
        power: of the damped matrix that gradients are divided by.
        ratio: of `MeanDamping`.
        crossed: whether scale and shift have something in common.
        separate: whether they are two layers.
        average: the running average, ``(C, 2, 2)``.
    """

    module: nn.LayerNorm | nn.modules.batchnorm._BatchNorm
    power: float
    ratio: float
    crossed: bool
    separate: bool
    average: Tensor | None = None
    _batch: Tensor | None = None
    _inverse: Tensor | None = None
    _momentum: Tensor | float = 0.0

    def observe(self, x: Tensor, g: Tensor) -> None:
        """A batch's inputs and output gradients; examples come first."""
        module = self.module
        if isinstance(module, nn.LayerNorm):
            unit = F.layer_norm(x, module.normalized_shape, eps=module.eps)
            x, g = unit.flatten(1, -2), g.flatten(1, -2)
        else:
            unit = F.batch_norm(x, None, None, training=True, eps=module.eps)
            x, g = unit.flatten(2).mT, g.flatten(2).mT
        # (C, N, 2): of scale and shift.
        gradients = torch.stack([(g * x).sum(1), g.sum(1)], 2).transpose(0, 1)
        products = gradients.mT @ gradients
        if not self.crossed:
            products = torch.diag_embed(products.diagonal(dim1=1, dim2=2))
        self._batch = products if self._batch is None else self._batch + products

    def learn(self, terms: int, decay: float) -> None:
        """Average the batch in, and damp and invert."""
        if self._batch is None:
            return
        mean, self._batch = self._batch / terms, None
        self.average = mean if self.average is None else self.average.lerp(mean, 1 - decay)
        each = self.average.diagonal(dim1=1, dim2=2).mean(0)
        damping = self.ratio * (each if self.separate else each.mean().expand(2))
        values, vectors = torch.linalg.eigh(self.average + torch.diag(damping.clamp_min(1e-14)))
        self._inverse = (vectors * values.clamp_min(1e-14).pow(-self.power)[:, None]) @ vectors.mT

    def step(self, lr: float) -> None:
        """As TEKFAC's: bounded, with Nesterov's momentum."""
        module = self.module
        scale, shift = module.weight, module.bias
        assert self._inverse is not None
        assert scale.grad is not None
        assert shift.grad is not None
        natural = self._inverse @ torch.stack([scale.grad, shift.grad], 1)[..., None]
        natural = natural[..., 0]
        size = natural.square().mean(0)
        size = (size if self.separate else size.mean().expand(2)).sqrt()
        natural = natural * ((1 - MOMENTUM) / size).clamp_max(1)
        self._momentum = MOMENTUM * self._momentum + natural
        step = natural + MOMENTUM * self._momentum
        scale.sub_(lr * step[:, 0])
        shift.sub_(lr * step[:, 1])


class Norms(Optimizer):
    """TEKFAC, and all norm layers by their Fisher matrices.

    Args:
        network: what is trained.
        task: how.
        lr, power, ratio: of the norm layers.
        crossed, separate: as of `Norm`.
    """

    def __init__(
        self,
        network: nn.Module,
        task: Task,
        crossed: bool,
        separate: bool,
        lr: float = LR,
        power: float = 1.0,
        ratio: float = 0.3,
    ) -> None:
        own, rest = _divided(network)
        super().__init__(own, {"lr": lr})
        given = task.likelihood
        dim = given.dim if isinstance(given, tekfac.Categorical) else None
        self.main = tekfac.TEKFAC(
            network,
            likelihood=Heard(dim=dim, hear=self._hear),
            mean_over=task.mean_over,
            params=[{"params": rest}],
        )
        self.norms = [
            Norm(module, power, ratio, crossed, separate)
            for module in network.modules()
            if isinstance(module, NORMS)
        ]
        self._terms = self._number = 0
        for norm in self.norms:
            norm.module.register_forward_hook(partial(self._after, norm))

    def _hear(self, terms: int) -> None:
        self._terms = terms

    def _after(self, norm: Norm, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        if not torch.is_grad_enabled() or not is_due(self._number, EVERY, STATISTICS):
            return
        x = args[0].detach()

        @torch.no_grad()
        def received(gradient: Tensor) -> None:
            # In passes before labels are drawn, it is found out whose rows are whose.
            if tekfac.measuring() and self._terms:
                norm.observe(x, gradient)

        output.register_hook(received)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self.main.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        loss = self.main.step(closure)
        decay = decay_at(self._number, EVERY, STATISTICS, DECAY)
        for norm in self.norms:
            norm.learn(self._terms, decay)
            norm.step(self.param_groups[0]["lr"])
        self._terms = 0
        self._number += 1
        return loss


RULES = {
    "unit": partial(Norms, crossed=True, separate=False),
    "diagonal": partial(Norms, crossed=False, separate=False),
    "separate": partial(Norms, crossed=False, separate=True),
}


@dataclass
class Run:
    """A run, a step at a time.

    Attributes:
        losses: held out, at thirds of the run; infinite after a divergence.
        seconds: of the processor, of each step.
    """

    task: Task
    contender: str
    seed: int
    steps: int
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __iter__(self) -> Iterator[None]:
        task, count = self.task, self.steps
        torch.manual_seed(self.seed)
        network = task.network()
        optimizer = _made(self.contender, network, task)
        schedule = partial(SCHEDULE.factor, steps_per_epoch=count, epochs=1)
        main = optimizer.main if isinstance(optimizer, Norms) else None
        schedulers = [LambdaLR(each, schedule) for each in (optimizer, main) if each is not None]
        batches = task.batches(torch.Generator().manual_seed(self.seed))
        for step in range(1, count + 1):
            inputs, targets = next(batches)

            def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
                optimizer.zero_grad()
                loss = task.loss(network(inputs), targets)
                loss.backward()
                return loss

            start = time.process_time()
            loss = optimizer.step(closure)  # type: ignore[arg-type]
            for scheduler in schedulers:
                scheduler.step()
            self.seconds.append(time.process_time() - start)
            assert isinstance(loss, Tensor)
            if not math.isfinite(loss.item()):
                self.losses.append(math.inf)
                return
            if 3 * step // count > 3 * (step - 1) // count:
                self.losses.append(evaluate(network, task, task.held_out("final"))[0])
                said = f"{self.losses[-1]:.4g}, {sum(self.seconds):.1f} s"
                print(f"{task.name}, step {step}, {self.contender}: {said}", file=sys.stderr)
            yield


def _divided(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Norm layers' parameters, and all others."""
    own = [p for m in network.modules() if isinstance(m, NORMS) for p in m.parameters()]
    return own, [p for p in network.parameters() if not any(p is each for each in own)]


def _made(contender: str, network: nn.Module, task: Task) -> Optimizer:
    rule, *given = contender.split(",")
    settings: dict[str, Any] = {}
    for each in given:
        name, _, value = each.partition("=")
        settings[name] = None if value == "none" else float(value)
    if rule in RULES:
        return RULES[rule](network, task, **settings)
    if "norm_lr" in settings:
        own, rest = _divided(network)
        settings["params"] = [{"params": rest}, {"params": own, "lr": settings.pop("norm_lr")}]
    return optimizers.build({"adam": "tekfac"}.get(rule, rule), network, task, settings)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all, and print a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cifar10", help="a file; without it scikit-learn's digits, enlarged")
    parser.add_argument("--tasks", default="gpt,vit,resnet20")
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, help="in place of a third of the task's own")
    parser.add_argument("--fraction", type=float, default=1.0, help="shrinks batches and widths")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)
    images: Mapping[str, str] = {"cifar10": options.cifar10} if options.cifar10 else {}
    sources = Sources(images, Path("runs/gauntlet"))
    print("| task | steps | seed | contender | held-out loss | seconds | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in options.tasks.split(","):
        task = TASKS[name](sources, options.fraction)
        steps = options.steps or shrunk(task.steps, SEARCH_LENGTH)
        for seed in options.seeds:
            runs = [Run(task, each, seed, steps) for each in options.contenders]
            going = [iter(run) for run in runs]
            while going:
                going = [each for each in going if next(each, StopIteration) is None]
            for run in runs:
                losses = ", ".join(f"{loss:.4g}" for loss in run.losses)
                seconds = sum(run.seconds)
                ratio = seconds / sum(runs[0].seconds)
                row = [name, steps, seed, run.contender, losses, f"{seconds:.1f}", f"{ratio:.3f}"]
                print("|", " | ".join(map(str, row)), "|", flush=True)


if __name__ == "__main__":
    main()
