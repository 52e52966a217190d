"""The shape of the package: files on the way of a command, declarations of a knob, and what makes a reader stop.

    python benchmarks/house.py walk plan rfdetr-nano --gpu "RTX 3060"
    python benchmarks/house.py counts
    python benchmarks/house.py undocumented

`walk` runs a command with an empty cache and lists the files of the package whose functions are called from the command's
function until the first replay of the allocator; a file counts once, and imports do not count. `counts` reads the source: lines,
packed assignments (`a, b = x, y`), conditional expressions within others, fields without a docstring (`undocumented` lists
them), names that say nothing about their value, and files outside of a family's folder that name it.
"""

import ast
import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import trainfit
from trainfit.cli import main

SOURCE = Path(trainfit.__file__).parent
ALLOCATOR = ("memory/caching_allocator.py", "memory/quick_replay.py")
VAGUE = frozenset({"found", "told", "said", "wish", "owed", "held"})


def walk(words: Sequence[str]) -> list[str]:
    """Files entered from the function of a command to the first replay, in the order in which they are entered."""
    files: list[str] = []

    def is_imported(frame: FrameType | None) -> bool:
        while frame is not None:
            if frame.f_code.co_name == "<module>" and frame.f_code.co_filename.startswith(str(SOURCE)):
                return True
            frame = frame.f_back
        return False

    def enter(frame: FrameType, event: str, _argument: Any) -> None:
        code = frame.f_code
        path = Path(code.co_filename)
        if event != "call" or not path.is_relative_to(SOURCE) or code.co_name == "<module>":
            return
        name = path.relative_to(SOURCE).as_posix()
        if files or (name, code.co_name) == (f"cli/{words[0].replace('-', '_')}.py", words[0].replace("-", "_")):
            if name not in files and not is_imported(frame.f_back) and code.co_flags & 1:  # a function, no class body
                files.append(name)
            if name in ALLOCATOR and name in files:
                sys.setprofile(None)

    with tempfile.TemporaryDirectory() as cache, contextlib.redirect_stdout(io.StringIO()):
        os.environ["XDG_CACHE_HOME"] = cache
        sys.setprofile(enter)
        with contextlib.suppress(SystemExit):
            main(list(words))
        sys.setprofile(None)
    return files


def counts() -> Iterator[tuple[str, int]]:
    """(what, how many) over the source of the package."""
    texts = [path.read_text() for path in SOURCE.rglob("*.py")]
    nodes = [node for text in texts for node in ast.walk(ast.parse(text))]
    yield "files", len(texts)
    yield "lines", sum(len(text.splitlines()) for text in texts)
    yield "packed assignments", sum(isinstance(node, ast.Assign) and _is_packed(node) for node in nodes)
    yield "nested conditional expressions", sum(isinstance(node, ast.IfExp) and _is_nested(node) for node in nodes)
    names = [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    names += [node.arg for node in nodes if isinstance(node, ast.arg)]
    classes = [node for node in nodes if isinstance(node, ast.ClassDef) and _is_record(node)]
    fields = [_documented(node) for node in classes]
    yield "fields of dataclasses", sum(map(len, fields))
    yield "fields without a docstring", sum(not text for each in fields for text in each.values())
    public = [each for node, each in zip(classes, fields, strict=True) if not node.name.startswith("_")]
    yield "of these in classes with a public name", sum(not text for each in public for text in each.values())
    yield f"bindings of {', '.join(sorted(VAGUE))}", sum(name in VAGUE for name in names)
    others = [path for path in SOURCE.rglob("*.py") if not path.is_relative_to(SOURCE / "models" / "rfdetr")]
    yield (
        "files naming rfdetr outside its folder",
        sum("rfdetr" in path.read_text().lower().replace("-", "") for path in others),
    )


def undocumented() -> Iterator[str]:
    """File, class and field of each field of a dataclass that has no docstring."""
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and _is_record(node):
                name = f"{path.relative_to(SOURCE)}: {node.name}"
                yield from (f"{name}.{field}" for field, text in _documented(node).items() if not text)


def _is_record(node: ast.ClassDef) -> bool:
    """Whether a class is a dataclass, by its decorators."""
    decorators = [each.func if isinstance(each, ast.Call) else each for each in node.decorator_list]
    return any(isinstance(each, ast.Name) and each.id == "dataclass" for each in decorators)


def _documented(node: ast.ClassDef) -> dict[str, bool]:
    """Field of a dataclass -> whether a docstring follows it."""
    fields: dict[str, bool] = {}
    for statement, after in pairwise([*node.body, ast.Pass()]):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            fields[statement.target.id] = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    return fields


def _is_packed(node: ast.Assign) -> bool:
    return isinstance(node.value, ast.Tuple) and any(isinstance(target, ast.Tuple) for target in node.targets)


def _is_nested(node: ast.IfExp) -> bool:
    return any(isinstance(inner, ast.IfExp) for inner in ast.walk(node) if inner is not node)


if __name__ == "__main__":
    if sys.argv[1:2] == ["walk"]:
        entered = walk(sys.argv[2:])
        print(*entered, f"{len(entered)} files", sep="\n")
    elif sys.argv[1:2] == ["undocumented"]:
        print(*undocumented(), sep="\n")
    else:
        for what, number in counts():
            print(f"{what:<55}{number:>7}")
