"""The tests of what may be different on a GPU."""

from __future__ import annotations

import os
import sys
from collections import Counter
from typing import Any

import pytest

from benchmarks.gpu.part import Results, options_of

TESTS = "tests/device/test_device.py"


class Recorder:
    """Keeps what has come of each test as soon as it is known, for the time may run out."""

    def __init__(self, results: Results) -> None:
        self._results = results
        self._counts: dict[str, Counter[str]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A test's preparation, its call or its end has come to something."""
        if report.when != "call" and report.passed:
            return
        name = report.nodeid.split("::")[-1]
        counts = self._counts.setdefault(name.split("[")[0], Counter())
        counts[report.outcome] += 1
        self._results.put(
            "tests",
            [
                {"test": test, **{each: found[each] for each in ("passed", "failed", "skipped")}}
                for test, found in self._counts.items()
            ],
        )
        if report.failed:
            words = str(getattr(report.longrepr, "reprcrash", report.longrepr))
            self._results.add("failures", test=name, words=words[:300])


def main() -> int:
    """Run them; pytest's exit code."""
    options = options_of(__doc__)
    results = Results(options.out, "Tests on the device", options.device)
    os.environ["TEKFAC_DEVICE"] = options.device.type
    chosen = ["-k", "resumes and TEKFAC"] if options.tiny else []
    return int(pytest.main(["-q", "-p", "no:cacheprovider", TESTS, *chosen], [Recorder(results)]))


if __name__ == "__main__":
    sys.exit(main())
