"""Networks: parameter counts against counts by hand, shapes, and what is done in place."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tekfac
from tekfac import networks
from tekfac.errors import InputError
from tekfac.networks import resnet

CIFAR, MNIST = (3, 32, 32), (1, 28, 28)


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def resnet20_count(width: int, channels: int, classes: int) -> int:
    """By hand for width w: convolutions without bias, two numbers per normalised channel."""
    w = width
    stem = 9 * channels * w + 2 * w
    stage1 = 6 * (9 * w * w + 2 * w)
    # The first convolution has half as many inputs; the shortcut has 1×1 convolution and norm.
    stage2 = (9 * w * 2 * w + 4 * w) + 5 * (9 * 2 * w * 2 * w + 4 * w) + (w * 2 * w + 4 * w)
    stage3 = (9 * 2 * w * 4 * w + 8 * w) + 5 * (9 * 4 * w * 4 * w + 8 * w) + (2 * w * 4 * w + 8 * w)
    return stem + stage1 + stage2 + stage3 + 4 * w * classes + classes


def test_resnet20_of_width_16_has_the_parameters_counted_by_hand() -> None:
    # Stem 432 + 32; stage 1: 6 × (2304 + 32); stage 2: 4608 + 64, 5 × (9216 + 64), shortcut
    # 512 + 64; stage 3: 18432 + 128, 5 × (36864 + 128), shortcut 2048 + 128; linear 640 + 10.
    by_hand = 464 + 14016 + (4672 + 46400 + 576) + (18560 + 184960 + 2176) + 650
    assert by_hand == 272_474
    assert resnet20_count(16, 3, 10) == by_hand
    assert parameters(networks.build("resnet20", CIFAR, 10, width=16)) == by_hand


def test_resnet20_is_64_wide_as_in_the_paper() -> None:
    # Stem 1728 + 128; stage 1: 6 × (36864 + 128); stage 2: 73728 + 256, 5 × (147456 + 256),
    # shortcut 8192 + 256; stage 3: 294912 + 512, 5 × (589824 + 512), shortcut 32768 + 512;
    # linear 25600 + 100.
    by_hand = 1856 + 221952 + (73984 + 738560 + 8448) + (295424 + 2951680 + 33280) + 25700
    assert by_hand == 4_350_884
    assert resnet20_count(64, 3, 100) == by_hand
    assert parameters(networks.build("resnet20", CIFAR, 100)) == by_hand


def test_vgg16_has_the_parameters_counted_by_hand() -> None:
    # Weights: 9 × (3·64 + 64·64) + 9 × (64·128 + 128·128) + 9 × (128·256 + 2·256·256)
    #          + 9 × (256·512 + 2·512·512) + 9 × 3·512·512 = 14,710,464; of batch norm
    #          2 × (2·64 + 2·128 + 3·256 + 6·512) = 8448; linear 512 · 10 + 10.
    convolutions = 38_592 + 221_184 + 1_474_560 + 5_898_240 + 7_077_888
    by_hand = convolutions + 8_448 + 5_130
    assert by_hand == 14_724_042
    assert parameters(networks.build("vgg16", CIFAR, 10)) == by_hand


def test_cnn_and_mlp_have_the_parameters_counted_by_hand() -> None:
    # 9·16 + 16; 9·16·32 + 32; 32·2·2 · 64 + 64; 64 · 10 + 10.
    assert parameters(networks.build("cnn", (1, 8, 8), 10)) == 160 + 4640 + 8256 + 650
    assert parameters(networks.build("mlp", (1, 8, 8), 10)) == 6500 + 10100 + 1010


@pytest.mark.parametrize("name", networks.NETWORKS)
@pytest.mark.parametrize("image_shape", [CIFAR, MNIST, (3, 40, 64)])
def test_networks_give_logits_for_images_of_all_sizes(
    name: str, image_shape: tuple[int, int, int]
) -> None:
    network = networks.build(name, image_shape, 7, width=4)
    assert network(torch.randn(2, *image_shape)).shape == (2, 7)


@pytest.mark.parametrize("name", ["resnet20", "vgg16"])
def test_layers_are_as_described(name: str) -> None:
    network = networks.build(name, CIFAR, 10, width=4)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    wide = [m for m in convolutions if m.kernel_size == (3, 3)]
    assert len(wide) == {"resnet20": 19, "vgg16": 13}[name]
    assert len(convolutions) - len(wide) == {"resnet20": 2, "vgg16": 0}[name]
    assert sum(isinstance(m, nn.BatchNorm2d) for m in network.modules()) == len(convolutions)
    assert sum(isinstance(m, nn.Linear) for m in network.modules()) == 1
    last = {"resnet20": 16, "vgg16": 32}[name]
    assert convolutions[-1].out_channels == last


@pytest.mark.parametrize("name", ["resnet20", "vgg16"])
def test_acting_in_place_changes_no_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = networks.build(name, CIFAR, 10, width=4)
    plain = copy.deepcopy(network)
    for module in plain.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    x, y = torch.randn(8, *CIFAR), torch.arange(8)
    F.cross_entropy(network(x), y).backward()
    with monkeypatch.context() as patch:
        patch.setattr(resnet.F, "relu", lambda x, inplace: torch.relu(x))
        F.cross_entropy(plain(x), y).backward()
    for one, other in zip(network.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("name", ["resnet20", "vgg16"])
def test_every_convolution_gets_a_curvature_block(name: str) -> None:
    torch.manual_seed(0)
    network = networks.build(name, CIFAR, 10, width=4)
    optimizer = tekfac.TEKFAC(network, lr=1e-3, damping=tekfac.TraceDamping(1e-2))
    F.cross_entropy(network(torch.randn(4, *CIFAR)), torch.arange(4)).backward()
    optimizer.step()
    layers = {n for n, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert set(optimizer.blocks) == layers
    optimizer.close()


def test_bad_networks() -> None:
    with pytest.raises(InputError, match="--network 'alexnet' is unknown; there is: cnn, mlp"):
        networks.build("alexnet", CIFAR, 10)
    with pytest.raises(InputError, match="--width must be 1 or more, got 0"):
        networks.build("vgg16", CIFAR, 10, width=0)
    with pytest.raises(InputError, match="cnn needs images of 4×4 pixels or more, got 3×8"):
        networks.build("cnn", (1, 3, 8), 2)
