"""A configuration file of Detectron2's: YAML with `_BASE_`, as values by dotted key."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from trainfit.errors import TrainfitError
from trainfit.models.maskrcnn.detectron2.zoo import ZOO

MOST_BYTES = 2**20
"""Largest file that is read; Detectron2's own have less than 2 KiB."""
DEEPEST = 8
"""Files that name each other as `_BASE_`, and maps within maps."""


def read_configuration(name: str) -> dict[str, Any]:
    """The values of a file, or of a configuration of Detectron2's own by its name below configs/.

    A `_BASE_` that is not there is taken for Detectron2's own where its name is one of them.

    Raises:
        TrainfitError: no such file, no YAML, a LazyConfig or a pickle, or `_BASE_`s in a circle.
    """
    return _read(Path(name), ())


def _read(path: Path, before: tuple[Path, ...]) -> dict[str, Any]:
    if path in before or len(before) > DEEPEST:
        chain = " -> ".join(str(each) for each in (*before, path))
        raise TrainfitError(f"{path}: its _BASE_ leads back to itself ({chain})")
    if not path.is_file():
        return dict(_of_the_zoo(path, before))
    content = _parsed(path)
    base = content.pop("_BASE_", None)
    values = dict(_flat(content, path))
    if base is None:
        return values
    if not isinstance(base, str):
        raise TrainfitError(f"{path}: _BASE_ must be one file name, not {base!r}"[:200])
    return _read(path.parent / base, (*before, path)) | values


def _of_the_zoo(path: Path, before: tuple[Path, ...]) -> Mapping[str, Any]:
    text = path.as_posix()
    for name, values in ZOO.items():
        if text == name or text.endswith("/" + name):
            return values
    where = f"{before[-1]}: its _BASE_ " if before else "--detectron2: "
    raise TrainfitError(
        f"{where}{path} is not a file, nor one of the Detectron2 configurations that trainfit knows: {', '.join(ZOO)}"
    )


def _parsed(path: Path) -> dict[str, Any]:
    import yaml

    if path.suffix == ".py":
        raise TrainfitError(
            f"{path} is a LazyConfig, which is code that trainfit does not run: give a .yaml, for instance the one that "
            "LazyConfig.save writes, or the knobs as flags"
        )
    if path.suffix in (".pkl", ".pth", ".pt"):
        raise TrainfitError(f"{path} is a checkpoint, not a configuration: give a .yaml to --detectron2")
    try:
        if path.stat().st_size > MOST_BYTES:
            raise TrainfitError(f"{path} has more than {MOST_BYTES} bytes: it is not a configuration of Detectron2's")
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        line = str(error).strip().partition("\n")[0]
        raise TrainfitError(f"{path} is not YAML that can be read safely ({line[:150]})") from error
    if not isinstance(content, dict):
        raise TrainfitError(f"{path} is not a configuration of Detectron2's: it has no keys")
    return cast(dict[str, Any], content)


def _flat(content: Mapping[Any, Any], path: Path, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    if depth > DEEPEST:
        raise TrainfitError(f"{path}: {prefix[:80]} is nested deeper than any key of Detectron2's")
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flat(cast(dict[Any, Any], value), path, f"{name}.", depth + 1)
        else:
            yield name, plain(value)


def plain(value: Any) -> Any:
    """A value as yacs reads it: text that is a Python literal, as tuples are written in YAML, is that literal; tuples are lists."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return value
    if isinstance(value, list | tuple):
        return [plain(each) for each in cast(list[Any], value)]
    return value
