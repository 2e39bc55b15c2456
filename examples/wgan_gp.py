"""A Wasserstein GAN with gradient penalty.

    python examples/wgan_gp.py

A critic's score is no parameter of a distribution, and its loss is linear in the scores: there is
no likelihood to take labels from. ``likelihood="gaussian"`` is right in the sense that is left. Its
Fisher matrix is the mean of ``J Jᵀ`` over the examples, with ``J`` the gradient of a score by the
weights: the metric by which a step is as long as it changes scores.

The penalty has no part in it: ``autograd.grad(create_graph=True)`` is no backward pass of the loss
and leaves no statistics. Its gradients are in ``.grad`` like any others and are preconditioned with
them.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import tekfac

NOISE = 4


def make_generator() -> nn.Sequential:
    """From noise to points in a plane."""
    return nn.Sequential(nn.Linear(NOISE, 32), nn.ReLU(), nn.Linear(32, 2))


def make_critic() -> nn.Sequential:
    """From points to a score each."""
    return nn.Sequential(
        nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
    )


def ring(size: int, generator: torch.Generator) -> Tensor:
    """Points of a circle."""
    angle = 2 * torch.pi * torch.rand(size, generator=generator)
    return torch.stack([angle.cos(), angle.sin()], 1)


def penalty(critic: nn.Module, real: Tensor, fake: Tensor, generator: torch.Generator) -> Tensor:
    """How far the slope of the critic is from 1 between real and fake points."""
    part = torch.rand(len(real), 1, generator=generator)
    between = (part * real + (1 - part) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (slope.norm(dim=1) - 1).square().mean()


def train(
    steps: int = 20, weight: float = 10.0, fisher: str = "mc"
) -> tuple[nn.Module, nn.Module, tekfac.TEKFAC]:
    """Train both.

    Args:
        steps: of the generator, each after three of the critic.
        weight: of the penalty.
        fisher: of the critic's optimizer.

    Returns:
        The generator, the critic and its optimizer.
    """
    torch.manual_seed(0)
    generator, critic = make_generator(), make_critic()
    of_generator = tekfac.TEKFAC(generator, lr=1e-3, likelihood="gaussian")
    of_critic = tekfac.TEKFAC(critic, lr=1e-3, likelihood="gaussian", fisher=fisher)
    draws = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for _ in range(3):
            real = ring(32, draws)
            fake = generator(torch.randn(32, NOISE, generator=draws)).detach()
            of_critic.zero_grad()
            loss = critic(fake).mean() - critic(real).mean()
            if weight:
                loss = loss + weight * penalty(critic, real, fake, draws)
            loss.backward()
            of_critic.step()
        of_generator.zero_grad()
        (-critic(generator(torch.randn(32, NOISE, generator=draws))).mean()).backward()
        of_generator.step()
    return generator, critic, of_critic


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small WGAN-GP on points of a circle.")
    parser.add_argument("--steps", type=int, default=20)
    print(train(parser.parse_args().steps)[2])


if __name__ == "__main__":
    main()
