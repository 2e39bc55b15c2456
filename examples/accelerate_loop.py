"""A loop with Hugging Face's Accelerate: the optimizer is prepared along with everything else.

    python examples/accelerate_loop.py --precision bf16

It is made of the model before ``prepare``, which wraps the model's ``forward`` in place (or, on
several devices, the model; tekfac refuses that so far). ``accelerator.backward``, accumulation,
clipping, ``save_state`` and ``load_state`` do with it what they do with any other.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import tekfac


class Network(nn.Module):
    """A small convolutional network."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.features(x).flatten(1))
        return logits


def pictures(size: int = 128) -> TensorDataset:
    """One bright quarter in noise."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(size, 1, 8, 8, generator=generator), torch.arange(size) % 4
    for picture, label in zip(x, y.tolist(), strict=True):
        row, column = 4 * (label // 2), 4 * (label % 2)
        picture[0, row : row + 4, column : column + 4] += 1
    return TensorDataset(x, y)


def train(
    epochs: int = 4,
    precision: str = "no",
    accumulate: int = 1,
    save: Path | None = None,
    resume: Path | None = None,
) -> tuple[nn.Module, tekfac.TEKFAC]:
    """Train, or go on from a saved state.

    Args:
        epochs: how many.
        precision: "no", "bf16" or "fp16".
        accumulate: batches to a step.
        save: folder for the state after the first epoch.
        resume: folder of a state after the first epoch, to begin with.
    """
    accelerator = Accelerator(mixed_precision=precision, gradient_accumulation_steps=accumulate)
    torch.manual_seed(0)
    model = Network()
    optimizer = tekfac.TEKFAC(model, lr=3e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=8, gamma=0.8)
    loader = DataLoader(pictures(), batch_size=16)
    model, prepared, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    if resume is not None:
        accelerator.load_state(str(resume))
    for epoch in range(0 if resume is None else 1, epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 5.0)
                prepared.step()
                scheduler.step()
                prepared.zero_grad()
        if save is not None and epoch == 0:
            accelerator.save_state(str(save))
    return accelerator.unwrap_model(model), optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small network by an Accelerate loop.")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--precision", default="no")
    parser.add_argument("--accumulate", type=int, default=1)
    given = parser.parse_args()
    _, optimizer = train(given.epochs, given.precision, given.accumulate)
    print(optimizer)


if __name__ == "__main__":
    main()
