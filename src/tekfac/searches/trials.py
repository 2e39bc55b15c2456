"""Trials of a search, and what they came to."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from optuna.trial import FrozenTrial, TrialState

from tekfac.runs.metrics import EpochMetrics
from tekfac.runs.optimizers import read_settings
from tekfac.searches.grids import Point

# Names of trials' attributes in the journal.
METRICS = "metrics"
DIVERGED = "diverged"


class Outcome(str, Enum):
    """What has become of a trial."""

    FINISHED = "finished"
    PRUNED = "pruned"
    DIVERGED = "diverged"
    RUNNING = "running"


@dataclass(frozen=True)
class Result:
    """A trial and what it came to.

    Attributes:
        settings: its point of the grid.
        outcome: pruned and diverged trials ended early.
        metrics: those of its last epoch, on held-out images; None if it has got through none.
        reason: of a diverged trial what was not finite, and when.
    """

    settings: Point
    outcome: Outcome
    metrics: EpochMetrics | None
    reason: str | None


def result_of(trial: FrozenTrial) -> Result:
    """What a trial in the journal has come to."""
    values = trial.user_attrs.get(METRICS)
    metrics = None if values is None else EpochMetrics(**values)
    reason = trial.user_attrs.get(DIVERGED)
    if trial.state == TrialState.COMPLETE:
        outcome = Outcome.FINISHED
    elif trial.state == TrialState.RUNNING:
        outcome = Outcome.RUNNING
    else:
        outcome = Outcome.PRUNED if reason is None else Outcome.DIVERGED
    return Result(read_settings(trial.params), outcome, metrics, reason)


def rank(result: Result) -> tuple[bool, bool, float, float]:
    """Sorts results, best first: those that finished before those that did not."""
    unfinished, metrics = result.outcome != Outcome.FINISHED, result.metrics
    if metrics is None:
        return unfinished, True, 0.0, 0.0
    return unfinished, False, -metrics.test_accuracy, metrics.test_loss


def row(result: Result) -> list[str]:
    """A row of a search's table."""
    settings = [as_text(value) for value in result.settings.values()]
    metrics = result.metrics
    if metrics is None:
        return [*settings, "–", "–", "0", "–", result.outcome.value]
    return [
        *settings,
        f"{100 * metrics.test_accuracy:.2f}",
        f"{metrics.test_loss:.4f}",
        str(metrics.epoch),
        f"{metrics.seconds:.1f}",
        result.outcome.value,
    ]


def as_text(value: object) -> str:
    """A setting's value, in short."""
    return f"{value:g}" if isinstance(value, float) else str(value)
