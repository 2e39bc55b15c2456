"""Pictures of the final runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.gauntlet.runner import Point

DPI = 100


def curves_figure(
    curves: Mapping[str, Mapping[str, Sequence[Point]]], titles: Mapping[str, str]
) -> Figure:
    """Held-out loss against steps and seconds, a row for each task.

    Args:
        curves: evaluations by task and optimizer's label; an empty one is of a run that diverged.
        titles: by task.
    """
    labels = list(dict.fromkeys(label for of_task in curves.values() for label in of_task))
    colours = dict(zip(labels, colormaps["tab10"](range(len(labels))), strict=True))
    figure = Figure(figsize=(11, 3.4 * len(curves)), dpi=DPI, layout="constrained")
    grid = figure.subplots(len(curves), 2, sharey="row", squeeze=False)
    for (task, of_task), (by_steps, by_seconds) in zip(curves.items(), grid, strict=True):
        for label, points in of_task.items():
            style = {"color": colours[label], "linewidth": 1.5}
            losses = [point.loss for point in points]
            by_steps.plot([point.step for point in points], losses, label=label, **style)
            by_seconds.plot(
                [point.processor_seconds for point in points], losses, label=label, **style
            )
        by_steps.set_title(titles[task], fontsize="small", loc="left")
        by_steps.set(xlabel="steps", ylabel="held-out loss")
        by_seconds.set_xlabel("processor seconds of training")
        for axes in (by_steps, by_seconds):
            axes.set_yscale("log")
            axes.grid(alpha=0.3, which="both")
        # What is far above the start is on its way back from a jump, and would flatten the rest.
        start = max((points[0].loss for points in of_task.values() if points), default=1.0)
        by_steps.set_ylim(top=min(by_steps.get_ylim()[1], 1.5 * start))
    figure.legend(*_legend(grid.flat), loc="outside upper center", ncols=5, fontsize="small")
    return figure


def _legend(panels: Iterable[Axes]) -> tuple[list[Artist], list[str]]:
    """A line for each label: not every panel has all of them."""
    lines = {str(line.get_label()): line for axes in panels for line in axes.get_lines()}
    return list(lines.values()), list(lines)
