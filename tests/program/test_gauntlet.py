"""The gauntlet at its smallest: its tasks, runs that processes share, and what is made of them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import map as the_map
from benchmarks.gauntlet import report, search
from benchmarks.gauntlet.__main__ import main
from benchmarks.gauntlet.optimizers import CONTENDERS, TRIALS, build, trials
from benchmarks.gauntlet.report import Outcome
from benchmarks.gauntlet.runner import Job, Point, Result, Runs, evaluate, trained
from benchmarks.gauntlet.search import Choice, Plan
from benchmarks.gauntlet.sources import Sources
from benchmarks.gauntlet.tasks import TASKS
from benchmarks.gauntlet.tasks.task import Task
from processes import Started

SECONDS = 120.0
FRACTION = 0.02
SMALL = [
    *("--tasks", "regression,lstm", "--optimizers", "sgd,adamw,tekfac-defaults"),
    *("--trials", "2", "--seeds", "2", "--fraction", "0.02"),
]
RUNS = 2 * (2 * (2 + 2) + 2)


def made(name: str, folder: Path) -> Task:
    return TASKS[name](Sources({}, folder), FRACTION)


# -- tasks -----------------------------------------------------------------------------------------


def test_there_are_the_eight_tasks() -> None:
    assert len(TASKS) == 8


@pytest.mark.parametrize("name", TASKS)
def test_two_optimizers_learn_a_batch(name: str, tmp_path: Path) -> None:
    task = made(name, tmp_path)
    inputs, targets = next(task.batches(torch.Generator().manual_seed(0)))
    for optimizer_name, settings in (("adamw", {"lr": 1e-3}), ("tekfac", {"mean_damping": 1.0})):
        torch.manual_seed(0)
        network = task.network()
        optimizer = build(optimizer_name, network, task, settings)
        losses = []
        for _ in range(8):
            optimizer.zero_grad()
            loss = task.loss(network(inputs), targets)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0], optimizer_name
    # Wide layers wait for theirs longer than this.
    assert not all(block.empty for block in optimizer.blocks.values()), "there is curvature"


@pytest.mark.parametrize("name", TASKS)
def test_searches_and_final_runs_have_held_out_examples_of_their_own(
    name: str, tmp_path: Path
) -> None:
    task = made(name, tmp_path)
    search, final = task.held_out("search"), task.held_out("final")
    count = min(len(search[0]), len(final[0]))
    assert not torch.equal(search[0][:count], final[0][:count])
    torch.manual_seed(0)
    loss, score = evaluate(task.network(), task, final)
    assert math.isfinite(loss)
    assert math.isfinite(score)


def test_a_network_is_pretrained_once(tmp_path: Path) -> None:
    task = made("finetuning", tmp_path)
    first, second = task.network(), task.network()
    assert len(list(tmp_path.glob("pretrained-*.pt"))) == 1
    kept = [torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True)]
    assert all(kept[:-2])
    assert not any(kept[-2:]), "the last layer is a fresh one"


# -- optimizers ------------------------------------------------------------------------------------


def test_every_search_has_equally_many_trials() -> None:
    for task in TASKS:
        for name, contender in CONTENDERS.items():
            tried = trials(task, name, TRIALS)
            assert len({tuple(settings.items()) for settings in tried}) == len(tried)
            assert len(tried) == (TRIALS if contender.tuned else 1)


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_optimizer_trains(name: str, tmp_path: Path) -> None:
    if name in ("soap", "muon", "shampoo"):
        pytest.importorskip("heavyball" if name == "soap" else "pytorch_optimizer")
    job = Job("lstm", name, "search", trials("lstm", name, 1)[0], 0, 12)
    result = trained(made("lstm", tmp_path), job)
    assert result.status == "done"
    assert [point.step for point in result.points] == [0, 12]


def test_divergence_is_recorded(tmp_path: Path) -> None:
    job = Job("regression", "sgd", "final", {"lr": 1e6}, 0, 40)
    result = trained(made("regression", tmp_path), job)
    assert result.status == "diverged"
    assert "step" in result.message
    assert result.loss == math.inf
    runs = Runs(tmp_path, {})
    with runs.claim(job):
        runs.save(job, result)
    assert Runs(tmp_path, {}).result(job) == result


# -- runs ------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, Any]:
    """Every run of a folder, without what depends on the machine's speed."""
    found = {}
    for path in sorted(folder.rglob("*seed*.json")):
        values = json.loads(path.read_text())
        del values["elapsed"]
        for point in values["points"]:
            del point["seconds"], point["processor_seconds"]
        found[str(path.relative_to(folder))] = values
    return found


def command(folder: Path) -> list[str]:
    return [*SMALL, "--out", str(folder), "--report", str(folder / "report")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, by one process that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    main(command(folder))
    return folder


def test_a_killed_process_is_gone_on_from(whole: Path, tmp_path: Path) -> None:
    process = Started(main, command(tmp_path))
    while len(contents(tmp_path)) < 3:
        assert process.returncode is None
        time.sleep(0.01)
    process.kill()
    process.communicate(SECONDS)
    before = contents(tmp_path)
    assert len(before) < RUNS
    main(command(tmp_path))
    assert len(contents(tmp_path)) == RUNS
    assert contents(tmp_path) == contents(whole)
    assert not list(tmp_path.rglob("*.tmp"))


def test_two_processes_share_the_work(whole: Path, tmp_path: Path) -> None:
    processes = [Started(main, command(tmp_path)) for _ in range(2)]
    told = [process.communicate(SECONDS)[0].splitlines()[:-1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert all(told), "each has done some"
    assert sum(map(len, told)) == RUNS, "and none twice"
    assert contents(tmp_path) == contents(whole)


def test_the_list_says_what_is_left(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*command(tmp_path), "--list"])
    output = capsys.readouterr().out
    assert "regression sgd: 2 trials and 2 final runs left" in output
    assert "lstm tekfac-defaults: 0 trials and 2 final runs left" in output
    main([*command(whole), "--list"])
    assert capsys.readouterr().out.startswith("about 0.0 hours")


def test_the_report_is_written(whole: Path) -> None:
    text = (whole / "report" / "gauntlet.md").read_text()
    assert "scikit-learn's digits" not in text, "neither task has images"
    assert "TEKFAC, defaults" in text
    assert len((whole / "report" / "gauntlet.csv").read_text().splitlines()) == 1 + 2 * 3
    assert (whole / "report" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_another_machine_goes_on_from_a_report(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = ["--kept", str(whole / "report" / "runs.jsonl")]
    main([*command(tmp_path), *kept, "--anew", "sgd", "--list"])
    output = capsys.readouterr().out
    assert "lstm sgd: 2 trials and 2 final runs left" in output
    assert "adamw" not in output, "taken over"
    main([*command(tmp_path), *kept, "--list"])
    assert contents(tmp_path) == contents(whole)
    with pytest.raises(SystemExit):
        main([*command(tmp_path / "smaller"), *kept, "--fraction", "0.01"])
    assert "the kept runs are of {'fraction': 0.02" in capsys.readouterr().err


def test_runs_are_taken_over_from_a_report_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("lstm: 1.3\n")
    for name in ("notes.txt", "nowhere.jsonl"):
        with pytest.raises(SystemExit):
            main([*command(tmp_path), "--kept", str(tmp_path / name)])
        assert f"{name} holds no runs of the gauntlet" in capsys.readouterr().err


def test_a_folder_is_of_one_size_and_data(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*command(whole), "--fraction", "0.03"])
    assert "give another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "chess"], "there is autoencoder"),
        (["--optimizers", "lion"], "there is sgd"),
        (["--anew", "lion"], "--anew lion: there is sgd"),
        (["--data", "svhn=x.npz"], "there is mnist, cifar10"),
        (["--data", "mnist"], "give NAME=FILE.npz"),
        (["--data", "mnist=nowhere.npz"], "no such file"),
        (["--fraction", "2"], "at most 1"),
        (["--trials", "0"], "1 or more"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*arguments, "--out", str(tmp_path)])
    assert words in capsys.readouterr().err


# -- what is made of them --------------------------------------------------------------------------


def curve(*losses: float) -> Result:
    """Evaluations every ten steps, which took a second each."""
    points = [Point(10 * n, loss, 0.0, float(n), n / 2) for n, loss in enumerate(losses)]
    return Result("done", "", points, 0.0)


def outcome(*results: Result) -> Outcome:
    return Outcome(Choice({"lr": 0.1}, []), results)


LOST = Result("diverged", "", [Point(0, 5.0, 0.0, 0.0, 0.0)], 0.0)


def test_steps_to_a_target_by_hand() -> None:
    found = {
        "sgd": outcome(curve(5.0, 4.0, 3.0, 2.5), curve(5.0, 4.0, 3.0, 2.1)),
        "adamw": outcome(curve(5.0, 3.0, 2.5, 2.0), curve(5.0, 3.0, 2.5, 2.2)),
        # Means 5, 3, 2.05, 2.2: below 2.1, the mean of AdamW's 2.0 and 2.2, after 20 steps.
        "tekfac": outcome(curve(5.0, 4.0, 2.0, 2.2), curve(5.0, 2.0, 2.1, 2.2)),
        "tekfac-defaults": outcome(curve(5.0, 2.0, 1.0, 1.0), LOST),
    }
    assert report.target(found) == pytest.approx(2.1)
    reached = found["tekfac"].reached(2.1)
    assert reached is not None
    assert (reached.step, reached.seconds, reached.processor_seconds) == (20, 2.0, 1.0)
    assert found["sgd"].reached(2.1) is None
    assert found["tekfac-defaults"].reached(2.1) is None, "one of its seeds is lost"
    assert found["tekfac-defaults"].loss == math.inf
    assert found["adamw"].deviation == pytest.approx(0.2 / math.sqrt(2))


def test_goals_in_words(tmp_path: Path) -> None:
    tasks = {name: made(name, tmp_path) for name in ("autoencoder", "regression")}
    found = {
        "autoencoder": {
            "adamw": outcome(curve(5.0, 4.0, 3.0)),
            "soap": outcome(curve(5.0, 3.0, 2.0)),
            "muon": outcome(curve(5.0, 4.0, 3.0)),
            "tekfac": outcome(curve(5.0, 2.9, 2.5)),
            "tekfac-defaults": outcome(curve(5.0, 4.0, 3.1)),
        },
        "regression": {
            "adamw": outcome(curve(5.0, 4.0, 3.0)),
            "tekfac": outcome(curve(5.0, 1.0, 0.25)),
            "tekfac-defaults": outcome(curve(5.0, 1.0, 0.2)),
        },
    }
    steps, seconds, best, ahead, autoencoder, regression = report.goals(tasks, found)
    assert "**missed**, 1 of 2; not on autoencoder." in steps
    assert "**open**, 1 of 2" in seconds
    assert "**open**, 1 of 2; not on autoencoder." in best
    assert "**open**, 0 of 1; not on autoencoder." in ahead
    assert "**met** (TEKFAC after 10, TEKFAC, defaults never)" in autoencoder
    assert "**met** (TEKFAC, defaults, 15 times)" in regression


@pytest.mark.parametrize(
    ("losses", "best", "at_edge"),
    [
        ([3, 3, 2, 1, 3, 3], 3, []),
        ([1, 3, 2, 2, 3, 3], 0, ["lr"]),
        ([math.inf, 3, 2, 2, 3, math.inf], 2, []),
    ],
)
def test_a_search_chooses_the_least_loss(
    losses: Sequence[float], best: int, at_edge: list[str], tmp_path: Path
) -> None:
    plan = searched(losses, tmp_path)
    settings = trials("regression", "adamw", TRIALS)[best]
    assert plan.choice("regression", "adamw") == Choice(settings, at_edge)
    (job,) = plan.finals("regression", "adamw")
    assert (job.settings, job.part, job.steps) == (settings, "final", plan.tasks[job.task].steps)


def test_an_optimizer_all_of_whose_trials_diverge_has_no_final_runs(tmp_path: Path) -> None:
    plan = searched([math.inf] * 6, tmp_path)
    assert plan.choice("regression", "adamw") is None
    assert plan.open_jobs() == []
    report.write(plan, tmp_path / "report")
    assert "all trials diverged" in (tmp_path / "report" / "gauntlet.md").read_text()


def searched(losses: Sequence[float], folder: Path) -> Plan:
    """A plan whose search came to these losses; infinite ones diverged."""
    tasks = {"regression": made("regression", folder)}
    plan = Plan(tasks, ["adamw"], TRIALS, 1, Runs(folder, {}))
    for job, loss in zip(plan.searched("regression", "adamw"), losses, strict=True):
        with plan.runs.claim(job):
            plan.runs.save(job, curve(loss) if math.isfinite(loss) else LOST)
    return plan


def test_a_map_counts_the_cells_near_the_best(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """AdamW is near at two of five rates, TEKFAC at two of five rates with any damping but one."""
    tried = []

    def ends(task: Task, job: Job) -> Result:
        tried.append(job)
        lr, ratio = job.settings["lr"], job.settings.get("ratio", 0.0)
        if ratio > 2 and lr > 0.02:
            return Result("diverged", "", [Point(0, 1.0, 0.0, 0.0, 0.0)], 0.0)
        loss = 1.0 if lr > 0.008 else 1.0999 if lr > 0.002 else 1.2
        return Result("done", "", [Point(job.steps, loss, 0.0, 0.0, 0.0)], 0.0)

    monkeypatch.setattr(search, "trained", ends)
    given = ["--tasks", "lstm", "--fraction", "0.02", "--out", str(tmp_path)]
    the_map.main(given)
    shown = capsys.readouterr().out
    assert len(tried) == 5 + 2 * 25
    assert "| AdamW | lr | 1.2 | 1.2 | 1.2 | 1.1 | 1 |" in shown
    assert "| TEKFAC, power 0.5, lr × 10 | damping | 1 | 1 | 1 | 1 | diverged |" in shown
    cell = "56% of 25, best 1, 0% below that of AdamW"
    near = f"40% of 5, best 1 | {cell} | {cell} | 2 |"
    assert shown.rstrip().endswith(f"| lstm | {near}")
    the_map.main(given)
    assert len(tried) == 5 + 2 * 25, "what is done is not done again"
    with pytest.raises(SystemExit):
        the_map.main(["--tasks", "chess", "--out", str(tmp_path)])
    assert "--tasks chess: there is autoencoder" in capsys.readouterr().err
