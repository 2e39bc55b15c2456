"""Where a network's graph branches, and how long what layers saw is held."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tekfac
from harness import METHODS, SideBySide, batch
from tekfac.curvature.blocks import Block
from tekfac.layers import Sample


class Towers(nn.Module):
    """Two towers of different depth, a way around, a layer called twice, heads that are added."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.deep = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(4, 4)
        self.shared, self.head, self.other_head = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x), self.deep(torch.tanh(self.right(x)))
        both = torch.tanh(self.shared(left) + self.shared(right)) + left
        output: Tensor = self.head(both) + self.other_head(x)
        return output


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_every_layer_of_a_branching_graph_is_measured(method: str, fisher: str) -> None:
    torch.manual_seed(1)
    pair = SideBySide(Towers(), method, fisher=fisher)
    for seed in range(3):
        torch.manual_seed(seed)
        pair.step(*batch("mlp", 6))
    pair.check_parameters()


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_output_gradients_of_several_layers_are_not_held_together(
    fisher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    layers: list[nn.Module] = [nn.Linear(5, 5)]
    for _ in range(8):
        layers += [nn.ReLU(inplace=True), nn.Linear(5, 5)]
    model = nn.Sequential(*layers)
    optimizer = tekfac.KFAC(model, fisher=fisher, factor_every=1, mc_samples=2)
    x, y = torch.randn(6, 5), torch.randint(5, (6,))
    seen: list[weakref.ref[Any]] = []
    alive: list[int] = []
    observe = Block.observe

    def watched(block: Block, sample: Sample) -> None:
        alive.append(sum(each() is not None for each in seen))
        seen.extend(weakref.ref(g.untyped_storage()) for g in sample.gradients)
        observe(block, sample)

    monkeypatch.setattr(Block, "observe", watched)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    draws = {"mc": 2, "exact": 5, "empirical": 1}[fisher]
    assert len(seen) == draws * len(optimizer.blocks)
    assert max(alive) <= 3
