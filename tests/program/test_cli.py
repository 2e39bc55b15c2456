"""The ``tekfac`` command as its user meets it: screens, files, exit codes, interruptions."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from command import rows, start, tekfac, workplace
from tekfac import cli
from tekfac.cli.progress import Interruption
from tekfac.paper import presets
from tekfac.runs import comparison, plots, training
from tekfac.runs import folder as runs
from tekfac.runs.config import Config
from tekfac.runs.metrics import EpochMetrics
from tekfac.runs.optimizers import METHODS

FAST = ["--data", "small.npz", "--network", "mlp", "--optimizer", "sgd"]
FAST += ["--device", "cpu", "--threads", "1"]
COMPARE = ["compare", "--data", "small.npz", "--network", "mlp"]
COMPARE += ["--device", "cpu", "--threads", "1"]

pytestmark = pytest.mark.usefixtures(workplace.__name__)


@pytest.mark.usefixtures("drawn")
def test_train_without_options_learns_the_digits() -> None:
    result = tekfac("train", "--device", "cpu")
    assert result.exit_code == 0, result.output
    folder = Path("runs/digits-cnn-tekfac-seed0")
    assert f"run in {folder}" in result.output
    metrics = rows(folder / runs.METRICS)
    assert list(metrics[0]) == [
        "epoch",
        "train_loss",
        "train_accuracy",
        "test_loss",
        "test_accuracy",
        "lr",
        "seconds",
    ]
    assert [int(row["epoch"]) for row in metrics] == list(range(1, Config.epochs + 1))
    assert float(metrics[-1]["test_accuracy"]) > 0.95
    assert f"test accuracy {100 * float(metrics[-1]['test_accuracy']):.2f} %" in result.output
    config = json.loads((folder / runs.CONFIG).read_text())
    assert (config["optimizer"], config["data"], config["seed"]) == ("tekfac", "digits", 0)
    assert (folder / runs.CURVES).read_bytes().startswith(b"\x89PNG")
    torch.load(folder / runs.CHECKPOINT, weights_only=True)


def test_options_reach_the_configuration() -> None:
    options = "--optimizer ekfac --epochs 2 --batch-size 17 --lr 0.002 --momentum 0.5 --seed 3 "
    options += "--weight-decay 0.01 --damping 0.2 --fisher empirical --factor-every 3 "
    options += "--scale-every 4 --basis-every 5 --schedule step --step-every 1 --step-factor 0.5 "
    options += "--warmup 0.5 --width 8 --augment --precision bf16 --limit-train 40 "
    options += "--nesterov --first-order-lr 0.3 --hold-out 5 --rank 7 --out here"
    result = tekfac("train", *FAST, *options.split())
    assert result.exit_code == 0, result.output
    config = json.loads(Path("here", runs.CONFIG).read_text())
    assert config == {
        "data": str(Path("small.npz").resolve()),
        "image_size": None,
        "data_dir": None,
        "limit_train": 40,
        "hold_out": 5,
        "augment": True,
        "network": "mlp",
        "width": 8,
        "optimizer": "ekfac",
        "settings": {
            "lr": 0.002,
            "damping": 0.2,
            "scale_every": 4,
            "momentum": 0.5,
            "nesterov": True,
            "weight_decay": 0.01,
            "fisher": "empirical",
            "factor_every": 3,
            "basis_every": 5,
            "rank": 7,
            "first_order_lr": 0.3,
        },
        "epochs": 2,
        "batch_size": 17,
        "schedule": {"name": "step", "warmup": 0.5, "step_every": 1, "step_factor": 0.5},
        "seed": 3,
        "device": "cpu",
        "precision": "bf16",
        "compile": False,
        "tensorboard": False,
        "threads": 1,
    }


def test_preset_is_the_papers_protocol_and_options_override_it() -> None:
    small = ["--data", "small.npz", "--network", "mlp", "--device", "cpu", "--epochs", "1"]
    assert tekfac("train", "--preset", "paper-svhn", *small, "--out", "a").exit_code == 0
    config = json.loads(Path("a", runs.CONFIG).read_text())
    assert config["batch_size"] == 128
    assert config["schedule"]["name"] == "step"
    assert (config["schedule"]["step_every"], config["schedule"]["step_factor"]) == (20, 0.1)
    assert (config["settings"]["momentum"], config["settings"]["weight_decay"]) == (0.9, 0)

    options = "--momentum 0.5 --batch-size 30 --step-every 3 --first-order-lr 0.02 --out b"
    assert tekfac("train", "--preset", "paper-svhn", *small, *options.split()).exit_code == 0
    config = json.loads(Path("b", runs.CONFIG).read_text())
    assert config["batch_size"] == 30
    assert (config["schedule"]["step_every"], config["schedule"]["step_factor"]) == (3, 0.1)
    assert config["settings"]["momentum"] == 0.5
    assert config["settings"]["first_order_lr"] == 0.02

    options = "--optimizer adam --schedule cosine --out c"
    assert tekfac("train", "--preset", "paper-svhn", *small, *options.split()).exit_code == 0
    config = json.loads(Path("c", runs.CONFIG).read_text())
    assert config["schedule"] == {
        "name": "cosine",
        "warmup": 0.0,
        "step_every": None,
        "step_factor": None,
    }
    assert "momentum" not in config["settings"]


@pytest.mark.parametrize(
    ("name", "data", "every", "epochs", "augment"),
    [
        ("paper-svhn", "svhn", 20, 60, False),
        ("paper-cifar10", "cifar10", 40, 120, True),
        ("paper-cifar100", "cifar100", 40, 120, True),
    ],
)
def test_presets_are_complete(name: str, data: str, every: int, epochs: int, augment: bool) -> None:
    preset = presets.PRESETS[name]
    config = Config(**preset.task, schedule=preset.schedule, settings=preset.settings)
    assert (config.data, config.epochs, config.augment) == (data, epochs, augment)
    assert (config.schedule.name, config.schedule.step_every) == ("step", every)
    assert (config.network, config.width, config.batch_size) == ("resnet20", 64, 128)


def test_options_come_from_a_file_and_the_command_line_overrides_them() -> None:
    Path("options.yaml").write_text(
        "preset: paper-cifar10   # below the options of this file\n"
        "data: small.npz\nnetwork: mlp\noptimizer: kfac\nepochs: 1\nbatch-size: 20\n"
        "lr: 1e-3\nfactor_every: 3\naugment: true\ndevice: cpu\nout: a\nseed:\n"
    )
    options = ["--lr", "0.004", "--no-augment"]
    result = tekfac("train", "--config", "options.yaml", *options)
    assert result.exit_code == 0, result.output
    config = json.loads(Path("a", runs.CONFIG).read_text())
    assert (config["optimizer"], config["batch_size"], config["seed"]) == ("kfac", 20, 0)
    assert (config["settings"]["lr"], config["settings"]["factor_every"]) == (0.004, 3)
    assert config["schedule"]["step_every"] == 40
    assert config["augment"] is False
    result = tekfac("train", "--config", "options.yaml", "--out", "b")
    assert result.exit_code == 0, result.output
    config = json.loads(Path("b", runs.CONFIG).read_text())
    assert (config["settings"]["lr"], config["augment"]) == (0.001, True)


@pytest.mark.parametrize("rates", ["{sgd: 0.02, adam: 1e-3}", "[sgd=0.02, adam=0.001]"])
def test_comparison_takes_options_from_a_file(rates: str) -> None:
    Path("options.yaml").write_text(
        "data: small.npz\nnetwork: mlp\noptimizers: [sgd, adam]\nseeds: 1\nepochs: 1\n"
        f"lr: {rates}\ndevice: cpu\nout: both\n"
    )
    result = tekfac("compare", "--config", "options.yaml")
    assert result.exit_code == 0, result.output
    table = rows(Path("both", comparison.TABLE_CSV))
    assert [(row["optimizer"], row["lr"]) for row in table] == [("SGD", "0.02"), ("Adam", "0.001")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: [", "bad.yaml is not valid YAML: "),
        ("\xe9", "bad.yaml is not valid YAML: "),
        ("- epochs", "bad.yaml must hold lines of the form `option: value`"),
        ("colour: red", "bad.yaml: there is no option --colour"),
        ("config: other.yaml", "bad.yaml: there is no option --config"),
        ("lr: {sgd: 1}", "bad.yaml: lr must have a plain value, not names with values"),
        ("preset: paper", "--preset 'paper' is unknown; there is: paper-svhn, paper-cifar10"),
        ("optimizer: sgd\nnu: 1", "--nu does nothing with --optimizer sgd"),
    ],
)
def test_bad_option_files(text: str, message: str, workplace: Path) -> None:
    Path("bad.yaml").write_text(text, encoding="latin-1")
    result = tekfac("train", "--config", "bad.yaml")
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("tekfac: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(os.listdir(workplace)) == ["bad.yaml", "small.npz"]


@pytest.mark.parametrize("value", ["12.5", "many", "[1, 2]"])
def test_option_file_with_a_value_of_the_wrong_kind(value: str, workplace: Path) -> None:
    Path("bad.yaml").write_text(f"epochs: {value}")
    result = tekfac("train", "--config", "bad.yaml")
    assert result.exit_code == 2
    assert "'--epochs'" in result.stderr
    assert sorted(os.listdir(workplace)) == ["bad.yaml", "small.npz"]


def test_missing_option_file_is_one_line() -> None:
    result = tekfac("train", "--config", "none.yaml")
    assert result.exit_code == 1
    assert result.stderr == "tekfac: No such file or directory: none.yaml\n"


def test_default_folder_taken_gets_a_numbered_sibling() -> None:
    for _ in range(2):
        assert tekfac("train", *FAST, "--epochs", "1").exit_code == 0
    assert sorted(os.listdir("runs")) == ["small-mlp-sgd-seed0", "small-mlp-sgd-seed0-2"]


def test_named_folder_taken_is_refused() -> None:
    assert tekfac("train", *FAST, "--epochs", "1", "--out", "mine").exit_code == 0
    before = Path("mine", runs.CHECKPOINT).read_bytes()
    result = tekfac("train", *FAST, "--epochs", "1", "--out", "mine")
    assert result.exit_code == 2
    assert "mine already holds a run (config.json), which is never overwritten" in result.stderr
    assert "--resume mine" in result.stderr
    assert Path("mine", runs.CHECKPOINT).read_bytes() == before


def test_finished_run_says_so() -> None:
    tekfac("train", *FAST, "--epochs", "1", "--out", "mine")
    result = tekfac("train", "--resume", "mine")
    assert result.exit_code == 0
    assert "mine is finished: 1 of 1 epochs, test accuracy" in result.output
    assert "Nothing changed." in result.output


def test_finished_run_is_extended() -> None:
    tekfac("train", *FAST, "--epochs", "1", "--out", "mine")
    result = tekfac("train", "--resume", "mine", "--epochs", "2")
    assert result.exit_code == 0, result.output
    assert "after 2 epochs; run in mine" in result.output
    assert len(rows(Path("mine", runs.METRICS))) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "nothing"], "nothing holds no run: there is no config.json in it"),
        (["--resume", "x", "--lr", "1"], "--lr cannot be changed when a run is resumed"),
        (["--data", "no.npz"], "--data 'no.npz': no such file or folder, and no data set"),
        (["--optimizer", "adagrad"], "--optimizer 'adagrad' is unknown; there is: sgd, adam, kfac"),
        (["--network", "vgg"], "--network 'vgg' is unknown; there is: cnn, mlp"),
        (["--optimizer", "kfac", "--nu", "1"], "--nu does nothing with --optimizer kfac"),
        (["--optimizer", "tkfac", "--scale-every", "2"], "--scale-every does nothing with"),
        (["--lr", "-1"], "-1"),
        (["--first-order-lr", "-1"], "-1"),
        (["--optimizer", "sgd", "--first-order-lr", "1"], "--first-order-lr does nothing with"),
        (["--width", "0"], "--width must be 1 or more, got 0"),
        (["--limit-train", "9999"], "--limit-train 9999 is more than the 1297 training images"),
        (["--data-dir", "x"], "--data-dir is for cifar10, cifar100, svhn, mnist, fashion-mnist"),
        (["--preset", "mine"], "--preset 'mine' is unknown; there is: paper-svhn, paper-cifar10"),
        (["--damping", "0"], "tekfac: damping"),
        (["--fisher", "true"], "'true'"),
        (["--basis-every", "0"], "basis_every"),
        (["--epochs", "0"], "--epochs must be 1 or more, got 0"),
        (["--step-every", "3"], "--step-every and --step-factor do nothing with --schedule const"),
        (["--image-size", "8"], "--image-size is for image folders only"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, workplace: Path) -> None:
    result = (
        tekfac("train", "--device", "cpu", *arguments)
        if "--resume" not in arguments
        else (tekfac("train", *arguments))
    )
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("tekfac: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert os.listdir(workplace) == ["small.npz"]


def test_unwritable_place_is_one_line() -> None:
    Path("file").touch()
    result = tekfac("train", *FAST, "--out", "file/run")
    assert result.exit_code == 1
    assert result.stderr == "tekfac: Not a directory: file/run\n"


def test_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = tekfac("train", *FAST, "--out", "mine")
    assert result.exit_code == 1
    assert result.stderr == "tekfac: No space left on device: mine/config.json\n"


def test_diverging_run(workplace: Path) -> None:
    result = tekfac("train", *FAST, "--lr", "1e30", "--out", "mine")
    assert result.exit_code == 1
    assert " in epoch 1" in result.stderr
    assert "Finished epochs kept in mine: 0" in result.stderr
    assert (workplace / "mine" / runs.CHECKPOINT).exists()


def test_interrupted_run(monkeypatch: pytest.MonkeyPatch) -> None:
    train_epoch = training.Training.run_epoch

    def interrupted(self: training.Training, watcher: training.Watcher) -> EpochMetrics:
        if len(self.history) == 1:
            raise KeyboardInterrupt
        return train_epoch(self, watcher)

    monkeypatch.setattr(training.Training, "run_epoch", interrupted)
    result = tekfac("train", *FAST, "--epochs", "3", "--out", "my run")
    assert result.exit_code == 130
    assert "interrupted; the checkpoint holds 1 of 3 epochs" in result.stderr
    assert "tekfac train --resume 'my run'" in result.stderr
    assert Path("my run", runs.CURVES).exists()


def wait_for(path: Path, lines: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if path.exists() and len(path.read_text().splitlines()) > lines:
            return
        time.sleep(0.02)
    raise TimeoutError(path)


@pytest.mark.slow
def test_signals_to_a_real_process_lose_at_most_the_epoch_in_flight() -> None:
    """Ctrl-C, then SIGKILL, then to the end: the metrics of a run left alone."""
    epochs = ["--epochs", "100000"]
    process = start("train", *FAST, *epochs, "--out", "cut")
    wait_for(Path("cut", runs.METRICS), 2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "tekfac train --resume cut" in errors
    assert "Traceback" not in errors

    done = len(rows(Path("cut", runs.METRICS)))
    process = start("train", "--resume", "cut")
    wait_for(Path("cut", runs.METRICS), done + 2)
    process.kill()
    process.communicate(timeout=60)

    done = len(torch.load(Path("cut", runs.CHECKPOINT), weights_only=True)["history"])
    result = tekfac("train", "--resume", "cut", "--epochs", str(done + 2))
    assert result.exit_code == 0, result.output
    assert tekfac("train", *FAST, "--epochs", str(done + 2), "--out", "whole").exit_code == 0
    cut, whole = (rows(Path(name, runs.METRICS)) for name in ("cut", "whole"))
    for row in (*cut, *whole):
        del row["seconds"]
    assert cut == whole


def test_first_interrupt_waits_and_the_second_does_not() -> None:
    # Ctrl-C as in the foreground, wherever the tests run.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    interruption = Interruption()
    try:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interruption.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_without_the_extra_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "tekfac.cli.app")
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    assert capsys.readouterr().err == (
        "tekfac: the command needs typer, which is not installed: pip install 'tekfac[train]'\n"
    )


@pytest.mark.usefixtures("drawn")
def test_compare_makes_picture_and_table_and_reuses_its_runs() -> None:
    arguments = [*COMPARE, "--optimizers", "sgd,adam", "--seeds", "2", "--target", "0.5"]
    arguments += ["--lr", "sgd=0.02", "--momentum", "0.8", "--out", "both"]
    result = tekfac(*arguments, "--epochs", "2")
    assert result.exit_code == 0, result.output
    assert Path("both", comparison.PICTURE).read_bytes().startswith(b"\x89PNG")
    table = rows(Path("both", comparison.TABLE_CSV))
    assert [(row["optimizer"], row["lr"]) for row in table] == [
        ("SGD", "0.02"),
        ("Adam", f"{METHODS['adam'].defaults['lr']:g}"),
    ]
    assert "epochs to 50 %" in table[0]
    markdown = Path("both", comparison.TABLE_MARKDOWN).read_text().splitlines()
    assert markdown[1] == "|" + " --- |" * 6
    assert markdown[2].startswith("| SGD | 0.02 |")
    config = json.loads(Path("both/sgd-seed1", runs.CONFIG).read_text())
    assert (config["settings"]["momentum"], config["seed"]) == (0.8, 1)

    checkpoints = {path: path.read_bytes() for path in Path("both").glob("*/checkpoint.pt")}
    assert len(checkpoints) == 4
    shutil.rmtree("both/adam-seed1")
    assert tekfac(*arguments, "--epochs", "2").exit_code == 0
    for path, content in checkpoints.items():
        assert path.parent.name == "adam-seed1" or path.read_bytes() == content
    assert tekfac(*arguments, "--epochs", "3").exit_code == 0
    assert len(rows(Path("both/sgd-seed0", runs.METRICS))) == 3


def test_compare_refuses_runs_of_another_configuration() -> None:
    arguments = [*COMPARE, "--optimizers", "sgd", "--seeds", "1", "--epochs", "1", "--out", "a"]
    assert tekfac(*arguments).exit_code == 0
    result = tekfac(*arguments, "--batch-size", "7")
    assert result.exit_code == 2
    assert (
        "a/sgd-seed0 holds a run of another configuration, batch_size 64 instead of 7"
        in result.stderr
    )


def test_compare_reports_runs_that_diverge() -> None:
    arguments = [*COMPARE, "--optimizers", "sgd,adam", "--seeds", "2", "--epochs", "1"]
    result = tekfac(*arguments, "--lr", "sgd=1e30", "--out", "a")
    assert result.exit_code == 0, result.output
    table = rows(Path("a", comparison.TABLE_CSV))
    assert table[0]["test accuracy (%)"] == "diverged"
    assert "±" in table[1]["test accuracy (%)"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizers", "sgd,magic"], "--optimizer 'magic' is unknown"),
        (["--lr", "0.1"], "--lr '0.1' must be NAME=VALUE with a name of sgd, adam"),
        (["--lr", "sgd=fast"], "--lr 'sgd=fast': 'fast' is not a number"),
        (["--lr", "kfac=1", "--optimizers", "sgd"], "must be NAME=VALUE with a name of sgd"),
        (["--nu", "1", "--optimizers", "sgd,kfac"], "--nu does nothing with sgd, kfac"),
        (["--lr", "sgd=-1"], "sgd: "),
    ],
)
def test_bad_comparisons(arguments: list[str], message: str, workplace: Path) -> None:
    result = tekfac(*COMPARE, *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert os.listdir(workplace) == ["small.npz"]


def test_compare_leaves_a_users_files_alone() -> None:
    Path("mine").mkdir()
    Path("mine", comparison.TABLE_CSV).write_text("precious")
    result = tekfac(*COMPARE, "--out", "mine")
    assert result.exit_code == 2
    assert "mine holds compare.csv but no runs of a comparison" in result.stderr


def history(accuracies: list[float]) -> list[EpochMetrics]:
    return [
        EpochMetrics(i, 1.0 / i, a, 1.0 / i, a, 0.1, 2.0 * i)
        for i, a in enumerate(accuracies, start=1)
    ]


def test_table_counts_the_seeds_that_reach_the_target() -> None:
    some = comparison.Outcome("sgd", 0.1, [history([0.5, 0.9, 0.8]), history([0.1, 0.2, 0.6])], 1)
    none = comparison.Outcome("adam", 0.01, [history([0.5])], 0)
    _, (first, second) = comparison.table([some, none], target=0.85)
    assert first == ["SGD", "0.1", "70.00 ± 14.14 (1 of 3 diverged)", "2.0 (1 of 3)", "6.0", "2.00"]
    assert second == ["Adam", "0.01", "50.00", "not reached", "2.0", "2.00"]


def test_comparison_figure_has_both_axes_and_every_method() -> None:
    figure = plots.comparison_figure(
        {"SGD": [history([0.5, 0.9]), history([0.6, 0.8])], "Adam": [], "TEKFAC": [history([0.9])]},
        "digits",
        target=0.97,
    )
    labels = [(axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes]
    assert labels == [
        ("", "test accuracy (%)"),
        ("", ""),
        ("epochs", "training loss (nats)"),
        ("training time (seconds)", ""),
    ]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [
        "SGD",
        "TEKFAC",
    ]
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [55, 85])
    np.testing.assert_allclose(figure.axes[1].lines[0].get_xdata(), [2, 4])
    assert figure.axes[0].get_ylim()[0] < 55


def test_comparison_figure_is_drawn_when_all_runs_diverged_or_fail() -> None:
    plots.comparison_figure({"SGD": []}, "digits", target=1.0)
    figure = plots.comparison_figure({"SGD": [history([0.1, 0.2])]}, "digits", target=1.0)
    low, high = figure.axes[0].get_ylim()
    assert low < 10
    assert high > 20


def test_comparison_figure_shows_the_end_of_good_runs_large() -> None:
    figure = plots.comparison_figure({"SGD": [history([0.1, 0.5, 0.98])]}, "digits", target=0.97)
    assert 85 < figure.axes[0].get_ylim()[0] < 90


def test_help_does_not_wait_for_what_reads_data() -> None:
    """Torchvision and scikit-learn take seconds to import."""
    said = "import sys, tekfac.cli.app; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", said], capture_output=True, text=True, check=True, timeout=120
    )
    assert not {"torchvision", "sklearn", "torch._dynamo"} & set(done.stdout.split())
