"""Tables of what the runs came to, and which goals are met."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gauntlet.curves import curves_figure
from benchmarks.gauntlet.optimizers import CONTENDERS
from benchmarks.gauntlet.runner import EVALUATIONS, Point, Result, shown, words
from benchmarks.gauntlet.search import Choice, Plan
from benchmarks.gauntlet.tasks.task import Task
from tekfac.runs.files import markdown, write_csv, write_figure, write_text

CURVATURE = ("kfac", "ekfac", "tkfac", "tekfac", "tekfac-defaults")
CSV_HEADER = (
    "task",
    "optimizer",
    "settings",
    "seeds",
    "diverged",
    "held-out loss",
    "deviation",
    "score",
    "steps to target",
    "seconds to target",
    "processor seconds to target",
    "seconds",
    "processor seconds",
)
NONE = "–"


@dataclass(frozen=True)
class Outcome:
    """What an optimizer came to on a task.

    Attributes:
        choice: what its search chose; None where all of it diverged.
        results: of the final runs, one per seed.
    """

    choice: Choice | None
    results: Sequence[Result]

    @property
    def diverged(self) -> int:
        """How many of the final runs."""
        return sum(result.status == "diverged" for result in self.results)

    @property
    def loss(self) -> float:
        """Mean of the final held-out losses; infinite if a run diverged or there is none."""
        return statistics.mean(r.loss for r in self.results) if self.results else math.inf

    @property
    def deviation(self) -> float:
        """Standard deviation of the final held-out losses over seeds; 0 of a single one."""
        if len(self.results) < 2 or self.diverged:
            return 0.0
        return statistics.stdev(result.loss for result in self.results)

    @property
    def curve(self) -> list[Point]:
        """Evaluations, each a mean over seeds; none if a run diverged."""
        if self.diverged:
            return []
        return [_mean(points) for points in zip(*(r.points for r in self.results), strict=True)]

    def reached(self, target: float) -> Point | None:
        """The first evaluation whose mean loss is ``target`` or less."""
        return next((point for point in self.curve if point.loss <= target), None)


def _mean(points: Sequence[Point]) -> Point:
    def mean(value: Callable[[Point], float]) -> float:
        return statistics.mean(map(value, points))

    return Point(
        step=points[0].step,
        loss=mean(lambda p: p.loss),
        score=mean(lambda p: p.score),
        seconds=mean(lambda p: p.seconds),
        processor_seconds=mean(lambda p: p.processor_seconds),
    )


Outcomes = Mapping[str, Outcome]
"""By optimizer."""


def outcomes(plan: Plan, task: str) -> dict[str, Outcome]:
    """What is known of a task: optimizers whose final runs are all there, or can't be."""
    found = {}
    for name in plan.optimizers:
        jobs = [*plan.searched(task, name), *plan.finals(task, name)]
        results = [plan.runs.result(job) for job in jobs]
        done = [result for result in results if result is not None]
        if len(done) == len(jobs):
            first = len(plan.searched(task, name))
            found[name] = Outcome(plan.choice(task, name), done[first:])
    return found


def target(found: Outcomes) -> float:
    """The best first-order optimizer's final loss; no loss at all if none has one."""
    losses = [found[name].loss for name in found if CONTENDERS[name].first_order]
    finite = [loss for loss in losses if math.isfinite(loss)]
    return min(finite, default=-math.inf)


def write(plan: Plan, folder: Path) -> None:
    """Write tables and curves of what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {task: outcomes(plan, task) for task in plan.tasks}
    found = {task: of_task for task, of_task in found.items() if of_task}
    rows = [row for task, of_task in found.items() for row in _csv_rows(task, of_task)]
    write_csv(folder / "gauntlet.csv", CSV_HEADER, rows)
    write_text(folder / "gauntlet.md", text(plan, found))
    write_text(folder / "runs.jsonl", plan.runs.pack(plan.jobs()))
    if found:
        curves = {
            task: {CONTENDERS[name].label: outcome.curve for name, outcome in of_task.items()}
            for task, of_task in found.items()
        }
        titles = {task: plan.tasks[task].title for task in found}
        write_figure(folder / "curves.png", curves_figure(curves, titles))


def _csv_rows(task: str, found: Outcomes) -> list[list[object]]:
    goal = target(found)
    rows: list[list[object]] = []
    for name, outcome in found.items():
        reached, curve = outcome.reached(goal), outcome.curve
        end = curve[-1] if curve else None
        rows.append(
            [
                task,
                name,
                words(outcome.choice.settings) if outcome.choice else "",
                len(outcome.results),
                outcome.diverged,
                outcome.loss,
                outcome.deviation,
                end.score if end else "",
                reached.step if reached else "",
                reached.seconds if reached else "",
                reached.processor_seconds if reached else "",
                end.seconds if end else "",
                end.processor_seconds if end else "",
            ]
        )
    return rows


def text(plan: Plan, found: Mapping[str, Outcomes]) -> str:
    """The report in Markdown."""
    parts = [
        "# The gauntlet\n",
        f"Each optimizer had {plan.trials} trials of a third of the length on each task, judged "
        "by held-out examples that the final runs are not judged by; then its best settings ran "
        f"at full length, seeds: {plan.seeds}. The learning rate of all rises over 5 % of the "
        "steps and falls to zero as a cosine. One thread a run; seconds are the processor's, of "
        f"training without evaluation, of which there are {EVALUATIONS}. The target of a task is "
        "the mean final held-out loss of the better of SGD and AdamW, as far as they ran; it is "
        "reached at the first evaluation whose mean over seeds is no more. A star: the best value "
        "of that setting was the first or last one tried.\n",
        "![Held-out loss against steps and seconds](curves.png)\n",
        "## Goals\n",
        "".join(f"- {line}\n" for line in goals(plan.tasks, found)),
        "## Final held-out loss\n",
        _summary(plan.tasks, found),
    ]
    for task, of_task in found.items():
        parts += [f"## {task}\n", _task_table(plan.tasks[task], of_task)]
    parts += ["## What searches tried\n", _grids(plan)]
    return "\n".join(parts)


def _summary(tasks: Mapping[str, Task], found: Mapping[str, Outcomes]) -> str:
    names = [name for name in CONTENDERS if any(name in of_task for of_task in found.values())]
    rows = []
    for task, of_task in found.items():
        best = min((outcome.loss for outcome in of_task.values()), default=math.inf)
        cells = []
        for name in names:
            cell = _loss(of_task[name]) if name in of_task else NONE
            is_best = name in of_task and of_task[name].loss == best < math.inf
            cells.append(f"**{cell}**" if is_best else cell)
        rows.append([task, *cells])
    return markdown(["task", *(CONTENDERS[name].label for name in names)], rows)


def _task_table(task: Task, found: Outcomes) -> str:
    goal = target(found)
    header = [
        "optimizer",
        "settings",
        "held-out loss",
        task.score_name,
        "steps to target",
        "seconds to target",
        "seconds",
        "by the clock on the wall",
    ]
    rows = []
    for name, outcome in found.items():
        reached, curve = outcome.reached(goal), outcome.curve
        rows.append(
            [
                CONTENDERS[name].label,
                _settings(outcome.choice),
                _loss(outcome),
                f"{curve[-1].score:.4g}" if curve else NONE,
                str(reached.step) if reached else NONE,
                f"{reached.processor_seconds:.1f}" if reached else NONE,
                f"{curve[-1].processor_seconds:.1f}" if curve else NONE,
                f"{curve[-1].seconds:.1f}" if curve else NONE,
            ]
        )
    target_words = f"Target {goal:.4g}." if math.isfinite(goal) else "No target yet."
    words_ = f"{task.title}; {task.steps} steps. Data: {task.data}. {target_words}\n"
    return "\n".join([words_, markdown(header, rows)])


def _settings(choice: Choice | None) -> str:
    if choice is None:
        return "all trials diverged"
    shown = [
        words({name: value}) + ("\\*" if name in choice.at_edge else "")
        for name, value in choice.settings.items()
    ]
    return ", ".join(shown) or "defaults"


def _loss(outcome: Outcome) -> str:
    if not outcome.results:
        return NONE
    if outcome.diverged:
        return f"{outcome.diverged} of {len(outcome.results)} diverged"
    deviation = f" ± {outcome.deviation:.2g}" if len(outcome.results) > 1 else ""
    return f"{outcome.loss:.4g}{deviation}"


def _grids(plan: Plan) -> str:
    rows = []
    for name in plan.optimizers:
        tried: dict[str, list[str]] = {}
        for task in plan.tasks:
            settings = [job.settings for job in plan.searched(task, name)]
            keys = settings[0] if settings else ()
            values = (
                f"{key} {', '.join(shown(v) for v in sorted({s[key] for s in settings}))}"
                for key in keys
            )
            tried.setdefault(" × ".join(values) or "nothing", []).append(task)
        grids = "; ".join(
            grid if len(tried) == 1 else f"{grid} ({', '.join(tasks)})"
            for grid, tasks in tried.items()
        )
        rows.append([CONTENDERS[name].label, grids, CONTENDERS[name].fixed or NONE])
    return markdown(["optimizer", "tried", "fixed"], rows)


# -- goals -----------------------------------------------------------------------------------------


def goals(tasks: Mapping[str, Task], found: Mapping[str, Outcomes]) -> list[str]:
    """What was aimed at, and how far it was met, in words."""
    lines = [
        _tally(
            "TEKFAC with its defaults reaches tuned AdamW's final loss in fewer steps than AdamW "
            "on all eight",
            8,
            found,
            lambda of_task: _sooner(of_task, lambda point: point.step),
        ),
        _tally(
            "in fewer seconds on six",
            6,
            found,
            lambda of_task: _sooner(of_task, lambda point: point.processor_seconds),
        ),
        _tally(
            "Tuned TEKFAC's final held-out loss is the best or level with it, nearer than the "
            "larger of both deviations over seeds, on seven",
            7,
            found,
            _level_with_best,
        ),
        _tally("it is ahead of SOAP and Muon on five", 5, found, _ahead_of_soap_and_muon),
    ]
    if "autoencoder" in found:
        lines.append(_autoencoder(found["autoencoder"]))
    if "regression" in found:
        lines.append(_regression(found["regression"]))
    return lines


def _tally(
    aim: str,
    wanted: int,
    found: Mapping[str, Outcomes],
    holds: Callable[[Outcomes], bool | None],
) -> str:
    verdicts = {task: holds(of_task) for task, of_task in found.items()}
    won = [task for task, verdict in verdicts.items() if verdict]
    lost = [task for task, verdict in verdicts.items() if verdict is False]
    if len(won) >= wanted:
        verdict = "met"
    elif len(lost) > 8 - wanted:
        verdict = "missed"
    else:
        verdict = "open"
    words_ = f"{aim}: **{verdict}**, {len(won)} of {len(won) + len(lost)}"
    return words_ + (f"; not on {', '.join(lost)}." if lost else ".")


def _sooner(found: Outcomes, clock: Callable[[Point], float]) -> bool | None:
    if not {"adamw", "tekfac-defaults"} <= found.keys():
        return None
    goal = found["adamw"].loss
    own, other = (found[name].reached(goal) for name in ("tekfac-defaults", "adamw"))
    return own is not None and (other is None or clock(own) < clock(other))


def _level_with_best(found: Outcomes) -> bool | None:
    if "tekfac" not in found or len(found) < 2:
        return None
    own = found["tekfac"]
    # Not against itself.
    others = (found[name] for name in found if name != "tekfac-defaults")
    best = min(others, key=lambda outcome: outcome.loss)
    return own.loss <= best.loss + max(own.deviation, best.deviation) < math.inf


def _ahead_of_soap_and_muon(found: Outcomes) -> bool | None:
    if not {"tekfac", "soap", "muon"} <= found.keys():
        return None
    return found["tekfac"].loss < min(found["soap"].loss, found["muon"].loss)


def _autoencoder(found: Outcomes) -> str:
    aim = "The autoencoder reaches AdamW's final loss in at most 100 steps"
    own = [name for name in ("tekfac", "tekfac-defaults") if name in found]
    if "adamw" not in found or not own:
        return f"{aim}: **open**."
    reached = {name: found[name].reached(found["adamw"].loss) for name in own}
    steps = [point.step for point in reached.values() if point is not None]
    shown = ", ".join(
        f"{CONTENDERS[name].label} " + (f"after {point.step}" if point else "never")
        for name, point in reached.items()
    )
    return f"{aim}: **{'met' if steps and min(steps) <= 100 else 'missed'}** ({shown})."


def _regression(found: Outcomes) -> str:
    aim = "In the regression a curvature method is ten times ahead of SGD and AdamW in loss"
    own = {name: found[name].loss for name in CURVATURE if name in found}
    goal = target(found)
    if not own or not math.isfinite(goal):
        return f"{aim}: **open**."
    best = min(own, key=lambda name: own[name])
    ratio = goal / own[best]
    verdict = "met" if ratio >= 10 else "missed"
    return f"{aim}: **{verdict}** ({CONTENDERS[best].label}, {ratio:.3g} times)."
