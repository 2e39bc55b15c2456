"""timm's models, scheduler, averaged weights and mixup with soft targets.

    python examples/timm_training.py vit_tiny_patch16_224

``create_optimizer_v2`` would give the optimizer parameters; tekfac wants the model, and is made of
it directly. timm's scheduler then drives it as any other. Mixup's targets are distributions over
classes: the likelihood is a categorical one as before, for the curvature is that of the model's own
labels.
"""

from __future__ import annotations

import argparse

import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn

import tekfac


def train(
    name: str = "test_vit", steps: int = 12, classes: int = 5, size: int | None = None
) -> tuple[nn.Module, nn.Module, tekfac.TEKFAC]:
    """Train a model without pretrained weights on made-up pictures.

    Args:
        name: a model of timm's.
        steps: how many.
        classes: how many.
        size: of the pictures; None for the model's own.

    Returns:
        The model, the one with averaged weights, and the optimizer.
    """
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=classes)
    channels, height, width = model.pretrained_cfg["input_size"]
    height, width = (height, width) if size is None else (size, size)
    optimizer = tekfac.TEKFAC(model, lr=3e-3)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=steps, warmup_t=3, warmup_lr_init=1e-4, t_in_epochs=False
    )
    averaged = ModelEmaV3(model, decay=0.9)
    mixup = Mixup(mixup_alpha=0.8, label_smoothing=0.1, num_classes=classes)
    loss_of = SoftTargetCrossEntropy()
    labels = torch.arange(8) % classes
    pictures = torch.randn(8, channels, height, width) + labels.view(-1, 1, 1, 1)
    for step in range(steps):
        x, y = _mixed(mixup, pictures, labels)
        optimizer.zero_grad()
        loss = loss_of(model(x), y)
        loss.backward()
        timm.utils.dispatch_clip_grad(model.parameters(), 1.0)
        optimizer.step()
        averaged.update(model)
        scheduler.step_update(num_updates=step + 1)
    return model, averaged.module, optimizer


def _mixed(mixup: Mixup, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # timm's Mixup changes the pictures in place, and puts the targets where it is told to.
    mixed, targets = mixup(x.clone(), y)
    return mixed, targets.to(x.device)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a model of timm's on made-up pictures.")
    parser.add_argument("name", nargs="?", default="test_vit")
    parser.add_argument("--steps", type=int, default=12)
    given = parser.parse_args()
    _, _, optimizer = train(given.name, given.steps)
    print(optimizer)


if __name__ == "__main__":
    main()
