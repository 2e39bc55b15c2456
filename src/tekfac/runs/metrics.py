"""The numbers that a run is judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class EpochMetrics:
    """What one epoch came to.

    Attributes:
        epoch: counted from 1.
        train_loss, train_accuracy: means over the epoch's training images, each taken in its batch
            before that batch's step.
        test_loss, test_accuracy: means over all test images after the epoch.
        lr: the learning rate of the epoch's last step.
        seconds: training time from the start of the run to the end of this epoch, over all its
            sessions, without evaluation.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    lr: float
    seconds: float


History = Sequence[EpochMetrics]


def epochs_to(history: History, target: float) -> int | None:
    """The first epoch with at least ``target`` test accuracy, None if there is none."""
    return next((m.epoch for m in history if m.test_accuracy >= target), None)
