"""Weights that are functions of parameters: normalised, standardised, scaled."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import tekfac
from test_uses import EXACT, check, dense_fisher

torch.set_num_threads(1)


class Scaled(nn.Module):
    """Each row times a number of its own: what a row of the gradient is longer by."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.scale = torch.linspace(0.5, 2.0, rows).double().reshape(-1, *[1] * (dim - 1))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.scale

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight.double() / self.scale


class Standardised(nn.Conv2d):
    """Filters without mean and of one length, as timm's ``StdConv2d`` and its kin have them."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.flatten(1)
        rows = (rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True)
        weight = (rows / rows.shape[1] ** 0.5).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.inner, x, use_reentrant=False)
        return result


def single_logits(model: nn.Module, x: Tensor) -> list[Tensor]:
    return [model(each[None]) for each in x]


def test_rows_that_are_scaled_are_exact() -> None:
    torch.manual_seed(0)
    linear, convolution = nn.Linear(5, 4).double(), nn.Conv2d(2, 3, 3).double()
    parametrize.register_parametrization(linear, "weight", Scaled(4, 2))
    parametrize.register_parametrization(convolution, "weight", Scaled(3, 4))
    x, y = torch.randn(7, 2, 5, 5).double(), torch.randint(3, (7,))
    model = nn.Sequential(
        convolution, nn.Tanh(), nn.Flatten(), nn.Linear(27, 5), nn.Tanh(), linear, nn.Tanh(),
        nn.Linear(4, 3),
    )  # fmt: skip
    optimizer = check(
        model,
        lambda m: F.cross_entropy(m(x), y),
        lambda m: single_logits(m, x),
        {"0", "3", "5", "7"},
    )
    # A row's bias is not scaled with it: no matrix of the row's inputs knows that.
    words = optimizer.treatment()
    assert words["5.parametrizations.weight.original"] == "EKFAC block '5'"
    assert words["5.bias"].startswith("first order")


MADE: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Conv2d(8, 6, 3)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Conv2d(8, 6, 3)),
    "weight_norm by hooks": lambda: nn.utils.weight_norm(nn.Conv2d(8, 6, 3)),
    "spectral_norm by hooks": lambda: nn.utils.spectral_norm(nn.Conv2d(8, 6, 3)),
    "standardised": lambda: Standardised(8, 6, 3),
    "in a checkpoint": lambda: Checkpointed(Standardised(8, 6, 3)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", MADE)
def test_normalised_rows_are_exact_but_for_single_directions(kind: str) -> None:
    """A row's own direction (and the mean) has no curvature: a few of 72 in each row."""
    torch.manual_seed(0)
    model = nn.Sequential(MADE[kind](), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3)).double()
    x, y = torch.randn(9, 8, 4, 4).double(), torch.randint(3, (9,))
    optimizer = tekfac.EKFAC(model, scale_every=1, scale_examples=None, **EXACT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    [block] = [block for name, block in optimizer.blocks.items() if name.startswith("0")]
    assert not block.empty
    model.eval()  # spectral_norm's vectors stay as they were
    truth = dense_fisher(single_logits(model, x), block.layer.parameters[:1])
    assert block.trace == pytest.approx(float(truth.trace()), rel=0.1)


class Angles(nn.Module):
    """Cosines between features and one direction for each class: a matrix of its own."""

    def __init__(self, times: float, by_hand: bool) -> None:
        super().__init__()
        self.body, self.directions = nn.Linear(6, 48), nn.Parameter(torch.randn(5, 48))
        self.times, self.by_hand = times, by_hand

    def forward(self, x: Tensor) -> Tensor:
        w = self.directions
        lengths = w.norm(dim=-1, keepdim=True)
        directions = w / lengths if self.by_hand else F.normalize(w)
        if self.times == 1:
            return 8 * F.normalize(self.body(x)) @ directions.T
        return F.linear(F.normalize(self.body(x)), self.times * directions)


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("times", [1.0, 8.0])
def test_directions_of_classes(times: float, by_hand: bool) -> None:
    torch.manual_seed(0)
    model = Angles(times, by_hand).double()
    x, y = torch.randn(9, 6).double(), torch.randint(5, (9,))
    optimizer = tekfac.EKFAC(model, scale_every=1, scale_examples=None, **EXACT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    for name, parameters in (
        ("directions", [model.directions]),
        ("body", list(model.body.parameters())),
    ):
        truth = dense_fisher(single_logits(model, x), parameters)
        assert optimizer.blocks[name].trace == pytest.approx(float(truth.trace()), rel=0.1)


def test_columns_of_one_length_are_left_to_the_first_order_rule() -> None:
    """A row's gradient is no multiple of what it would be without."""

    class Columns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.matrix = nn.Linear(6, 4), nn.Parameter(torch.randn(5, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) @ F.normalize(self.matrix, dim=0).T

    torch.manual_seed(0)
    model = Columns()
    optimizer = tekfac.TEKFAC(model)
    F.cross_entropy(model(torch.randn(9, 6)), torch.randint(5, (9,))).backward()
    with pytest.warns(RuntimeWarning, match="DivBackward0"):
        optimizer.step()
    assert optimizer.blocks["matrix"].empty
    assert not optimizer.blocks["body"].empty


def test_a_length_of_one_weight_has_that_weights_block() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)))
    optimizer = tekfac.TEKFAC(model)
    F.cross_entropy(model(torch.randn(5, 4)), torch.randint(3, (5,))).backward()
    optimizer.step()
    words = optimizer.treatment()
    assert words["0.parametrizations.weight.original1"] == "TEKFAC block '0'"
    assert words["0.parametrizations.weight.original0"].startswith("first order")


def test_what_mixes_rows_is_left_to_the_first_order_rule() -> None:
    torch.manual_seed(0)
    turned = parametrizations.orthogonal(nn.Linear(4, 4))
    model = nn.Sequential(turned, nn.Tanh(), nn.Linear(4, 3))
    optimizer = tekfac.TEKFAC(model)
    F.cross_entropy(model(torch.randn(5, 4)), torch.randint(3, (5,))).backward()
    optimizer.step()
    words = optimizer.treatment()["0.parametrizations.weight.original"]
    assert words.startswith("first order: used by")


def test_activations_of_a_weights_shape_are_no_weight() -> None:
    """As many examples as outputs: scores of examples by examples are no layer's."""

    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x).tanh()
            result: Tensor = self.second((hidden @ hidden.mT).softmax(-1) @ hidden)
            return result

    torch.manual_seed(0)
    model = Scores()
    optimizer = tekfac.TEKFAC(model, fisher="exact")
    loss = F.cross_entropy(model(torch.randn(4, 4)), torch.randint(3, (4,)))
    loss.backward()
    optimizer.step()
    assert optimizer._capture is not None
    assert not optimizer._capture.strange
    assert all(not block.empty for block in optimizer.blocks.values())
