"""Arrows between rooms go down only."""

import ast
from pathlib import Path

import trainfit

ROOMS = [
    "cli",
    "api",
    "reports",
    "explaining",
    "planning",
    "integrations",
    "exactness",
    "training",
    "measuring",
    "memory",
    "tracing",
    "timing",
    "models",
    "tasks",
    "weights",
    "step",
    "gpus",
    "process",
    "values",
    "errors",
    "cache",
    "files",
]
SOURCE = Path(trainfit.__file__).parent


def rooms_imported(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names.add(node.module or "")
    return {name.split(".")[1] for name in names if name.startswith("trainfit.")}


def test_every_room_is_known() -> None:
    found = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found - {"__init__", "__main__"} == set(ROOMS)


def test_arrows_go_down() -> None:
    upward = [
        f"{file.relative_to(SOURCE)} imports {imported}"
        for room in ROOMS
        for file in (SOURCE / f"{room}.py", *sorted((SOURCE / room).rglob("*.py")))
        if file.exists()
        for imported in sorted(rooms_imported(file))
        if ROOMS.index(imported) < ROOMS.index(room)
    ]
    assert not upward


def test_files_and_functions_stay_readable() -> None:
    """A file has at most 400 lines and a function at most 60, docstrings included."""
    too_long: list[str] = []
    for file in sorted(SOURCE.rglob("*.py")):
        text = file.read_text()
        if len(text.splitlines()) > 400:
            too_long.append(f"{file.relative_to(SOURCE)}: {len(text.splitlines())} lines")
        too_long += [
            f"{file.relative_to(SOURCE)}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None and node.end_lineno - node.lineno >= 60
        ]
    assert not too_long
