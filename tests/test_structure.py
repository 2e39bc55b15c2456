"""The structure of the package, read from its imports: no circle, no arrow upward."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"

# The floors of the house, from the bottom up: packages and modules of tekfac. One may import what
# is on the floors below, and nothing beside it on its own. PUBLIC is ``tekfac/__init__.py``.
PUBLIC = "tekfac"
CORE = (
    ("checks", "numerics", "verdict"),
    ("layers", "ranks"),
    ("capture", "curvature"),
    ("optimizer",),
    ("methods",),
    (PUBLIC,),
)
PROGRAM = (
    ("errors",),
    ("data", "networks"),
    ("runs",),
    ("searches",),
    ("paper",),
    ("cli",),
)
# What the program may import of the core.
OFFERED = {PUBLIC, "checks"}

Imports = Mapping[str, set[str]]


def modules(source: Path) -> dict[str, Path]:
    """The files of all modules, by their names."""
    found = {}
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """All imports in a syntax tree, also those within functions, but not those for types alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from statements(other)
        elif isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        else:
            yield from statements(child)


def imports(source: Path) -> Imports:
    """For each module the modules of the package that it imports.

    ``from package import name`` is the module of that name, if there is one, or else the package.
    """
    files = modules(source)
    found: dict[str, set[str]] = {}
    for module, path in files.items():
        names: set[str] = set()
        for statement in statements(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(statement, ast.Import):
                names |= {each.name for each in statement.names}
                continue
            assert statement.level == 0, f"{module}: imports are written out whole"
            for each in statement.names:
                inner = f"{statement.module}.{each.name}"
                names.add(inner if inner in files else f"{statement.module}")
        found[module] = {name for name in names if name in files and name != module}
    return found


def room(module: str) -> str:
    """The package or module of tekfac that a module is in."""
    return module.split(".")[1] if "." in module else module


def circle(found: Imports) -> list[str]:
    """The modules of a circle of imports, if there is one."""
    try:
        TopologicalSorter(found).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def forbidden(found: Imports) -> list[str]:
    """The imports that are not downward."""
    floors = [*CORE, *PROGRAM]
    floor = {name: number for number, names in enumerate(floors) for name in names}
    core = {name for names in CORE for name in names}
    return [
        f"{module} imports {other}"
        for module, others in found.items()
        for other in sorted(others)
        if (here := room(module)) != (there := room(other))
        and (
            floor[there] >= floor[here]
            or (here not in core and there in core and there not in OFFERED)
        )
    ]


@pytest.fixture(scope="module")
def found() -> Imports:
    return imports(SOURCE)


def test_no_circle(found: Imports) -> None:
    assert circle(found) == []


def test_no_arrow_upward(found: Imports) -> None:
    rooms = {room(module) for module in found}
    assert rooms == {name for names in (*CORE, *PROGRAM) for name in names}
    assert forbidden(found) == []


def test_no_room_holds_half_of_the_house() -> None:
    sizes: dict[str, int] = {}
    for module, path in modules(SOURCE).items():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        sizes[room(module)] = sizes.get(room(module), 0) + lines
    assert max(sizes.values()) < sum(sizes.values()) / 2


def test_what_is_forbidden_is_found(tmp_path: Path) -> None:
    def write(name: str, text: str) -> None:
        path = tmp_path / "tekfac" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    write("__init__.py", "from tekfac.methods import ekfac\n")
    write("methods/__init__.py", "")
    write("methods/ekfac.py", "if TYPE_CHECKING:\n    from tekfac.methods import kfac\n")
    write("methods/kfac.py", "def f():\n    from tekfac.methods.ekfac import x\n")
    write("data/digits.py", "import tekfac\nfrom tekfac.networks import build\n")
    write("networks/__init__.py", "from tekfac.methods import kfac\n")
    found = imports(tmp_path)
    assert found["tekfac.methods.kfac"] == {"tekfac.methods.ekfac"}
    assert circle(found) == []
    assert forbidden(found) == [
        "tekfac.data.digits imports tekfac.networks",
        "tekfac.networks imports tekfac.methods.kfac",
    ]
    write("methods/ekfac.py", "from tekfac.methods import kfac\n")
    assert set(circle(imports(tmp_path))) == {"tekfac.methods.ekfac", "tekfac.methods.kfac"}
