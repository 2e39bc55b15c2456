"""Files of command-line options, in YAML: one ``option: value`` per line, without the dashes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import yaml

from tekfac.errors import InputError
from tekfac.runs.options import flag


def read(path: Path, known: Collection[str], repeatable: Collection[str]) -> dict[str, object]:
    """Options as text, for the command line to take them as if they had been typed.

    Args:
        path: the file. A value left empty counts as not given, a list stands for its parts with
            commas between.
        known: names of all options, with underscores; the file may have dashes in their place.
        repeatable: those that may be given several times, as a list or as names with values.

    Raises:
        InputError: if it cannot be read as such a file, or names an option that there is not.
        OSError: if it cannot be opened.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise InputError(f"{path} must hold lines of the form `option: value`")
    options: dict[str, object] = {}
    for name, value in content.items():
        key = str(name).lstrip("-").replace("-", "_")
        if key not in known:
            raise InputError(f"{path}: there is no option {flag(key)}")
        if value is None:
            continue
        if key in repeatable:
            options[key] = _parts(value)
        elif isinstance(value, Mapping):
            raise InputError(f"{path}: {name} must have a plain value, not names with values")
        else:
            options[key] = ",".join(_parts(value))
    return options


def _parts(value: object) -> list[str]:
    """A value's parts as text: of a mapping ``name=value``, of a list its items, else itself."""
    if isinstance(value, Mapping):
        return [f"{name}={','.join(_parts(each))}" for name, each in value.items()]
    if isinstance(value, list):
        return [str(each) for each in value]
    return [str(value)]
