"""What an experiment of the paper, run again, comes to: its tables and its picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from tekfac.data import NAMED, source_name
from tekfac.paper.cells import Cell, Standing
from tekfac.paper.experiments import size
from tekfac.paper.reproduction import Reproduction
from tekfac.paper.scales import SCALES
from tekfac.runs import plots
from tekfac.runs.comparison import mean_and_deviation
from tekfac.runs.config import Config
from tekfac.runs.files import markdown, write_csv, write_figure, write_text
from tekfac.runs.metrics import History, epochs_to
from tekfac.runs.plots import Panel
from tekfac.searches.grids import paper_grid
from tekfac.searches.trials import Outcome, as_text

Standings = Mapping[Cell, Standing]

NUMBERS = (
    "task",
    "row",
    "settings",
    "trials",
    "held_out_accuracy",
    "seeds_finished",
    "seeds_diverged",
    "seeds_left",
    "test_accuracy",
    "test_accuracy_deviation",
    "paper_accuracy",
    "paper_deviation",
    "seconds_per_epoch",
    "seconds_to_sgd",
    "seeds_to_sgd",
)
NONE = "–"


def save_tables(work: Reproduction) -> None:
    """Write the table and that of the settings, as Markdown, and all numbers as CSV."""
    report, numbers, _ = work.experiment.files
    with work.lock:
        standings = _standings(work)
        write_text(work.path / report, _report(work, standings))
        write_csv(work.path / numbers, NUMBERS, [_numbers(cell, standings) for cell in standings])


def save_figure(work: Reproduction) -> None:
    """Write the picture."""
    standings = _standings(work)
    columns = list(dict.fromkeys(cell.variant.panel for cell in standings))
    rows = []
    for task in work.experiment.protocols:
        row = []
        for column in columns:
            runs = {
                cell.variant.label: standing.histories
                for cell, standing in standings.items()
                if (cell.task, cell.variant.panel) == (task, column)
            }
            title = f"{task}: {column}" if column else task
            row.append(Panel(title, runs, "epochs", in_order=bool(column)))
            if not column:
                row.append(Panel(title, runs, "seconds"))
        rows.append(row)
    title = f"Mean ± standard deviation over {_count(work.experiment.seeds, 'seed')}"
    figure = plots.accuracy_figure(rows, title)
    with work.lock:
        write_figure(work.path / work.experiment.files[2], figure)


def table(work: Reproduction) -> str:
    """The table: a row per variant, for each task what was measured and the paper's, in Markdown.

    Accuracy is that after the last epoch, in per cent, mean ± standard deviation over seeds.
    """
    return _table(work, _standings(work))


def _standings(work: Reproduction) -> Standings:
    return {cell: cell.standing() for cell in work.cells}


def _report(work: Reproduction, standings: Standings) -> str:
    experiment = work.experiment
    explanation = "Seconds are of training, without evaluation."
    if any(cell.searched for cell in standings):
        explanation = (
            "Settings were chosen by training images held out, with the same number of trials for "
            "each optimizer, as far as its grid goes; the test images had no part in it. "
        ) + explanation
    if any(cell.variant.optimizer == "sgd" for cell in standings):
        explanation += (
            " SGD's accuracy is passed at the end of the first epoch after which a run's test "
            "accuracy is SGD's mean final one or more: the mean over those seeds that get there."
        )
    parts = [
        f"# Table {experiment.table[-1]}: {experiment.title}",
        f"After the last epoch, mean ± standard deviation over {_count(experiment.seeds, 'seed')}, "
        "beside the paper's own numbers.",
        _table(work, standings),
        _differences(work),
        "## Settings and times",
        explanation,
        _settings(standings),
    ]
    return "\n".join(part if part.endswith("\n") else f"{part}\n" for part in parts)


def _table(work: Reproduction, standings: Standings) -> str:
    tasks = list(work.experiment.protocols)
    header = ["optimizer" if work.experiment.table == "table3" else "TEKFAC with"]
    for task in tasks:
        header += [task, "paper"]
    rows = []
    for variant in work.experiment.variants:
        row = [variant.label]
        for cell, standing in standings.items():
            if cell.variant is variant:
                paper = variant.paper.get(cell.task)
                row.append(_accuracy(standing))
                row.append(f"{paper.mean:.2f} ± {paper.deviation:.2f}" if paper else NONE)
        rows.append(row)
    return markdown(header, rows)


def _accuracy(standing: Standing) -> str:
    if standing.hopeless:
        return "no trial finished"
    seeds = len(standing.histories) + standing.diverged + standing.left_runs
    if standing.diverged == seeds:
        return "diverged"
    if not standing.histories:
        return "not done yet"
    notes = [
        f"{number} of {seeds} {what}"
        for number, what in ((standing.diverged, "diverged"), (standing.left_runs, "not done yet"))
        if number
    ]
    text = mean_and_deviation([100 * history[-1].test_accuracy for history in standing.histories])
    return f"{text} ({', '.join(notes)})" if notes else text


def _settings(standings: Standings) -> str:
    header = ["task", "row", "settings", "trials", "held-out (%)", "s/epoch", "s to SGD's accuracy"]
    rows = []
    for cell, standing in standings.items():
        histories = standing.histories
        seconds = _seconds_to_sgd(cell, standings)
        text = NONE
        if histories and seconds is not None:
            text = mean_and_deviation(seconds, digits=1) if seconds else "not passed"
            if 0 < len(seconds) < len(histories):
                text += f" ({len(seconds)} of {len(histories)})"
        rows.append(
            [
                cell.task,
                cell.variant.label,
                _chosen(cell, standing) or NONE,
                _trials(cell, standing),
                f"{100 * standing.best_accuracy:.2f}" if standing.best_accuracy else NONE,
                f"{_seconds_per_epoch(histories):.2f}" if histories else NONE,
                text,
            ]
        )
    # Without a search, or without SGD, columns would be empty.
    kept = [
        number
        for number, _ in enumerate(header)
        if not rows or any(row[number] != NONE for row in rows)
    ]
    return markdown([header[n] for n in kept], [[row[n] for n in kept] for row in rows])


def _trials(cell: Cell, standing: Standing) -> str:
    if not cell.searched:
        return NONE
    text = f"{standing.trials.total()} of {cell.grid_size}"
    ends = [
        f"{standing.trials[outcome]} {outcome.value}"
        for outcome in Outcome
        if outcome is not Outcome.FINISHED and standing.trials[outcome]
    ]
    return f"{text} ({', '.join(ends)})" if ends else text


def _numbers(cell: Cell, standings: Standings) -> list[object]:
    standing = standings[cell]
    final = [100 * history[-1].test_accuracy for history in standing.histories]
    seconds = _seconds_to_sgd(cell, standings)
    paper = cell.variant.paper.get(cell.task)
    best = standing.best_accuracy
    return [
        cell.task,
        cell.variant.label,
        _chosen(cell, standing),
        standing.trials.total(),
        None if best is None else 100 * best,
        len(standing.histories),
        standing.diverged,
        standing.left_runs,
        statistics.mean(final) if final else None,
        statistics.stdev(final) if len(final) > 1 else None,
        paper.mean if paper else None,
        paper.deviation if paper else None,
        _seconds_per_epoch(standing.histories) if final else None,
        statistics.mean(seconds) if seconds else None,
        None if seconds is None else len(seconds),
    ]


def _chosen(cell: Cell, standing: Standing) -> str | None:
    if standing.chosen is None:
        return None
    values = standing.chosen.settings
    return ", ".join(f"{key} {as_text(values[key])}" for key in cell.variant.grid)


def _seconds_per_epoch(histories: Sequence[History]) -> float:
    return statistics.mean(history[-1].seconds / len(history) for history in histories)


def _seconds_to_sgd(cell: Cell, standings: Standings) -> list[float] | None:
    """Seconds of the runs that pass SGD's mean final accuracy; None if SGD has no finished run."""
    final = [
        history[-1].test_accuracy
        for other, standing in standings.items()
        if (other.task, other.variant.optimizer) == (cell.task, "sgd")
        for history in standing.histories
    ]
    if not final:
        return None
    target = statistics.mean(final)
    passed = [(history, epochs_to(history, target)) for history in standings[cell].histories]
    return [history[epoch - 1].seconds for history, epoch in passed if epoch is not None]


def _differences(work: Reproduction) -> str:
    """In words, what is smaller than in the paper, or otherwise."""
    experiment, full = work.experiment, SCALES["full"]
    tasks: dict[str, list[str]] = {}
    by_protocol = [cell for cell in work.cells if cell.variant.recipe is None] or work.cells
    for task, config in {cell.task: cell.base for cell in by_protocol}.items():
        tasks.setdefault("; ".join(_task_differences(task, config)), []).append(task)
    sentences = [f"{', '.join(names)}: {text}." for text, names in tasks.items() if text]
    recipes: dict[str, dict[str, None]] = {}
    for cell in work.cells:
        if cell.variant.recipe is not None:
            recipes.setdefault(_schedule(cell.base), {})[cell.variant.label] = None
    sentences += [f"{_words(names)}: {schedule}." for schedule, names in recipes.items()]
    if experiment.seeds < full.seeds:
        sentences.append(f"{_count(experiment.seeds, 'seed')} instead of {full.seeds}.")
    searched = [cell for cell in work.cells if cell.searched]
    if searched:
        trials = max(min(cell.grid_size, experiment.trials) for cell in searched)
        sizes = [size(paper_grid(cell.variant.optimizer, {})) for cell in searched]
        sentences.append(
            f"Searches of {trials} trials at most, where the paper's grids have up to {max(sizes)} "
            "points; it does not say how many of them it tried."
        )
        if experiment.trial_epochs is not None or experiment.trial_images is not None:
            trial = searched[0].trial
            images = "all" if trial.limit_train is None else f"the first {trial.limit_train:,}"
            sentences.append(f"A trial has {images} training images and {trial.epochs} epochs.")
    nesterov = dict.fromkeys(
        cell.variant.label for cell in work.cells if cell.base.settings.get("nesterov")
    )
    if nesterov:
        sentences.append(f"With Nesterov's momentum, which the paper has not: {_words(nesterov)}.")
    absent = [task for task in full.protocols if task not in experiment.protocols]
    known = any(task in full.protocols for task in experiment.protocols)
    if known and absent and experiment.table == "table3":
        sentences.append(f"Not run: {', '.join(absent)}.")
    if known:
        sentences.append(
            "The paper does not say for how many epochs it trains; those of full scale are this "
            "program's choice."
        )
    return "Smaller than in the paper, or otherwise: " + " ".join(sentences)


def _task_differences(task: str, config: Config) -> list[str]:
    """What a run on a task has otherwise than at full scale."""
    if task not in SCALES["full"].protocols:
        return ["not one of the paper's tasks"]
    protocol = SCALES["full"].protocols[task]
    full = Config(**protocol.task, schedule=protocol.schedule)
    differences = []
    if config.limit_train is not None:
        differences.append(f"the first {config.limit_train:,} training images alone")
    for name, here, there in (
        ("epochs", config.epochs, full.epochs),
        ("width", config.width, full.width),
        ("images in a batch", config.batch_size, full.batch_size),
    ):
        if here != there:
            differences.append(f"{name} {here} instead of {there}")
    if config.schedule != full.schedule:
        own = _schedule(config)
        comma = "," if "," in own else ""
        differences.append(f"{own}{comma} instead of {_schedule(full)}")
    if config.augment != full.augment:
        differences.append("augmentation" if config.augment else "no augmentation")
    if config.precision != full.precision:
        differences.append(f"layers compute in {config.precision}")
    if config.data not in NAMED:
        differences.append(f"images from {source_name(config.data)}.npz")
    return differences


def _schedule(config: Config) -> str:
    schedule = config.schedule
    text = f"{schedule.name} schedule"
    if schedule.step_every is not None:
        text += f", every {schedule.step_every} epochs"
    return f"{text} with {schedule.warmup:g} epochs of warm-up" if schedule.warmup else text


def _words(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
