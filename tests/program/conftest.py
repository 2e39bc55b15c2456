"""Pictures of runs are made, but drawn only for tests that look at them: it takes most of a run."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import pytest
from matplotlib.figure import Figure


@pytest.fixture
def drawn() -> None:
    """For a test that looks at pictures."""


@pytest.fixture(autouse=True)
def sketched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere a picture's file is no picture."""

    def sketch(figure: Figure, file: IO[bytes] | Path, **options: Any) -> None:
        write = file.write_bytes if isinstance(file, Path) else file.write
        write(b"not drawn")

    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(Figure, "savefig", sketch)
