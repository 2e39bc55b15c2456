"""The ``tekfac`` command's entry point, which also works where its extra is not installed."""

from __future__ import annotations

import sys

EXTRA = {
    "filelock",
    "matplotlib",
    "numpy",
    "optuna",
    "PIL",
    "rich",
    "scipy",
    "sklearn",
    "torchvision",
    "typer",
    "yaml",
}


def main() -> None:
    """Run the command line; exits with the command's status."""
    try:
        from tekfac.cli.app import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in EXTRA:
            raise
        print(
            f"tekfac: the command needs {error.name}, which is not installed: "
            "pip install 'tekfac[train]'",
            file=sys.stderr,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    run()
