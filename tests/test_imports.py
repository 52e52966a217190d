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
    "user_code",
    "values",
    "errors",
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


def module_name(file: Path) -> str:
    parts = ("trainfit", *file.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in sorted(SOURCE.rglob("*.py"))}


def modules_imported(file: Path) -> set[str]:
    """Modules of the package that a file imports, also within functions; not those imported for type checking only."""
    imported: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(file.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
        waiting += ast.iter_child_nodes(node)
    known = {name if name in MODULES else name.rpartition(".")[0] for name in imported}
    return {name for name in known if name in MODULES} - {module_name(file)}


def cycles(graph: dict[str, set[str]]) -> list[str]:
    """Nodes that are left when those without arrows to others are taken away again and again: members of a cycle, and
    nodes between two cycles or in front of one.
    """
    left = {node: targets - {node} for node, targets in graph.items()}
    while ends := {node for node, targets in left.items() if not targets & left.keys()}:
        left = {node: targets for node, targets in left.items() if node not in ends}
    while starts := left.keys() - {target for targets in left.values() for target in targets}:
        left = {node: targets for node, targets in left.items() if node not in starts}
    return sorted(left)


def test_no_module_imports_itself_through_others() -> None:
    """Modules and rooms form no cycle, with the imports within functions too."""
    graph = {name: modules_imported(file) for name, file in MODULES.items()}
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == ["b", "c"]
    assert not cycles(graph)


RFDETR_IN = {"cli/plan.py", "api/results.py"}
"""Files outside of models/rfdetr that may name it: they list the tools that `emit` writes for."""


def test_generic_files_name_no_family() -> None:
    """Outside its folder rfdetr is named in the lists of what `emit` writes alone, and no name of a family is compared."""
    naming: set[str] = set()
    switches: list[str] = []
    families = {folder.name for folder in (SOURCE / "models").iterdir() if (folder / "family.py").exists()}
    assert {"rfdetr", "maskrcnn", "clip"} <= families
    for file in MODULES.values():
        path = file.relative_to(SOURCE)
        if path.parts[0] == "models" and path.parts[1] in families:
            continue
        text = file.read_text()
        if "rfdetr" in text.lower().replace("-", ""):
            naming.add(path.as_posix())
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Compare):
                values = [each.value for each in ast.walk(node) if isinstance(each, ast.Constant)]
                switches += [f"{path}:{node.lineno}" for value in values if value in families]
    assert naming == RFDETR_IN
    assert not switches
