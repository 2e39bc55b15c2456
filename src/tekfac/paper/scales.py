"""How much of the paper's tables 3 and 4 is run: whole, at sizes for two CPU cores, or to test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from tekfac.paper.presets import PRESETS, Preset
from tekfac.paper.published import TABLE_3, TABLE_4, TABLE_4_CENTRE, TABLE_4_TASK
from tekfac.runs.schedules import Schedule
from tekfac.searches.grids import Grid, Point

OPTIMIZERS = ("sgd", "adam", "ekfac", "tkfac", "tekfac")

# The numbers of both tables are of three runs.
SEEDS = 3

# Of each optimizer what a small search tries, all of it: six points each. An optimizer that is not
# here has a random part, as large, of the paper's grids.
SMALL_TRIALS = 6
SMALL_GRIDS: Mapping[str, Grid] = {
    "sgd": {"lr": (0.03, 0.1, 0.2, 0.4, 0.8, 1.6)},
    "adam": {"lr": (5e-4, 1e-3, 2e-3, 3e-3, 6e-3, 1e-2)},
    "soap": {"lr": (2e-3, 3e-3, 6e-3, 1e-2, 2e-2, 4e-2)},
    # Muon's own momentum, in place of that of all others.
    "muon": {"lr": (3e-3, 1e-2, 2e-2, 3e-2, 6e-2, 0.1), "momentum": (0.95,)},
    # Relative damping, not the paper's kinds, serves all of them better, and a larger β TEKFAC,
    # whose exact curvature of convolutions asks for a larger lr (results/README.md).
    "kfac": {"lr": (1e-3, 3e-3), "relative_damping": (3e-4, 1e-3, 3e-3)},
    "ekfac": {"lr": (1e-3, 3e-3), "relative_damping": (3e-4, 1e-3, 3e-3)},
    "tkfac": {"lr": (1e-3, 3e-3), "relative_damping": (3e-4, 1e-3, 3e-3)},
    "tekfac": {"lr": (3e-3, 6e-3), "relative_damping": (1e-3, 2e-3, 4e-3), "fc_scale": (4.0,)},
}
# The paper's own kinds of damping, in the part of its grids where such networks train; beside them,
# as the package has them, TEKFAC and SOAP. Six points each.
MEDIUM_GRIDS: Mapping[str, Grid] = {
    "sgd": SMALL_GRIDS["sgd"],
    "adam": SMALL_GRIDS["adam"],
    "ekfac": {"lr": (1e-3, 3e-3), "damping": (3e-4, 1e-3, 3e-3)},
    "tkfac": {"lr": (1e-3, 3e-3), "nu": (0.1, 1.0, 10.0)},
    "tekfac": {"lr": (1e-3, 3e-3), "nu": (0.1, 1.0, 10.0)},
    "tekfac-defaults": {"lr": (2.5e-3, 5e-3, 1e-2), "weight_decay": (0.0, 0.3)},
    "soap": {"lr": (3e-3, 1e-2, 3e-2), "weight_decay": (0.0, 0.3)},
}
# Near what suits the digits, so that a test sees learning.
SMOKE_GRIDS: Mapping[str, Grid] = {
    "sgd": {"lr": (0.03, 0.1)},
    "adam": {"lr": (5e-3, 1.5e-2)},
    "ekfac": {"lr": (1e-4,), "damping": (3e-4, 3e-3)},
    "tkfac": {"lr": (3e-4,), "nu": (0.1, 1.0)},
    "tekfac": {"lr": (1e-4, 3e-4), "nu": (1.0,)},
}


@dataclass(frozen=True)
class Scale:
    """A size of the experiments.

    Attributes:
        name: what it is called.
        protocols: for each task, a data set and a network, what all runs on it have in common.
        trials: how many points of its grid each optimizer's search tries, at most.
        seeds: runs of each setting.
        grids: what is searched of an optimizer; one without takes the paper's grids.
        prune: whether hopeless trials are given up.
        optimizers: the rows of table 3.
        recipes: of an optimizer schedule and settings in place of a protocol's.
        trial_images, trial_epochs: how many of them a search's trial has, at most; None for all.
        sweep_task: the task of table 4.
        sweeps: the values of each of TEKFAC's settings there, while the others are the centre's.
        centre: those settings.
        hours: whether the runs take so long that their cost is told, and asked about, before.
    """

    name: str
    protocols: Mapping[str, Preset]
    trials: int
    seeds: int
    sweep_task: str
    sweeps: Grid
    optimizers: Sequence[str] = OPTIMIZERS
    recipes: Mapping[str, Preset] = field(default_factory=dict)
    trial_images: int | None = None
    trial_epochs: int | None = None
    grids: Mapping[str, Grid] = field(default_factory=dict)
    prune: bool = False
    centre: Point = field(default_factory=lambda: TABLE_4_CENTRE)
    hours: bool = False


# Of every optimizer that has such a setting: for the rest its defaults are those for the digits.
SETTINGS = {"momentum": 0.9, "beta1": 0.9, "weight_decay": 0.0}
# The paper's text does not give the intervals; the programs that it names for its settings took 10
# steps, the default here too, for statistics and 200 for bases.
PAPER_INTERVALS = {"basis_every": 200}

PAPER_SWEEPS: Grid = {setting: tuple(row) for setting, row in TABLE_4.items()}


def _paper(task: str) -> Preset:
    data, network = task.split("-")
    preset = PRESETS[f"paper-{data}"]
    settings = {**preset.settings, **SETTINGS, **PAPER_INTERVALS}
    return replace(preset, task={**preset.task, "network": network}, settings=settings)


def _small(data: str) -> Preset:
    return Preset(
        task={
            "data": data,
            "network": "resnet20",
            "width": 16,
            "limit_train": 6400,
            "epochs": 5,
            "batch_size": 128,
            "precision": "bf16",
        },
        schedule=Schedule("cosine", warmup=0.5),
        # The optimizers' own interval, and for norm layers what suits Adam on these images.
        # Nesterov's momentum, which the paper has not, for all that know it.
        settings={**SETTINGS, "nesterov": True, "basis_every": 100, "first_order_lr": 1e-2},
    )


def _medium(task: str) -> Preset:
    data, network = task.split("-")
    return Preset(
        task={
            "data": data,
            "network": network,
            "width": 16,
            "epochs": 15,
            "batch_size": 128,
            "precision": "bf16",
        },
        # As the paper's, which falls twice.
        schedule=Schedule("step", step_every=5, step_factor=0.1),
        settings={**SETTINGS, **PAPER_INTERVALS},
    )


_SCALES = (
    # Ten trials for each optimizer: the paper's grids have no more for SGD and Adam.
    Scale(
        "full",
        {task: _paper(task) for task in TABLE_3},
        trials=10,
        seeds=SEEDS,
        sweep_task=TABLE_4_TASK,
        sweeps=PAPER_SWEEPS,
        prune=True,
        hours=True,
    ),
    Scale(
        "medium",
        {task: _medium(task) for task in TABLE_3 if not task.startswith("svhn")},
        trials=SMALL_TRIALS,
        seeds=2,
        optimizers=(*OPTIMIZERS, "tekfac-defaults", "soap"),
        recipes=dict.fromkeys(
            ("tekfac-defaults", "soap"), Preset(schedule=Schedule("cosine", warmup=0.5))
        ),
        trial_images=6400,
        trial_epochs=6,
        sweep_task=TABLE_4_TASK,
        sweeps=PAPER_SWEEPS,
        grids=MEDIUM_GRIDS,
    ),
    Scale(
        "small",
        {f"{data}-resnet20": _small(data) for data in ("cifar10", "cifar100")},
        trials=SMALL_TRIALS,
        seeds=SEEDS,
        sweep_task=TABLE_4_TASK,
        sweeps=PAPER_SWEEPS,
        grids=SMALL_GRIDS,
    ),
    Scale(
        "smoke",
        {
            "digits-cnn": Preset(
                task={
                    "data": "digits",
                    "network": "cnn",
                    "width": 4,
                    "epochs": 2,
                }
            )
        },
        trials=2,
        seeds=2,
        grids=SMOKE_GRIDS,
        sweep_task="digits-cnn",
        sweeps={"nu": (0.1, 1.0), "lr": (1e-4, 1e-3)},
        centre={"lr": 1e-4, "nu": 1.0},
    ),
)
SCALES: Mapping[str, Scale] = {scale.name: scale for scale in _SCALES}
