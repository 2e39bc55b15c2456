"""Pictures of runs. Every function returns a figure; nothing here touches files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from tekfac.runs.metrics import EpochMetrics, History

DPI = 120

# Okabe and Ito's colours, which the colour-blind can tell apart, without the yellow.
COLOURS = ("#000000", "#E69F00", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#56B4E9")
MARKERS = "osv^DPX"


def run_figure(history: History, title: str) -> Figure:
    """Loss and accuracy of one run against epochs."""
    figure = Figure(figsize=(9, 3.6), dpi=DPI, layout="constrained")
    figure.suptitle(title)
    loss, accuracy = figure.subplots(1, 2)
    epochs = [m.epoch for m in history]
    marker = "o" if len(history) <= 20 else ""
    style = {"marker": marker, "markersize": 3.5}
    loss.plot(epochs, [m.train_loss for m in history], label="training", **style)
    loss.plot(epochs, [m.test_loss for m in history], label="test", **style)
    loss.set(xlabel="epoch", ylabel="cross-entropy (nats)", yscale="log", title="Loss")
    accuracy.plot(epochs, [100 * m.train_accuracy for m in history], label="training", **style)
    accuracy.plot(epochs, [100 * m.test_accuracy for m in history], label="test", **style)
    accuracy.set(xlabel="epoch", ylabel="accuracy (%)", title="Accuracy")
    for axes in (loss, accuracy):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def comparison_figure(runs: Mapping[str, Sequence[History]], title: str, target: float) -> Figure:
    """Test accuracy and training loss of several methods, against epochs and against seconds.

    Args:
        runs: for each method's label the histories of its seeds; methods without one are left out.
        title: what all of them were trained on.
        target: a test accuracy, from 0 to 1, marked by a dashed line.

    The axis of accuracy leaves out what is more than six times as far from 100 % as the worst run
    is in the end: seen whole, the first epochs would flatten all that is worth seeing.
    """
    runs = {label: histories for label, histories in runs.items() if histories}
    figure = Figure(figsize=(10, 7), dpi=DPI, layout="constrained")
    figure.suptitle(title)
    (accuracy_epochs, accuracy_seconds), (loss_epochs, loss_seconds) = figure.subplots(
        2, 2, sharey="row", sharex="col"
    )
    for label, histories in runs.items():
        epochs = _over_seeds(histories, lambda m: m.epoch)[0]
        seconds = _over_seeds(histories, lambda m: m.seconds)[0]
        accuracy = _over_seeds(histories, lambda m: 100 * m.test_accuracy)
        loss = _over_seeds(histories, lambda m: m.train_loss)
        _band(accuracy_epochs, epochs, accuracy, label)
        _band(accuracy_seconds, seconds, accuracy, label)
        _band(loss_epochs, epochs, loss, label)
        _band(loss_seconds, seconds, loss, label)
    for axes in (accuracy_epochs, accuracy_seconds):
        axes.axhline(100 * target, color="0.4", linewidth=1, linestyle="--")
    accuracy_epochs.set_ylabel("test accuracy (%)")
    _leave_out_beginnings(accuracy_epochs, [h for each in runs.values() for h in each])
    loss_epochs.set(ylabel="training loss (nats)", yscale="log", xlabel="epochs")
    loss_epochs.xaxis.set_major_locator(MaxNLocator(integer=True))
    loss_seconds.set_xlabel("training time (seconds)")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    if runs:
        accuracy_epochs.legend(loc="lower right")
    return figure


@dataclass(frozen=True)
class Panel:
    """One diagram of test accuracies.

    Attributes:
        title: what it shows.
        runs: for each label the histories of its seeds; a label without one is left out.
        against: what is on the horizontal axis.
        in_order: whether the labels are values of one setting, in order.
    """

    title: str
    runs: Mapping[str, Sequence[History]]
    against: Literal["epochs", "seconds"]
    in_order: bool = False


def accuracy_figure(rows: Sequence[Sequence[Panel]], title: str) -> Figure:
    """Test accuracies, mean and a band of ± standard deviation over seeds.

    Args:
        rows: panels in rows of equal length; those of a row share the vertical axis, which leaves
            beginnings out as that of ``comparison_figure`` does. A panel has a legend if the one
            to the right of it has other labels.
        title: stands above all.
    """
    figure = Figure(figsize=(5.2 * len(rows[0]), 3.6 * len(rows)), dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize="medium")
    grid = figure.subplots(len(rows), len(rows[0]), sharey="row", squeeze=False)
    for row, line in zip(rows, grid, strict=True):
        for number, (panel, axes) in enumerate(zip(row, line, strict=True)):
            _draw(axes, panel)
            last = number == len(row) - 1
            drawn = any(panel.runs.values())
            if drawn and (last or row[number + 1].runs.keys() != panel.runs.keys()):
                axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small")
        line[0].set_ylabel("test accuracy (%)")
        _leave_out_beginnings(line[0], [h for p in row for each in p.runs.values() for h in each])
    return figure


def _draw(axes: Axes, panel: Panel) -> None:
    shades = colormaps["viridis"](np.linspace(0, 0.88, len(panel.runs)))
    for number, (label, histories) in enumerate(panel.runs.items()):
        if not histories:
            continue
        accuracy = _over_seeds(histories, lambda m: 100 * m.test_accuracy)
        deviation = np.zeros_like(accuracy[0])
        if len(histories) > 1:
            table = [[100 * m.test_accuracy for m in h[: len(deviation)]] for h in histories]
            deviation = np.std(table, axis=0, ddof=1)
        x = _over_seeds(histories, lambda m: m.epoch if panel.against == "epochs" else m.seconds)[0]
        colour = shades[number] if panel.in_order else COLOURS[number % len(COLOURS)]
        mean = accuracy[0]
        axes.plot(
            x,
            mean,
            label=label,
            color=colour,
            linewidth=1.6,
            marker=MARKERS[number % len(MARKERS)],
            markersize=4,
            markevery=max(1, len(x) // 10),
        )
        axes.fill_between(
            x, mean - deviation, mean + deviation, color=colour, alpha=0.15, linewidth=0
        )
    axes.set_title(panel.title, fontsize="medium")
    axes.set_xlabel("epochs" if panel.against == "epochs" else "training time (seconds)")
    if panel.against == "epochs":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def _leave_out_beginnings(axes: Axes, histories: Sequence[History]) -> None:
    """Begin the axis of accuracies where it serves to tell the ends of the runs apart."""
    worst = min((100 * history[-1].test_accuracy for history in histories), default=0.0)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 100 - 6 * (100 - worst) - 0.5), min(high, 100.2))


Summary = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]


def _over_seeds(histories: Sequence[History], value: Callable[[EpochMetrics], float]) -> Summary:
    """Mean, least and greatest over seeds, epoch by epoch, as far as all seeds got."""
    length = min(len(history) for history in histories)
    table = np.array([[value(m) for m in history[:length]] for history in histories])
    return table.mean(axis=0), table.min(axis=0), table.max(axis=0)


def _band(axes: Axes, x: NDArray[np.float64], summary: Summary, label: str) -> None:
    mean, low, high = summary
    (line,) = axes.plot(x, mean, label=label, linewidth=1.6)
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
