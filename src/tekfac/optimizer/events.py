"""What was skipped or failed: counted, and said once."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

# Steps skipped in a row after which a run is called lost.
LOST = 10

NAMES = ("steps", "skipped_steps", "skipped_statistics", "failed_decompositions")


class Events:
    """Counters of a run, and one warning for each kind of trouble.

    What happens on an accelerator is counted there, and read when the host waits for it anyway.

    Attributes:
        counts: by name (see `NaturalGradient.counters`).
    """

    def __init__(self) -> None:
        self.counts = dict.fromkeys(NAMES, 0)
        self._unread: dict[str, Tensor] = {}
        self._in_a_row: Tensor | int = 0
        self._warned: set[str] = set()

    def decide(self, finite: Tensor) -> None:
        """The device takes the step if ``finite``, 0-dimensional, and else skips it."""
        self.count("skipped_steps", ~finite)
        self._in_a_row = torch.where(finite, 0, self._in_a_row + 1)

    def skip(self, what: str) -> None:
        """A step is skipped: the gradient of ``what`` is not finite."""
        self.counts["skipped_steps"] += 1
        self.warn_of("skipped_steps", what)
        self._in_a_row = self._in_a_row + 1
        self._check_lost()

    def go(self) -> None:
        """A step is taken."""
        self._in_a_row = 0

    def count(self, name: str, events: Tensor) -> None:
        """Count what happened on the device, a 0-dimensional number, without waiting for it."""
        count = self._unread.get(name)
        self._unread[name] = events.long() if count is None else count + events.to(count.device)

    def read(self) -> None:
        """Wait for what was counted on the device, and warn of it."""
        for name, count in self._unread.items():
            found = int(count)
            self.counts[name] += found
            if name == "skipped_steps":
                self.counts["steps"] -= found
            if found:
                self.warn_of(name, "a parameter" if name == "skipped_steps" else "some layers")
        self._unread.clear()
        self._check_lost()

    def _check_lost(self) -> None:
        self._in_a_row = int(self._in_a_row)
        if self._in_a_row >= LOST:
            self.warn(
                "lost",
                f"this run is lost: no gradient was finite in the last {self._in_a_row} steps, all "
                "of which were skipped, and nothing will change that. If the loss was finite "
                "before, training diverged: go back to a checkpoint, or start again, with a third "
                "of lr, and with rms_clip=1.0 if that was off. If it never was, look for inf and "
                "nan in the data and in the loss",
            )

    def load(self, counts: dict[str, int]) -> None:
        """Go on from counts that were saved."""
        self._unread.clear()
        self._in_a_row = 0
        self.counts = dict(counts)

    def warn_of(self, counter: str, what: str) -> None:
        """Warn once of steps or statistics that were skipped."""
        if counter == "skipped_steps":
            words = (
                f"the gradient of {what} is not finite: the step was skipped, parameters, momentum "
                "and curvature are as they were (counters['skipped_steps'] counts such steps)"
            )
        else:
            words = (
                f"statistics of {what} are not finite in this batch: they were "
                "left out (counters['skipped_statistics'] counts such batches)"
            )
        self.warn(counter, words)

    def warn(self, kind: str, words: str) -> None:
        """Warn once for each kind of trouble."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(words, RuntimeWarning, stacklevel=4)
