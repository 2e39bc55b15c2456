"""`benchmarks.gpu` in small, on the CPU: on the day that there is a GPU, nothing is a typo."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import __main__ as kit
from benchmarks.gpu import networks, optimizers, report, steps
from benchmarks.gpu.part import Results, options_of

TINY = ["--device", "cpu", "--tiny"]


def run(
    monkeypatch: pytest.MonkeyPatch, out: Path, module: str, *arguments: str
) -> dict[str, list[dict[str, Any]]]:
    """The tables of one part, in this process."""
    file = out / "part.json"
    monkeypatch.setattr(sys, "argv", ["part", "--out", str(file), *TINY, *arguments])
    importlib.import_module(f"benchmarks.gpu.{module}").main()
    return json.loads(file.read_text())["tables"]


@pytest.mark.parametrize("name", [*networks.NAMES])
def test_every_network_makes_a_step_with_tekfac(name: str) -> None:
    if name == "resnet50":
        pytest.importorskip("torchvision")
    device = options_of_cpu().device
    task = networks.task(name, device, tiny=True)
    optimizer = optimizers.build("tekfac", task, tiny=True)
    task.loss(task.network, "bfloat16").backward()
    optimizer.step()
    assert optimizer.counters["steps"] == 1


def options_of_cpu() -> Any:
    argv = sys.argv
    try:
        sys.argv = ["part", "--out", "part.json", *TINY]
        return options_of(None)
    finally:
        sys.argv = argv


def test_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chosen = [(False, "float32", "sgd"), (False, "float32", "tekfac"), (True, "bfloat16", "tekfac")]
    assert set(chosen) < set(steps.order())
    assert len(set(steps.order())) == 2 * len(networks.PRECISIONS) * len(optimizers.NAMES)
    monkeypatch.setattr(steps, "order", lambda: chosen)
    rows = run(monkeypatch, tmp_path, "steps", "--network", "gpt2")["steps"]
    assert not any("failed" in row for row in rows)
    seen = [(row["network"], row["precision"], row["optimizer"]) for row in rows]
    assert seen == [
        ("eager", "float32", "sgd"), ("eager", "float32", "tekfac"),
        ("compiled", "bfloat16", "tekfac"),
    ]  # fmt: skip
    for ours in rows[1:]:
        assert ours["with statistics"] > ours["plain step"] > 0
        assert ours["all bases"] > ours["plain step"]


def test_an_optimizer_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(name: str, *_: object, **__: object) -> None:
        raise ValueError(f"no {name} today")

    monkeypatch.setattr(steps, "order", lambda: [(False, "float32", "sgd")])
    monkeypatch.setattr(optimizers, "build", broken)
    [row] = run(monkeypatch, tmp_path, "steps", "--network", "gpt2")["steps"]
    assert row["failed"] == "ValueError: no sgd today"


def test_soap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("heavyball")
    monkeypatch.setattr(steps, "order", lambda: [(False, "float32", "soap")])
    [row] = run(monkeypatch, tmp_path, "steps", "--network", "gpt2")["steps"]
    assert row["mean"] > 0


def test_where_a_step_goes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tables = run(monkeypatch, tmp_path, "where", "--network", "gpt2")
    parts = {row["step"]: row for row in tables["parts"]}
    assert parts.keys() == {"plain", "statistics", "basis"}
    assert parts["plain"]["preconditioning"] > 0
    assert "factors" not in parts["plain"]
    assert parts["statistics"]["factors"] > 0
    assert parts["basis"]["basis"] > 0
    assert {row["step"] for row in tables["kernels"]} == parts.keys()


def test_decompositions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tables = run(monkeypatch, tmp_path, "decompositions")
    assert [(row["width"], row["matrices"]) for row in tables["whole"]] == [
        (4, 1), (4, 6), (8, 1), (8, 6),
    ]  # fmt: skip
    assert tables["leading eigenvectors"][0]["ms"] > 0


@pytest.mark.parametrize("file", [False, True])
def test_epoch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: bool) -> None:
    arguments = []
    if file:
        np = pytest.importorskip("numpy")
        images = np.zeros((30, 32, 32, 3), np.uint8)
        labels = np.arange(30) % 10
        data = tmp_path / "images.npz"
        np.savez(data, x_train=images, y_train=labels, x_test=images, y_test=labels)
        arguments = ["--data", str(data)]
    rows = run(monkeypatch, tmp_path, "epoch", *arguments)["epochs"]
    assert [(row["optimizer"], row["steps"]) for row in rows] == [("SGD", 3), ("TEKFAC", 3)]


def test_a_part_that_fails_and_one_that_takes_too_long_are_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kit, "PACKAGES", ["torch"])
    parts = {
        "missing": kit.Part("nowhere", 20),
        "endless": kit.Part("endless", 1),
        "last": kit.Part("report", 20),
    }
    monkeypatch.setattr(kit, "PARTS", parts)
    call = kit._call

    def called(command: list[str], *rest: Any) -> Any:
        if command[2] == "benchmarks.gpu.endless":
            command = [command[0], "-c", "import time; time.sleep(600)"]
        return call(command, *rest)

    monkeypatch.setattr(kit, "_call", called)
    assert kit.main(["--out", str(tmp_path), "--parts", ",".join(parts), *TINY]) == 2
    outcomes = json.loads((tmp_path / "outcomes.json").read_text())["parts"]
    assert [(each["part"], each["status"]) for each in outcomes] == [
        ("installing", "done"), ("missing", "failed"), ("endless", "timed out"), ("last", "done"),
    ]  # fmt: skip
    page = (tmp_path / "report.md").read_text()
    assert "No module named benchmarks.gpu.nowhere" in page
    assert "| endless | timed out |" in page


def test_rows_are_there_before_a_part_ends(tmp_path: Path) -> None:
    results = Results(tmp_path / "some.json", "Some", options_of_cpu().device)
    results.add("numbers", width=3, ms=0.12345)
    results.add("numbers", width=4, failed="a | b")
    outcome = {"part": "some", "status": "timed out", "seconds": 1.0, "words": "the last line"}
    report.write(tmp_path, [outcome])
    page = (tmp_path / "report.md").read_text()
    assert "| width | ms | failed |" in page
    assert "| 3 | 0.123 |  |" in page
    assert r"| 4 |  | a \| b |" in page
    assert "the last line" in page


def test_every_part_is_a_module() -> None:
    for part in kit.PARTS.values():
        assert importlib.util.find_spec(f"benchmarks.gpu.{part.module}") is not None


@pytest.mark.slow
def test_all_of_it(tmp_path: Path) -> None:
    pytest.importorskip("heavyball")
    chosen = "tests,decompositions,where-gpt2,epoch"
    assert kit.main(["--out", str(tmp_path), "--parts", chosen, *TINY]) == 0
    assert "## Tests on the device" in (tmp_path / "report.md").read_text()
