"""Searches: every point once, whatever is killed, by held-out images alone."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.trial import TrialState
from torch import nn

from command import fork, rows, tekfac, workplace
from tekfac.cli.configuration import arguments
from tekfac.data import Dataset, load
from tekfac.errors import InputError
from tekfac.runs import folder as runs
from tekfac.runs import training
from tekfac.runs.config import Config
from tekfac.runs.metrics import EpochMetrics
from tekfac.runs.ranks import Ranks
from tekfac.runs.schedules import Schedule
from tekfac.runs.training import BatchProgress, Watcher
from tekfac.searches import grids, storages
from tekfac.searches import search as searching
from tekfac.searches.plan import Plan
from tekfac.searches.search import Search
from tekfac.searches.trials import Outcome

TASK = ["--data", "small.npz", "--network", "mlp", "--device", "cpu", "--threads", "1"]
SEARCH = ["search", *TASK, "--optimizer", "sgd", "--hold-out", "15", "--out", "s"]

pytestmark = pytest.mark.usefixtures(workplace.__name__)


def plan(grid: Mapping[str, Any], prune: bool = True, **changes: Any) -> Plan:
    defaults: dict[str, Any] = {"epochs": 2, "optimizer": "sgd", "hold_out": 15}
    task = {"data": "small.npz", "network": "mlp", **defaults, **changes}
    return Plan(Config(**task), grid, prune)


def search(plan: Plan, trials: int | None = None, watcher: Watcher | None = None) -> Search:
    """A search carried out in the folder ``s``, or as far as the watcher lets it."""
    work = Search(Path("s"), plan, plan.base.load_data(), trials)
    work.run(lambda number, total, point: watcher or Watcher(), lambda result: None)
    return work


class InterruptedAfter(Watcher):
    """Presses Ctrl-C in the batch after so many."""

    def __init__(self, batches: int) -> None:
        self._left = batches

    def on_batch(self, progress: BatchProgress) -> None:
        if self._left == 0:
            raise KeyboardInterrupt
        self._left -= 1


class Epochs(Watcher):
    """Remembers which epochs were trained."""

    def __init__(self) -> None:
        self.trained: list[int] = []

    def on_epoch(self, metrics: EpochMetrics) -> None:
        self.trained.append(metrics.epoch)


def test_search_tries_every_point_and_prints_the_command_for_the_best() -> None:
    options = ["--grid", "lr=0.001,0.1", "--grid", "momentum=0,0.9", "--epochs", "3"]
    result = tekfac(*SEARCH, *options, "--schedule", "cosine")
    assert result.exit_code == 0, result.output
    table = rows(Path("s", searching.TABLE_CSV))
    assert {(row["lr"], row["momentum"]) for row in table} == {
        (lr, momentum) for lr in ("0.001", "0.1") for momentum in ("0", "0.9")
    }
    assert {(row["outcome"], row["epochs"]) for row in table} == {("finished", "3")}
    accuracies = [float(row["held-out (%)"]) for row in table]
    assert accuracies == sorted(accuracies, reverse=True)
    markdown = Path("s", searching.TABLE_MARKDOWN).read_text().splitlines()
    assert markdown[0] == "| lr | momentum | held-out (%) | loss | epochs | seconds | outcome |"
    assert len(markdown) == 2 + 4

    command = next(line for line in result.output.splitlines() if "tekfac train" in line)
    assert tekfac(*shlex.split(command)[1:], "--out", "best").exit_code == 0
    best = Config.from_dict(json.loads(Path("best", runs.CONFIG).read_text()))
    settings = {"lr": float(table[0]["lr"]), "momentum": float(table[0]["momentum"])}
    point = ",".join(f"{key}={value}" for key, value in settings.items())
    trial = json.loads(Path("s", searching.TRIALS, point, runs.CONFIG).read_text())
    assert best.to_dict() == {**trial, "hold_out": None}
    others = {"nesterov": False, "weight_decay": 0.0}
    assert (trial["hold_out"], trial["settings"]) == (15, {**settings, **others})

    journal = Path("s", searching.JOURNAL).read_bytes()
    again = tekfac(*SEARCH, *options, "--schedule", "cosine")
    assert again.exit_code == 0
    assert command in again.output
    assert rows(Path("s", searching.TABLE_CSV)) == table
    assert Path("s", searching.JOURNAL).read_bytes().startswith(journal)
    assert "SET_TRIAL" not in Path("s", searching.JOURNAL).read_text()[len(journal) :]


def test_printed_command_is_complete() -> None:
    config = Config(
        data="small.npz",
        network="mlp",
        width=7,
        optimizer="tekfac",
        settings={"damping": 0.3, "fisher": "empirical", "scale_every": 3},
        limit_train=50,
        augment=True,
        schedule=Schedule("step", warmup=0.5, step_every=2, step_factor=0.3),
        batch_size=20,
        epochs=1,
        seed=4,
        precision="bf16",
        tensorboard=True,
    )
    assert tekfac("train", *arguments(config), "--out", "run").exit_code == 0
    assert Config.from_dict(json.loads(Path("run", runs.CONFIG).read_text())) == config


def test_search_takes_its_grid_from_a_file() -> None:
    Path("options.yaml").write_text(
        "data: small.npz\nnetwork: mlp\noptimizer: tekfac\nepochs: 1\ndevice: cpu\nout: s\n"
        "grid:\n  lr: [1e-3, 3e-3]\n  nu: 1\n"
    )
    result = tekfac("search", "--config", "options.yaml")
    assert result.exit_code == 0, result.output
    plan = json.loads(Path("s", searching.PLAN).read_text())
    assert plan["grid"] == {"lr": [0.001, 0.003], "nu": [1.0]}
    assert plan["config"]["hold_out"] == 6


def test_paper_grids() -> None:
    sizes = {
        method: {key: len(values) for key, values in grids.paper_grid(method, {}).items()}
        for method in ("sgd", "adam", "kfac", "ekfac", "tkfac", "tekfac")
    }
    assert sizes == {
        "sgd": {"lr": 10},
        "adam": {"lr": 10},
        "kfac": {"lr": 10, "damping": 10},
        "ekfac": {"lr": 10, "damping": 10},
        "tkfac": {"lr": 10, "nu": 7},
        "tekfac": {"lr": 10, "nu": 7},
    }
    assert grids.paper_grid("kfac", {"lr": 1}).keys() == {"damping"}
    assert grids.paper_grid("tekfac", {"nu": 1}).keys() == {"lr"}
    # Constant damping and trace damping take the place of each other.
    assert grids.paper_grid("tekfac", {"damping": 1}).keys() == {"lr"}


def test_random_part_of_the_grid_is_fixed_by_the_seed_and_can_grow() -> None:
    grid = {"lr": [0.01, 0.02, 0.03, 0.04], "momentum": [0.0, 0.5]}
    points = plan(grid).points()
    assert points == plan(grid).points()
    assert points != plan(grid, seed=1).points()
    search(plan(grid, epochs=1), trials=2)
    work = search(plan(grid, epochs=1), trials=3)
    assert work.complete
    settings = [dict(result.settings) for result in work.results()]
    assert len(settings) == 3
    assert all(point in settings for point in points[:3])


def test_test_images_are_never_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    test_images = load("small.npz").x_test
    evaluated, evaluate = [], training.evaluate

    def recorded(network: nn.Module, data: Dataset, ranks: Ranks) -> tuple[float, float]:
        evaluated.append(data)
        return evaluate(network, data, ranks)

    monkeypatch.setattr(training, "evaluate", recorded)
    assert tekfac(*SEARCH, "--grid", "lr=0.01,0.1", "--epochs", "2").exit_code == 0
    assert len(evaluated) == 4
    for data in evaluated:
        assert (len(data.y_train), len(data.y_test)) == (45, 15)
        for images in (data.x_train, data.x_test):
            assert not (images.flatten(1)[:, None] == test_images.flatten(1)).all(-1).any()


def test_images_held_out_are_a_fixed_random_part() -> None:
    whole = load("small.npz")
    data = whole.hold_out(15)
    parts = torch.cat([data.x_train, data.x_test])
    order = [int((whole.x_train == image).flatten(1).all(1).nonzero()) for image in parts]
    assert sorted(order) == list(range(60))
    assert order != list(range(60))
    assert torch.equal(torch.cat([data.y_train, data.y_test]), whole.y_train[order])
    assert torch.equal(data.mean, whole.mean)
    assert torch.equal(whole.hold_out(15).x_test, data.x_test)
    limited = Config(data="small.npz", limit_train=30, hold_out=10).load_data()
    assert (len(limited.y_train), len(limited.y_test)) == (20, 10)
    with pytest.raises(InputError, match="--hold-out 60 leaves nothing to train on: there are 60"):
        whole.hold_out(60)


def test_run_with_images_held_out_says_so() -> None:
    result = tekfac("train", *TASK, "--optimizer", "sgd", "--hold-out", "20", "--epochs", "1")
    assert result.exit_code == 0, result.output
    assert "held-out loss" in result.output
    assert re.search(r"^held-out accuracy [\d.]+ % after 1 epochs", result.output, re.MULTILINE)


def test_diverged_trials_are_recorded_and_do_not_end_the_search() -> None:
    result = tekfac(*SEARCH, "--grid", "lr=1e30,0.1", "--epochs", "3")
    assert result.exit_code == 0, result.output
    assert re.search(r"^lr 1e\+30: diverged, .* loss became nan in epoch 1", result.output, re.M)
    outcomes = [(row["lr"], row["outcome"]) for row in rows(Path("s", searching.TABLE_CSV))]
    assert outcomes == [("0.1", "finished"), ("1e+30", "diverged")]


def test_hopeless_trials_are_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "TRIALS_BEFORE_PRUNING", 2)
    monkeypatch.setattr(random.Random, "shuffle", lambda self, points: None)
    grid = {"lr": [0.1, 0.2, 1e-9, 0.3]}
    results = search(plan(grid, epochs=6)).results()
    assert [result.outcome for result in results] == [Outcome.FINISHED] * 3 + [Outcome.PRUNED]
    assert results[-1].settings == {"lr": 1e-9}
    assert results[-1].metrics is not None
    assert results[-1].metrics.epoch == 2
    assert not list(Path("s").glob(f"**/{runs.CHECKPOINT}"))


def test_pruning_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "TRIALS_BEFORE_PRUNING", 0)
    results = search(plan({"lr": [0.1, 0.2, 1e-9]}, prune=False, epochs=3)).results()
    assert [result.outcome for result in results] == [Outcome.FINISHED] * 3


def test_search_without_a_finished_trial_says_what_there_is() -> None:
    result = tekfac(*SEARCH, "--grid", "lr=1e30,1e31", "--epochs", "1")
    assert result.exit_code == 2
    assert result.stderr == (
        "tekfac: no trial of the search in s has finished, so that there is no best: 2 diverged. "
        "Begin another with a smaller lr, or larger damping or nu, in its --grid\n"
    )
    assert len(rows(Path("s", searching.TABLE_CSV))) == 2


def test_interrupted_trial_goes_on_from_its_last_epoch() -> None:
    grid = {"lr": [0.05, 0.1]}
    with pytest.raises(KeyboardInterrupt):
        search(plan(grid, epochs=4), watcher=InterruptedAfter(batches=3))
    watcher = Epochs()
    work = search(plan(grid, epochs=4), watcher=watcher)
    assert watcher.trained == [4, 1, 2, 3, 4]
    parts = {str(r.settings): r.metrics for r in work.results()}
    os.rename("s", "parts")
    for result in search(plan(grid, epochs=4)).results():
        part, whole = parts[str(result.settings)], result.metrics
        assert part is not None
        assert whole is not None
        assert (part.test_loss, part.test_accuracy) == (whole.test_loss, whole.test_accuracy)


@pytest.mark.parametrize("place", ["add_trial", "tell"])
@pytest.mark.parametrize("after", [False, True])
def test_process_that_dies_between_two_writes(
    monkeypatch: pytest.MonkeyPatch, place: str, after: bool
) -> None:
    grid = {"lr": [0.05, 0.1, 0.2]}
    original = getattr(searching.optuna.Study, place)
    calls = []

    def dying(*arguments: Any, **options: Any) -> Any:
        calls.append(place)
        if len(calls) < 2:
            return original(*arguments, **options)
        if after:
            original(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(searching.optuna.Study, place, dying)
        with pytest.raises(KeyboardInterrupt):
            search(plan(grid))
    results = search(plan(grid)).results()
    assert sorted(result.settings["lr"] for result in results) == [0.05, 0.1, 0.2]
    assert {result.outcome for result in results} == {Outcome.FINISHED}


def wait_for_trials(count: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if len(list(Path("s").glob(f"{searching.TRIALS}/*/{runs.METRICS}"))) >= count:
            return
        time.sleep(0.01)
    raise TimeoutError(count)


@pytest.mark.slow
def test_killed_processes_and_several_at_once_try_each_point_once() -> None:
    rates = [f"0.{number}" for number in range(11, 24) if number != 20]
    options = ["--grid", f"lr={','.join(rates)}", "--epochs", "12", "--no-prune"]
    killed = fork(*SEARCH, *options)
    wait_for_trials(2)
    killed.kill()
    killed.communicate(timeout=60)
    interrupted = fork(*SEARCH, *options)
    wait_for_trials(4)
    interrupted.send_signal(signal.SIGINT)
    assert "the same command continues where it stopped" in interrupted.communicate(timeout=60)[1]
    assert interrupted.returncode == 130

    pair = [fork(*SEARCH, *options) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    assert any("tekfac train" in output for output, _ in outputs)
    assert all(output.count(": finished") < 10 for output, _ in outputs)
    table = rows(Path("s", searching.TABLE_CSV))
    assert sorted(row["lr"] for row in table) == rates
    assert {(row["outcome"], row["epochs"]) for row in table} == {("finished", "12")}
    for rate in rates:
        metrics = rows(Path("s", searching.TRIALS, f"lr={rate}", runs.METRICS))
        assert [int(row["epoch"]) for row in metrics] == list(range(1, 13))
    lines = Path("s", searching.JOURNAL).read_text().splitlines()
    operations = [json.loads(line) for line in lines]
    ends = Counter(each["trial_id"] for each in operations if each.get("datetime_complete"))
    assert ends == dict.fromkeys(range(12), 1)
    reports = Counter(
        (each["trial_id"], each["step"]) for each in operations if "intermediate_value" in each
    )
    assert set(reports.values()) == {1}
    assert len(reports) == 12 * 12


def test_trial_of_another_process_is_left_to_it() -> None:
    grid = {"lr": [0.05, 0.1]}
    work = Search(Path("s"), plan(grid), plan(grid).base.load_data())
    claim = work._claim()
    assert claim is not None
    with claim[1]:
        other = search(plan(grid))
        assert not other.complete
        assert [r.outcome for r in other.results()] == [Outcome.FINISHED, Outcome.RUNNING]
        result = tekfac(*SEARCH, "--grid", "lr=0.05,0.1", "--epochs", "2")
        assert result.exit_code == 0, result.output
        assert "Other processes are at work on the last trials" in result.output
    assert search(plan(grid)).complete


@pytest.mark.parametrize("tail", [b'{"op_code":4,"worker_id"', b"\0\0\0\0"])
def test_line_left_half_written_by_a_crash_is_cut_off(tail: bytes) -> None:
    grid = {"lr": [0.05, 0.1]}
    search(plan(grid), trials=1)
    with Path("s", searching.JOURNAL).open("ab") as file:
        file.write(tail)
    assert len(search(plan(grid)).results()) == 2
    assert len(search(plan(grid)).results()) == 2


def test_damaged_journal_is_one_clear_message() -> None:
    search(plan({"lr": [0.05, 0.1]}), trials=1)
    journal = Path("s", searching.JOURNAL)
    journal.write_bytes(b"nonsense\n" + journal.read_bytes())
    with pytest.raises(InputError, match=r"s/trials\.journal cannot be read, it is damaged"):
        search(plan({"lr": [0.05, 0.1]}))


def test_another_search_is_not_mixed_in() -> None:
    search(plan({"lr": [0.05]}))
    for other, difference in (
        (plan({"lr": [0.05, 0.1]}), "grid.lr [0.05] instead of [0.05, 0.1]"),
        (plan({"lr": [0.05]}, epochs=3), "config.epochs 2 instead of 3"),
        (plan({"lr": [0.05]}, prune=False), "prune True instead of False"),
    ):
        with pytest.raises(InputError, match=re.escape(f"s holds another search, {difference}")):
            search(other)
    data = load("small.npz").hold_out(15)
    data.x_train[0] += 1
    with pytest.raises(InputError, match="s holds another search, data_digest"):
        Search(Path("s"), plan({"lr": [0.05]}), data)


def test_damaged_plan() -> None:
    search(plan({"lr": [0.05]}))
    Path("s", searching.PLAN).write_text("{")
    with pytest.raises(InputError, match=r"s/search\.json is not valid JSON"):
        search(plan({"lr": [0.05]}))


@pytest.mark.parametrize("name", [searching.TABLE_CSV, searching.TABLE_MARKDOWN, "trials.journal"])
def test_users_files_are_left_alone(name: str) -> None:
    Path("s").mkdir()
    Path("s", name).write_text("precious")
    with pytest.raises(InputError, match=re.escape(f"s holds {name} but no search.json")):
        search(plan({"lr": [0.05]}))
    assert os.listdir("s") == [name]
    assert Path("s", name).read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid", "nu=1"], "--grid 'nu=1': sgd has no setting 'nu'; its settings are: lr, mom"),
        (["--grid", "lr"], "--grid 'lr' must be SETTING=VALUE,... with values of type float"),
        (["--grid", "lr=fast"], "--grid 'lr=fast' must be SETTING=VALUE,... with values of type"),
        (["--grid", "lr=1", "--grid", "lr=2"], "--grid 'lr=2': lr is there twice"),
        (["--grid", "lr=nan"], "--lr must be finite, got nan"),
        (["--grid", "lr=0.1,-1"], "-1"),
        (["--grid", "lr=0.1", "--lr", "0.1"], "--lr is in the --grid too: give one"),
        (["--lr", "0.1"], "nothing to search: all settings are given"),
        (["--optimizer", "magic"], "--optimizer 'magic' is unknown"),
        (
            ["--optimizer", "tekfac", "--grid", "nu=1", "--damping", "1"],
            "--nu takes the place of --",
        ),
        (["--hold-out", "60"], "--hold-out 60 leaves nothing to train on"),
        (["--hold-out", "0"], "--hold-out must be 1 or more, got 0"),
    ],
)
def test_bad_searches(arguments: list[str], message: str, workplace: Path) -> None:
    result = tekfac(*SEARCH, *arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("tekfac: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert os.listdir(workplace) == ["small.npz"]


def test_full_disk_is_one_line_and_leaves_the_search_usable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ["--grid", "lr=0.05,0.1", "--epochs", "2"]
    fsync, calls = os.fsync, []

    def full(file: int) -> None:
        calls.append(file)
        if len(calls) > 12:
            raise OSError(28, "No space left on device")
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        result = tekfac(*SEARCH, *options)
    assert result.exit_code == 1
    assert result.stderr.startswith("tekfac: No space left on device")
    assert result.stderr.count("\n") == 1
    assert tekfac(*SEARCH, *options).exit_code == 0
    assert [row["outcome"] for row in rows(Path("s", searching.TABLE_CSV))] == ["finished"] * 2


URL = "sqlite:///shared.db"


def shared(name: str, grid: Mapping[str, Any], **changes: Any) -> Search:
    """A search in a folder of its own, on the storage that it shares with others."""
    chosen = plan(grid, **changes)
    return Search(Path(name), chosen, chosen.base.load_data(), storage=URL)


def carried_out(work: Search) -> list[float]:
    """The learning rates that a search tries now."""
    tried: list[float] = []
    work.run(lambda *point: Watcher(), lambda result: tried.append(result.settings["lr"]))
    return tried


def test_folders_share_a_storage_and_leave_trials_to_one_another() -> None:
    grid = {"lr": [0.05, 0.1, 0.2]}
    here, there = shared("here", grid), shared("there", grid, threads=2)
    claim = here._claim()
    assert claim is not None
    rate = claim[0].params["lr"]
    with claim[1]:
        tried = carried_out(there)
        assert sorted([*tried, rate]) == [0.05, 0.1, 0.2]
        assert not there.complete
        ((owner, count),) = there.elsewhere().items()
        assert f":{Path('here').resolve()} (" in owner
        assert count == 1
        assert here.elsewhere() == {}
    # Killed, the folder that began the trial goes on with it, and no other.
    assert carried_out(there) == []
    assert carried_out(shared("here", grid)) == [rate]
    assert there.complete
    assert there.results() == here.results()
    assert {result.outcome for result in here.results()} == {Outcome.FINISHED}


def test_point_begun_in_two_folders_at_once_is_tried_in_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grid = {"lr": [0.05, 0.1]}
    here, there = shared("here", grid), shared("there", grid)
    add, claims = there._study.add_trial, []

    def late(trial: Any) -> None:
        if not claims:
            claims.append(here._claim())
        add(trial)

    monkeypatch.setattr(there._study, "add_trial", late)
    (other,) = carried_out(there)
    (claim,) = claims
    assert claim is not None
    assert {claim[0].params["lr"], other} == {0.05, 0.1}
    claim[1].close()
    assert carried_out(here) == [claim[0].params["lr"]]
    assert [r.outcome for r in here.results()] == [Outcome.FINISHED] * 2


def test_trial_given_up_by_hand_is_tried_again() -> None:
    """As for a machine that does not come back."""
    grid = {"lr": [0.05, 0.1]}
    claim = shared("gone", grid)._claim()
    assert claim is not None
    claim[1].close()
    here = shared("here", grid)
    assert len(carried_out(here)) == 1
    here._study.tell(claim[0].number, state=TrialState.FAIL)
    assert carried_out(here) == [claim[0].params["lr"]]
    assert here.complete


def test_searches_on_one_storage_are_told_apart() -> None:
    for grid in ({"lr": [0.05]}, {"lr": [0.1]}):
        work = shared(f"s{grid['lr'][0]}", grid)
        assert carried_out(work) == grid["lr"]
        assert len(work.results()) == 1


def test_storage_of_a_search_cannot_be_changed() -> None:
    grid = {"lr": [0.05]}
    shared("a", grid)
    with pytest.raises(InputError, match="the search in a was begun with a --storage: give it ag"):
        Search(Path("a"), plan(grid), plan(grid).base.load_data())
    search(plan(grid))
    with pytest.raises(InputError, match="the search in s was begun without --storage: leave it"):
        shared("s", grid)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite:////nowhere/x.db", "--storage sqlite:////nowhere/x.db: .*unable to open"),
        ("postgresql+asyncpg2://me:secret@host/db", r"--storage postgresql\+asyncpg2://host/db: "),
        ("firebird://me:secret@host/db", "--storage firebird://host/db: Can't load plugin"),
        ("here.db", "--storage here.db: Could not parse"),
        ("grpc://localhost", "--storage grpc://localhost must be grpc://HOST:PORT"),
        ("grpc://localhost:1", "--storage grpc://localhost:1: .*"),
    ],
)
def test_storages_that_are_none(url: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storages, "WAIT", 1)
    result = tekfac(*SEARCH, "--grid", "lr=0.1", "--storage", url)
    assert result.exit_code == 2, result.output
    assert re.match(f"tekfac: {message}", result.stderr), result.stderr
    assert result.stderr.count("\n") == 1
    assert "secret" not in result.stderr
    assert not Path("s").exists()


def test_driver_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("psycopg", "psycopg2"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match="postgresql://host/db needs psycopg"):
        storages.open_storage("postgresql://me:secret@host/db")


GRPC_SERVER = """\
import sys
from optuna.storages import RDBStorage, run_grpc_proxy_server
run_grpc_proxy_server(RDBStorage("sqlite:///shared.db"), host="localhost", port=int(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "grpc"])
def test_two_machines_on_one_storage_try_each_point_once(kind: str) -> None:
    rates = [f"0.{number}" for number in range(11, 20)]
    options = ["--grid", f"lr={','.join(rates)}", "--epochs", "3", "--no-prune"]
    url, server = URL, None
    if kind == "grpc":
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        url = f"grpc://localhost:{port}"
        server = subprocess.Popen([sys.executable, "-c", GRPC_SERVER, str(port)])
    try:
        pair = [fork(*SEARCH[:-1], out, *options, "--storage", url) for out in ("here", "there")]
        outputs = [process.communicate(timeout=240) for process in pair]
    finally:
        if server is not None:
            server.kill()
            server.wait()
    assert [process.returncode for process in pair] == [0, 0], outputs
    done = [re.findall(r"^lr ([\d.]+): finished", output, re.MULTILINE) for output, _ in outputs]
    assert Counter(done[0] + done[1]) == Counter(rates)
    assert done[0]
    assert done[1]
    assert any("tekfac train" in output for output, _ in outputs)
    trials = [sorted(Path(out, searching.TRIALS).iterdir()) for out in ("here", "there")]
    assert [len(each) for each in trials] == [len(each) for each in done]
