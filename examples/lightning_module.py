"""A LightningModule: the optimizer is given the module itself, in ``configure_optimizers``.

    python examples/lightning_module.py --precision bf16-mixed --accumulate 2 --clip 1.0

``training_step`` may call ``self(x)`` or, as here, ``self.net`` and ``self.head``: where the module
itself is never called, what the outermost calls of its parts return are its outputs, here the
head's. Accumulation, clipping, precision and checkpoints are the Trainer's business and stay so.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import tekfac


class Classifier(lightning.LightningModule):
    """A small network for points in a plane."""

    def __init__(self, lr: float = 3e-3) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        self.head = nn.Linear(32, 3)
        self.loss = nn.CrossEntropyLoss()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        loss: Tensor = self.loss(self.head(self.net(x)), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        x, y = batch
        self.log("accuracy", (self.head(self.net(x)).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = tekfac.TEKFAC(self, lr=self.lr)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def points(size: int = 256) -> TensorDataset:
    """Three rings."""
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(size) % 3
    angle = 2 * torch.pi * torch.rand(size, generator=generator)
    radius = label + 1 + 0.2 * torch.randn(size, generator=generator)
    return TensorDataset(torch.stack([radius * angle.cos(), radius * angle.sin()], 1), label)


def fit(steps: int = 64, resume: str | None = None, **arguments: Any) -> lightning.Trainer:
    """Train, or go on from a checkpoint.

    Args:
        steps: how many, those before the checkpoint included.
        resume: the checkpoint's file.
        **arguments: of ``lightning.Trainer``.
    """
    lightning.seed_everything(0, verbose=False)
    settings = {
        "max_steps": steps,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(**(settings | arguments))
    # Of one process and in one order, so that a run that was interrupted sees the same batches.
    loader = DataLoader(points(), batch_size=32)
    trainer.fit(Classifier(), loader, loader, ckpt_path=resume)
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small network by Lightning.")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--clip", type=float)
    given = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = fit(
        given.steps,
        precision=given.precision,
        accumulate_grad_batches=given.accumulate,
        gradient_clip_val=given.clip,
    )
    print(trainer.optimizers[0])
    print({name: round(float(value), 3) for name, value in trainer.callback_metrics.items()})


if __name__ == "__main__":
    main()
