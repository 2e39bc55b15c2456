"""`tekfac reproduce` of tables 3 and 4: each run once, whatever is killed, and the tables right."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from command import fork, rows, tekfac, workplace
from tekfac import networks
from tekfac.cli import progress
from tekfac.cli import reproduce as command
from tekfac.cli.app import app
from tekfac.data import downloads
from tekfac.errors import Diverged
from tekfac.paper import cells, experiments, reproduction, scales
from tekfac.paper.costs import CUBES, FORWARD, WIDTH, gpu_hours
from tekfac.paper.published import TABLE_3, TABLE_4, TABLE_4_CENTRE, TABLE_4_TASK
from tekfac.paper.scales import SCALES, SMALL_GRIDS
from tekfac.runs import folder as runs
from tekfac.runs.config import Config
from tekfac.runs.folder import RunFolder
from tekfac.runs.training import BatchProgress
from tekfac.searches import grids

SMOKE = ["--scale", "smoke", "--device", "cpu"]
# One short cell on a task of the paper.
SHORT = [
    *("--scale", "small", "--tasks", "cifar10-resnet20", "--data", "cifar10=small.npz"),
    *("--limit-train", "60", "--width", "2", "--batch-size", "20", "--epochs", "1"),
    *("--precision", "fp32", "--device", "cpu", "--threads", "1", "--seeds", "2", "--out", "r"),
]
SGD = ["--optimizers", "sgd", "--grid", "sgd:lr=0.05,0.1"]

pytestmark = pytest.mark.usefixtures(workplace.__name__)


def reproduce(*arguments: str) -> str:
    result = tekfac("reproduce", *arguments)
    assert result.exit_code == 0, result.output
    return result.output


def final(folder: Path) -> tuple[float, float]:
    """Test accuracy in per cent after the last epoch, and seconds, as the run's file has them."""
    last = rows(folder / runs.METRICS)[-1]
    return 100 * float(last["test_accuracy"]), float(last["seconds"])


def shown(path: Path) -> dict[str, list[str]]:
    """The cells of a Markdown file's first table, by its first column."""
    lines = path.read_text().split("\n\n")[2].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in cells}


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob("**/*/*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.usefixtures("drawn")
def test_table_3_is_what_its_runs_say_and_figure_3_costs_nothing() -> None:
    output = reproduce("table3", *SMOKE)
    out = Path("results/table3-smoke")
    assert (out / "figure3.png").read_bytes().startswith(b"\x89PNG")
    table = shown(out / "table3.md")
    numbers = {row["row"]: row for row in rows(out / "table3.csv")}
    assert list(numbers) == ["SGD", "Adam", "EKFAC", "TKFAC", "TEKFAC"]
    target = None
    for name, row in numbers.items():
        folder = out / "digits-cnn" / name.lower()
        # The setting with the best held-out accuracy, by the trials' own files.
        trials = {path.parent: final(path.parent)[0] for path in folder.glob("search/trials/*/m*")}
        assert len(trials) == int(row["trials"]) == 2
        best = max(trials, key=lambda path: trials[path])
        assert float(row["held_out_accuracy"]) == pytest.approx(trials[best])
        settings = json.loads((best / runs.CONFIG).read_text())["settings"]
        chosen = dict(text.split(" ") for text in row["settings"].split(", "))
        assert {key: settings[key] for key in chosen} == {k: float(v) for k, v in chosen.items()}

        paths = list(folder.glob("*/seed*/metrics.csv"))
        configs = [json.loads((path.parent / runs.CONFIG).read_text()) for path in paths]
        assert sorted(config["seed"] for config in configs) == [0, 1]
        for config in configs:
            assert (config["settings"], config["hold_out"]) == (settings, None)
        accuracies = [final(path.parent)[0] for path in paths]
        mean, deviation = statistics.mean(accuracies), statistics.stdev(accuracies)
        assert float(row["test_accuracy"]) == pytest.approx(mean)
        assert float(row["test_accuracy_deviation"]) == pytest.approx(deviation)
        assert table[name] == [f"{mean:.2f} ± {deviation:.2f}", "–"]
        assert f"| {name} | {table[name][0]} | – |" in output

        target = mean if name == "SGD" else target
        passed = [
            next(
                (
                    float(e["seconds"])
                    for e in rows(path)
                    if 100 * float(e["test_accuracy"]) >= target
                ),
                None,
            )
            for path in paths
        ]
        reached = [seconds for seconds in passed if seconds is not None]
        assert int(row["seeds_to_sgd"]) == len(reached)
        if reached:
            assert float(row["seconds_to_sgd"]) == pytest.approx(statistics.mean(reached))
        per_epoch = statistics.mean(final(path.parent)[1] / 2 for path in paths)
        assert float(row["seconds_per_epoch"]) == pytest.approx(per_epoch)
    assert "not one of the paper's tasks" in (out / "table3.md").read_text()
    assert not list(out.glob(f"**/{runs.CHECKPOINT}"))

    before = times(out)
    assert "All is done already" in reproduce("figure3", *SMOKE)
    after = times(out)
    # Searches bring their own tables up to date.
    assert {path for path in after if after[path] != before[path]} <= {
        path for path in after if path.name.startswith((".lock", "search.", "trials.journal"))
    }
    assert shown(out / "table3.md") == table


@pytest.mark.slow
@pytest.mark.usefixtures("drawn")
def test_table_4_is_what_its_runs_say() -> None:
    output = reproduce("figure4", *SMOKE)
    assert "0 trials of searches and 6 runs" in output
    out = Path("results/table4-smoke")
    assert (out / "figure4.png").read_bytes().startswith(b"\x89PNG")
    table = shown(out / "table4.md")
    # Two rows are of one setting, that of the centre, and so of the same runs.
    points = {
        "ν = 0.1": "lr=0.0001,nu=0.1",
        "ν = 1": "lr=0.0001,nu=1",
        "lr = 0.0001": "lr=0.0001,nu=1",
        "lr = 0.001": "lr=0.001,nu=1",
    }
    assert [row["row"] for row in rows(out / "table4.csv")] == list(points)
    assert len(list(out.glob("**/metrics.csv"))) == 6
    for row in rows(out / "table4.csv"):
        folder = out / "digits-cnn" / "tekfac" / points[row["row"]]
        accuracies = [final(folder / f"seed{seed}")[0] for seed in range(2)]
        mean, deviation = statistics.mean(accuracies), statistics.stdev(accuracies)
        assert float(row["test_accuracy"]) == pytest.approx(mean)
        assert table[row["row"]][0] == f"{mean:.2f} ± {deviation:.2f}"
    assert "All is done already" in reproduce("table4", *SMOKE)


def test_papers_numbers_and_differences_stand_beside_ones_own() -> None:
    reproduce("table3", *SHORT, *SGD)
    text = Path("r/table3.md").read_text()
    assert shown(Path("r/table3.md"))["SGD"][1] == "92.79 ± 0.14"
    for part in (
        "cifar10-resnet20: the first 60 training images alone; epochs 1 instead of 120; width 2 "
        "instead of 64; images in a batch 20 instead of 128; cosine schedule with 0.5 epochs of "
        "warm-up instead of step schedule, every 40 epochs; images from small.npz.",
        "2 seeds instead of 3.",
        "Searches of 2 trials at most",
        "Not run: svhn-vgg16, svhn-resnet20, cifar10-vgg16, cifar100-vgg16, cifar100-resnet20.",
    ):
        assert part in text
    config = json.loads(next(Path("r").glob("**/seed0/config.json")).read_text())
    # A file is augmented as what it stands for.
    assert (config["augment"], config["precision"], config["width"]) == (True, "fp32", 2)
    assert config["settings"]["momentum"] == 0.9


def test_table_4_at_the_papers_settings_has_its_numbers() -> None:
    arguments = [each.replace("cifar10", "cifar100") for each in SHORT]
    reproduce("table4", *arguments, "--grid", "tekfac:nu=0.01,100", "--grid", "tekfac:lr=0.001")
    table = shown(Path("r/table4.md"))
    assert {name: row[1] for name, row in table.items() if "=" in name} == {
        "ν = 0.01": "77.04 ± 0.15",
        "ν = 100": "73.68 ± 0.09",
        "lr = 0.001": "77.04 ± 0.15",
    }


def test_more_seeds_and_optimizers_keep_what_is_there() -> None:
    reproduce("table3", *SHORT, *SGD, "--seeds", "1")
    kept = {path: each for path, each in times(Path("r")).items() if path.name == runs.METRICS}
    assert "To do: 0 trials of searches and 1 runs" in reproduce("table3", *SHORT, *SGD)
    adam = ["--grid", "adam:lr=0.01", *SGD[2:], "--optimizers", "sgd,adam"]
    assert "To do: 0 trials of searches and 2 runs" in reproduce("figure3", *SHORT, *adam)
    after = times(Path("r"))
    assert {path: after[path] for path in kept} == kept
    assert [row["row"] for row in rows(Path("r/table3.csv"))] == ["SGD", "Adam"]


def test_cells_that_fail_say_so_and_the_others_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    options = [
        *("--optimizers", "sgd,adam,ekfac", "--grid", "sgd:lr=1e30,1e31"),
        *("--grid", "adam:lr=1e30", "--grid", "ekfac:lr=1e-3", "--grid", "ekfac:damping=1e-2"),
    ]
    output = reproduce("table3", *SHORT, *options)
    assert "cifar10-resnet20, Adam, seed 1: diverged, the" in output
    table = shown(Path("r/table3.md"))
    assert [table[name][0] for name in ("SGD", "Adam")] == ["no trial finished", "diverged"]
    assert re.fullmatch(r"[\d.]+ ± [\d.]+", table["EKFAC"][0])
    assert "| 2 of 2 (2 diverged) |" in Path("r/table3.md").read_text()
    monkeypatch.setattr(cells, "fit", None)
    assert "All is done already" in reproduce("table3", *SHORT, *options)
    assert shown(Path("r/table3.md")) == table


def test_seeds_that_diverge_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = cells.fit

    def sometimes(folder: RunFolder, *more: Any) -> Any:
        if folder.config.seed == 1:
            raise Diverged("the loss became nan")
        return fit(folder, *more)

    monkeypatch.setattr(cells, "fit", sometimes)
    reproduce("table3", *SHORT, "--optimizers", "sgd", "--grid", "sgd:lr=0.1")
    assert shown(Path("r/table3.md"))["SGD"][0].endswith(" (1 of 2 diverged)")
    assert [row["seeds_diverged"] for row in rows(Path("r/table3.csv"))] == ["1"]


def test_run_of_another_process_is_left_to_it() -> None:
    reproduce("table3", *SHORT, *SGD)
    complete = shown(Path("r/table3.md"))
    held = next(Path("r").glob("**/seed1"))
    (held / runs.METRICS).unlink()
    with RunFolder.open(held):
        output = reproduce("table3", *SHORT, *SGD)
        assert "Left to other processes, which are at work: 0 trials and 1 runs." in output
        assert shown(Path("r/table3.md"))["SGD"][0].endswith(" (1 of 2 not done yet)")
    reproduce("table3", *SHORT, *SGD)
    assert shown(Path("r/table3.md")) == complete


def test_trial_of_another_process_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupting(progress.Bar):
        def on_batch(self, progress: BatchProgress) -> None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command, "Bar", Interrupting)
        result = tekfac("reproduce", "table3", *SHORT, *SGD)
    assert (result.exit_code, result.stderr) == (
        130,
        "tekfac: interrupted; the same command continues where it stopped\n",
    )
    with RunFolder.open(next(Path("r").glob("**/trials/*"))):
        output = reproduce("table3", *SHORT, *SGD)
        assert "which are at work: 1 trials and 2 runs." in output
        assert shown(Path("r/table3.md"))["SGD"][0] == "not done yet"
    reproduce("table3", *SHORT, *SGD)
    assert len(list(Path("r").glob("**/seed*/metrics.csv"))) == 2


def wait_for(pattern: str) -> None:
    deadline = time.monotonic() + 120
    while not list(Path("r").glob(pattern)):
        assert time.monotonic() < deadline, pattern
        time.sleep(0.005)


@pytest.mark.slow
def test_killed_and_shared_commands_end_with_the_table_of_an_undisturbed_one() -> None:
    command = ["table3", *SMOKE, "--optimizers", "sgd,tekfac", "--epochs", "4", "--out", "r"]
    reproduce(*command[:-1], "whole")
    chance = random.Random(0)
    for pattern in ("**/trials/*/metrics.csv", "**/seed*/config.json"):
        killed = fork("reproduce", *command)
        wait_for(pattern)
        time.sleep(chance.uniform(0, 0.2))
        killed.send_signal(signal.SIGKILL)
        killed.communicate(timeout=60)
    pair = [fork("reproduce", *command) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    assert shown(Path("r/table3.md")) == shown(Path("whole/table3.md"))
    whole = {path.relative_to("whole"): path for path in Path("whole").glob("**/metrics.csv")}
    assert {path.relative_to("r") for path in Path("r").glob("**/metrics.csv")} == set(whole)
    for path, other in whole.items():
        for here, there in zip(rows("r" / path), rows(other), strict=True):
            assert {**here, "seconds": ""} == {**there, "seconds": ""}


def test_full_scale_tells_its_cost_and_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    full = ["--scale", "full", *SHORT[2:], *SGD]
    result = tekfac("reproduce", "table3", *full)
    assert result.exit_code == 2
    assert (
        "To do: 2 trials of searches and 2 runs with settings chosen.\nAbout 0 GPU hours"
        in result.output
    )
    assert "An estimate, from operation counts" in result.output
    assert result.stderr == "tekfac: so much work is not begun without --yes\n"
    assert not Path("r").exists()
    monkeypatch.setattr(command, "_interactive", lambda: True)
    for answer, done in (("n\n", False), ("y\n", True)):
        result = CliRunner().invoke(app, ["reproduce", "table3", *full], input=answer)
        assert (result.exit_code, Path("r/table3.md").exists()) == (0, done), result.output
    assert "All is done already" in reproduce("table3", *full)


def test_estimate_is_of_the_networks_operations() -> None:
    products: list[int] = []
    cubes: list[int] = []

    def count(module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        products.append(module.weight.numel() * output[0, 0].numel())
        columns = module.weight[0].numel() + (module.bias is not None)
        cubes.append(columns**3 + len(module.weight) ** 3)

    for name in ("resnet20", "vgg16"):
        products.clear()
        cubes.clear()
        network = networks.build(name, (3, 32, 32), 10)
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(count)
        network(torch.zeros(2, 3, 32, 32))
        assert sum(products) == pytest.approx(FORWARD[name], rel=0.02)
        assert sum(cubes) == pytest.approx(CUBES[name], rel=0.02)
    assert WIDTH == networks.NETWORKS["resnet20"].width == networks.NETWORKS["vgg16"].width
    task: dict[str, Any] = {"data": "cifar10", "network": "resnet20", "batch_size": 128}
    sgd = gpu_hours(Config(**task, optimizer="sgd", epochs=100), 50_000)
    assert sgd == pytest.approx(6 * 0.65e9 * 5e6 / 20e12 / 3600)
    settings = {"factor_every": 10, "basis_every": 391}
    tekfac = gpu_hours(Config(**task, optimizer="tekfac", settings=settings, epochs=100), 50_000)
    assert tekfac == pytest.approx(1.2 * sgd + 100 * 9 * 7.2e10 / 1e12 / 3600)


def test_scales_give_every_optimizer_the_same_number_of_trials() -> None:
    for optimizer, grid in SMALL_GRIDS.items():
        assert experiments.size(grid) == scales.SMALL_TRIALS, optimizer
    assert SCALES["full"].trials == len(grids.PAPER_GRIDS["lr"])
    assert SCALES["full"].protocols.keys() == TABLE_3.keys()
    assert all(list(row) == list(scales.OPTIMIZERS) for row in TABLE_3.values())
    tekfac = TABLE_3[TABLE_4_TASK]["tekfac"]
    assert all(TABLE_4[key][TABLE_4_CENTRE[key]] == tekfac for key in TABLE_4)


def test_medium_scale_searches_on_less_and_shows_the_package_beside_the_paper(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    medium = SCALES["medium"]
    assert {name: experiments.size(grid) for name, grid in medium.grids.items()} == dict.fromkeys(
        medium.optimizers, medium.trials
    )
    monkeypatch.setitem(vars(scales)["SCALES"], "medium", replace(medium, trial_images=30))
    chosen = ["sgd:lr=0.05,0.1", "tekfac:lr=1e-3", "tekfac:nu=1", "tekfac-defaults:lr=5e-3,1e-2"]
    grid = [part for each in chosen for part in ("--grid", each)]
    reproduce(
        *("table3", "--scale", "medium", *SHORT[2:], "--optimizers", "sgd,tekfac,tekfac-defaults"),
        *(*grid, "--grid", "tekfac-defaults:weight_decay=0.3", "--epochs", "15"),
    )
    trial, run = (
        {
            name: json.loads(next(Path(f"r/cifar10-resnet20/{name}").glob(where)).read_text())
            for name in ("sgd", "tekfac-defaults")
        }
        for where in ("search/trials/*/config.json", "*/seed1/config.json")
    )
    for name in ("sgd", "tekfac-defaults"):
        assert (trial[name]["limit_train"], trial[name]["hold_out"]) == (30, 6), name
        assert (run[name]["limit_train"], run[name]["hold_out"]) == (60, None), name
        assert (trial[name]["epochs"], run[name]["epochs"]) == (6, 15), name
    # The paper's schedule falls twice in either; what the package recommends beside it is another.
    assert (trial["sgd"]["schedule"]["step_every"], run["sgd"]["schedule"]["step_every"]) == (2, 5)
    assert run["tekfac-defaults"]["schedule"]["name"] == "cosine"
    assert trial["tekfac-defaults"]["schedule"]["warmup"] == pytest.approx(0.2)
    assert run["tekfac-defaults"]["settings"]["nesterov"] is True
    text = Path("r/table3.md").read_text()
    assert "step schedule, every 5 epochs, instead of step schedule, every 40 epochs" in text
    assert "TEKFAC, defaults: cosine schedule with 0.5 epochs of warm-up." in text
    assert "A trial has the first 30 training images and 6 epochs." in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table3", "--scale", "huge"], "--scale 'huge' is unknown; there is: ["),
        (["table3", "--tasks", "mnist-mlp"], "--tasks 'mnist-mlp' is unknown; there is: cifar10-"),
        (["table3", "--optimizers", "sgd,magic"], "--optimizers 'magic' is unknown; there is: sgd"),
        (
            ["table3", "--data", "cifar10=no.npz"],
            "--data 'cifar10=no.npz': there is no file no.npz",
        ),
        (["table3", "--data", "small.npz"], "--data 'small.npz' must be NAME=FILE.npz with a name"),
        (["table3", "--data", "svhn=small.npz"], "--data 'svhn=small.npz' must be NAME=FILE.npz"),
        (["table3", "--grid", "lr=1"], "--grid 'lr=1' must be OPTIMIZER:SETTING=VALUE,... with"),
        (["table3", "--grid", "sgd:nu=1"], "--grid 'nu=1': sgd has no setting 'nu'"),
        (["table3", *SMOKE, "--grid", "sgd:lr=0.1,-1"], "-1"),
        (["table3", *SMOKE, "--hold-out", "5000"], "--hold-out 5000 leaves nothing to train on"),
        (["table3", *SMOKE, "--limit-train", "5000"], "--limit-train 5000 is more than the 1297"),
        (["table3", *SMOKE, "--data-dir", "d"], "--data-dir is for cifar10"),
        (["table3", *SMOKE, "--epochs", "0"], "--epochs must be 1 or more, got 0"),
        (["table4", "--optimizers", "sgd"], "--optimizers does nothing with table4"),
        (["figure4", "--trials", "3"], "--trials does nothing with figure4"),
        (["theorem31", "--epochs", "3"], "--epochs does nothing with theorem31"),
        (["table3", "--trials", "0"], "Invalid value for '--trials'"),
        (["table3", "--seeds", "0"], "Invalid value for '--seeds'"),
        (["table9"], "Invalid value for"),
    ],
)
def test_bad_input(arguments: list[str], message: str, workplace: Path) -> None:
    result = tekfac("reproduce", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert os.listdir(workplace) == ["small.npz"]


def test_data_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch, workplace: Path) -> None:
    def offline(root: Path, train: bool) -> downloads.Part:
        raise URLError("no route to host")

    source = downloads.DOWNLOADS["cifar100"]
    cut_off = downloads.Download(offline, source.classes, source.augment, source.urls)
    monkeypatch.setitem(downloads.DOWNLOADS, "cifar100", cut_off)
    result = tekfac("reproduce", "table3", "--data", "cifar10=small.npz", "--limit-train", "60")
    assert result.exit_code == 2
    assert "--data cifar100 can be neither read from" in result.stderr
    assert os.listdir(workplace) == ["small.npz"]


@pytest.mark.parametrize("name", ["table3.md", "table3.csv", "figure3.png"])
def test_users_files_are_left_alone(name: str) -> None:
    Path("r").mkdir()
    Path("r", name).write_text("precious")
    result = tekfac("reproduce", "table3", *SHORT, *SGD)
    assert result.exit_code == 2
    assert f"r holds {name} but no experiment.json" in result.stderr
    assert os.listdir("r") == [name]
    assert Path("r", name).read_text() == "precious"


def test_another_experiment_is_not_mixed_in() -> None:
    reproduce("table3", *SHORT, *SGD)
    before = {path: path.read_bytes() for path in Path("r").glob("**/*") if path.is_file()}
    for arguments, message in (
        (["table4", *SHORT, "--tasks", "cifar10-resnet20"], "r holds another experiment"),
        (["table3", *SHORT, *SGD, "--scale", "full", "--yes"], "r holds another experiment"),
        (["table3", *SHORT, *SGD, "--width", "3"], "holds another search, config.width 2 instead"),
        (["table3", *SHORT, *SGD[:2], "--grid", "sgd:lr=0.1,0.2"], "grid.lr [0.05, 0.1] instead"),
    ):
        result = tekfac("reproduce", *arguments)
        assert result.exit_code == 2, result.output
        assert message in result.stderr
    after = {path: path.read_bytes() for path in Path("r").glob("**/*") if path.is_file()}
    assert after == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (runs.METRICS, "epoch,loss\n1,2\n", "holds no run that can be read"),
        (runs.METRICS, "nonsense", "has metrics.csv but no checkpoint.pt to continue from"),
        (runs.CONFIG, "{", "holds no run that can be read"),
        (runs.CONFIG, '{"data": "mnist"}', "holds another run, data mnist instead of"),
    ],
)
def test_damaged_runs(name: str, content: str, message: str) -> None:
    reproduce("table3", *SHORT, *SGD)
    path = next(Path("r").glob(f"**/seed0/{name}"))
    path.write_text(content)
    result = tekfac("reproduce", "table3", *SHORT, *SGD)
    assert result.exit_code == 2
    assert f"{path.parent} {message}" in result.stderr
    assert path.read_text() == content


def test_damaged_marker() -> None:
    Path("r").mkdir()
    Path("r", reproduction.MARKER).write_text("{")
    result = tekfac("reproduce", "table3", *SHORT, *SGD)
    assert result.exit_code == 2
    assert "r/experiment.json is not valid JSON" in result.stderr
