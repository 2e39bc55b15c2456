"""Eight tasks, ten optimizers, equal trials: searches, final runs and the report.

    python -m benchmarks.gauntlet --data mnist=mnist.npz cifar10=cifar10.npz

Each run is one file in ``--out``: interrupted, the same command goes on; started twice at the same
time, both processes share the work. The report is written when nothing is left, and all runs with
it in ``runs.jsonl``, from which another machine goes on by ``--kept``.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.gauntlet import report
from benchmarks.gauntlet.optimizers import CONTENDERS, TRIALS
from benchmarks.gauntlet.runner import Job, Result, Runs, words
from benchmarks.gauntlet.search import Plan
from benchmarks.gauntlet.sources import SHAPES, Sources
from benchmarks.gauntlet.tasks import TASKS
from benchmarks.gauntlet.tasks.task import Task
from tekfac.errors import InputError

SEEDS = 3


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what is left, and write the report."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gauntlet",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_task_arguments(parser)
    parser.add_argument(
        "--optimizers", default=",".join(CONTENDERS), help=f"of {', '.join(CONTENDERS)}"
    )
    parser.add_argument("--trials", type=int, default=TRIALS, help="of each search")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="of the final settings")
    parser.add_argument("--out", type=Path, default=Path("runs/gauntlet"), help="runs")
    parser.add_argument("--report", type=Path, default=Path("results/gauntlet"), help="tables")
    parser.add_argument(
        "--kept",
        type=Path,
        metavar="runs.jsonl",
        help="a report's runs, to go on from: they are taken over into --out",
    )
    parser.add_argument(
        "--anew", default="", help="optimizers whose kept runs don't count: they have changed"
    )
    parser.add_argument("--report-only", action="store_true", help="of what is there, and no runs")
    parser.add_argument("--list", action="store_true", help="what is left, and for how long")
    options = parser.parse_args(arguments)
    try:
        plan = _plan(options)
        if options.list:
            _list(plan)
            return
        if not options.report_only:
            torch.set_num_threads(1)
            warnings.simplefilter("ignore", RuntimeWarning)  # of steps on the way to divergence
            plan.work(tell)
        # Processes that shared the work are done with it at the same time.
        with plan.runs.alone():
            report.write(plan, options.report)
    except InputError as error:
        parser.error(str(error))
    print(f"report: {options.report / 'gauntlet.md'}")


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """What `tasks_and_runs` reads: which tasks, of which data, how large."""
    parser.add_argument("--tasks", default=",".join(TASKS), help=f"of {', '.join(TASKS)}")
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="NAME=FILE.npz",
        help="mnist= and cifar10=: a file, or the name of a data set to be downloaded; without "
        "one, scikit-learn's digits, enlarged",
    )
    parser.add_argument("--fraction", type=float, default=1.0, help="shrinks everything")


def tasks_and_runs(options: argparse.Namespace) -> tuple[dict[str, Task], Runs]:
    """The tasks asked for, by name, and the folder ``--out`` for their runs.

    Raises:
        InputError: for a task, data or a size that there is not, or a folder of other runs.
    """
    data, tasks = _data(options.data), options.tasks.split(",")
    check_known("--tasks", tasks, TASKS)
    check_known("--data", data, SHAPES)
    if not 0 < options.fraction <= 1:
        raise InputError(f"--fraction must be above 0 and at most 1, got {options.fraction}")
    sources = Sources(data, options.out)
    identity = {
        "fraction": options.fraction,
        "data": {name: sources.words(name) for name in SHAPES},
    }
    runs = Runs(options.out, identity)
    return {name: TASKS[name](sources, options.fraction) for name in tasks}, runs


def check_known(option: str, given: Iterable[str], known: Mapping[str, object]) -> None:
    """Refuse names that are not known.

    Raises:
        InputError: with those, and what there is.
    """
    if unknown := sorted(set(given) - known.keys()):
        raise InputError(f"{option} {', '.join(unknown)}: there is {', '.join(known)}")


def _plan(options: argparse.Namespace) -> Plan:
    optimizers = options.optimizers.split(",")
    check_known("--optimizers", optimizers, CONTENDERS)
    check_known("--anew", filter(None, options.anew.split(",")), CONTENDERS)
    if options.trials < 1 or options.seeds < 1:
        raise InputError("--trials and --seeds must be 1 or more")
    tasks, runs = tasks_and_runs(options)
    if options.kept is not None:
        _adopt(runs, options.kept, set(optimizers) - set(options.anew.split(",")))
    return Plan(tasks, optimizers, options.trials, options.seeds, runs)


def _adopt(runs: Runs, path: Path, optimizers: set[str]) -> None:
    try:
        runs.adopt(path.read_text(), optimizers)
    except InputError:
        raise
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"--kept {path} holds no runs of the gauntlet: {error!r}") from error


def _data(given: Sequence[str]) -> dict[str, str]:
    """Sources by name, of ``NAME=SOURCE``."""
    for entry in given:
        if "=" not in entry:
            raise InputError(f"--data {entry}: give NAME=FILE.npz")
    return dict(entry.split("=", 1) for entry in given)


def tell(job: Job, result: Result) -> None:
    """Print a line of a run that is done."""
    end = result.points[-1]
    said = f"loss {end.loss:.4g}" if result.status == "done" else result.message
    print(
        f"{job.task} {job.optimizer} {job.part} {words(job.settings)} seed={job.seed}: {said}, "
        f"{end.step} steps in {end.seconds:.1f} s, {result.elapsed:.1f} s in all",
        flush=True,
    )


def _list(plan: Plan) -> None:
    jobs = plan.open_jobs()
    for task in plan.tasks:
        for optimizer in plan.optimizers:
            left = [job for job in jobs if (job.task, job.optimizer) == (task, optimizer)]
            searches = sum(job.part == "search" for job in left)
            finals = plan.seeds if searches else len(left)
            if searches or finals:
                print(f"{task} {optimizer}: {searches} trials and {finals} final runs left")
    hours = plan.seconds_left() / 3600
    print(f"about {hours:.1f} hours for one process, {hours / 2:.1f} for two on cores of their own")


if __name__ == "__main__":
    main()
