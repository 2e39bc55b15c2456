"""Several optimizers on one task: the runs, and what they come to in a table and a picture.

Runs of one seed share initial weights and data order. Each run has its own folder, so that an
interrupted comparison goes on where it stopped and an extended one reuses what is there.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tekfac.data import Dataset
from tekfac.errors import Diverged, InputError
from tekfac.runs import plots
from tekfac.runs.config import Config
from tekfac.runs.files import markdown, write_csv, write_figure, write_text
from tekfac.runs.folder import CONFIG, RunFolder
from tekfac.runs.metrics import History, epochs_to
from tekfac.runs.optimizers import METHODS
from tekfac.runs.training import Watcher, fit

PICTURE = "compare.png"
TABLE_MARKDOWN = "compare.md"
TABLE_CSV = "compare.csv"


@dataclass(frozen=True)
class Outcome:
    """What a method came to over all seeds.

    Attributes:
        method: the optimizer's name.
        lr: its learning rate.
        histories: one for each seed whose run did not diverge.
        diverged: the number of seeds whose run did.
    """

    method: str
    lr: float
    histories: Sequence[History]
    diverged: int


def compare(
    configs: Mapping[str, Config],
    seeds: int,
    path: Path,
    data: Dataset,
    watch: Callable[[Config], Watcher],
) -> list[Outcome]:
    """Run every configuration with seeds 0 to ``seeds - 1``, or reuse the run that is there.

    Args:
        configs: for each optimizer's name what to run; the seed in it is replaced.
        seeds: 1 or more.
        path: the folder for the runs' folders, ``<optimizer>-seed<seed>``.
        data: the data set that all configurations name.
        watch: gives a run's watcher, before that run begins.

    Raises:
        InputError: if a run's folder holds a run of another configuration, or ``path`` holds
            files that would be overwritten and are no comparison's.
    """
    foreign = [name for name in (PICTURE, TABLE_MARKDOWN, TABLE_CSV) if (path / name).exists()]
    if foreign and not any(path.glob(f"*-seed*/{CONFIG}")):
        raise InputError(
            f"{path} holds {foreign[0]} but no runs of a comparison: give another --out"
        )
    outcomes = []
    for name, base in configs.items():
        histories, diverged = [], 0
        for seed in range(seeds):
            config = replace(base, seed=seed)
            with RunFolder.begun(path / f"{name}-seed{seed}", config) as folder:
                try:
                    # `fit` extends a run of fewer epochs where its schedule allows that.
                    histories.append(fit(folder, data, watch(config), config.epochs))
                except Diverged:
                    diverged += 1
        outcomes.append(Outcome(name, base.settings["lr"], histories, diverged))
    return outcomes


HEADER = (
    "optimizer",
    "lr",
    "test accuracy (%)",
    "epochs to {target}",
    "seconds",
    "s/epoch",
)


def table(outcomes: Sequence[Outcome], target: float) -> tuple[list[str], list[list[str]]]:
    """A header and one row per method, as text: means over seeds, ± standard deviation.

    Accuracy is that after the last epoch; seconds are training time without evaluation. Epochs to
    the target are averaged over the seeds that reach it, and "(2 of 3)" says so when not all do.
    """
    header = [title.format(target=f"{100 * target:g} %") for title in HEADER]
    return header, [_row(outcome, target) for outcome in outcomes]


def _row(outcome: Outcome, target: float) -> list[str]:
    label, lr = METHODS[outcome.method].label, f"{outcome.lr:g}"
    if not outcome.histories:
        return [label, lr, "diverged", "–", "–", "–"]
    final = [100 * history[-1].test_accuracy for history in outcome.histories]
    accuracy = mean_and_deviation(final)
    seeds = len(outcome.histories) + outcome.diverged
    if outcome.diverged:
        accuracy += f" ({outcome.diverged} of {seeds} diverged)"
    reached = [e for h in outcome.histories if (e := epochs_to(h, target)) is not None]
    epochs = mean_and_deviation([float(e) for e in reached], digits=1) if reached else "not reached"
    if 0 < len(reached) < seeds:
        epochs += f" ({len(reached)} of {seeds})"
    seconds = statistics.mean(history[-1].seconds for history in outcome.histories)
    per_epoch = statistics.mean(history[-1].seconds / len(history) for history in outcome.histories)
    return [label, lr, accuracy, epochs, f"{seconds:.1f}", f"{per_epoch:.2f}"]


def mean_and_deviation(values: Sequence[float], digits: int = 2) -> str:
    """``mean ± standard deviation`` as text, of a single value the value alone."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def save(outcomes: Sequence[Outcome], path: Path, title: str, target: float) -> None:
    """Write the picture and the table, as Markdown and as CSV, into a folder."""
    header, rows = table(outcomes, target)
    histories = {METHODS[outcome.method].label: outcome.histories for outcome in outcomes}
    write_figure(path / PICTURE, plots.comparison_figure(histories, title, target))
    write_text(path / TABLE_MARKDOWN, markdown(header, rows))
    write_csv(path / TABLE_CSV, header, rows)
