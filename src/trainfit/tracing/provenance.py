"""Provenance of a stored trace: the code that built and traced the step, and the packages it used. Imports no torch.

A trace is made by the files that its family's `workload` module and the tracer import, directly or not; a change of another
file cannot change it. Each file has two digests, of its bytes and of its syntax tree without docstrings: reading the
bytes of about forty files takes 5 ms, and only a file whose bytes differ is parsed, so that a changed comment, docstring or
line break does not make a trace invalid.
"""

import ast
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from threading import Lock
from typing import Any

import trainfit

SOURCE = Path(trainfit.__file__).parent
_PARSING = Lock()
"""Only one thread parses at a time: CPython 3.11 counts the depth of a syntax tree for all threads together, and raises
SystemError if two threads parse at once (two threads make traces)."""
TRACER = ("trainfit.tracing.trace", "trainfit.models.build")
"""Modules that run in every tracing process, in addition to the family's."""
DECLARATIONS = ("models/setting.py", "/family.py")
"""Files that declare knobs: their annotated fields are left out of the digest, because a trace is stored with the value
of every knob."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The packages and files that a trace was made with."""

    packages: Mapping[str, str]
    """Name -> installed version (of torch without the patch number)."""
    files: Mapping[str, str]
    """Path under the package's folder -> `file_digest`."""

    def changes(self) -> Iterator[str]:
        """Yield a description of each difference from this installation; nothing if the trace is valid."""
        installed = installed_versions(tuple(self.packages))
        for name, version in self.packages.items():
            if installed[name] != version:
                yield f"{name} {version} (installed: {installed[name] or 'none'})"
        for path, digest in self.files.items():
            if not is_unchanged(path, digest):
                yield path

    def to_record(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"packages": dict(self.packages), "files": dict(self.files)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Provenance":
        """Read what `to_record` returned."""
        return cls(packages=record["packages"], files=record["files"])


@cache
def provenance(packages: tuple[str, ...], modules: tuple[str, ...]) -> Provenance:
    """The provenance of what this installation makes with `packages` and `modules`, which are modules of this package."""
    files = {path.relative_to(SOURCE).as_posix(): file_digest(path) for path in imported_files(modules)}
    return Provenance(packages=installed_versions(packages), files=files)


@cache
def installed_versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Installed versions, "" if not installed; torch's without the patch number, because patches do not change kernels."""
    versions: dict[str, str] = {}
    for name in packages:
        version = next((dist.version for dist in metadata.distributions(name=name)), "")
        versions[name] = ".".join(version.split(".")[:2]) if name == "torch" else version
    return versions


def imported_files(modules: tuple[str, ...]) -> list[Path]:
    """Files of this package that `modules` import, directly or not, including their own files; sorted by path."""
    files: set[Path] = set()
    waiting = [path for name in modules if (path := module_file(name)) is not None]
    while waiting:
        path = waiting.pop()
        if path in files:
            continue
        files.add(path)
        waiting += _imports(_parsed(path))
    return sorted(files)


def _imports(tree: ast.Module) -> Iterator[Path]:
    """Files of this package that a module imports at its top level, not within functions or for type checking only."""
    for node in tree.body:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from (path for name in names if (path := module_file(name)) is not None)


def module_file(name: str) -> Path | None:
    """The file of a module of this package; None for a folder without code and for other packages."""
    first, *parts = name.split(".")
    if first != "trainfit" or not parts:
        return None
    path = SOURCE.joinpath(*parts).with_suffix(".py")
    return path if path.exists() else None


def is_unchanged(path: str, digest: str) -> bool:
    """Whether a file of this package still has the code that `file_digest` gave `digest` for."""
    file = SOURCE / path
    if not file.exists():
        return False
    bytes_digest, _, syntax_digest = digest.partition(" ")
    return _digest(file.read_bytes()) == bytes_digest or code_digest(file) == syntax_digest


def file_digest(file: Path) -> str:
    """Digest of a file's bytes and, after a space, `code_digest`."""
    return f"{_digest(file.read_bytes())} {code_digest(file)}"


@cache
def code_digest(file: Path) -> str:
    """Digest of a file's syntax tree without docstrings and, in `DECLARATIONS`, without annotated fields."""
    tree = _parsed(file)
    declares = file.as_posix().endswith(DECLARATIONS)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            is_class = isinstance(node, ast.ClassDef)
            node.body = [
                each for each in node.body if not _is_text(each) and not (declares and is_class and _is_field(each))
            ]
    return _digest(ast.dump(tree).encode())


def _parsed(file: Path) -> ast.Module:
    with _PARSING:
        return ast.parse(file.read_text(encoding="utf-8"))


def _is_text(node: ast.stmt) -> bool:
    """Whether a statement is only a string: a docstring, or the text under a field."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _is_field(node: ast.stmt) -> bool:
    return isinstance(node, ast.AnnAssign)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
