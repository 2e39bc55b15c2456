"""A DCGAN in the loop of PyTorch's own tutorial, with a natural-gradient optimizer for either side.

    python examples/dcgan.py

The discriminator says yes or no: its likelihood is "bernoulli". The generator returns pictures;
with "gaussian" its curvature is that of the pictures themselves, and a step is large where pictures
change little.

The generator's loss goes backward through the discriminator and leaves gradients and statistics
there. They go together: ``discriminator.zero_grad()``, with which the tutorial's loop begins, drops
both.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tekfac

NOISE = 8


def make_generator() -> nn.Sequential:
    """From noise to pictures of 16 by 16."""
    return nn.Sequential(
        nn.ConvTranspose2d(NOISE, 16, 4, 1, 0, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.ConvTranspose2d(8, 1, 4, 2, 1, bias=False), nn.Tanh(),
    )  # fmt: skip


def make_discriminator() -> nn.Sequential:
    """From pictures to one logit each."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 4, 2, 1, bias=False), nn.LeakyReLU(0.2),
        nn.Conv2d(8, 16, 4, 2, 1, bias=False), nn.BatchNorm2d(16), nn.LeakyReLU(0.2),
        nn.Conv2d(16, 1, 4, 1, 0, bias=False), nn.Flatten(0),
    )  # fmt: skip


def discs(size: int, generator: torch.Generator) -> Tensor:
    """Pictures of a bright disc somewhere."""
    place = torch.arange(16.0)
    x, y = 4 + 8 * torch.rand(2, size, 1, 1, generator=generator)
    inside = (place.view(1, 1, 16) - x) ** 2 + (place.view(1, 16, 1) - y) ** 2 < 9
    return 2 * inside[:, None].float() - 1


def train(
    steps: int = 20, fisher: str = "mc"
) -> tuple[nn.Module, nn.Module, tekfac.TEKFAC, tekfac.TEKFAC]:
    """Train both; the generator, the discriminator and their optimizers."""
    torch.manual_seed(0)
    generator, discriminator = make_generator(), make_discriminator()
    of_generator = tekfac.TEKFAC(generator, lr=1e-3, likelihood="gaussian")
    of_discriminator = tekfac.TEKFAC(discriminator, lr=1e-3, likelihood="bernoulli", fisher=fisher)
    draws = torch.Generator().manual_seed(1)
    yes, no = torch.ones(16), torch.zeros(16)
    for _ in range(steps):
        discriminator.zero_grad()
        real = discs(16, draws)
        F.binary_cross_entropy_with_logits(discriminator(real), yes).backward()
        fake = generator(torch.randn(16, NOISE, 1, 1, generator=draws))
        F.binary_cross_entropy_with_logits(discriminator(fake.detach()), no).backward()
        of_discriminator.step()

        generator.zero_grad()
        # With discriminator.requires_grad_(False) around this pass it would cost a little less.
        F.binary_cross_entropy_with_logits(discriminator(fake), yes).backward()
        of_generator.step()
    return generator, discriminator, of_generator, of_discriminator


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small DCGAN on pictures of discs.")
    parser.add_argument("--steps", type=int, default=20)
    for optimizer in train(parser.parse_args().steps)[2:]:
        print(optimizer)


if __name__ == "__main__":
    main()
