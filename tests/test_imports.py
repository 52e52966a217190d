"""Arrows between rooms go down only."""

import ast
from pathlib import Path

import trainfit

ROOMS = [
    "cli",
    "reports",
    "planning",
    "training",
    "measure",
    "memory",
    "timing",
    "models",
    "step",
    "data",
    "gpus",
    "errors",
    "cache",
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


def code_lines(file: Path) -> int:
    """Lines that hold code: no blank lines, comments or docstrings."""
    text = file.read_text()
    docstrings = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines = enumerate(text.splitlines(), start=1)
    return sum(1 for n, line in lines if line.strip() and not line.lstrip().startswith("#") and n not in docstrings)


OUTSIDE = {"coco_ap.py", "tensorboard.py", "usage.py"}
"""Metrics and telemetry."""


def is_core(file: Path) -> bool:
    """What trainfit exists for: no commands, reports, data formats, single families, metrics or telemetry."""
    room, *rest = file.relative_to(SOURCE).parts
    of_family = room == "models" and len(rest) > 1
    return room not in ("cli", "reports", "data") and not of_family and file.name not in OUTSIDE


def test_core_stays_small() -> None:
    assert sum(map(code_lines, filter(is_core, SOURCE.rglob("*.py")))) < 6000
