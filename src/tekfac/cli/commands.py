"""The commands of ``tekfac``: options in, text and progress out."""

from __future__ import annotations

import shlex
import signal
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column, Table

from tekfac.cli import option_files as options
from tekfac.data import DATA_DIR, NAMED, Dataset, augments, load
from tekfac.data.downloads import DOWNLOADS
from tekfac.errors import Diverged, InputError
from tekfac.networks import NETWORKS
from tekfac.paper import presets, reports, theorem31
from tekfac.paper.costs import HOW_ESTIMATED
from tekfac.paper.experiments import Experiment, table_3, table_4
from tekfac.paper.presets import PRESETS, Preset
from tekfac.paper.reproduction import Reproduction
from tekfac.paper.scales import OPTIMIZERS, SCALES, Scale
from tekfac.runs import comparison
from tekfac.runs.config import PRECISIONS, Config, default_device, default_threads
from tekfac.runs.folder import RunFolder
from tekfac.runs.metrics import EpochMetrics, History
from tekfac.runs.optimizers import METHODS, STANDARD, has_setting
from tekfac.runs.schedules import SCHEDULES, Schedule
from tekfac.runs.training import BatchProgress, Watcher, check, fit
from tekfac.searches.grids import Grid, paper_grid, read_grid
from tekfac.searches.plan import HELD_OUT_FRACTION, Plan
from tekfac.searches.search import Search
from tekfac.searches.trials import Result

if TYPE_CHECKING:
    from typing_extensions import Self

RUNS = Path("runs")


class Target(str, Enum):
    """What `reproduce` knows."""

    TABLE3 = "table3"
    FIGURE3 = "figure3"
    TABLE4 = "table4"
    FIGURE4 = "figure4"
    THEOREM31 = "theorem31"


BAD_INPUT, FAILURE, INTERRUPTED = 2, 1, 130

app = typer.Typer(
    help="Train networks on images with natural-gradient optimizers, and compare them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(highlight=False, markup=False)

TASK, METHOD = "Task", "Optimizer (where the method has the setting)"


def _take_options_from(context: typer.Context, path: Path | None) -> None:
    """Let a file's options be defaults of this command, below what is on the command line.

    Nothing remains of the option itself: what it stands for is among the other options now.
    """
    if path is None:
        return
    parameters = {each.name: each for each in context.command.params if each.name != "config_file"}
    repeatable = {name for name, each in parameters.items() if getattr(each, "multiple", False)}
    with _plain_errors():
        context.default_map = options.read(path, parameters.keys(), repeatable)


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE.yaml",
        callback=_take_options_from,
        is_eager=True,
        help="Take options from a file with a line `option: value` for each; those on the command "
        "line take precedence.",
    ),
]
PresetName = Annotated[
    str | None,
    typer.Option(
        help=f"{', '.join(PRESETS)}: the paper's protocol. Batches of 128, momentum 0.9, no weight "
        "decay, lr × 0.1 every 20 (SVHN) or 40 epochs, 60 or 120 epochs in all (our choice: the "
        "paper does not say), resnet20 (or give --network vgg16). Learning rate and damping, which "
        "the paper searches, are not part of it. All other options take precedence.",
        rich_help_panel=TASK,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        help=f"{', '.join(NAMED)}, an .npz file (x_train, y_train, x_test, y_test), or a folder "
        f"of pictures. (default: {Config.data})",
        rich_help_panel=TASK,
    ),
]
ImageSize = Annotated[
    int | None,
    typer.Option(
        help="Pixels to which an image folder's pictures are resized. (default: 32)",
        rich_help_panel=TASK,
    ),
]
DataDir = Annotated[
    str | None,
    typer.Option(
        help=f"Folder of {', '.join(DOWNLOADS)}, which are downloaded into it if they are not "
        f"there. (default: {DATA_DIR})",
        rich_help_panel=TASK,
    ),
]
LimitTrain = Annotated[
    int | None,
    typer.Option(help="Train on the first so many images only.", rich_help_panel=TASK),
]
HoldOut = Annotated[
    int | None,
    typer.Option(
        help="Do not train on so many of the training images, and test on them in place of the "
        "test images.",
        rich_help_panel=TASK,
    ),
]
Augment = Annotated[
    bool | None,
    typer.Option(
        "--augment/--no-augment",
        help="Train on random crops (4 pixels of padding) and horizontal flips. (default: as the "
        f"paper, for {' and '.join(name for name, each in DOWNLOADS.items() if each.augment)})",
        rich_help_panel=TASK,
    ),
]
Network = Annotated[
    str | None,
    typer.Option(help=f"{', '.join(NETWORKS)}. (default: {Config.network})", rich_help_panel=TASK),
]
Width = Annotated[
    int | None,
    typer.Option(
        help="Channels of the network's first convolutions, or an mlp's hidden units; deeper ones "
        "are in proportion. (default: "
        f"{', '.join(f'{network.width} for {name}' for name, network in NETWORKS.items())})",
        rich_help_panel=TASK,
    ),
]
Epochs = Annotated[
    int | None, typer.Option(help=f"(default: {Config.epochs})", rich_help_panel=TASK)
]
BatchSize = Annotated[
    int | None, typer.Option(help=f"(default: {Config.batch_size})", rich_help_panel=TASK)
]
ScheduleName = Annotated[
    str | None,
    typer.Option(
        help=f"Learning rate over time: {', '.join(SCHEDULES)}. (default: constant)",
        rich_help_panel=TASK,
    ),
]
Warmup = Annotated[
    float | None,
    typer.Option(help="Epochs of linear warm-up. (default: 0)", rich_help_panel=TASK),
]
StepEvery = Annotated[
    int | None,
    typer.Option(
        help="Epochs between steps of --schedule step. (default: 20)", rich_help_panel=TASK
    ),
]
StepFactor = Annotated[
    float | None,
    typer.Option(help="Factor of each such step. (default: 0.1)", rich_help_panel=TASK),
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, ... (default: cuda if there is one)", rich_help_panel=TASK),
]
Precision = Annotated[
    str | None,
    typer.Option(
        help=f"{', '.join(PRECISIONS)}: what layers compute in; parameters are float32 in any "
        f"case, and fp16 has its loss scaled. (default: {Config.precision})",
        rich_help_panel=TASK,
    ),
]
Compile = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile",
        help="Train with torch.compile's form of the network. (default: no)",
        rich_help_panel=TASK,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(help="CPU threads. (default: torch's, 1 for digits)", rich_help_panel=TASK),
]
Seed = Annotated[
    int | None,
    typer.Option(
        help="Fixes initial weights, data order, augmentation and sampled labels. (default: 0)",
        rich_help_panel=TASK,
    ),
]
Lr = Annotated[float | None, typer.Option(help="Learning rate.", rich_help_panel=METHOD)]
Momentum = Annotated[float | None, typer.Option(rich_help_panel=METHOD)]
Nesterov = Annotated[
    bool | None,
    typer.Option(
        "--nesterov/--no-nesterov",
        help="Nesterov's form of the momentum. (default: no)",
        rich_help_panel=METHOD,
    ),
]
Beta1 = Annotated[
    float | None,
    typer.Option("--beta1", help="Decay of Adam's mean of gradients.", rich_help_panel=METHOD),
]
WeightDecay = Annotated[float | None, typer.Option(rich_help_panel=METHOD)]
Damping = Annotated[float | None, typer.Option(help="Constant damping λ.", rich_help_panel=METHOD)]
Nu = Annotated[
    float | None,
    typer.Option(help="ν of trace damping (TKFAC, TEKFAC).", rich_help_panel=METHOD),
]
FactoredDamping = Annotated[
    float | None,
    typer.Option(
        help="λ of KFAC's factored damping, for EKFAC and TEKFAC too.", rich_help_panel=METHOD
    ),
]
RelativeDamping = Annotated[
    float | None,
    typer.Option(
        help="λ of factored damping, less where a layer's weights have grown.",
        rich_help_panel=METHOD,
    ),
]
FcScale = Annotated[
    str | None,
    typer.Option(
        help="β of fully-connected layers behind convolutions (TKFAC, TEKFAC): auto, or a number; "
        "above 1 they take smaller steps. (default: auto)",
        rich_help_panel=METHOD,
    ),
]
TensorBoard = Annotated[
    bool | None,
    typer.Option(
        "--tensorboard/--no-tensorboard",
        help="Write TensorBoard's event files, too, into run folders. (default: no)",
    ),
]
FirstOrderLr = Annotated[
    float | None,
    typer.Option(
        help="Adam's learning rate for parameters without curvature, e.g. of norm layers.",
        rich_help_panel=METHOD,
    ),
]
Fisher = Annotated[str | None, typer.Option(help="mc, exact or empirical.", rich_help_panel=METHOD)]
FactorEvery = Annotated[
    int | None, typer.Option(help="Steps between statistics.", rich_help_panel=METHOD)
]
ScaleEvery = Annotated[
    int | None, typer.Option(help="Steps between rescalings.", rich_help_panel=METHOD)
]
BasisEvery = Annotated[
    int | None, typer.Option(help="Steps between eigenbases.", rich_help_panel=METHOD)
]
Rank = Annotated[
    int | None,
    typer.Option(
        help="Eigenvectors kept of factors wider than three times that.", rich_help_panel=METHOD
    ),
]


TASK_OPTIONS = (
    "data",
    "image_size",
    "data_dir",
    "limit_train",
    "hold_out",
    "augment",
    "network",
    "width",
    "epochs",
    "batch_size",
    "device",
    "precision",
    "compile",
    "tensorboard",
    "threads",
)
SCHEDULE_OPTIONS = ("warmup", "step_every", "step_factor")
SETTING_OPTIONS = (
    "lr",
    "momentum",
    "nesterov",
    "beta1",
    "weight_decay",
    "damping",
    "nu",
    "factored_damping",
    "relative_damping",
    "fc_scale",
    "fisher",
    "factor_every",
    "scale_every",
    "basis_every",
    "rank",
    "first_order_lr",
)


def run() -> None:
    """Run the command line; exits with the command's status."""
    warnings.showwarning = _show_warning
    # Loss scaling may skip the very first step, on purpose.
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
    app()


@app.command()
def train(
    context: typer.Context,
    optimizer: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(METHODS)}. (default: {Config.optimizer})"),
    ] = None,
    preset: PresetName = None,
    config_file: ConfigFile = None,
    data: Data = None,
    image_size: ImageSize = None,
    data_dir: DataDir = None,
    limit_train: LimitTrain = None,
    hold_out: HoldOut = None,
    augment: Augment = None,
    network: Network = None,
    width: Width = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    schedule: ScheduleName = None,
    warmup: Warmup = None,
    step_every: StepEvery = None,
    step_factor: StepFactor = None,
    device: Device = None,
    precision: Precision = None,
    compile: Compile = None,
    threads: Threads = None,
    seed: Seed = None,
    lr: Lr = None,
    momentum: Momentum = None,
    nesterov: Nesterov = None,
    beta1: Beta1 = None,
    weight_decay: WeightDecay = None,
    damping: Damping = None,
    nu: Nu = None,
    factored_damping: FactoredDamping = None,
    relative_damping: RelativeDamping = None,
    fc_scale: FcScale = None,
    fisher: Fisher = None,
    factor_every: FactorEvery = None,
    scale_every: ScaleEvery = None,
    basis_every: BasisEvery = None,
    rank: Rank = None,
    first_order_lr: FirstOrderLr = None,
    tensorboard: TensorBoard = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder. (default: runs/DATA-NETWORK-OPTIMIZER-seedSEED)"),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Continue the run in this folder; of all options only --epochs goes along."
        ),
    ] = None,
) -> None:
    """Train a network. Without options: handwritten digits, a small convolutional net, TEKFAC.

    Options left out take values tuned for the digits; config.json in the run folder records all.
    """
    given = _given(context)
    with _plain_errors():
        if resume is not None:
            if others := sorted(given.keys() - {"resume", "epochs"}):
                raise InputError(
                    f"--{others[0].replace('_', '-')} cannot be changed when a run is resumed, "
                    "only --epochs can"
                )
            with RunFolder.open(resume) as folder:
                _train(folder, folder.config.load_data(), epochs)
            return
        settings = {key: given[key] for key in SETTING_OPTIONS if key in given}
        config = _config(given, Config.optimizer if optimizer is None else optimizer, settings)
        dataset = config.load_data()
        check(config, dataset)
        with (
            RunFolder.create_numbered(RUNS / config.name, config)
            if out is None
            else RunFolder.create(out, config)
        ) as folder:
            _train(folder, dataset, None)


def _train(folder: RunFolder, dataset: Dataset, epochs: int | None) -> None:
    with EpochLines() as watcher:
        try:
            history = fit(folder, dataset, watcher, epochs)
        except KeyboardInterrupt:
            if not watcher.started:
                raise
            watcher.close()
            _fail(
                f"interrupted; the checkpoint holds {watcher.done} of {folder.config.epochs} "
                f"epochs. Continue with:\n  tekfac train --resume {shlex.quote(str(folder.path))}",
                INTERRUPTED,
            )
        except Diverged as error:
            watcher.close()
            _fail(
                f"{error}. A smaller --lr or more damping may help. Finished epochs kept in "
                f"{folder.path}: {watcher.done}",
                FAILURE,
            )
    accuracy = f"{folder.config.tested_on} accuracy {100 * history[-1].test_accuracy:.2f} %"
    if watcher.started:
        console.print(f"{accuracy} after {len(history)} epochs; run in {folder.path}")
    else:
        console.print(
            f"{folder.path} is finished: {len(history)} of {folder.config.epochs} epochs, "
            f"{accuracy}. Nothing changed."
        )


@app.command()
def compare(
    context: typer.Context,
    optimizers: Annotated[str, typer.Option(help="Names, separated by commas.")] = ",".join(
        STANDARD
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each optimizer, seeds 0, 1, ...")] = 3,
    target: Annotated[
        float, typer.Option(min=0, max=1, help="Test accuracy to count epochs to.")
    ] = 0.97,
    preset: PresetName = None,
    config_file: ConfigFile = None,
    data: Data = None,
    image_size: ImageSize = None,
    data_dir: DataDir = None,
    limit_train: LimitTrain = None,
    hold_out: HoldOut = None,
    augment: Augment = None,
    network: Network = None,
    width: Width = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    schedule: ScheduleName = None,
    warmup: Warmup = None,
    step_every: StepEvery = None,
    step_factor: StepFactor = None,
    device: Device = None,
    precision: Precision = None,
    compile: Compile = None,
    threads: Threads = None,
    lr: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Learning rate of one optimizer; may be repeated.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    momentum: Momentum = None,
    nesterov: Nesterov = None,
    beta1: Beta1 = None,
    weight_decay: WeightDecay = None,
    damping: Damping = None,
    nu: Nu = None,
    factored_damping: FactoredDamping = None,
    relative_damping: RelativeDamping = None,
    fc_scale: FcScale = None,
    fisher: Fisher = None,
    factor_every: FactorEvery = None,
    scale_every: ScaleEvery = None,
    basis_every: BasisEvery = None,
    rank: Rank = None,
    first_order_lr: FirstOrderLr = None,
    tensorboard: TensorBoard = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for runs, picture and table; runs that it holds already are reused.  "
            "(default: runs/compare-DATA-NETWORK)"
        ),
    ] = None,
) -> None:
    """Run several optimizers on one task; draw their curves and print a table.

    Runs of one seed share initial weights and data order. Interrupted, the same command goes on.
    """
    given = _given(context)
    with _plain_errors():
        names = list(dict.fromkeys(name.strip() for name in optimizers.split(",")))
        rates = _learning_rates(lr or [], names)
        configs = {}
        for name in names:
            settings = {
                key: given[key]
                for key in SETTING_OPTIONS
                if key != "lr" and key in given and has_setting(name, key)
            }
            configs[name] = _config(given, name, {**settings, **rates.get(name, {})})
        for key in SETTING_OPTIONS:
            if key in given and not any(has_setting(name, key) for name in names):
                raise InputError(f"--{key.replace('_', '-')} does nothing with {', '.join(names)}")
        first = configs[names[0]]
        dataset = first.load_data()
        for config in configs.values():
            check(config, dataset)
        task = f"{dataset.name}, {first.network}"
        path = RUNS / f"compare-{dataset.name}-{first.network}" if out is None else out
        with Bar() as bar:
            try:
                outcomes = comparison.compare(configs, seeds, path, dataset, bar.for_run)
            except KeyboardInterrupt:
                bar.close()
                _fail("interrupted; the same command continues where it stopped", INTERRUPTED)
        title = f"{task}: mean and range of {seeds} seeds" if seeds > 1 else task
        comparison.save(outcomes, path, title, target)
        header, rows = comparison.table(outcomes, target)
        _print_table(header, rows)
        console.print(f"picture, table and runs in {path}")


@app.command()
def search(
    context: typer.Context,
    optimizer: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(METHODS)}. (default: {Config.optimizer})"),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SETTING=VALUE,...",
            help="Values to try of one setting; may be repeated. (default: the paper's grids of "
            "lr and of nu or damping, where they are not given as options)",
        ),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(
            min=1, help="Try a random part of the grid, of this size. (default: all of it)"
        ),
    ] = None,
    prune: Annotated[
        bool,
        typer.Option(
            help="Give a trial up when, after a third of its epochs or later, its best accuracy is "
            "below the median of the finished trials' after as many epochs."
        ),
    ] = True,
    preset: PresetName = None,
    config_file: ConfigFile = None,
    data: Data = None,
    image_size: ImageSize = None,
    data_dir: DataDir = None,
    limit_train: LimitTrain = None,
    hold_out: Annotated[
        int | None,
        typer.Option(
            help="Training images that trials do not train on but are judged by. (default: "
            f"{100 * HELD_OUT_FRACTION:g} %)",
            rich_help_panel=TASK,
        ),
    ] = None,
    augment: Augment = None,
    network: Network = None,
    width: Width = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    schedule: ScheduleName = None,
    warmup: Warmup = None,
    step_every: StepEvery = None,
    step_factor: StepFactor = None,
    device: Device = None,
    precision: Precision = None,
    compile: Compile = None,
    threads: Threads = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Fixes the part of the grid and its order, and of each trial initial weights, "
            "data order, augmentation and sampled labels. (default: 0)",
            rich_help_panel=TASK,
        ),
    ] = None,
    lr: Lr = None,
    momentum: Momentum = None,
    nesterov: Nesterov = None,
    beta1: Beta1 = None,
    weight_decay: WeightDecay = None,
    damping: Damping = None,
    nu: Nu = None,
    factored_damping: FactoredDamping = None,
    relative_damping: RelativeDamping = None,
    fc_scale: FcScale = None,
    fisher: Fisher = None,
    factor_every: FactorEvery = None,
    scale_every: ScaleEvery = None,
    basis_every: BasisEvery = None,
    rank: Rank = None,
    first_order_lr: FirstOrderLr = None,
    tensorboard: TensorBoard = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the search; one that it holds already is continued. (default: "
            "runs/search-DATA-NETWORK-OPTIMIZER)"
        ),
    ] = None,
) -> None:
    """Search for an optimizer's best settings, judged by training images held out.

    Interrupted, the same command goes on; started several times, it shares the work.
    At the end it prints all trials, and the command to train with the best settings.
    """
    given = _given(context)
    with _plain_errors():
        plan, dataset = _plan(given, Config.optimizer if optimizer is None else optimizer)
        plan.check(dataset)
        name = f"search-{dataset.name}-{plan.base.network}-{plan.base.optimizer}"
        path = RUNS / name if out is None else out
        with Bar() as bar:
            try:
                work = Search(path, plan, dataset, trials)
                work.run(
                    lambda number, total, point: bar.labelled(f"trial {number}/{total}, "),
                    lambda result: _print_trial("", result),
                )
            except KeyboardInterrupt:
                bar.close()
                _fail("interrupted; the same command continues where it stopped", INTERRUPTED)
        work.save_table()
        _print_table(*work.table())
        console.print(f"table and trials in {path}")
        if not work.complete:
            console.print(
                "Other processes are at work on the last trials; the last to end them has"
                " the whole table."
            )
            return
        best = shlex.join(["tekfac", "train", *_arguments(work.best())])
        console.print(f"The best settings, on all training images:\n  {best}", soft_wrap=True)


def _plan(given: Mapping[str, Any], optimizer: str) -> tuple[Plan, Dataset]:
    """What ``search`` is to try, and the data for it, some of them held out."""
    fixed = {key: given[key] for key in SETTING_OPTIONS if key in given}
    grid = read_grid(given.get("grid", []), optimizer)
    if both := sorted(fixed.keys() & grid.keys()):
        raise InputError(f"--{both[0].replace('_', '-')} is in the --grid too: give one")
    grid = {**paper_grid(optimizer, {**fixed, **grid}), **grid}
    first = {key: values[0] for key, values in grid.items()}
    base = _config(given, optimizer, {**fixed, **first})
    dataset = base.load_data()
    if base.hold_out is None:
        count = max(1, round(HELD_OUT_FRACTION * len(dataset.y_train)))
        base, dataset = replace(base, hold_out=count), dataset.hold_out(count)
    return Plan(base, grid, given["prune"]), dataset


def _print_trial(label: str, result: Result) -> None:
    settings = ", ".join(f"{key} {value}" for key, value in result.settings.items())
    line = f"{label}{settings}: {result.outcome.value}"
    if result.metrics is not None:
        accuracy = f"{100 * result.metrics.test_accuracy:.2f} %"
        line += f" after epoch {result.metrics.epoch}, held-out accuracy {accuracy}"
    if result.reason is not None:
        line += f", {result.reason}"
    console.print(line, soft_wrap=True)


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(*(Column(title, no_wrap=True) for title in header), box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _arguments(config: Config) -> list[str]:
    """The options of ``train`` for a configuration, without those that have their default."""
    method = METHODS[config.optimizer]
    values = {key: getattr(config, key) for key in TASK_OPTIONS}
    defaults = {key: getattr(Config, key) for key in TASK_OPTIONS}
    # Defaults that the machine or other options decide.
    defaults.update(device=None, threads=None, augment=None, width=NETWORKS[config.network].width)
    values.update(seed=config.seed, schedule=config.schedule.name, **config.settings)
    defaults.update(seed=Config.seed, schedule=Schedule.name, **method.defaults)
    values.update({key: getattr(config.schedule, key) for key in SCHEDULE_OPTIONS})
    defaults.update({key: getattr(Schedule, key) for key in SCHEDULE_OPTIONS})
    arguments = ["--optimizer", config.optimizer]
    for key, value in values.items():
        option = key.replace("_", "-")
        if value is None or value == defaults.get(key):
            continue
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        else:
            arguments += [f"--{option}", str(value)]
    return arguments


@app.command()
def reproduce(
    context: typer.Context,
    target: Annotated[
        Target,
        typer.Argument(
            help="table3 or figure3: optimizers on tasks, each with the best settings found for "
            "it. table4 or figure4: TEKFAC with ν or lr varied. theorem31: distances to the Fisher "
            "matrix (Theorem 3.1). A table and its figure are made of the same runs, both of them "
            "whichever is asked for."
        ),
    ],
    scale: Annotated[
        str,
        typer.Option(
            help=f"How much is run: {', '.join(SCALES)}. Of tables 3 and 4, full is the paper's "
            "size, small one for two CPU cores, smoke a test of seconds; the options below "
            "override its numbers."
        ),
    ] = "small",
    tasks: Annotated[
        str | None,
        typer.Option(help="Names, separated by commas. (default: the scale's)"),
    ] = None,
    optimizers: Annotated[
        str | None,
        typer.Option(
            help=f"For table3: names, separated by commas. (default: {','.join(OPTIMIZERS)})"
        ),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OPTIMIZER:SETTING=VALUE,...",
            help="Values of one setting to search (table3) or to compare (table4) in place of the "
            "scale's; may be repeated.",
        ),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(min=1, help="For table3: random part of the grid that each search tries."),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Runs with the settings chosen, seeds 0, 1, ...")
    ] = None,
    config_file: ConfigFile = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE.npz",
            help="A file (x_train, y_train, x_test, y_test) in place of a data set's download; may "
            "be repeated.",
            rich_help_panel=TASK,
        ),
    ] = None,
    data_dir: DataDir = None,
    limit_train: LimitTrain = None,
    hold_out: Annotated[
        int | None,
        typer.Option(
            help="For table3: training images that searches do not train on but are decided by. "
            f"(default: {100 * HELD_OUT_FRACTION:g} %)",
            rich_help_panel=TASK,
        ),
    ] = None,
    augment: Augment = None,
    width: Width = None,
    epochs: Annotated[int | None, typer.Option(rich_help_panel=TASK)] = None,
    batch_size: Annotated[int | None, typer.Option(rich_help_panel=TASK)] = None,
    schedule: ScheduleName = None,
    warmup: Warmup = None,
    step_every: StepEvery = None,
    step_factor: StepFactor = None,
    device: Device = None,
    precision: Precision = None,
    compile: Compile = None,
    threads: Threads = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of runs, table and picture; runs that it holds already are kept. "
            "(default: results/theorem31, or results/TABLE-SCALE)"
        ),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Do not ask before --scale full begins.")
    ] = False,
) -> None:
    """Run one of the paper's experiments again; print its table and draw its picture.

    What is there already is kept, the rest is run. Interrupted, the same command goes on;
    started several times, it shares the work.
    """
    given = _given(context)
    with _plain_errors():
        if scale not in SCALES:
            raise InputError(f"--scale {scale!r} is unknown; there is: {list(SCALES)}")
        if target is Target.THEOREM31:
            _refuse(given.keys() - {"target", "scale", "out", "yes"}, target)
            _reproduce_theorem31(scale, Path("results/theorem31") if out is None else out)
            return
        experiment = _experiment(given, target, SCALES[scale])
        path = Path("results") / f"{experiment.table}-{scale}" if out is None else out
        work = Reproduction(path, experiment)
        _announce(work, ask=SCALES[scale].hours and not yes, hours=SCALES[scale].hours)
        with Bar() as bar:
            try:
                work.run(
                    watch=bar.labelled,
                    on_trial=_print_trial,
                    on_run=lambda words: console.print(words, soft_wrap=True),
                    on_cell=lambda: reports.save_tables(work),
                )
            except KeyboardInterrupt:
                bar.close()
                _fail("interrupted; the same command continues where it stopped", INTERRUPTED)
        reports.save_tables(work)
        reports.save_figure(work)
        console.print(reports.table(work), soft_wrap=True)
        console.print(f"table, picture and runs in {path}")
        if any(left := work.left()):
            console.print(
                f"Left to other processes, which are at work: {left[0]} trials and {left[1]} runs. "
                "The last to end has the whole table, and so has this command when run again."
            )


def _reproduce_theorem31(scale: str, path: Path) -> None:
    chosen = theorem31.SCALES[scale]
    distances = theorem31.run(chosen, load("digits"), console.print)
    title = (
        f"digits, cnn of width {chosen.width}: distance to the exact Fisher block, "
        f"{chosen.examples} examples"
    )
    theorem31.save(distances, path, title)
    console.print(theorem31.table(distances))
    for better, worse in (("TEKFAC", "TKFAC"), ("EKFAC", "KFAC")):
        ratio = theorem31.worst_ratio(distances, better, worse)
        console.print(f"{better}'s error is at most {ratio:.4f} times {worse}'s")
    console.print(f"table and picture in {path}")


def _experiment(given: Mapping[str, Any], target: Target, scale: Scale) -> Experiment:
    """What ``reproduce`` is to run for a table or figure."""
    sensitivity = target in (Target.TABLE4, Target.FIGURE4)
    if sensitivity:
        _refuse(given.keys() & {"optimizers", "trials", "hold_out"}, target)
    tasks = _names(given["tasks"]) if "tasks" in given else list(scale.protocols)
    if "tasks" not in given and sensitivity:
        tasks = [scale.sweep_task]
    for task in tasks:
        if task not in scale.protocols:
            raise InputError(f"--tasks {task!r} is unknown; there is: {', '.join(scale.protocols)}")
    sources = [scale.protocols[task].task["data"] for task in tasks]
    files = _files(given.get("data", []), sources)
    protocols = {task: _overridden(scale.protocols[task], given, files) for task in tasks}
    names = _names(given["optimizers"]) if "optimizers" in given else list(OPTIMIZERS)
    grids = _grids(given.get("grid", []), ["tekfac"] if sensitivity else names)
    if sensitivity:
        return table_4(scale, protocols, grids.get("tekfac"), given.get("seeds"))
    return table_3(
        scale,
        protocols,
        names,
        grids,
        given.get("trials"),
        given.get("seeds"),
        given.get("hold_out"),
    )


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in text.split(",")))


def _files(pairs: Sequence[str], sources: Sequence[str]) -> dict[str, str]:
    """The files that stand for data sets."""
    files = {}
    for pair in pairs:
        name, equals, file = pair.partition("=")
        if name not in sources or not equals:
            raise InputError(
                f"--data {pair!r} must be NAME=FILE.npz with a name of "
                f"{', '.join(dict.fromkeys(sources))}"
            )
        if not Path(file).is_file():
            raise InputError(f"--data {pair!r}: there is no file {file}")
        files[name] = file
    return files


def _grids(texts: Sequence[str], names: Sequence[str]) -> dict[str, Grid]:
    by_name: dict[str, list[str]] = {}
    for text in texts:
        name, colon, grid = text.partition(":")
        if name not in names or not colon:
            raise InputError(
                f"--grid {text!r} must be OPTIMIZER:SETTING=VALUE,... with an optimizer of "
                f"{', '.join(names)}"
            )
        by_name.setdefault(name, []).append(grid)
    return {name: read_grid(grids, name) for name, grids in by_name.items()}


def _overridden(protocol: Preset, given: Mapping[str, Any], files: Mapping[str, str]) -> Preset:
    """A task of a scale with what is given for it on the command line."""
    source = protocol.task["data"]
    task = {
        # A file is augmented as the data set that it stands for.
        "augment": augments(source),
        "device": default_device(),
        "threads": default_threads(source),
        **protocol.task,
        **{key: given[key] for key in TASK_OPTIONS if key in given and key != "hold_out"},
        "data": files.get(source, source),
    }
    if source in files:
        task.pop("data_dir", None)
    return replace(protocol, task=task, schedule=_schedule(given, protocol.schedule))


def _announce(work: Reproduction, ask: bool, hours: bool) -> None:
    """Say what is left to do and, of much work, about how long it takes; ask where told to."""
    trials, runs = work.left()
    if not trials + runs:
        console.print("All is done already.")
        return
    console.print(f"To do: {trials} trials of searches and {runs} runs with settings chosen.")
    if not hours:
        return
    console.print(
        f"About {work.hours():.0f} GPU hours, or less as hopeless trials are given up. An "
        f"estimate, {HOW_ESTIMATED}.",
        soft_wrap=True,
    )
    if not ask:
        return
    if not _interactive():
        raise InputError("so much work is not begun without --yes")
    if not typer.confirm("Begin?"):
        raise typer.Exit


def _interactive() -> bool:
    return sys.stdin.isatty()


def _refuse(options: Collection[str], target: Target) -> None:
    """Raise if there are options that do nothing."""
    if options:
        option = sorted(options)[0].replace("_", "-")
        raise InputError(f"--{option} does nothing with {target.value}")


class Interruption:
    """Holds back the first Ctrl-C until the program is ready for it; a second one acts at once.

    Python would raise KeyboardInterrupt anywhere, also within torch's C++ code, some of which turns
    it into another error or ends the process.
    """

    def __init__(self) -> None:
        self._requested = False
        self._previous = signal.signal(signal.SIGINT, self._request)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        self.close()

    def check(self) -> None:
        """Raise KeyboardInterrupt if there was a Ctrl-C."""
        if self._requested:
            raise KeyboardInterrupt

    def close(self) -> None:
        """Let Ctrl-C act as before."""
        signal.signal(signal.SIGINT, self._previous)


class Bar(Watcher):
    """A live bar over all batches of a run: epoch, loss, accuracy, seconds.

    Ctrl-C raises KeyboardInterrupt after the batch in which it was pressed.
    """

    def __init__(self) -> None:
        self._interruption = Interruption()
        self.done = 0
        self.started = False
        self._label = ""
        self._task: TaskID | None = None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar off the screen; harmless when done twice."""
        self._progress.stop()
        self._interruption.close()

    def for_run(self, config: Config) -> Self:
        """This bar, labelled for a run of a comparison."""
        return self.labelled(f"{METHODS[config.optimizer].label}, seed {config.seed}, ")

    def labelled(self, label: str) -> Self:
        """This bar, with a label in front for the next run."""
        self._label = label
        return self

    def on_start(self, config: Config, history: History, batches: int) -> None:
        self.done, self.started = len(history), True
        self._epochs = config.epochs
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(
            f"{self._label}epoch {self.done + 1}/{config.epochs}",
            total=config.epochs * batches,
            completed=self.done * batches,
            numbers="",
        )
        self._progress.start()

    def on_batch(self, progress: BatchProgress) -> None:
        self._interruption.check()
        if self._task is not None:
            self._progress.update(
                self._task,
                description=f"{self._label}epoch {progress.epoch}/{self._epochs}",
                completed=(progress.epoch - 1) * progress.batches + progress.batch,
                numbers=f"loss {progress.loss:.4f}  accuracy {100 * progress.accuracy:5.1f} %  "
                f"{progress.seconds:.1f} s",
            )

    def on_epoch(self, metrics: EpochMetrics) -> None:
        self.done = metrics.epoch


class EpochLines(Bar):
    """The bar, and above it a line for each epoch that is done."""

    def on_start(self, config: Config, history: History, batches: int) -> None:
        super().on_start(config, history, batches)
        settings = ", ".join(f"{key} {value}" for key, value in config.settings.items())
        console.print(f"{METHODS[config.optimizer].label} ({settings})")
        console.print(f"{config.data}, {config.network}, seed {config.seed}, on {config.device}")
        test_loss = f"{config.tested_on} loss"
        console.print(f"epoch   training loss  accuracy  {test_loss:>13}  accuracy    seconds")

    def on_epoch(self, metrics: EpochMetrics) -> None:
        super().on_epoch(metrics)
        console.print(
            f"{metrics.epoch:5d}"
            f"   {metrics.train_loss:13.4f}  {100 * metrics.train_accuracy:6.2f} %"
            f"  {metrics.test_loss:13.4f}  {100 * metrics.test_accuracy:6.2f} %"
            f"  {metrics.seconds:9.1f}"
        )


def _given(context: typer.Context) -> dict[str, Any]:
    """The options given on the command line or in a file."""
    return {key: value for key, value in context.params.items() if value not in (None, [], ())}


def _config(given: Mapping[str, Any], optimizer: str, settings: Mapping[str, Any]) -> Config:
    preset = presets.find(given.get("preset"))
    task = {**preset.task, **{key: given[key] for key in TASK_OPTIONS if key in given}}
    task.setdefault("device", default_device())
    task.setdefault("threads", default_threads(task.get("data", Config.data)))
    if "seed" in given:
        task["seed"] = given["seed"]
    fixed = {key: value for key, value in preset.settings.items() if has_setting(optimizer, key)}
    return Config(
        optimizer=optimizer,
        settings={**fixed, **settings},
        schedule=_schedule(given, preset.schedule),
        **task,
    )


def _schedule(given: Mapping[str, Any], base: Schedule) -> Schedule:
    if given.get("schedule", base.name) != base.name:
        base = Schedule(given["schedule"])
    return replace(base, **{key: given[key] for key in SCHEDULE_OPTIONS if key in given})


def _learning_rates(pairs: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, float]]:
    rates = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if name not in names or not equals:
            raise InputError(f"--lr {pair!r} must be NAME=VALUE with a name of {', '.join(names)}")
        try:
            rates[name] = {"lr": float(value)}
        except ValueError:
            raise InputError(f"--lr {pair!r}: {value!r} is not a number") from None
    return rates


@contextmanager
def _plain_errors() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        _fail(str(error), BAD_INPUT)
    except OSError as error:
        where = f": {error.filename}" if error.filename is not None else ""
        _fail(f"{error.strerror or error}{where}", FAILURE)
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)


def _fail(message: str, status: int) -> NoReturn:
    print(f"tekfac: {message}", file=sys.stderr)
    raise typer.Exit(status)


def _show_warning(message: Warning | str, *where: object, **more: object) -> None:
    print(f"tekfac: warning: {message}", file=sys.stderr)
