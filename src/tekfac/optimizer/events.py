"""What was skipped or failed: counted, and said once."""

from __future__ import annotations

import warnings

from torch import Tensor

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
        self._warned: set[str] = set()

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

    def load(self, counts: dict[str, int]) -> None:
        """Go on from counts that were saved."""
        self._unread.clear()
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
