"""Runs: repeatable, resumable to the bit, and safe on disk."""

from __future__ import annotations

import csv
import importlib.util
import math
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import tekfac
from command import assert_identical
from tekfac import networks
from tekfac.data import Dataset, load
from tekfac.errors import Diverged, InputError
from tekfac.runs import folder as runs
from tekfac.runs import optimizers
from tekfac.runs.config import Config
from tekfac.runs.files import write_atomically
from tekfac.runs.folder import RunFolder
from tekfac.runs.metrics import EpochMetrics, epochs_to
from tekfac.runs.schedules import Schedule
from tekfac.runs.training import BatchProgress, Training, Watcher, evaluate, fit
from tekfac.searches import grids

# Intervals that divide neither an epoch's 4 batches nor one another.
INTERVALS = {"factor_every": 3, "basis_every": 5}
SETTINGS: dict[str, dict[str, Any]] = {
    "sgd": {"nesterov": True, "weight_decay": 1e-3},
    "adam": {"weight_decay": 1e-3},
    "kfac": {"relative_damping": 0.3, "nesterov": True, **INTERVALS},
    "ekfac": {"damping": 0.3, "scale_every": 2, **INTERVALS},
    "tkfac": {"lr": 1e-3, "nu": 10.0, **INTERVALS},
    "tekfac": {"lr": 1e-3, "nu": 10.0, "scale_every": 2, **INTERVALS},
}


@pytest.fixture(scope="module")
def data() -> Dataset:
    digits = load("digits")
    return replace(
        digits,
        x_train=digits.x_train[:150],
        y_train=digits.y_train[:150],
        x_test=digits.x_test[:100],
        y_test=digits.y_test[:100],
    )


@pytest.fixture(autouse=True)
def network_with_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    def small(image_shape: tuple[int, int, int], classes: int, width: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, width, 3, stride=2),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(9 * width, classes),
        )

    monkeypatch.setitem(networks.NETWORKS, "small", networks.Network(small, width=4))


def configure(**changes: Any) -> Config:
    optimizer = changes.get("optimizer", "sgd")
    settings = SETTINGS.get(optimizer, {})
    defaults = {"network": "small", "epochs": 3, "batch_size": 40}
    return Config(**{**defaults, "optimizer": optimizer, "settings": settings, **changes})


class InterruptedAt(Watcher):
    """Presses Ctrl-C after a batch."""

    def __init__(self, epoch: int, batch: int) -> None:
        self._at = (epoch, batch)

    def on_batch(self, progress: BatchProgress) -> None:
        if (progress.epoch, progress.batch) == self._at:
            raise KeyboardInterrupt


class Epochs(Watcher):
    """Remembers which epochs were trained."""

    def __init__(self) -> None:
        self.trained: list[int] = []

    def on_epoch(self, metrics: EpochMetrics) -> None:
        self.trained.append(metrics.epoch)


def run(path: Path, config: Config, data: Dataset, watcher: Watcher | None = None) -> None:
    with RunFolder.create(path, config) as folder:
        fit(folder, data, watcher or Watcher())


def resume(path: Path, data: Dataset, watcher: Watcher | None = None, **options: Any) -> None:
    # Whatever else has used the global generator must not matter.
    torch.manual_seed(12345)
    with RunFolder.open(path) as folder:
        fit(folder, data, watcher or Watcher(), **options)


def numbers(path: Path) -> list[dict[str, str]]:
    """All of metrics.csv but the seconds."""
    with open(path / runs.METRICS, newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert float(row.pop("seconds")) > 0
    return rows


def checkpoint(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path / runs.CHECKPOINT, weights_only=True)
    return state


def assert_same_run(one: Path, other: Path) -> None:
    assert numbers(one) == numbers(other)
    expected, actual = checkpoint(one), checkpoint(other)
    for part in (
        "network",
        "optimizer",
        "scheduler",
        "order_rng",
        "augmentation_rng",
        "torch_rng",
    ):
        assert_identical(expected[part], actual[part])


@pytest.mark.parametrize("optimizer", optimizers.METHODS)
def test_run_interrupted_in_mid_epoch_continues_exactly(
    tmp_path: Path, data: Dataset, optimizer: str
) -> None:
    config = configure(optimizer=optimizer)
    run(tmp_path / "whole", config, data)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", config, data, InterruptedAt(epoch=2, batch=3))
    assert len(numbers(tmp_path / "parts")) == 1
    watcher = Epochs()
    resume(tmp_path / "parts", data, watcher)
    assert watcher.trained == [2, 3]
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_augmented_run_continues_exactly_and_is_another_run(tmp_path: Path, data: Dataset) -> None:
    config = configure(optimizer="tekfac", augment=True)
    run(tmp_path / "whole", config, data)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", config, data, InterruptedAt(epoch=2, batch=3))
    resume(tmp_path / "parts", data)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    run(tmp_path / "plain", configure(optimizer="tekfac"), data)
    assert numbers(tmp_path / "plain") != numbers(tmp_path / "whole")


@pytest.mark.parametrize(
    ("width", "layout"), [(8, torch.channels_last), (3, torch.contiguous_format)]
)
@pytest.mark.parametrize("optimizer", ["sgd", "tekfac"])
def test_colour_images_and_kernels_lie_alike_and_runs_continue_exactly(
    tmp_path: Path, optimizer: str, width: int, layout: torch.memory_format
) -> None:
    """Channels last, but for numbers of channels with which torch ends the process."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (60, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(60) % 5
    mean, deviation = torch.full((3, 1, 1), 127.0), torch.full((3, 1, 1), 70.0)
    colour = Dataset("colour", images, labels, images[:20], labels[:20], 5, mean, deviation)
    config = configure(
        optimizer=optimizer, network="resnet20", width=width, batch_size=20, epochs=2, augment=True
    )
    training = Training(config, colour)
    seen: list[bool] = []

    def note(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        for tensor in (module.get_parameter("weight"), *inputs):
            seen.append(tensor.is_contiguous(memory_format=layout))

    for module in training.network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(note)
    training.run_epoch(Watcher())
    assert seen
    assert all(seen)

    run(tmp_path / "whole", config, colour)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", config, colour, InterruptedAt(epoch=2, batch=2))
    resume(tmp_path / "parts", colour)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["sgd", "tekfac"])
def test_run_in_16_bits_is_near_the_run_in_float32_and_continues_exactly(
    tmp_path: Path, data: Dataset, optimizer: str, precision: str
) -> None:
    config = configure(optimizer=optimizer, precision=precision)
    run(tmp_path / "whole", config, data)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", config, data, InterruptedAt(epoch=2, batch=3))
    resume(tmp_path / "parts", data)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    run(tmp_path / "fine", configure(optimizer=optimizer), data)
    coarse, fine = numbers(tmp_path / "whole")[0], numbers(tmp_path / "fine")[0]
    assert coarse != fine
    assert float(coarse["train_loss"]) == pytest.approx(float(fine["train_loss"]), rel=0.05)
    parameters = checkpoint(tmp_path / "whole")["network"].values()
    assert {p.dtype for p in parameters if p.is_floating_point()} == {torch.float32}


def test_loss_is_scaled_in_float16_alone(tmp_path: Path, data: Dataset) -> None:
    scales = {}
    for precision in ("fp32", "bf16", "fp16"):
        run(tmp_path / precision, configure(precision=precision, epochs=1), data)
        scales[precision] = checkpoint(tmp_path / precision)["scaler"].get("scale", 1)
    assert scales["fp32"] == scales["bf16"] == 1
    assert scales["fp16"] > 1000


def test_steps_with_infinite_gradients_are_skipped_in_float16(
    data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(configure(precision="fp16"), data)
    training._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    before = {name: each.clone() for name, each in training.network.named_parameters()}
    with pytest.warns(UserWarning, match="lr_scheduler"):
        training.run_epoch(Watcher())
    assert training._scaler.get_scale() == 2.0**96
    assert_identical(before, dict(training.network.named_parameters()))


def test_machine_without_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*arguments: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not implemented for 'Half'\nmore")

    monkeypatch.setattr(torch, "conv2d", refusing)
    message = (
        "--precision fp16: torch cannot train in it on cpu of this machine (not implemented for "
        "'Half'); use --device cuda, or --precision bf16 or fp32"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        configure(precision="fp16")


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_run_is_near_the_other_and_continues_exactly(
    tmp_path: Path, data: Dataset, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("it needs a C++ compiler")
    original, calls = torch.compile, []

    def compiled(module: nn.Module, dynamic: bool) -> Any:
        calls.append(module)
        return original(module, dynamic=dynamic, backend=backend)

    monkeypatch.setattr(torch, "compile", compiled)
    torch._dynamo.reset()
    config = configure(compile=True)
    run(tmp_path / "whole", config, data)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", config, data, InterruptedAt(epoch=2, batch=3))
    torch._dynamo.reset()  # as a new process
    resume(tmp_path / "parts", data)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert len(calls) == 3
    run(tmp_path / "plain", configure(), data)
    found, plain = (numbers(tmp_path / name)[0] for name in ("whole", "plain"))
    assert float(found["train_loss"]) == pytest.approx(float(plain["train_loss"]), rel=0.2)
    assert checkpoint(tmp_path / "whole")["network"].keys() == (
        checkpoint(tmp_path / "plain")["network"].keys()
    )


def test_network_that_cannot_be_compiled(
    tmp_path: Path, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> None:
        raise RuntimeError("no compiler\nmore")

    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, dynamic: original(module, backend=failing))
    with pytest.raises(InputError, match=r"--compile: torch cannot compile small here \(.*no com"):
        # A natural-gradient optimizer's first steps run as if nothing was compiled.
        run(tmp_path, configure(compile=True, optimizer="sgd", settings={}), data)
    torch._dynamo.reset()


def events(path: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run."""
    accumulator = EventAccumulator(str(path / runs.EVENTS)).Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


def test_tensorboard_shows_all_epochs_once(
    tmp_path: Path, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(tensorboard=True)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, config, data, InterruptedAt(epoch=2, batch=3))
    save_events = RunFolder.save_events

    def killed(folder: RunFolder, history: list[EpochMetrics]) -> None:
        if len(history) == 3:
            raise KeyboardInterrupt
        save_events(folder, history)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_events", killed)
        with pytest.raises(KeyboardInterrupt):
            resume(tmp_path, data)
    assert [step for step, _ in events(tmp_path)["loss/test"]] == [1, 2]
    resume(tmp_path, data)
    shown = events(tmp_path)
    for tag, column in (
        ("loss/train", "train_loss"),
        ("loss/test", "test_loss"),
        ("accuracy/train", "train_accuracy"),
        ("accuracy/test", "test_accuracy"),
        ("learning rate", "lr"),
    ):
        assert [step for step, _ in shown[tag]] == [1, 2, 3]
        expected = [float(row[column]) for row in numbers(tmp_path)]
        assert [value for _, value in shown[tag]] == pytest.approx(expected)
    files = sorted((tmp_path / runs.EVENTS).iterdir())
    resume(tmp_path, data)
    assert sorted((tmp_path / runs.EVENTS).iterdir()) == files


def test_run_without_tensorboard_has_no_event_files(tmp_path: Path, data: Dataset) -> None:
    run(tmp_path, configure(epochs=1), data)
    assert not (tmp_path / runs.EVENTS).exists()


def test_tensorboard_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = "--tensorboard: the package tensorboard is not installed: pip install 'tekfac[tensor"
    with pytest.raises(InputError, match=re.escape(message)):
        configure(tensorboard=True)


def test_outputs_in_bfloat16_are_counted_exactly() -> None:
    images, labels = torch.zeros(999, 1, 1, 2), torch.ones(999, dtype=torch.int64)
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    nn.init.zeros_(network[1].weight)
    network[1].bias.data = torch.tensor([0.0, 1.0])
    zero, one = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        _, accuracy = evaluate(network, Dataset("x", images, labels, images, labels, 2, zero, one))
    assert accuracy == 1.0


def test_run_interrupted_in_its_first_epoch_starts_again(tmp_path: Path, data: Dataset) -> None:
    run(tmp_path / "whole", configure(), data)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", configure(), data, InterruptedAt(epoch=1, batch=2))
    assert not (tmp_path / "parts" / runs.CURVES).exists()
    resume(tmp_path / "parts", data)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_run_killed_before_its_first_checkpoint_starts_again(tmp_path: Path, data: Dataset) -> None:
    run(tmp_path / "whole", configure(), data)
    RunFolder.create(tmp_path / "parts", configure()).close()
    resume(tmp_path / "parts", data)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_crash_between_checkpoint_and_metrics_loses_nothing(
    tmp_path: Path, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole", configure(), data)
    save_metrics = RunFolder.save_metrics

    def crash(folder: RunFolder, history: list[EpochMetrics]) -> None:
        if len(history) == 3:
            raise KeyboardInterrupt
        save_metrics(folder, history)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_metrics", crash)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts", configure(), data)
    assert len(numbers(tmp_path / "parts")) == 2
    watcher = Epochs()
    resume(tmp_path / "parts", data, watcher)
    assert watcher.trained == []
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_seed_fixes_the_run_and_another_seed_changes_it(tmp_path: Path, data: Dataset) -> None:
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        run(tmp_path / name, configure(optimizer="tekfac", seed=seed), data)
    assert_same_run(tmp_path / "one", tmp_path / "again")
    assert numbers(tmp_path / "one") != numbers(tmp_path / "other")


def test_methods_start_from_the_same_weights_in_the_same_order(
    tmp_path: Path, data: Dataset
) -> None:
    starts = []
    for optimizer in ("adam", "tekfac"):
        path = tmp_path / optimizer
        with pytest.raises(KeyboardInterrupt):
            run(path, configure(optimizer=optimizer), data, InterruptedAt(1, 1))
        starts.append(checkpoint(path))
    assert_identical(starts[0]["network"], starts[1]["network"])
    assert_identical(starts[0]["order_rng"], starts[1]["order_rng"])


def test_finished_run_is_left_as_it_is(tmp_path: Path, data: Dataset) -> None:
    run(tmp_path, configure(), data)
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in tmp_path.iterdir()}
    assert {file.name for file in before} >= {
        runs.CONFIG,
        runs.METRICS,
        runs.CURVES,
        runs.CHECKPOINT,
    }
    watcher = Epochs()
    resume(tmp_path, data, watcher)
    assert watcher.trained == []
    assert before == {
        file: (file.stat().st_mtime_ns, file.read_bytes()) for file in tmp_path.iterdir()
    }


def test_run_is_extended_where_its_schedule_allows(tmp_path: Path, data: Dataset) -> None:
    run(tmp_path / "long", configure(epochs=4), data)
    run(tmp_path / "extended", configure(epochs=2), data)
    resume(tmp_path / "extended", data, epochs=4)
    assert_same_run(tmp_path / "long", tmp_path / "extended")
    with pytest.raises(InputError, match="has done 4 epochs already, more than 3"):
        resume(tmp_path / "extended", data, epochs=3)


def test_cosine_run_cannot_be_extended(tmp_path: Path, data: Dataset) -> None:
    run(tmp_path, configure(epochs=2, schedule=Schedule("cosine")), data)
    with pytest.raises(InputError, match="a cosine schedule over 2 epochs, which cannot become 3"):
        resume(tmp_path, data, epochs=3)
    with RunFolder.open(tmp_path) as folder:
        assert folder.config.epochs == 2


def test_diverging_run_stops_and_keeps_its_checkpoint(tmp_path: Path, data: Dataset) -> None:
    config = configure(settings={"lr": 1e30})
    with pytest.raises(Diverged, match=r"the (training|test) loss became (nan|inf) in epoch 1"):
        run(tmp_path, config, data)
    state = checkpoint(tmp_path)
    assert state["history"] == []
    assert all(torch.isfinite(value).all() for value in state["network"].values())


def test_changed_data_are_refused(tmp_path: Path, data: Dataset) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, configure(), data, InterruptedAt(2, 1))
    with pytest.raises(InputError, match="the data digits are not those that the run in"):
        resume(tmp_path, replace(data, y_test=data.y_test.flip(0)))


@pytest.mark.parametrize("content", [b"", b"no checkpoint"])
def test_damaged_checkpoint(tmp_path: Path, data: Dataset, content: bytes) -> None:
    run(tmp_path, configure(epochs=1), data)
    (tmp_path / runs.CHECKPOINT).write_bytes(content)
    with pytest.raises(InputError, match=r"checkpoint\.pt cannot be read, it is damaged"):
        resume(tmp_path, data)


def test_truncated_checkpoint(tmp_path: Path, data: Dataset) -> None:
    run(tmp_path, configure(epochs=1), data)
    path = tmp_path / runs.CHECKPOINT
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(InputError, match=r"checkpoint\.pt cannot be read, it is damaged"):
        resume(tmp_path, data)


def test_checkpoint_of_something_else(tmp_path: Path, data: Dataset) -> None:
    run(tmp_path, configure(epochs=1), data)
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / runs.CHECKPOINT)
    with pytest.raises(InputError, match=r"checkpoint\.pt is not a run's checkpoint"):
        resume(tmp_path, data)


def test_checkpoint_that_does_not_fit_the_configuration(tmp_path: Path, data: Dataset) -> None:
    run(tmp_path, configure(epochs=1), data)
    config = tmp_path / runs.CONFIG
    config.write_text(
        config.read_text().replace('"small"', '"mlp"').replace('"epochs": 1', '"epochs": 2')
    )
    with pytest.raises(InputError, match="does not fit its configuration"):
        resume(tmp_path, data)


def test_missing_checkpoint_is_not_taken_for_a_new_run(tmp_path: Path, data: Dataset) -> None:
    run(tmp_path, configure(epochs=1), data)
    (tmp_path / runs.CHECKPOINT).unlink()
    with pytest.raises(InputError, match=r"has metrics\.csv but no checkpoint\.pt"):
        resume(tmp_path, data)


def test_run_folder_is_never_overwritten(tmp_path: Path, data: Dataset) -> None:
    run(tmp_path, configure(epochs=1), data)
    before = checkpoint(tmp_path)
    message = re.escape(f"{tmp_path} already holds a run (config.json), which is never overwritten")
    with pytest.raises(InputError, match=message):
        RunFolder.create(tmp_path, configure(epochs=1, seed=1))
    assert_identical(before, checkpoint(tmp_path))


@pytest.mark.parametrize("name", [runs.METRICS, runs.CURVES, runs.CHECKPOINT, runs.EVENTS])
def test_folder_with_a_file_of_a_runs_name_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=re.escape(f"already holds a run ({name})")):
        RunFolder.create(tmp_path, configure())
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_numbered_siblings(tmp_path: Path) -> None:
    made = []
    for _ in range(3):
        with RunFolder.create_numbered(tmp_path / "runs" / "a", configure()) as folder:
            made.append(folder.path.name)
    assert made == ["a", "a-2", "a-3"]


def test_second_process_is_kept_out(tmp_path: Path) -> None:
    with (
        RunFolder.create(tmp_path, configure()),
        pytest.raises(InputError, match="another process is at work in"),
    ):
        RunFolder.open(tmp_path)
    RunFolder.open(tmp_path).close()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config\.json is not valid JSON"),
        ("[]", r"config\.json is not a run's configuration"),
        ("{}", r"config\.json: not a run's configuration: 'schedule'"),
        ('{"schedule": {}, "colour": 1}', r"config\.json: not a run's configuration: .*colour"),
        ('{"schedule": {}, "network": "x"}', r"config\.json: --network 'x' is unknown"),
    ],
)
def test_bad_configuration_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / runs.CONFIG).write_text(text)
    with pytest.raises(InputError, match=message):
        RunFolder.open(tmp_path)


def test_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no run: there is no config\.json in it"):
        RunFolder.open(tmp_path)


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full_disk(file: Any) -> None:
        file.write(b"half of the ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left on device") as caught:
        write_atomically(path, full_disk)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_what_is_not_given_is_recorded_as_what_it_becomes(tmp_path: Path) -> None:
    config = Config(data="cifar100", network="resnet20")
    assert (config.augment, config.width) == (True, 64)
    assert config.data_dir == str(Path("data").resolve())
    assert Config(data="cifar100", augment=False).augment is False
    config = Config(data="svhn", network="vgg16", data_dir=str(tmp_path))
    assert (config.augment, config.width, config.data_dir) == (False, 64, str(tmp_path))
    config = Config()
    assert (config.augment, config.width, config.data_dir) == (False, 16, None)


def test_limited_run_has_the_first_training_images() -> None:
    whole, limited = Config().load_data(), Config(limit_train=100).load_data()
    assert torch.equal(limited.x_train, whole.x_train[:100])
    assert torch.equal(limited.y_train, whole.y_train[:100])
    for part in ("x_test", "y_test", "mean", "deviation"):
        assert torch.equal(getattr(limited, part), getattr(whole, part))
    with pytest.raises(
        InputError, match="--limit-train 1298 is more than the 1297 training images of digits"
    ):
        Config(limit_train=1298).load_data()


def test_configuration_survives_json() -> None:
    config = configure(optimizer="tekfac", schedule=Schedule("step", 1.5, 7, 0.3))
    assert Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "--epochs must be 1 or more, got 0"),
        ({"batch_size": -1}, "--batch-size must be 1 or more, got -1"),
        ({"network": "net"}, "--network 'net' is unknown; there is: cnn, mlp"),
        ({"width": 0}, "--width must be 1 or more, got 0"),
        ({"limit_train": 0}, "--limit-train must be 1 or more, got 0"),
        ({"hold_out": 0}, "--hold-out must be 1 or more, got 0"),
        ({"data_dir": "here"}, "--data-dir is for cifar10, cifar100, svhn, mnist, fashion-mnist; "),
        ({"optimizer": "adagrad"}, "--optimizer 'adagrad' is unknown; there is: sgd, adam"),
        ({"precision": "fp8"}, "--precision 'fp8' is unknown; there is: fp32, bf16, fp16"),
        (
            {"precision": "fp16", "optimizer": "tekfac", "settings": {"fisher": "empirical"}},
            "--precision fp16 scales the loss, and --fisher empirical would measure the scaled one",
        ),
        ({"device": "abacus"}, "--device 'abacus' is no device of torch"),
        (
            {"settings": {"scale_every": 3}},
            "--scale-every does nothing with --optimizer sgd, whose settings are: --lr, --momentum",
        ),
        ({"settings": {"lr": math.nan}}, "--lr must be finite, got nan"),
        (
            {"optimizer": "tekfac", "settings": {"nu": 1.0, "damping": 1.0}},
            "--nu takes the place of --damping: give one",
        ),
        (
            {"optimizer": "tekfac", "settings": {"nu": 1.0, "factored_damping": 1.0}},
            "--nu takes the place of --factored-damping: give one",
        ),
        (
            {"optimizer": "ekfac", "settings": {"damping": 1.0, "factored_damping": 1.0}},
            "--factored-damping takes the place of --damping: give one",
        ),
        (
            {"optimizer": "tkfac", "settings": {"factored_damping": 1.0}},
            "--factored-damping does nothing with --optimizer tkfac",
        ),
    ],
)
def test_bad_configuration(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        configure(**changes)


def test_optimizers_own_objections_name_it(data: Dataset) -> None:
    network = networks.build("mlp", data.image_shape, data.classes)
    for name in optimizers.METHODS:
        settings = optimizers.resolve(name, {"lr": -1.0})
        with pytest.raises(InputError, match=f"^{name}: .*-1"):
            optimizers.build(name, network, settings, torch.Generator())


def test_trace_damping_takes_the_place_of_constant_damping() -> None:
    settings = optimizers.resolve("tekfac", {"nu": 0.1})
    assert settings["nu"] == 0.1
    assert "damping" not in settings


def test_rules_take_the_place_of_the_other_kinds_of_damping(data: Dataset) -> None:
    network = networks.build("mlp", data.image_shape, data.classes)
    for name in ("ekfac", "tekfac"):
        settings = optimizers.resolve(name, {"factored_damping": 0.1})
        optimizer = optimizers.build(name, network, settings, torch.Generator())
        assert optimizer.param_groups[0]["damping"] == tekfac.FactoredDamping(0.1)
    for name in ("kfac", "ekfac", "tkfac", "tekfac"):
        settings = optimizers.resolve(name, {"relative_damping": 0.1})
        optimizer = optimizers.build(name, network, settings, torch.Generator())
        assert optimizer.param_groups[0]["damping"] == tekfac.RelativeDamping(0.1)
    for setting in ("factored_damping", "relative_damping"):
        assert grids.paper_grid("tekfac", {setting: 0.1}).keys() == {"lr"}


def test_nesterov(data: Dataset) -> None:
    network = networks.build("mlp", data.image_shape, data.classes)
    for name in ("sgd", "kfac", "ekfac", "tkfac", "tekfac"):
        for nesterov in (True, False):
            settings = optimizers.resolve(name, {"nesterov": nesterov})
            optimizer = optimizers.build(name, network, settings, torch.Generator())
            assert optimizer.param_groups[0]["nesterov"] is nesterov
    settings = optimizers.resolve("sgd", {"nesterov": True, "momentum": 0.0})
    with pytest.raises(InputError, match=r"^sgd: Nesterov"):
        optimizers.build("sgd", network, settings, torch.Generator())
    grid = grids.read_grid(["nesterov=true,false,true"], "sgd")
    assert grid == {"nesterov": [True, False]}
    with pytest.raises(InputError, match="values of type bool"):
        grids.read_grid(["nesterov=1"], "sgd")


def test_scale_of_fully_connected_layers(data: Dataset) -> None:
    network = networks.build("mlp", data.image_shape, data.classes)
    for name in ("tkfac", "tekfac"):
        for given, expected in ({}, "auto"), ({"fc_scale": "auto"}, "auto"), ({"fc_scale": 4.0}, 4):
            settings = optimizers.resolve(name, given)
            optimizer = optimizers.build(name, network, settings, torch.Generator())
            assert optimizer.fc_scale == expected
        settings = optimizers.resolve(name, {"fc_scale": "steep"})
        with pytest.raises(InputError, match=f"^{name}: fc_scale must be .* got 'steep'$"):
            optimizers.build(name, network, settings, torch.Generator())


def test_schedules() -> None:
    def factors(schedule: Schedule, epochs: int) -> list[float]:
        return [schedule.factor(step, 2, epochs) for step in range(2 * epochs)]

    assert factors(Schedule(), 2) == [1, 1, 1, 1]
    assert factors(Schedule(warmup=1.5), 2) == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert factors(Schedule("step", step_every=1, step_factor=0.5), 3) == [
        1,
        1,
        0.5,
        0.5,
        0.25,
        0.25,
    ]
    cosine = factors(Schedule("cosine"), 2)
    assert cosine == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "linear"}, "--schedule 'linear' is unknown; there is: constant, cosine, step"),
        ({"warmup": -1.0}, "--warmup must be 0 or more epochs, got -1.0"),
        ({"step_every": 3}, "--step-every and --step-factor do nothing with --schedule constant"),
        ({"name": "step", "step_every": 0}, "--step-every must be 1 epoch or more, got 0"),
        ({"name": "step", "step_factor": 2.0}, "--step-factor must be above 0 and at most 1"),
    ],
)
def test_bad_schedules(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Schedule(**values)


def test_schedule_reaches_the_optimizer_and_the_metrics(tmp_path: Path, data: Dataset) -> None:
    schedule = Schedule("step", step_every=1, step_factor=0.5)
    run(tmp_path, configure(settings={"lr": 0.08}, schedule=schedule), data)
    assert [float(row["lr"]) for row in numbers(tmp_path)] == pytest.approx([0.08, 0.04, 0.02])


def test_evaluation_is_in_evaluation_mode_over_all_test_images_standardised() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3), nn.Dropout(0.9), nn.Linear(3, 4))
    images, labels = torch.randint(256, (1234, 1, 1, 3)).byte(), torch.randint(4, (1234,))
    mean, deviation = torch.full((1, 1, 1), 127.0), torch.full((1, 1, 1), 60.0)
    data = Dataset("x", images[:2], labels[:2], images, labels, 4, mean, deviation)
    loss, accuracy = evaluate(network, data)
    logits = network[3](network[1](((images.float() - 127) / 60).flatten(1)))
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert accuracy == (logits.argmax(1) == labels).double().mean().item()
    assert network[1].num_batches_tracked == 0


def test_epochs_to_a_target() -> None:
    row = EpochMetrics(1, 0.0, 0.0, 0.0, 0.5, 0.1, 1.0)
    history = [row, replace(row, epoch=2, test_accuracy=0.97), replace(row, epoch=3)]
    assert epochs_to(history, 0.97) == 2
    assert epochs_to(history, 0.98) is None
    assert list(asdict(row)) == [
        "epoch",
        "train_loss",
        "train_accuracy",
        "test_loss",
        "test_accuracy",
        "lr",
        "seconds",
    ]


def test_first_order_lr_is_that_of_parameters_without_curvature(data: Dataset) -> None:
    network = networks.build("small", data.image_shape, data.classes)
    settings = optimizers.resolve("tekfac", {"lr": 0.5, "first_order_lr": 0.02})
    optimizer = optimizers.build("tekfac", network, settings, torch.Generator())
    [group] = optimizer.param_groups
    assert (group["lr"], group["first_order"]["lr"]) == (0.5, 0.02)
