"""Is what `make build` made whole, and does it work where the source is not seen?

The wheel and the sdist in `dist/` are compared with the source; then the wheel is installed into an
empty virtual environment, where the README's first program is run as it stands.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"

# What the README's loop takes for granted: a model, and batches.
BEFORE = """\
import torch
from torch import nn
from torch.nn import functional as F

import tekfac

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 3))
weights = torch.randn(20, 3)
inputs = [torch.randn(64, 20) for _ in range(100)]
loader = [(x, (x @ weights).argmax(1)) for x in inputs]
before = F.cross_entropy(model(inputs[0]), loader[0][1])
"""
AFTER = """
after = F.cross_entropy(model(inputs[0]), loader[0][1])
print(f"loss {before:.3f} before, {after:.3f} after")
assert after < before / 2
print(tekfac.__file__)
"""


def main() -> None:
    [wheel], [sdist] = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    check_contents(wheel, sdist)
    with tempfile.TemporaryDirectory() as folder:
        check_installed(wheel, Path(folder))
    print(f"{wheel.name} and {sdist.name} are whole, and work.")


def check_contents(wheel: Path, sdist: Path) -> None:
    """Raise SystemExit if a file of the source is missing."""
    package = sources(ROOT / "src") | {"tekfac/py.typed"}
    report_missing(wheel, package - set(zipfile.ZipFile(wheel).namelist()))

    with tarfile.open(sdist) as archive:
        # Below the folder that all of it is in.
        kept = {name.partition("/")[2] for name in archive.getnames()}
    needed = {f"src/{name}" for name in package}
    for part in ("tests", "benchmarks"):
        needed |= {f"{part}/{name}" for name in sources(ROOT / part)}
    needed |= {"pyproject.toml", "README.md", "CONTRIBUTING.md", "LICENSE", "CHANGELOG.md"}
    report_missing(sdist, needed - kept)


def sources(folder: Path) -> set[str]:
    """Python files and what tests compare with, relative to the folder."""
    found = [*folder.rglob("*.py"), *folder.glob("*.txt")]
    return {path.relative_to(folder).as_posix() for path in found}


def report_missing(archive: Path, missing: set[str]) -> None:
    if missing:
        sys.exit(f"{archive.name} lacks {', '.join(sorted(missing))}")


def check_installed(wheel: Path, folder: Path) -> None:
    """Raise if the README's loop does not train with the wheel alone."""
    environment = folder / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    # The version that the tests run with, whatever it was built for.
    torch = f"torch=={version('torch').partition('+')[0]}"
    run(python, "-m", "pip", "install", "--quiet", torch, wheel)
    program = folder / "loop.py"
    program.write_text(BEFORE + first_program() + AFTER, encoding="utf-8")
    # Isolated: neither PYTHONPATH nor the current folder is looked at.
    output = run(python, "-I", program)
    print(output, end="")
    if not Path(output.splitlines()[-1]).is_relative_to(environment):
        sys.exit("the package that ran is not the one installed")


def first_program() -> str:
    """The README's first block of Python."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    if found is None:
        sys.exit("README.md has no block of Python")
    return found[1]


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} ended with {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    main()
