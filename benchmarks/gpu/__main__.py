"""Everything that is to be known of tekfac on a GPU, in eight minutes and by one command.

    python -m benchmarks.gpu --data cifar10.npz

Needs this repository and Python; torch and what else is missing is installed into ``.venv`` first.
Each part is a process of its own with a time limit, and writes what it has found as it goes: one
that fails or takes too long is a row of the report, and the others run all the same. The report,
``report.md``, and all numbers, ``*.json``, are in ``$OUT``, by default results/gpu.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu import report

# Nothing here may import torch: it may not be there yet.
PACKAGES = ["torch", "torchvision", "numpy", "pytest", "heavyball>=3.2"]


@dataclass(frozen=True)
class Part:
    """A process of its own.

    Attributes:
        module: in ``benchmarks.gpu``.
        seconds: it may take.
        arguments: of the module.
    """

    module: str
    seconds: int
    arguments: tuple[str, ...] = ()


# In the order in which they are worth the time, should it end before they do.
PARTS = {
    "tests": Part("device_tests", 100),
    "steps-resnet20": Part("steps", 50, ("--network", "resnet20")),
    "steps-gpt2": Part("steps", 65, ("--network", "gpt2")),
    "where-resnet20": Part("where", 25, ("--network", "resnet20")),
    "where-gpt2": Part("where", 30, ("--network", "gpt2")),
    "decompositions": Part("decompositions", 35),
    "epoch": Part("epoch", 45),
    "steps-resnet50": Part("steps", 60, ("--network", "resnet50")),
    "steps-vgg16": Part("steps", 45, ("--network", "vgg16")),
}
TOTAL = 470


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; how many were not done."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, help="CIFAR-10 as .npz; else random images")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT", "results/gpu"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="all sizes so small that a CPU does")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="for everything")
    options = parser.parse_args(arguments)
    names = options.parts.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"{', '.join(unknown)} unknown; there is: {', '.join(PARTS)}")
    if options.data is not None and not options.data.is_file():
        parser.error(f"{options.data} is no file")
    end = time.monotonic() + options.seconds
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.json"):
        old.unlink()
    outcomes = []
    python, outcome = _python(out, end)
    outcomes.append(outcome)
    for name in names if python else []:
        outcomes.append(_run(name, python, options, out, end))
        # After each: what has been found is there even if nobody lets this end.
        report.write(out, outcomes)
    report.write(out, outcomes)
    print(f"{out / 'report.md'}", flush=True)
    return sum(outcome["status"] != "done" for outcome in outcomes)


def _python(out: Path, end: float) -> tuple[str, dict[str, object]]:
    """A Python with everything that is needed, and what it took to have it."""
    needed = [p.split(">")[0] for p in PACKAGES]
    start = time.monotonic()
    if all(importlib.util.find_spec(name) for name in needed):
        return sys.executable, _outcome("installing", "done", 0.0)
    folder = Path(".venv")
    python = folder / "bin" / "python"
    with (out / "installing.log").open("w") as log:
        for command in (
            [sys.executable, "-m", "venv", str(folder)],
            [str(python), "-m", "pip", "install", "--quiet", *PACKAGES, "-e", "."],
        ):
            code, late = _call(command, end - time.monotonic(), log, os.environ)
            if code:
                status = "timed out" if late else "failed"
                words = _tail(out / "installing.log")
                return "", _outcome("installing", status, time.monotonic() - start, words)
    return str(python), _outcome("installing", "done", time.monotonic() - start)


def _run(
    name: str, python: str, options: argparse.Namespace, out: Path, end: float
) -> dict[str, object]:
    part, start = PARTS[name], time.monotonic()
    if end - start < 5:
        return _outcome(name, "not begun", 0.0, "no time was left")
    command = [python, "-m", f"benchmarks.gpu.{part.module}", *part.arguments]
    command += ["--out", str((out / f"{name}.json").resolve()), "--device", options.device]
    if options.tiny:
        command.append("--tiny")
    if part.module == "epoch" and options.data is not None:
        command += ["--data", str(options.data)]
    path = os.pathsep.join([str(Path("src").resolve()), str(Path.cwd())])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    log_file = out / f"{name}.log"
    with log_file.open("w") as log:
        code, late = _call(command, min(part.seconds, end - start), log, environment)
    status = "timed out" if late else "failed" if code else "done"
    words = _tail(log_file) if code else ""
    return _outcome(name, status, time.monotonic() - start, words)


def _call(command: list[str], seconds: float, log: object, environment: object) -> tuple[int, bool]:
    """Exit code, and whether it had to be ended, with all that it had started."""
    process = subprocess.Popen(
        command,
        stdout=log,  # type: ignore[call-overload]
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    try:
        return process.wait(max(1.0, seconds)), False
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            return -1, True
        raise


def _outcome(name: str, status: str, seconds: float, words: str = "") -> dict[str, object]:
    print(f"{name}: {status}, {seconds:.0f} s", flush=True)
    return {"part": name, "status": status, "seconds": round(seconds, 1), "words": words}


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return "\n".join(lines[-15:])


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
