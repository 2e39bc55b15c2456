"""What the README and the pages say in code is run, and what they say of the package is so.

Each page's blocks of Python run in order in one namespace. What a page takes for granted (your
model, your batches) is in `STUBS`.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import shlex
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import tekfac
from docs.site.snippets import execute, snippets

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "results/README.md", "benchmarks/README.md")
    for path in sorted(ROOT.glob(pattern))
]
SOURCE = {path: path.read_text("utf-8") for path in (ROOT / "src" / "tekfac").rglob("*.py")}


# -- what pages take for granted -------------------------------------------------------------------


class BodyAndHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(20, 32), nn.ReLU())
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


def train(model: nn.Module, optimizer: torch.optim.Optimizer, loader: list[Any]) -> None:
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(16, 20), torch.randint(3, (16,))) for _ in range(8)]


def modules() -> dict[str, Any]:
    return {"torch": torch, "nn": nn, "F": F, "tekfac": tekfac}


def classifier() -> dict[str, Any]:
    """Imports, a model, batches and one of them."""
    loader = batches()
    x, y = loader[0]
    return {**modules(), "model": BodyAndHead(), "loader": loader, "x": x, "y": y, "train": train}


def trained() -> dict[str, Any]:
    given = classifier()
    given["optimizer"] = tekfac.TEKFAC(given["model"])
    train(given["model"], given["optimizer"], given["loader"])
    return given


def frameworks() -> dict[str, Any]:
    examples = TensorDataset(torch.randn(128, 20), torch.randint(3, (128,)))
    given = {**modules(), "network": BodyAndHead(), "loader": DataLoader(examples, 16)}
    if importlib.util.find_spec("transformers"):
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = {"vocab_size": 50, "n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 2}
        given["model"] = GPT2LMHeadModel(GPT2Config(**sizes))
        text = torch.randint(50, (8, 16))
        given["dataset"] = [{"input_ids": each, "labels": each} for each in text]
    return given


def alone() -> dict[str, str]:
    """The environment of one process that torchrun has started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}


STUBS: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": classifier,
    "docs/settings.md": classifier,
    "docs/coming-from.md": classifier,
    "docs/troubleshooting.md": trained,
    "docs/reference/damping.md": classifier,
    "docs/ranks.md": classifier,
    "docs/recipes/loop.md": classifier,
    "docs/recipes/precision.md": classifier,
    "docs/recipes/checkpoints.md": lambda: {**classifier(), "make_model": BodyAndHead},
    "docs/recipes/finetuning.md": lambda: {
        **classifier(),
        "loader": [(x, y % 3) for x, y in batches()],
    },
    "docs/recipes/transformers.md": modules,
    "docs/recipes/autoencoders.md": modules,
    "docs/recipes/gans.md": modules,
    "docs/recipes/outputs.md": modules,
    "docs/recipes/frameworks.md": frameworks,
}


# -- code ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page for page in PAGES if snippets((ROOT / page).read_text())])
def test_code_on_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = snippets((ROOT / page).read_text("utf-8"))
    if any(snippet.shown for snippet in found):
        pytest.importorskip("sklearn")
        pytest.importorskip("matplotlib").use("agg")
    monkeypatch.chdir(tmp_path)
    for name, value in alone().items():
        monkeypatch.setenv(name, value)
    torch.manual_seed(0)
    namespace = {"__name__": "__main__", **STUBS.get(page, dict)()}
    for snippet in found:
        there = all(importlib.util.find_spec(name) for name in snippet.needs)
        if snippet.runs and there:
            execute(snippet, page, namespace)


def test_almost_all_code_is_run() -> None:
    left_out = [
        f"{page}:{snippet.line}"
        for page in PAGES
        for snippet in snippets((ROOT / page).read_text("utf-8"))
        if not snippet.runs
    ]
    assert len(left_out) <= 1, left_out


def test_no_code_goes_unnoticed() -> None:
    for page in PAGES:
        text = (ROOT / page).read_text("utf-8")
        fences = re.findall(r"^ *```python", text, re.MULTILINE)
        assert len(fences) == len(snippets(text)), page
        known = {"run", "not-run"}
        for snippet in snippets(text):
            assert {w for w in snippet.words if not w.startswith("needs=")} <= known, page


def test_stubs_are_of_pages() -> None:
    assert set(STUBS) <= set(PAGES)


def test_commands_on_pages_exist() -> None:
    typer = pytest.importorskip("typer")
    from tekfac.cli.app import app

    commands = typer.main.get_command(app).commands
    seen = 0
    for page in PAGES:
        for block in re.findall(r"^```sh\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["tekfac"]:
                    options = {o for each in commands[words[1]].params for o in each.opts}
                    given = {w.partition("=")[0] for w in words[2:] if w.startswith("--")}
                    assert given <= options, (page, line)
                    seen += 1
    assert seen > 10


# -- words -----------------------------------------------------------------------------------------


def test_the_table_of_settings_is_the_signature() -> None:
    table = (ROOT / "docs" / "settings.md").read_text("utf-8").partition("## All settings")[2]
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", table, re.MULTILINE))
    signature = inspect.signature(tekfac.TEKFAC)
    assert rows == {
        name: repr(parameter.default)
        for name, parameter in signature.parameters.items()
        if name != "model"
    }


def messages() -> str:
    """All strings of the package, a line each, with ``{}`` for what is put in."""
    lines = []
    for source in SOURCE.values():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "{}" for p in node.values]
                lines.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                lines.append(node.value)
    return "\n".join(lines)


def test_symptoms_are_messages_of_the_package() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    headings = re.findall(r"^### (\".*)$", page, re.MULTILINE)
    quotes = [quote for heading in headings for quote in re.findall(r'"([^"]+)"', heading)]
    assert len(quotes) > 20
    known = messages()
    for quote in quotes:
        for part in re.split(r"\s*…\s*'?s?\s*|\b[XYNM]\b", quote):
            words = part.strip(" ,").split(" ")
            # Something may have been put in between two words.
            assert any(
                " ".join(words[:cut]) in known and " ".join(words[cut:]) in known
                for cut in range(len(words))
            ), quote


def test_every_public_name_is_in_the_reference() -> None:
    pages = "".join(path.read_text("utf-8") for path in (ROOT / "docs/reference").glob("*.md"))
    for name in tekfac.__all__:
        assert re.search(rf"^\.\. auto\w+:: {name}$", pages, re.MULTILINE), name
