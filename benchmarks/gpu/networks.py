"""Networks with a batch for each, in the sizes of a GPU and in those of a test."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tekfac
from benchmarks.first_steps import GPT
from tekfac import networks

NAMES = ("resnet20", "vgg16", "resnet50", "gpt2")
PRECISIONS = ("float32", "TF32", "bfloat16")


@dataclass
class Task:
    """A network on a batch.

    Attributes:
        network: the network.
        x: its input.
        y: the labels.
        words: how large it is.
        likelihood: what tekfac is told.
    """

    network: nn.Module
    x: Tensor
    y: Tensor
    words: str
    likelihood: tekfac.Categorical

    def loss(self, forward: nn.Module, precision: str) -> Tensor:
        """The loss of one forward pass; ``forward`` is the network, perhaps compiled."""
        lower = precision == "bfloat16"
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=lower):
            return F.cross_entropy(forward(self.x), self.y)


def set_precision(precision: str) -> None:
    """Float32 products as they are, or rounded to TF32."""
    torch.backends.cuda.matmul.allow_tf32 = precision != "float32"
    torch.backends.cudnn.allow_tf32 = precision != "float32"


def task(name: str, device: torch.device, tiny: bool) -> Task:
    """The task of a name."""
    torch.manual_seed(0)
    likelihood = tekfac.Categorical(dim=1)
    if name == "gpt2":
        width, depth, heads, words, tokens, batch = (
            (16, 1, 2, 32, 8, 2) if tiny else (768, 12, 12, 50257, 512, 8)
        )
        x = torch.randint(words, (batch, tokens))
        with device:
            network: nn.Module = GPT(width, depth, heads, words, tokens)
        sizes = f"batch {batch} × {tokens} tokens"
        return Task(network.to(device), x.to(device), x.roll(-1, 1).to(device), sizes, likelihood)
    if name == "resnet50":
        with device:
            network, batch, size, classes = _resnet50(tiny)
    else:
        width, batch, size, classes = (2, 4, 32, 10) if tiny else (64, 128, 32, 10)
        with device:
            network = networks.build(name, (3, size, size), classes, width)
    x, y = torch.randn(batch, 3, size, size), torch.randint(classes, (batch,))
    return Task(network.to(device), x.to(device), y.to(device), f"batch {batch}", likelihood)


def _resnet50(tiny: bool) -> tuple[nn.Module, int, int, int]:
    from torchvision.models.resnet import Bottleneck, ResNet

    if tiny:
        return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5, width_per_group=1), 2, 32, 5
    return ResNet(Bottleneck, [3, 4, 6, 3]), 64, 224, 1000
