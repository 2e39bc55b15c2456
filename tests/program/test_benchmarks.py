"""The benchmarks run, at the smallest size, and their tables hold together."""

from __future__ import annotations

import copy
import importlib.util
import math
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import tekfac
from benchmarks import adaptive, norms, strangers
from tekfac.runs.config import Config
from tekfac.runs.optimizers import METHODS

SMALL = ["--model", "cnn", "--width", "2", "--batch", "4", "--threads", "1", "--warmup", "2"]


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    return importlib.import_module("benchmarks.step")


def table(output: str) -> dict[str, list[float]]:
    lines = [line.strip("| ").split(" | ") for line in output.splitlines() if line[:1] == "|"]
    return {name: [float(cell) for cell in cells] for name, *cells in lines[2:]}


@pytest.mark.slow
def test_race_over_a_whole_interval(step: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = "--against tekfac,sgd --intervals 2/1/6 --steps 2 --set damping=0.1"
    step.main([*SMALL, *arguments.split()])
    output = capfd.readouterr().out
    assert "6 steps, which are 1 intervals of the bases" in output
    rows = table(output)
    assert list(rows) == ["sgd", "tekfac"]
    _, median, mean, slowest, memory, share = rows["sgd"]
    assert median == mean == share == 1.0
    assert slowest >= 1.0
    assert memory >= 0
    assert rows["tekfac"][2] > 1.0, "statistics in every other step cannot be free"


def test_options_reach_the_optimizers(step: ModuleType) -> None:
    arguments = "--intervals 3/4/5 --set scale_decay=0.5 --set kl_clip=None --precision bf16"
    options = step._parser().parse_args([*SMALL, *arguments.split(), "--channels-last"])
    kfac, tekfac = (step.Contender(name, options) for name in ("kfac", "tekfac"))
    assert (kfac.optimizer.factor_every, kfac.optimizer.basis_every) == (3, 5)
    assert (tekfac.optimizer.scale_every, tekfac.optimizer.scale_decay) == (4, 0.5)
    assert kfac.x.is_contiguous(memory_format=torch.channels_last)
    assert kfac.x.dtype == torch.float32
    kfac.block(2)
    assert len(kfac.times[0]) == 2


@pytest.mark.parametrize("name", ["soap", "shampoo", "muon"])
def test_peers_train(step: ModuleType, name: str) -> None:
    package = "heavyball" if name == "soap" else "pytorch_optimizer"
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{name} needs {package}: pip install 'tekfac[baselines]'")
    options = step._parser().parse_args([*SMALL, "--peer-every", "2"])
    contender = step.Contender(name, options)
    before = [p.detach().clone() for p in contender.network.parameters()]
    contender.block(5)
    after = list(contender.network.parameters())
    assert all(p.isfinite().all() for p in after)
    assert not any(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_profile_names_the_parts(step: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    step.main([*SMALL, "--against", "tekfac", "--profile", "--blocks", "1"])
    kinds = capfd.readouterr().out.split("tekfac, ")
    assert [kind.split(":")[0] for kind in kinds[1:]] == [
        "without statistics",
        "with statistics",
        "with statistics and a new basis",
    ]
    assert "factors: " not in kinds[1]
    assert "factors: " in kinds[2]
    assert "basis: " in kinds[3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "lamb"], "lamb unknown; there is: sgd, adam, kfac"),
        (["--intervals", "10/100"], "'10/100' must be three counts, such as 10/10/100"),
        (["--blocks", "0"], "'0' must be a whole number of at least 1"),
        (["--set", "dampening=1"], "no natural-gradient optimizer has 'dampening'"),
        (["--set", "damping="], "'damping=' must be NAME=VALUE"),
    ],
)
def test_bad_options(
    step: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as raised:
        step.main(arguments)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_adaptive_damping_is_compared(capsys: pytest.CaptureFixture[str]) -> None:
    given = "--tasks regression --steps 6 --seeds 1 --fraction 0.05 --steps-of default,plain:0.1"
    adaptive.main([*given.split(), "--dampings", "mean:0.1,adaptive:0.3"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[2:4] for row in rows] == [
        [length, damping]
        for length in ("default", "plain:0.1")
        for damping in ("mean 0.1", "adaptive 0.3")
    ]
    assert all(len(row[4].split(", ")) == 4 for row in rows)
    assert [row[6] for row in rows[::2]] == ["0.1", "0.1"]
    assert all(row[6] != "0.3" for row in rows[1::2])


def test_kinds_of_models_are_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each trains as it is, without a word; what is judged is better where more of it is."""
    ends = iter([(1.0, 2.0), (3.0, 2.0), (2.0, 2.0), (0.5, 8.0)])
    with monkeypatch.context() as patch:
        patch.setattr(strangers, "train", lambda *_: next(ends))
        strangers.main(["--problems", "poles", "--seeds", "1"])
    row = capsys.readouterr().out.splitlines()[-1]
    assert row == "| poles | 600 | 1 | **3** | 2 | 0.5 | 4.00 |"
    monkeypatch.setattr(strangers, "ADAMW", ())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, make in strangers.PROBLEMS.items():
            torch.manual_seed(0)
            images = strangers.Images(torch.rand(64, 1, 28, 28), torch.arange(64) % 10)
            problem = make(images)
            problem.steps = 2
            end, _ = strangers.train(strangers.tekfac_as_it_is, problem)
            assert math.isfinite(end), name


class Normed(nn.Module):
    """Two layers on each of some positions, and a norm layer between."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 6), norm, nn.Linear(6, 4)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = self.norm(x) if isinstance(self.norm, nn.LayerNorm) else self.norm(x.mT).mT
        return self.last(torch.tanh(x))


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.BatchNorm1d(6)], ids=["layer", "batch"])
def test_norm_layers_have_their_fisher_matrix(
    monkeypatch: pytest.MonkeyPatch, norm: nn.Module
) -> None:
    torch.manual_seed(0)
    network = Normed(norm).double()
    before = copy.deepcopy(network)
    x, y = torch.randn(7, 3, 5, dtype=torch.float64), torch.randint(4, (7, 3))
    task = SimpleNamespace(likelihood=tekfac.Categorical(dim=-1), mean_over="terms")
    drawn = []
    sample = tekfac.Categorical.sample

    def recorded(*given: Any) -> torch.Tensor:
        drawn.append(sample(*given))
        return drawn[-1]

    monkeypatch.setattr(tekfac.Categorical, "sample", recorded)
    optimizer = norms.Norms(network, task, crossed=True, separate=False)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(x).flatten(0, 1), y.flatten())
        loss.backward()
        return loss

    optimizer.step(closure)
    assert len(drawn) == 1
    own = list(before.norm.parameters())
    truth = torch.zeros(6, 2, 2, dtype=torch.float64)
    for example, cotangent in zip(before(x), drawn[0], strict=True):
        gradient = torch.stack(torch.autograd.grad(example, own, cotangent, retain_graph=True), 1)
        truth += gradient[:, :, None] * gradient[:, None] / 21
    torch.testing.assert_close(optimizer.norms[0].average, truth)


def test_norm_layers_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    given = "--tasks gpt --steps 3 --seeds 0 --fraction 0.1 --contenders"
    contenders = [
        "adam",
        "adam,norm_lr=0.1",
        "unit,lr=0.1",
        "separate,lr=0.3,power=0.5",
        "adamw,lr=0.1",
    ]
    norms.main([*given.split(), *contenders])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[3] for row in rows] == contenders
    losses = [row[4] for row in rows]
    assert len(set(losses)) == len(contenders)
    assert all(len(each.split(", ")) == 3 for each in losses)


@pytest.fixture
def lead(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    return importlib.import_module("benchmarks.lead")


def test_every_variant_of_the_study_can_be_trained(lead: ModuleType) -> None:
    """What it changes is there to be changed, and the run gets through."""
    task = Config(data="digits", network="mlp", width=4, epochs=1, limit_train=64, threads=1)
    data = task.load_data()
    for variant in lead.VARIANTS.values():
        package = METHODS[variant.optimizer].package
        if package is not None and importlib.util.find_spec(package) is None:
            continue
        config = lead.configured(variant, task)
        assert {**config.settings, **variant.settings} == config.settings
        row = lead.trained(variant, task, data)
        assert row[0] == "diverged" or float(row[0]) > 0


def test_the_study_goes_on_where_it_stopped(
    lead: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = iter((["1", "2", "3"], None, ["4", "5", "6"]))

    def trained(*_: object) -> list[str]:
        row = next(results)
        if row is None:
            raise KeyboardInterrupt
        return row

    first, second = list(lead.VARIANTS)[:2]
    monkeypatch.setattr(lead, "VARIANTS", {n: lead.VARIANTS[n] for n in (first, second)})
    monkeypatch.setattr(lead, "trained", trained)
    arguments = ["--data", "digits", "--train", "60", "--held-out", "20", "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        lead.main(arguments)
    lead.main(arguments)
    assert lead.read(tmp_path / "lead.csv") == [[first, "1", "2", "3"], [second, "4", "5", "6"]]
    assert f"| {second} | 4 | 5 | 6 |" in (tmp_path / "lead.md").read_text()
