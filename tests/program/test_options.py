"""Options, declared once: what the command line, files and kept configurations make of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner, Result

from command import rows, tekfac, workplace
from tekfac.cli.configuration import arguments
from tekfac.cli.options import Given, Panel, command, given
from tekfac.runs import folder as runs
from tekfac.runs.config import Config
from tekfac.runs.optimizers import METHODS, SETTINGS, read_settings
from tekfac.runs.options import Option, declarations
from tekfac.runs.schedules import Schedule

pytestmark = pytest.mark.usefixtures(workplace.__name__)


@dataclass(frozen=True)
class Tea:
    kind: Annotated[str, Option("Which leaves.", name="leaves")] = "assam"
    minutes: Annotated[float, Option()] = 3.0
    sugar: Annotated[int | None, Option("Lumps.", default="as you like")] = None
    milk: Annotated[bool, Option("Milk first.")] = False
    warmth: Annotated[float | Literal["hot", "iced"], Option()] = "hot"
    pot: Annotated[str, Option("The pot.", hidden=True)] = "brown"
    guests: int = 1


def brew(*arguments: str) -> tuple[Result, dict[str, Any]]:
    """A command with these options: what became of it, and what it was told."""
    told: dict[str, Any] = {}

    @command(without=["pot"], help={"milk": "Milk last."})
    def make(
        *,
        context: typer.Context,
        tea: Annotated[Given[Tea], Panel("Tea")],
        sugar: Annotated[list[str] | None, typer.Option(help="Lumps for each guest.")] = None,
        cups: int = 2,
    ) -> None:
        """Make tea."""
        told.update(tea=tea.values, sugar=sugar, cups=cups, given=given(context))

    app = typer.Typer()
    app.command()(make)
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "100"}), told


def test_declarations_have_types_defaults_and_help() -> None:
    found = declarations(Tea)
    assert list(found) == ["leaves", "minutes", "sugar", "milk", "warmth", "pot"]
    assert [each.type for each in found.values()] == [str, float, int, bool, float, str]
    assert (found["leaves"].field, found["leaves"].default) == ("kind", "assam")
    assert found["warmth"].words == ("hot", "iced")
    assert [each.help for each in found.values()] == [
        "Which leaves. (default: assam)",
        "(default: 3)",
        "Lumps. (default: as you like)",
        "Milk first. (default: no)",
        "(default: hot)",
        "The pot. (default: brown)",
    ]


def test_text_is_read_in_the_declared_type() -> None:
    found = declarations(Tea)
    assert found["minutes"].read("4") == 4.0
    assert found["minutes"].read(4.5) == 4.5
    assert found["milk"].read("true") is True
    assert [found["warmth"].read(text) for text in ("60", "iced", "tepid")] == [60, "iced", "tepid"]
    for option, text in (("minutes", "long"), ("milk", "yes"), ("sugar", "1.5")):
        with pytest.raises(ValueError, match=text):
            found[option].read(text)


def test_command_is_told_what_was_given_and_nothing_else() -> None:
    result, told = brew()
    assert result.exit_code == 0, result.output
    assert told == {"tea": {}, "sugar": None, "cups": 2, "given": set()}
    # A default that is given is given.
    arguments = "--leaves assam --no-milk --warmth 60 --sugar 1 --sugar 2 --cups 2"
    result, told = brew(*arguments.split())
    assert result.exit_code == 0, result.output
    assert told["tea"] == {"kind": "assam", "milk": False, "warmth": 60.0}
    assert (told["sugar"], told["cups"]) == (["1", "2"], 2)
    assert told["given"] == {"leaves", "milk", "warmth", "sugar", "cups"}


def test_file_gives_what_the_command_line_does_not() -> None:
    Path("tea.yaml").write_text("leaves: darjeeling\nminutes: 4\nmilk: yes\nsugar: [1, 2]\n")
    result, told = brew("--config", "tea.yaml", "--minutes", "5")
    assert result.exit_code == 0, result.output
    assert told["tea"] == {"kind": "darjeeling", "minutes": 5.0, "milk": True}
    assert told["given"] == {"leaves", "minutes", "milk", "sugar"}
    Path("tea.yaml").write_text("pot: blue\n")
    result, _ = brew("--config", "tea.yaml")
    assert (result.exit_code, result.stderr) == (2, "tekfac: tea.yaml: there is no option --pot\n")


def test_help_of_a_command() -> None:
    result, _ = brew("--help")
    words = " ".join(result.output.replace("│", " ").split())
    assert "Make tea." in words
    assert words.index(" Options ") < words.index("Lumps for each guest.") < words.index(" Tea ")
    assert "--leaves <str> Which leaves. (default: assam)" in words
    assert "--milk --no-milk <bool> Milk last." in words
    assert "--warmth <float> (default: hot)" in words
    assert "--pot" not in words
    assert "as you like" not in words


def test_every_setting_of_every_optimizer_is_declared() -> None:
    for name, method in METHODS.items():
        for key, value in method.defaults.items():
            declared = SETTINGS[key]
            assert type(value) is declared.type or value in declared.words, (name, key)
        assert method.alternatives.keys() <= SETTINGS.keys()


def test_options_are_what_a_run_keeps() -> None:
    kept = Config().to_dict()
    assert {each.field for each in declarations(Config).values()} == kept.keys() - {
        "optimizer",
        "settings",
        "schedule",
    }
    assert {each.field for each in declarations(Schedule).values()} == kept["schedule"].keys()


TRAIN = ["train", "--data", "small.npz", "--network", "cnn", "--width", "2"]
TRAIN += ["--device", "cpu", "--threads", "1", "--epochs", "1"]


def test_a_number_is_one_configuration_however_it_is_written() -> None:
    Path("four.yaml").write_text("fc-scale: 4\n")
    ways = (["--fc-scale", "4"], ["--fc-scale", "4.0"], ["--config", "four.yaml"])
    texts = set()
    for number, way in enumerate(ways):
        result = tekfac(*TRAIN, *way, "--out", f"{number}")
        assert result.exit_code == 0, result.output
        texts.add(Path(f"{number}", runs.CONFIG).read_text())
    (text,) = texts
    assert json.loads(text)["settings"]["fc_scale"] == 4.0
    assert tekfac(*TRAIN, "--fc-scale", "auto", "--out", "auto").exit_code == 0
    assert json.loads(Path("auto", runs.CONFIG).read_text())["settings"]["fc_scale"] == "auto"
    result = tekfac(*TRAIN, "--fc-scale", "steep", "--out", "steep")
    assert result.exit_code == 2
    assert "fc_scale must be" in result.stderr
    assert read_settings({"fc_scale": "4", "fisher": "mc"}) == {"fc_scale": 4.0, "fisher": "mc"}


# As it was written while fc_scale was text.
KEPT = """{
  "data": "digits",
  "image_size": null,
  "data_dir": null,
  "limit_train": 200,
  "hold_out": null,
  "augment": false,
  "network": "cnn",
  "width": 4,
  "optimizer": "tekfac",
  "settings": {
    "lr": 0.0001,
    "damping": 0.0001,
    "momentum": 0.9,
    "nesterov": false,
    "weight_decay": 0.0,
    "fisher": "mc",
    "factor_every": 10,
    "basis_every": 20,
    "rank": 512,
    "first_order_lr": 0.001,
    "scale_every": 10,
    "fc_scale": "4"
  },
  "epochs": 1,
  "batch_size": 64,
  "schedule": {
    "name": "constant",
    "warmup": 0.0,
    "step_every": null,
    "step_factor": null
  },
  "seed": 0,
  "device": "cpu",
  "precision": "fp32",
  "compile": false,
  "tensorboard": false,
  "threads": 1
}
"""


def test_run_kept_before_goes_on() -> None:
    options = "--limit-train 200 --width 4 --fc-scale 4 --epochs 1 --device cpu --threads 1"
    assert tekfac("train", *options.split(), "--out", "run").exit_code == 0
    config = Path("run", runs.CONFIG)
    assert config.read_text() == KEPT.replace('"4"', "4.0")
    config.write_text(KEPT)
    result = tekfac("train", "--resume", "run", "--epochs", "2")
    assert result.exit_code == 0, result.output
    assert len(rows(Path("run", runs.METRICS))) == 2
    assert json.loads(config.read_text())["settings"]["fc_scale"] == 4.0


SEARCH = ["search", *TRAIN[1:], "--grid", "lr=1e-4,1e-3", "--grid", "fc_scale=4"]
SEARCH += ["--damping", "1e-3", "--out", "s"]


def test_search_kept_before_goes_on() -> None:
    assert tekfac(*SEARCH, "--trials", "1").exit_code == 0
    # In the journal it is in a text itself.
    for name, four in (("search.json", '"4"'), ("trials.journal", r"\"4\"")):
        path = Path("s", name)
        assert "4.0" in path.read_text()
        path.write_text(path.read_text().replace("4.0", four))
    result = tekfac(*SEARCH)
    assert result.exit_code == 0, result.output
    assert [row["fc_scale"] for row in rows(Path("s/search.csv"))] == ["4", "4"]


def test_printed_command_of_a_search_has_options_that_help_leaves_out() -> None:
    pytest.importorskip("heavyball")
    settings = {"beta2": 0.9, "precondition_frequency": 3}
    config = Config(data="small.npz", network="mlp", optimizer="soap", settings=settings, epochs=1)
    result = tekfac("train", *arguments(config), "--out", "run")
    assert result.exit_code == 0, result.output
    assert Config.from_dict(json.loads(Path("run", runs.CONFIG).read_text())) == config
