"""Factors of layers that multiply an example at several positions: `weight_sharing`."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reference
import tekfac
from harness import METHODS, RESCALED, TOLERANCE, SideBySide, relative
from test_facts import KINDS
from test_uses import EXACT, dense_fisher, flat_order

torch.set_num_threads(1)

REDUCE: dict[str, Any] = {**EXACT, "weight_sharing": "reduce"}


# A padded kernel may see the same mean at two of its places.
UNPADDED = {
    "conv2d": lambda: (
        nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 4, 2, stride=(1, 2)), nn.Tanh(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
        ),
        torch.randn(6, 2, 6, 6),
    )
}  # fmt: skip


def reduced(seen: reference.Batch) -> reference.Batch:
    """One position: the mean of an example's inputs that count, the sum of its gradients."""
    counts = seen.live.sum(1).clamp_min(1)[:, None]
    return dataclasses.replace(
        seen,
        inputs=((seen.inputs * seen.live[:, :, None]).sum(1) / counts)[:, None],
        cotangents=seen.cotangents.sum(1, keepdim=True),
        live=seen.live.any(1, keepdim=True),
    )


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_one_position_stands_for_all(method: str, kind: str, fisher: str) -> None:
    """Two batches, against factors of dense means and sums; the rescaling is the exact one."""
    torch.manual_seed(5)
    model, x = {**KINDS, **UNPADDED}[kind]()
    model, x = model.double(), x.double()
    pair = SideBySide(model, method, fisher=fisher, lr=0.0)
    pair.fast.close()
    every = {"scale_every": 1, "scale_examples": None} if method in RESCALED else {}
    options = {**REDUCE, "fisher": fisher, "damping": 1e-2, "power": 1.0, **every}
    pair.fast = getattr(tekfac, method)(model, **options)
    for _ in range(2):
        # As many that no factor has a null space, in which any basis is as good.
        x = torch.randn(40, *x.shape[1:]).double()
        y = torch.randint(3, (len(x), *model(x).shape[2:]))
        measured = reference.measure(pair.slow.model, x, y, pair.draws)
        groups = {name: [reduced(each) for each in those] for name, those in measured.items()}
        pair.step(x, y, groups)
    pair.check_blocks()


class Pooled(nn.Module):
    """Linear layers on tokens, whose mean is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 3), nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)).mean(1))


@pytest.mark.parametrize("method", METHODS)
def test_a_mean_over_positions_makes_it_exact(method: str) -> None:
    """All positions get the same gradient: of one example every method's block is the Fisher's."""
    torch.manual_seed(0)
    model, x = Pooled().double(), torch.randn(1, 6, 4).double()
    for sharing in ("reduce", "expand"):
        optimizer = getattr(tekfac, method)(model, **{**REDUCE, "weight_sharing": sharing})
        F.cross_entropy(model(x), torch.tensor([1])).backward()
        optimizer.step()
        for name in ("first", "second"):
            block = optimizer.blocks[name]
            order = flat_order(block)
            truth = dense_fisher([model(x)], block.layer.parameters)[order][:, order]
            close = relative(block.dense(), truth) < TOLERANCE
            assert close == (sharing == "reduce"), (name, sharing)
        optimizer.close()


class Tokens(nn.Module):
    """A layer that sees tokens, all at once or half of them in each of two calls."""

    def __init__(self, halves: bool) -> None:
        super().__init__()
        self.halves, self.first, self.last = halves, nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.tensor_split([1], 1) if self.halves else [x]
        return self.last(torch.cat([self.first(part).tanh() for part in parts], 1))


@pytest.mark.parametrize("method", METHODS)
def test_padding_and_calls(method: str) -> None:
    """Neither what no term looks at nor the number of calls changes anything."""
    x, y = torch.randn(3, 4, 4).double(), torch.randint(3, (3, 4))
    padded = torch.cat([x, 30 * torch.randn(3, 8, 4).double()], 1)
    ignored = torch.cat([y, torch.full((3, 8), -100)], 1)
    found = []
    for halves, inputs, targets in ((False, x, y), (True, x, y), (False, padded, ignored)):
        torch.manual_seed(0)
        model = Tokens(halves).double()
        optimizer = getattr(tekfac, method)(model, damping=1e-2, **REDUCE)
        F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        found.append([block.dense() for block in optimizer.blocks.values()])
    for other in found[1:]:
        torch.testing.assert_close(found[0], other)


def test_tables_are_seen_by_entry() -> None:
    found = []
    for sharing in ("expand", "reduce"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        optimizer = tekfac.EKFAC(model, **{**REDUCE, "weight_sharing": sharing})
        x = torch.arange(12).view(3, 4) % 7
        F.cross_entropy(model(x).flatten(0, 1), x.flatten() % 3).backward()
        optimizer.step()
        found.append({name: block.dense() for name, block in optimizer.blocks.items()})
    torch.testing.assert_close(found[0]["0"], found[1]["0"])
    assert relative(found[0]["2"], found[1]["2"]) > TOLERANCE


def test_a_setting_like_others() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(ValueError, match="'expand' or 'reduce', got 'mean'"):
        tekfac.TEKFAC(model, weight_sharing="mean")
    optimizer, other = tekfac.TEKFAC(model, weight_sharing="reduce"), tekfac.TEKFAC(model)
    assert other.weight_sharing == "expand"
    other.load_state_dict(optimizer.state_dict())
    assert other.weight_sharing == "reduce"
