"""Flags in a file: `--config FILE` reads them from YAML, `--print-config` writes those of a command line as one.

A key is a flag without its hyphens in front; what is given on the command line wins.
"""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from textwrap import wrap
from typing import Any, cast, get_args

import yaml

from trainfit.cli.flags import GROUPS, Leaf, flag_value
from trainfit.errors import TrainfitError
from trainfit.files import read_bytes
from trainfit.models.family import families
from trainfit.values import flag, require_known

CONFIG = "--config"
PRINT_CONFIG = "--print-config"
_NAME = "model"
MOST_BYTES = 2**20


def with_config(
    words: Sequence[str],
    leaves: Callable[[Sequence[str]], Mapping[str, Sequence[Leaf]]],
    note: Callable[[str], None] = lambda _: None,
) -> list[str]:
    """A command line with the flags of its `--config FILE` in the place of that flag.

    Args:
        words: The command line.
        leaves: The flags of each command, for a command line that names the model.
        note: Called with a line on a key that is left out, because files of version 0.1 had it for every model.

    Raises:
        TrainfitError: the file cannot be read, is not a mapping, or has a key or a value that the command does not take.
    """
    path, rest = _taken(words)
    if path is None:
        return rest
    values = _read(path)
    command, *arguments = rest or [""]
    free = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    named = arguments[:free] or ([str(values[_NAME])] if _NAME in values else [])
    known = leaves([command, *named, *arguments]).get(command)
    if known is None:
        raise TrainfitError(f"{CONFIG} {path}: name the command before it, for instance trainfit train {CONFIG} {path}")
    names = {leaf.name: leaf for leaf in known}
    for name in _of_other_models(values, command, names):
        del values[name]
        note(f"{CONFIG} {path}: {flag(name)[2:]} says nothing to this model: left out")
    require_known(values, names, path)
    given = {_field(word) for word in arguments if word.startswith("--")}
    positional = [leaf.name for leaf in known if leaf.where.positional]
    places = [str(each) for name in positional[free:] if name in values for each in _several(values[name])]
    flags: list[str] = []
    for name, value in values.items():
        if name not in positional and name not in given and value is not None:
            flags += _words(names[name], value, path)
    return [command, *arguments[:free], *places, *flags, *arguments[free:]]


def _of_other_models(keys: Iterable[str], command: str, names: Container[str]) -> list[str]:
    """The keys of a training that the models of other families alone have."""
    unknown = [key for key in keys if key not in names]
    if not unknown or command != "train":
        return []
    from trainfit.training.recipe import training_fields

    elsewhere = [name for family in families().values() for name in training_fields(family)]
    return [key for key in unknown if key in elsewhere]


def _taken(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The file of `--config`, and the other words.

    Raises:
        TrainfitError: it has no file, or comes twice.
    """
    path: Path | None = None
    rest: list[str] = []
    items = iter(words)
    for word in items:
        name, equals, value = word.partition("=")
        if name != CONFIG:
            rest.append(word)
            continue
        value = value if equals else next(items, "")
        if not value or path is not None:
            raise TrainfitError(f"{CONFIG} takes one YAML file")
        path = Path(value)
    return path, rest


def _read(path: Path) -> dict[str, Any]:
    try:
        content: object = yaml.safe_load(read_bytes(path, MOST_BYTES))
    except OSError as error:
        raise TrainfitError(f"{CONFIG} {path} cannot be read ({error.strerror})") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        hint = "; indent with spaces, not with tabs" if "\\t" in str(error.problem) else ""
        raise TrainfitError(f"{CONFIG} {path} is not YAML: line {line}: {error.problem}{hint}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise TrainfitError(f"{CONFIG} {path} is not YAML: {reason}") from error
    if not isinstance(content, Mapping):
        raise TrainfitError(f"{CONFIG} {path}: expected flags as `key: value`, a line each")
    mapping = cast(Mapping[object, Any], content)
    return {
        _field(str(key)): not value if isinstance(value, bool) and str(key)[:3] in ("no-", "no_") else value
        for key, value in mapping.items()
    }


def _field(word: str) -> str:
    """The field of a flag as it is written: `--no-micro-batch=4` and `micro-batch` are `micro_batch`."""
    name = word.removeprefix("--").partition("=")[0].replace("-", "_").removeprefix("no_")
    return "as_json" if name == "json" else name


def _several(value: Any) -> list[Any]:
    return cast(list[Any], value) if isinstance(value, list) else [value]


def _words(leaf: Leaf, value: Any, path: Path) -> list[str]:
    """A flag and its value as words of a command line. YAML reads a bare `on` as true, also where it is a word."""
    name = flag(leaf.name)
    if isinstance(value, bool) and leaf.hint is not bool and "on" in get_args(leaf.hint):
        return [name, "on" if value else "off"]
    if value is True:
        return [name]
    if value is False:
        return [] if name == "--json" else [f"--no-{name[2:]}"]
    if isinstance(value, Mapping):
        raise TrainfitError(f"{CONFIG} {path}: {name[2:]} must be a value, not a table")
    return [name, *(str(each) for each in _several(value))]


def config_text(command: str, leaves: Sequence[Leaf], flags: Any, given: AbstractSet[str]) -> str:
    """A command line as a file for `--config`: what was given, and everything else as a comment with its default."""
    lines = [f"# trainfit {command} {CONFIG} FILE"]
    for group in (None, *GROUPS):
        members = [leaf for leaf in leaves if (None if leaf.where.positional else leaf.where.group) == group]
        if members and group:
            lines += ["", f"## {group}"]
        for leaf in members:
            lines += _entry(leaf, flags, given)
    return "\n".join(lines) + "\n"


def _entry(leaf: Leaf, flags: Any, given: AbstractSet[str]) -> list[str]:
    value = flag_value(leaf, flags)
    known = leaf.name in given or (leaf.where.positional and value not in (None, "", ()))
    if not known:
        value = None if leaf.open or leaf.chosen else value
    text = yaml.safe_dump(_plain(value), default_flow_style=True, width=10**6).removesuffix("...\n").strip()
    key = flag(leaf.name)[2:]
    about = [f"# {line}" for line in wrap(leaf.text, 100)]
    return [*about, f"{'' if known else '# '}{key}: {text}"]


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in cast(tuple[Any, ...], value)]
    return str(value) if isinstance(value, Path) else value
