"""The command started by torchrun: one writer, one message, and nothing lost whoever is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from agent import SECONDS, launch, launch_on
from command import PROGRAM, assert_identical, rows, workplace
from tekfac.runs import folder as runs
from tekfac.searches import search as searching

TASK = ["--data", "small.npz", "--network", "mlp", "--device", "cpu", "--threads", "1"]
TRAIN = ["train", *TASK, "--optimizer", "sgd", "--out", "run"]
# Kills of a rank in the test; twenty were done by hand.
KILLS = 5
EPOCHS = 24

pytestmark = [pytest.mark.usefixtures(workplace.__name__), pytest.mark.slow]


def torchrun(count: int, *arguments: str) -> Any:
    """The command by several ranks."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.Popen(
        [sys.executable, *launch, "--no-python", sys.executable, "-c", PROGRAM, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def ended(process: Any) -> tuple[int, str, list[str]]:
    """Status and output of a command, and what of its errors is the command's own, by line."""
    try:
        output, errors = process.communicate(timeout=SECONDS)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)  # it ends the ranks
            process.communicate(timeout=60)
    return process.returncode, output, own_lines(errors)


def launched(count: int, *arguments: str, **options: Any) -> tuple[int, str, list[str]]:
    """The same of a command by ranks that start at once."""
    status, output, errors = launch(count, *arguments, **options)
    return status, output, own_lines(errors)


def own_lines(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if line.startswith("tekfac: ")]


def test_one_rank_writes_and_the_same_command_goes_on() -> None:
    status, output, errors = launched(2, *TRAIN, "--epochs", "2")
    assert (status, errors) == (0, []), output
    assert re.findall(r"^ +(\d+) ", output, re.MULTILINE) == ["1", "2"]
    assert output.count("run in run") == 1
    status, output, errors = launched(2, *TRAIN, "--epochs", "3")
    assert (status, errors) == (0, []), output
    assert re.findall(r"^ +(\d+) ", output, re.MULTILINE) == ["3"]
    assert [row["epoch"] for row in rows(Path("run", runs.METRICS))] == ["1", "2", "3"]
    status, _, errors = launched(2, *TRAIN, "--epochs", "3", "--seed", "1")
    assert status == 1
    assert errors == [
        "tekfac: run holds a run of another configuration, seed 0 instead of 1: give another --out"
    ]


# A rank ends itself after some CPU time of training: which one, and when, the attempt decides.
KILLED = """\
import os, random, signal, threading, time
from tekfac.runs import ranks
weigh, begun = ranks.Group.weigh, None
attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
draw = random.Random(attempt)
victim, seconds = draw.randrange(2), draw.uniform(0, {most})
def kill():
    while time.process_time() - begun < seconds:
        time.sleep(1e-4)
    with open("kills", "a") as file:
        file.write(f"{{rank}} after {{seconds:.3f}} s\\n")
    os.kill(os.getpid(), signal.SIGKILL)
def weighed(self, share):
    global begun
    if begun is None and rank == victim and attempt < {kills}:
        begun = time.process_time()
        threading.Thread(target=kill, daemon=True).start()
    weigh(self, share)
ranks.Group.weigh = weighed
"""


def killed_and_undisturbed(kills: int, most: float, optimizer: str) -> tuple[str, str, list[str]]:
    """What two runs print, ``killed`` and ``whole``, and who was killed."""
    options = ["train", "--data", "digits", "--limit-train", "250", "--network", "mlp", "--width"]
    options += ["16", "--device", "cpu", "--threads", "1", "--batch-size", "25", "--epochs"]
    options += [str(EPOCHS), "--optimizer", optimizer, "--augment", "--schedule", "cosine"]
    status, output, errors = launched(2, *options, "--out", "whole")
    assert (status, errors) == (0, []), output
    program = KILLED.format(kills=kills, most=most)
    status, found, _ = launched(2, *options, "--out", "killed", restarts=kills, program=program)
    assert status == 0, found
    return found, output, Path("kills").read_text().splitlines()


def test_killed_ranks_cost_the_epoch_in_flight_alone() -> None:
    found, expected, kills = killed_and_undisturbed(KILLS, 0.4, "tekfac")
    assert len(kills) == KILLS, kills
    assert_same_run("killed", "whole")
    epochs = [int(each) for each in re.findall(r"^ +(\d+) ", found, re.MULTILINE)]
    # Printed when it is on disk: none is trained again that was.
    assert epochs == sorted(set(epochs))
    assert len(re.findall(r"^ +(\d+) ", expected, re.MULTILINE)) == EPOCHS


def test_two_machines_train_as_one_and_restart_together() -> None:
    """A rank of one is killed; torchrun counts that as an attempt there, and perhaps not here."""
    options = [*TRAIN[:-1], "killed", "--epochs", str(EPOCHS), "--batch-size", "20"]
    program = KILLED.format(kills=1, most=0.2)
    results = launch_on(2, 1, *options, restarts=3, program=program)
    assert [status for status, _, _ in results] == [0, 0], results
    assert Path("kills").exists()
    writers = [output for _, output, _ in results if output]
    assert len(writers) == 1
    assert "run in killed" in writers[0]
    options[options.index("killed")] = "whole"
    status, output, errors = launched(2, *options)
    assert (status, errors) == (0, []), output
    assert_same_run("killed", "whole")


def assert_same_run(one: str, other: str) -> None:
    """Bit for bit, but for the seconds."""
    tables = [rows(Path(name, runs.METRICS)) for name in (one, other)]
    for table in tables:
        assert [int(row["epoch"]) for row in table] == list(range(1, len(table) + 1))
        for row in table:
            del row["seconds"]
    assert tables[0] == tables[1]
    here, there = (torch.load(Path(name, runs.CHECKPOINT)) for name in (one, other))
    for part in ("network", "optimizer", "scheduler", "order_rng", "augmentation_rng"):
        assert_identical(here[part], there[part])


def test_interrupt_ends_all_with_one_message() -> None:
    process = torchrun(2, *TRAIN, "--epochs", "100000")
    end = time.monotonic() + SECONDS
    while not Path("run", runs.METRICS).exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    status, _, errors = ended(process)
    assert status != 0
    assert len(errors) == 1, errors
    assert re.match(r"tekfac: interrupted; the checkpoint holds \d+ of 100000 epochs\.", errors[0])
    with runs.RunFolder.open(Path("run")):  # nobody holds it
        pass


def at_a_batch(what: str, rank: int, seconds: int) -> str:
    """Lines that do something on one rank in the fifth batch, and wait for one that long."""
    return f"""\
import os, time
from datetime import timedelta
from tekfac.errors import InputError
from tekfac.runs import ranks
ranks.TIMEOUT = timedelta(seconds={seconds})
weigh, count = ranks.Group.weigh, 0
def weighed(self, share):
    global count
    count += 1
    if count == 5 and self.number == {rank} and self.count > 1:
        {what}
    weigh(self, share)
ranks.Group.weigh = weighed
"""


@pytest.mark.parametrize(
    ("what", "rank", "message"),
    [
        ("raise InputError('it went wrong here')", 1, "tekfac: it went wrong here"),
        ("raise OSError(28, 'No space left')", 0, "tekfac: No space left"),
        ("share = float('nan')", 1, "tekfac: the training loss became nan in epoch 2, batch 3."),
        ("os._exit(3)", 0, "tekfac: rank 1 lost another, which ended or did not answer ("),
        ("time.sleep(600)", 1, "tekfac: rank 0 lost another, which ended or"),
    ],
)
def test_trouble_on_one_rank_ends_all_with_one_message(what: str, rank: int, message: str) -> None:
    program = at_a_batch(what, rank, seconds=8 if "sleep" in what else 60)
    status, output, errors = launched(
        2, *TRAIN, "--epochs", "9", "--batch-size", "20", program=program
    )
    assert status != 0, output
    assert len(errors) == 1, errors
    assert errors[0].startswith(message)


def test_bad_options_are_one_message() -> None:
    status, _, errors = launched(2, *TRAIN, "--batch-size", "1")
    assert status != 0
    assert len(errors) == 1
    assert errors[0].startswith("tekfac: 2 ranks cannot share batches of 1 images: give torchrun")
    assert not Path("run").exists()


def test_search_by_ranks_that_are_killed_tries_each_point_once() -> None:
    rates = ["0.11", "0.12", "0.13"]
    options = ["search", *TASK, "--optimizer", "sgd", "--hold-out", "15", "--out", "s"]
    options += ["--grid", f"lr={','.join(rates)}", "--epochs", "12", "--no-prune"]
    program = KILLED.format(kills=1, most=0.1)
    status, output, _ = launched(2, *options, restarts=1, program=program)
    assert status == 0, output
    assert output.count("tekfac train") == 1
    assert Counter(re.findall(r"^lr ([\d.]+): finished", output, re.MULTILINE)) == Counter(rates)
    table = rows(Path("s", searching.TABLE_CSV))
    assert sorted(row["lr"] for row in table) == rates
    for rate in rates:
        metrics = rows(Path("s", searching.TRIALS, f"lr={rate}", runs.METRICS))
        assert [int(row["epoch"]) for row in metrics] == list(range(1, 13))


def test_reproduce_by_ranks() -> None:
    options = "reproduce table3 --scale smoke --optimizers sgd,tekfac --device cpu --out r"
    status, output, errors = launched(2, *options.split())
    assert (status, errors) == (0, []), output
    assert output.count("table, picture and runs in r") == 1
    found = sorted(Path("r").glob(f"**/seed*/{runs.METRICS}"))
    assert len(found) == 4
    assert all([row["epoch"] for row in rows(path)] == ["1", "2"] for path in found)
