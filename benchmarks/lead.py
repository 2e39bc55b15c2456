"""What decides the first epochs: TEKFAC with one thing changed at a time, beside other optimizers.

    python -m benchmarks.lead --data cifar10 --out results/lead

ResNet20 of width 16 on 12,800 images for three epochs, evaluated on 5,000 other training images:
the test images play no part. Each variant's row is added to ``lead.csv`` when it is done, and one
that is there is not run again: interrupted, the same command goes on. ``--part 1/2`` and ``2/2``
share the variants out to two processes.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import fcntl
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import tekfac
from tekfac.curvature.basis import Basis
from tekfac.curvature.blocks import Block
from tekfac.curvature.statistics import carried_over, overlap
from tekfac.errors import Diverged
from tekfac.methods.tekfac import TEKFACBlock
from tekfac.methods.tkfac import TKFACBlock
from tekfac.optimizer import intervals
from tekfac.runs.config import Config
from tekfac.runs.files import markdown, write_text
from tekfac.runs.optimizers import METHODS, excluded
from tekfac.runs.schedules import Schedule
from tekfac.runs.training import Training, Watcher

SCHEDULE = Schedule("cosine", warmup=0.3)
NATURAL = {
    "lr": 3e-3,
    "damping": 1e-3,
    "factor_every": 10,
    "basis_every": 100,
    "first_order_lr": 1e-2,
}


class RootBlock(TEKFACBlock):
    """Divides by ``√(Λ + λ)``, which is not the paper's."""

    def _damped_eigenvalues(self) -> Tensor:
        return super()._damped_eigenvalues().sqrt()


class PlainBlock(TKFACBlock):
    """TKFAC with EKFAC's and TEKFAC's damping in place of its own."""

    def _damped_eigenvalues(self) -> Tensor:
        return self._eigenvalues() + self._damping()


class AdaptedBlock(TEKFACBlock):
    """Adam in the eigenbasis, as SOAP has it, but in TEKFAC's basis; not the paper's.

    To be used without momentum, which it has itself.
    """

    betas = (0.9, 0.95)
    steps = 0

    def precondition(self, matrix: Tensor) -> Tensor:
        basis = self._require_basis()
        rotated = basis.output.mT @ matrix @ basis.input
        if not self.steps:
            self.mean, self.squares = torch.zeros_like(matrix), torch.zeros_like(rotated)
        self.steps += 1
        self.mean.lerp_(matrix, 1 - self.betas[0])
        self.squares.lerp_(rotated.square(), 1 - self.betas[1])
        first, second = (1 - beta**self.steps for beta in self.betas)
        mean = basis.output.mT @ (self.mean / first) @ basis.input
        step = mean / ((self.squares / second).sqrt() + 1e-8)
        return basis.output @ step @ basis.input.mT

    def _change_basis(self, old: Basis, new: Basis) -> None:
        super()._change_basis(old, new)
        if self.steps:
            sides = ((old.input, new.input), (old.output, new.output))
            self.squares = carried_over(self.squares, *(overlap(u, v) for u, v in sides))


@dataclasses.dataclass(frozen=True)
class Variant:
    """A run.

    Attributes:
        optimizer: a name of ``optimizers.METHODS``.
        settings: in place of `NATURAL`'s, where the method has them.
        attributes: of the optimizer itself, set before the first step.
        schedule: the learning rate's.
        block: in place of the method's own.
        memory: of `optimizer.intervals`; 0 for averages with the same decay from the first step.
    """

    optimizer: str = "tekfac"
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)
    schedule: Schedule = SCHEDULE
    block: type[Block] | None = None
    memory: int = intervals.MEMORY


VARIANTS = {
    "TEKFAC": Variant(),
    "SOAP, lr 2e-2": Variant("soap", {"lr": 2e-2}),
    "lr 1e-2, kl_clip 1e-2": Variant(settings={"lr": 1e-2}, attributes={"kl_clip": 1e-2}),
    "lr 1e-2, kl_clip 1e-3": Variant(settings={"lr": 1e-2}, attributes={"kl_clip": 1e-3}),
    "norm layers by Adam with lr 2e-2": Variant(settings={"first_order_lr": 2e-2}),
    "factored damping 3e-4": Variant(settings={"factored_damping": 3e-4}),
    "factored damping 1e-3": Variant(settings={"factored_damping": 1e-3}),
    "factored damping 1e-4": Variant(settings={"factored_damping": 1e-4}),
    "relative damping 2e-3": Variant(settings={"relative_damping": 2e-3}),
    "relative damping 2e-3, Nesterov's momentum": Variant(
        settings={"relative_damping": 2e-3, "nesterov": True}
    ),
    "TKFAC, relative damping 2e-3, Nesterov's momentum": Variant(
        "tkfac", {"relative_damping": 2e-3, "nesterov": True}
    ),
    "TKFAC with λ added to its eigenvalues": Variant("tkfac", block=PlainBlock),
    "λ 3e-4, lr 1e-3": Variant(settings={"lr": 1e-3, "damping": 3e-4}),
    "averages with decay 0.95 from the first step": Variant(memory=0),
    "averages with decay 0.5": Variant(attributes={"factor_decay": 0.5, "scale_decay": 0.5}),
    "divided by √(Λ + λ), lr 2e-2": Variant(
        settings={"lr": 2e-2, "damping": 1e-6}, block=RootBlock
    ),
    "SOAP's second moments in TEKFAC's basis, lr 2e-2": Variant(
        settings={"lr": 2e-2, "momentum": 0.0, "basis_every": 10}, block=AdaptedBlock
    ),
    "intervals 10/10/100 from the first step": Variant(attributes={"interval_warmup": False}),
    "SOAP, lr 3e-3": Variant("soap", {"lr": 3e-3}),
    "EKFAC": Variant("ekfac"),
    "TKFAC": Variant("tkfac"),
    "λ 1e-2": Variant(settings={"damping": 1e-2}),
    "lr 1e-3": Variant(settings={"lr": 1e-3}),
    "norm layers by Adam with lr 1e-3": Variant(settings={"first_order_lr": 1e-3}),
    "trace damping, ν 1e-2": Variant(settings={"nu": 1e-2}),
    "β 1": Variant(attributes={"fc_scale": 1.0}),
    "statistics of whole batches": Variant(
        attributes={"factor_rows": None, "scale_examples": None}
    ),
    "statistics every 2, basis every 10": Variant(
        settings={"factor_every": 2, "scale_every": 2, "basis_every": 10}
    ),
    "no warm-up of the learning rate": Variant(schedule=Schedule("cosine")),
    "SGD, lr 0.1": Variant("sgd", {"lr": 0.1, "momentum": 0.9}),
    "Adam, lr 3e-3": Variant("adam", {"lr": 3e-3, "beta1": 0.9}),
    "Nesterov's momentum": Variant(settings={"nesterov": True}),
    "weight decay 1": Variant(settings={"weight_decay": 1.0}),
    "weight decay 1, Nesterov's momentum": Variant(
        settings={"weight_decay": 1.0, "nesterov": True}
    ),
    "SOAP, lr 1e-2, weight decay 0.3": Variant("soap", {"lr": 1e-2, "weight_decay": 0.3}),
    "no momentum, lr × 10": Variant(settings={"momentum": 0.0, "lr": 3e-2}),
    "trace damping, ν 10": Variant(settings={"nu": 10.0}),
    "SOAP, lr 2e-2, every step": Variant("soap", {"lr": 2e-2, "precondition_frequency": 1}),
    "Muon, lr 2e-2": Variant("muon", {"lr": 2e-2, "first_order_lr": 3e-3}),
}
HEADER = ["variant", "held-out loss", "held-out accuracy (%)", "processor seconds"]


def configured(variant: Variant, task: Config) -> Config:
    """The variant's run."""
    given = dict(variant.settings)
    if variant.optimizer in ("kfac", "ekfac", "tkfac", "tekfac"):
        given = {**NATURAL, **given}
        for other in excluded(variant.optimizer, variant.settings):
            given.pop(other, None)
    known = {*METHODS[variant.optimizer].defaults, *METHODS[variant.optimizer].alternatives}
    settings = {key: value for key, value in given.items() if key in known}
    return dataclasses.replace(
        task, optimizer=variant.optimizer, settings=settings, schedule=variant.schedule
    )


def trained(variant: Variant, task: Config, data: Any) -> list[str]:
    """Loss and accuracy on the held-out images after the last epoch, and processor time."""
    with ExitStack() as stack:
        if variant.block is not None:
            method = getattr(tekfac, variant.optimizer.upper())
            stack.enter_context(mock.patch.object(method, "make_block", variant.block))
        training = Training(configured(variant, task), data)
    for name, value in variant.attributes.items():
        if not hasattr(training.optimizer, name):
            raise AttributeError(f"{variant.optimizer} has no {name}")
        setattr(training.optimizer, name, value)
    start = time.process_time()
    try:
        with mock.patch.object(intervals, "MEMORY", variant.memory):
            for _ in range(task.epochs):
                training.run_epoch(Watcher())
    except Diverged:
        return ["diverged", "–", "–"]
    end = training.history[-1]
    return [
        f"{end.test_loss:.3f}",
        f"{100 * end.test_accuracy:.2f}",
        f"{time.process_time() - start:.0f}",
    ]


def main(arguments: list[str] | None = None) -> None:
    """Run the variants that are missing and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", default="1/1")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--train", type=int, default=12800)
    parser.add_argument("--held-out", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore", RuntimeWarning)  # of steps skipped on the way to divergence
    task = Config(
        data=options.data,
        limit_train=options.train + options.held_out,
        hold_out=options.held_out,
        augment=True,
        network="resnet20",
        width=16,
        epochs=options.epochs,
        batch_size=128,
        precision=options.precision,
        threads=1,
    )
    data = task.load_data()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "lead.csv"
    part, parts = map(int, options.part.split("/"))
    for name, variant in list(VARIANTS.items())[part - 1 :: parts]:
        if name in {row[0] for row in read(path)}:
            continue
        row = [name, *trained(variant, task, data)]
        with open(path, "a", newline="") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            csv.writer(file).writerow(row)
        rows = sorted(read(path), key=lambda row: list(VARIANTS).index(row[0]))
        write_text(options.out / "lead.md", markdown(HEADER, rows))
        print(" | ".join(row), flush=True)


def read(path: Path) -> list[list[str]]:
    """The rows that are there."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [row for row in csv.reader(file) if len(row) == len(HEADER)]


if __name__ == "__main__":
    main()
