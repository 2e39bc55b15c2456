"""`tekfac reproduce theorem31`: its Fisher block, what it claims, and what it leaves behind."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from tekfac import data
from tekfac.cli.app import app
from tekfac.paper import theorem31


def test_fisher_block_is_the_sum_over_labels() -> None:
    """Example by example, label by label, by plain autograd."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))
    x = torch.randn(4, 1, 4, 4)
    for name in ("0", "3"):
        layer = network.get_submodule(name)
        rows = []
        for image in x:
            log_p = F.log_softmax(network(image[None])[0], dim=0)
            for label in range(3):
                weight, bias = torch.autograd.grad(
                    log_p[label], list(layer.parameters()), retain_graph=True
                )
                gradient = torch.cat([weight.flatten(1), bias[:, None]], 1).flatten()
                rows.append(gradient * log_p[label].exp().sqrt())
        stacked = torch.stack(rows)
        expected = (stacked.mT @ stacked / len(x)).detach()
        assert torch.allclose(theorem31.fisher_block(network, name, x), expected, atol=1e-6)


def test_theorem_holds_on_every_layer_at_every_time() -> None:
    distances = theorem31.run(theorem31.SCALES["smoke"], data.load("digits"), lambda words: None)
    assert {d.epoch for d in distances} == {0, 1}
    assert len(distances) == 2 * 4 * 4  # times, layers, methods
    assert theorem31.worst_ratio(distances, "TEKFAC", "TKFAC") <= 1 + 1e-4
    assert theorem31.worst_ratio(distances, "EKFAC", "KFAC") <= 1 + 1e-4
    for distance in distances:
        if distance.method in ("EKFAC", "TEKFAC"):
            assert distance.trace == pytest.approx(1, abs=1e-3)


@pytest.mark.usefixtures("drawn")
def test_command(tmp_path: Path) -> None:
    out = tmp_path / "results"
    arguments = ["reproduce", "theorem31", "--scale", "smoke", "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "TEKFAC's error is at most" in result.output
    assert (out / "theorem31.png").read_bytes().startswith(b"\x89PNG")
    assert (
        (out / "theorem31.md").read_text().startswith("| layer | KFAC | EKFAC | TKFAC | TEKFAC |")
    )
    with open(out / "theorem31.csv") as file:
        assert len(list(csv.DictReader(file))) == 32


def test_unknown_scale() -> None:
    result = CliRunner().invoke(app, ["reproduce", "theorem31", "--scale", "huge"])
    assert result.exit_code == 2
    assert "--scale 'huge' is unknown" in result.output
