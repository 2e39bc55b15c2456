"""The benchmarks run, at the smallest size, and their tables hold together."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

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


def test_adaptive_damping_is_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    adaptive = importlib.import_module("benchmarks.adaptive")
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
