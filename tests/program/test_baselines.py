"""SOAP and Muon beside the package's own optimizers: optional, repeatable, and what they claim."""

from __future__ import annotations

import importlib.util
import io
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

import tekfac
from tekfac.data import Dataset, load
from tekfac.errors import InputError
from tekfac.runs import optimizers
from tekfac.runs.config import Config
from tekfac.runs.schedules import Schedule
from tekfac.runs.training import Training, Watcher

PACKAGES = {"soap": "heavyball", "muon": "pytorch_optimizer"}


def needs(name: str) -> pytest.MarkDecorator:
    package = PACKAGES[name]
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None,
        reason=f"{name} needs {package}: pip install 'tekfac[baselines]'",
    )


BASELINES = [pytest.param(name, marks=needs(name)) for name in PACKAGES]


@pytest.fixture(scope="module")
def data() -> Dataset:
    digits = load("digits")
    return replace(
        digits,
        x_train=digits.x_train[:200],
        y_train=digits.y_train[:200],
        x_test=digits.x_test[:100],
        y_test=digits.y_test[:100],
    )


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 3),
    )  # fmt: skip


def make(name: str, **settings: Any) -> tuple[nn.Sequential, Optimizer]:
    model = network()
    complete = optimizers.resolve(name, settings)
    return model, optimizers.build(name, model, complete, torch.Generator())


def step(model: nn.Sequential, optimizer: Optimizer) -> dict[str, Tensor]:
    """A step on a fixed batch; by how much it moved each parameter."""
    torch.manual_seed(1)
    x, y = torch.randn(16, 2, 6, 6), torch.randint(3, (16,))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


def test_standard_methods_need_no_optional_package() -> None:
    assert optimizers.STANDARD == ("sgd", "adam", "kfac", "ekfac", "tkfac", "tekfac")
    assert set(optimizers.METHODS) == {*optimizers.STANDARD, "tekfac-defaults", *PACKAGES}


def test_defaults_of_the_package_are_what_it_does_by_itself() -> None:
    made, optimizer = make("tekfac-defaults")
    moved = step(made, optimizer)
    model = network()
    generator = torch.Generator()
    own = tekfac.TEKFAC(model, generator=generator)
    groups = [{**each.param_groups[0], "params": None} for each in (optimizer, own)]
    assert groups[0] == groups[1]
    alone = step(model, own)
    for name, change in alone.items():
        assert torch.equal(moved[name], change), name
    # Not the paper's method, which has the same settings but no bound.
    paper = step(*make("tekfac", lr=5e-3, mean_damping=0.3, nesterov=True, rank=32))
    assert not torch.allclose(paper["0.weight"], alone["0.weight"], rtol=0.1)


@pytest.mark.parametrize("name", PACKAGES)
def test_package_that_is_not_installed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    message = (
        f"--optimizer {name}: the package {PACKAGES[name]} is not installed: "
        "pip install 'tekfac[baselines]'"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        Config(optimizer=name)
    for standard in optimizers.STANDARD:
        Config(optimizer=standard)


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        pytest.param(name, setting, value, marks=needs(name))
        for name, setting, value in (
            ("soap", "lr", -1.0),
            ("soap", "weight_decay", -0.5),
            ("soap", "beta1", 1.0),
            ("soap", "beta2", -0.1),
            ("soap", "precondition_frequency", 0),
            ("muon", "lr", -1.0),
            ("muon", "weight_decay", -0.5),
            ("muon", "momentum", 1.0),
            ("muon", "first_order_lr", -1.0),
        )
    ],
)
def test_values_out_of_range(name: str, setting: str, value: float) -> None:
    with pytest.raises(InputError, match=f"^{name}: {setting} must be .*, got {value}$"):
        make(name, **{setting: value})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", BASELINES)
def test_run_continues_exactly(data: Dataset, name: str, precision: str) -> None:
    # SOAP's bases are refreshed in mid-epoch, before and after the break.
    settings = {"precondition_frequency": 3} if name == "soap" else {}
    config = Config(
        optimizer=name,
        settings={"weight_decay": 1e-3, **settings},
        epochs=3,
        batch_size=40,
        schedule=Schedule("cosine", warmup=0.5),
        precision=precision,
    )

    def losses(training: Training, epochs: int) -> list[float]:
        return [training.run_epoch(Watcher()).train_loss for _ in range(epochs)]

    whole = Training(config, data)
    expected = losses(whole, 3)
    assert expected[2] < expected[0]
    for epochs in (0, 1):
        first = Training(config, data)
        losses(first, epochs)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        rest = Training(config, data)
        torch.manual_seed(12345)
        rest.load_state_dict(torch.load(file, weights_only=True))
        assert losses(rest, 3 - epochs) == expected[epochs:]
        for (key, one), other in zip(
            whole.network.state_dict().items(), rest.network.state_dict().values(), strict=True
        ):
            assert torch.equal(one, other), key


@pytest.mark.parametrize("name", BASELINES)
def test_learning_rates_are_read_in_each_step(name: str) -> None:
    moves = {}
    for factor in (1.0, 0.5, 0.0):
        model, optimizer = make(name, lr=1e-2)
        step(model, optimizer)  # SOAP's first only measures
        for group in optimizer.param_groups:
            group["lr"] *= factor
        moves[factor] = step(model, optimizer)
    for key, move in moves[1.0].items():
        assert torch.allclose(moves[0.5][key], move / 2, rtol=1e-3, atol=1e-7), key
        assert not moves[0.0][key].any(), key


@needs("soap")
def test_soap_keeps_to_its_frequency_and_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("compiles")

    monkeypatch.setattr(torch, "compile", refuse)

    def bases(optimizer: Optimizer) -> list[Tensor]:
        state = optimizer.state_dict()["state"][0][0]
        return [q.clone() for key, qs in state.items() if "_Q_" in key for q in qs]

    model, optimizer = make("soap", precondition_frequency=4)
    refreshed = []
    for number in range(9):
        before = bases(optimizer) if number else []
        step(model, optimizer)
        refreshed.append(
            any(
                not torch.equal(old, new)
                for old, new in zip(before, bases(optimizer), strict=False)
            )
        )
    assert [number for number, new in enumerate(refreshed, start=1) if new] == [4, 8]


@pytest.mark.slow
@needs("soap")
def test_soap_with_a_schedule_says_nothing_of_its_own(tmp_path: Path) -> None:
    command = "train --optimizer soap --schedule cosine --epochs 2 --limit-train 200 --out run"
    program = f"from tekfac.cli import main; import sys; sys.argv[1:] = {command.split()}; main()"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert "Learning rate changed" not in done.stdout
    assert "AUTOTUNE" not in done.stdout


HIDDEN = ("0.weight", "3.weight", "6.weight")


@needs("muon")
def test_muon_moves_hidden_weights_by_orthogonal_matrices() -> None:
    lr = 0.02
    model, optimizer = make("muon", lr=lr, first_order_lr=1e-3)
    moves = step(model, optimizer)
    for name in HIDDEN:
        # After one step the momentum is along the gradient, whose polar factor is wanted.
        gradient = _gradient(network(), name)
        u, s, vh = torch.linalg.svd(gradient, full_matrices=False)
        d_out, d_in = gradient.shape
        move = -moves[name].flatten(1) / (lr * max(1, d_out / d_in) ** 0.5)
        # Five steps of its iteration bring singular values near 1, not to it, and those that were
        # next to nothing not even there.
        kept = s > 0.05 * s.norm()
        assert kept.sum() >= 4, name
        core = (u.T @ move @ vh.T)[kept][:, kept]
        assert core.diag().min() > 0.6, name
        assert core.diag().max() < 1.25, name
        assert (core - core.diag().diag()).abs().max() < 0.05, name


@needs("muon")
def test_muon_leaves_vectors_and_the_last_layer_to_adam() -> None:
    model, optimizer = make("muon", lr=0.02, first_order_lr=3e-3)
    moves = step(model, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.02  # the one that runs report
    others = [name for name in moves if name not in HIDDEN]
    assert "8.weight" in others
    for name in others:
        gradient = _gradient(network(), name).flatten()
        # Adam's first step is the gradient's sign; a bias before batch normalisation has none.
        if gradient.abs().max() > 1e-6:
            assert torch.allclose(moves[name].flatten(), -3e-3 * gradient.sign(), atol=1e-5), name


@needs("muon")
def test_muon_decays_all_parameters() -> None:
    plain, decayed = (
        step(*make("muon", lr=0.02, first_order_lr=1e-3, weight_decay=decay))
        for decay in (0.0, 0.5)
    )
    for name, p in network().named_parameters():
        lr = 0.02 if name in HIDDEN else 1e-3
        assert torch.allclose(decayed[name] - plain[name], -lr * 0.5 * p, atol=1e-6), name


def _gradient(model: nn.Sequential, name: str) -> Tensor:
    torch.manual_seed(1)
    x, y = torch.randn(16, 2, 6, 6), torch.randint(3, (16,))
    F.cross_entropy(model(x), y).backward()
    gradient = model.get_parameter(name).grad
    assert gradient is not None
    return gradient.flatten(1) if gradient.ndim > 1 else gradient
