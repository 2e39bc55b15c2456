"""What the parts have found, as one page."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def save(file: Path, found: Mapping[str, Any]) -> None:
    """Write JSON whole or not at all."""
    temporary = file.with_suffix(".part")
    temporary.write_text(json.dumps(found, indent=1))
    os.replace(temporary, file)


def write(out: Path, outcomes: Sequence[Mapping[str, Any]]) -> None:
    """``report.md`` and ``outcomes.json`` of the parts so far."""
    save(out / "outcomes.json", {"parts": list(outcomes)})
    pages = [_head(out, outcomes)]
    for outcome in outcomes:
        file = out / f"{outcome['part']}.json"
        if file.exists():
            pages.append(_page(json.loads(file.read_text())))
        if outcome["words"]:
            pages.append(f"{outcome['part']}, {outcome['status']}:\n\n```\n{outcome['words']}\n```")
    temporary = out / "report.part"
    temporary.write_text("\n\n".join(pages) + "\n")
    os.replace(temporary, out / "report.md")


def _head(out: Path, outcomes: Sequence[Mapping[str, Any]]) -> str:
    machines = []
    for outcome in outcomes:
        file = out / f"{outcome['part']}.json"
        if file.exists():
            machines.append(json.loads(file.read_text())["machine"])
    rows = [{key: each[key] for key in ("part", "status", "seconds")} for each in outcomes]
    where = f"{machines[0]}.\n\n" if machines else ""
    return f"# tekfac on a GPU\n\n{where}{table(rows)}"


def _page(found: Mapping[str, Any]) -> str:
    parts = [f"## {found['title']}"]
    if found.get("words"):
        parts.append(found["words"])
    for rows in found["tables"].values():
        if rows:
            parts.append(table(rows))
    return "\n\n".join(parts)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table with every column that any row has."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(_cell(row.get(key, "")) for key in columns) + " |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value).replace("|", "\\|").replace("\n", " ")
