"""Values that a user hands in, by command line, JSON file or constructor: one check for all, from the type annotations."""

import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import cache, wraps
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from trainfit.errors import TrainfitError

T = TypeVar("T")
_GIVEN = "_given"
_FLAGS = {"as_json": "--json"}
"""Flags that are not spelt as their field."""
_PLAIN = (bool, int, float, str, types.NoneType)
_ALLOWED: set[tuple[type, str, type, Any]] = set()
"""Class, field, and type and value of plain values that were allowed before: a plan copies its setting thousands of times."""


@dataclass(frozen=True)
class Range:
    """What a number may be; an annotation: `Annotated[int, Range(1)]`. Text and None pass."""

    low: float
    """The least value."""
    high: float = math.inf
    """The largest value."""
    inside: bool = False
    """Whether the limits themselves are refused."""

    def fault(self, value: float) -> str | None:
        """What is wrong with a number; None: nothing."""
        if self.inside and not self.low < value < self.high:
            return f"must lie between {self.low:g} and {self.high:g}"
        if value < self.low:
            return f"must be at least {self.low:g}"
        return f"must be at most {self.high:g}" if value > self.high else None


@dataclass(frozen=True)
class In:
    """Where the flags of a command show a field; an annotation: `Annotated[int, In("memory")]`.

    A family's knobs are in the group "model" unless they say otherwise.
    """

    group: str | None = ""
    """The group of `--help`: "model", "card", "data", "batch", "memory", "schedule", "run", "output", or "" for the others.
    None: the field is no flag."""
    positional: bool = False
    """Whether it is given without a flag."""
    rare: bool = False
    """Whether `--help` leaves it out: it is in `--help-all`, and configuration files take it like any other."""


def flag(name: str) -> str:
    """The flag of a field."""
    return _FLAGS.get(name, f"--{name.replace('_', '-')}")


def flag_words(words: Sequence[str]) -> list[str]:
    """Words of a command line with hyphens in flags, and `--flag=value` as two words: `--a_b=1` becomes `--a-b`, `1`."""
    parted: list[str] = []
    for word in words:
        if not word.startswith("--"):
            parted.append(word)
            continue
        name, equals, value = word.partition("=")
        parted += [name.replace("_", "-"), *([value] if equals else [])]
    return parted


def require_valid(values: object) -> None:
    """Refuse a dataclass that holds what its annotations do not allow.

    Raises:
        TrainfitError: with the flag of the first such field, what it may be, and its value.
    """
    make = type(values)
    hints = _hints(make)
    for name, value in vars(values).items():
        is_plain = isinstance(value, _PLAIN)
        if is_plain and (make, name, type(value), value) in _ALLOWED:
            continue
        if name in hints and (fault := _fault(hints[name], value)):
            raise TrainfitError(f"{flag(name)} {fault}, not {_short(value)}{_nearest(hints[name], value)}")
        if is_plain:
            _ALLOWED.add((make, name, type(value), value))


def from_record(make: type[T], record: Any, source: Path | str) -> T:
    """The dataclass of a JSON object that was read from `source`.

    Raises:
        TrainfitError: it is no object, or has keys or values that the dataclass does not allow.
    """
    if not isinstance(record, Mapping):
        raise TrainfitError(f"{source}: expected a JSON object, not {_short(record)}")
    record = cast(Mapping[str, Any], record)
    hints = _hints(make)
    require_known(record, hints, source)
    values = {key: _decoded(hints[key], value) for key, value in record.items()}
    try:
        return make(**values)
    except TrainfitError as error:
        raise TrainfitError(f"{source}: {error}") from error
    except TypeError as error:  # a key without a default is missing
        raise TrainfitError(f"{source}: {error}") from error


def require_known(record: Iterable[str], known: Iterable[str], source: Path | str) -> None:
    """Refuse a key that is not known.

    Raises:
        TrainfitError: with the nearest known key.
    """
    names = sorted(known)
    for key in record:
        if key not in names:
            near = get_close_matches(str(key), names, n=1, cutoff=0.6)
            hint = f". Perhaps you meant {near[0]!r}" if near else ""
            raise TrainfitError(f"{source}: unknown key {_short(key)}{hint}")


def keeps_given(make: type[T]) -> type[T]:
    """Decorate a dataclass so that `given` tells which values its constructor was called with.

    A value that was given is thus distinct from a default, also where they are equal.
    """
    initialize = cast(Callable[..., None], make.__init__)

    @wraps(initialize)
    def remember(self: T, **values: Any) -> None:
        object.__setattr__(self, _GIVEN, frozenset(values))
        initialize(self, **values)

    make.__init__ = remember  # pyright: ignore[reportAttributeAccessIssue]
    return make


def given(values: object) -> frozenset[str]:
    """Names of the values that an object of a class with `keeps_given` was made with."""
    return cast(frozenset[str], vars(values)[_GIVEN])


def changed(values: T, **changes: Any) -> T:
    """A copy with other values; those and the ones given before are given."""
    names = given(values) | changes.keys()
    return _marked(replace(cast(Any, values), **changes), names)


def given_by_flags(values: T, flags: AbstractSet[str]) -> T:
    """A copy that was given the values whose flags are named, and no others."""
    names = {field.name for field in fields(cast(Any, values))}
    return _marked(
        replace(cast(Any, values)), frozenset(name for name in names if flag(name)[2:].replace("-", "_") in flags)
    )


def _marked(values: T, names: frozenset[str]) -> T:
    object.__setattr__(values, _GIVEN, names)
    return values


@cache
def _hints(make: type) -> dict[str, Any]:
    return get_type_hints(make, include_extras=True)


def _fault(hint: Any, value: Any) -> str | None:
    """What is wrong with a value; None: nothing."""
    if get_origin(hint) is Annotated:
        inner, *extras = get_args(hint)
        faults = [_fault(inner, value)]
        if isinstance(value, int | float):
            faults += [extra.fault(value) for extra in extras if isinstance(extra, Range)]
        return next(filter(None, faults), None)
    options = _options(hint)
    return None if any(_is(option, value) for option in options) else f"must be {_words(options)}"


def _options(hint: Any) -> list[Any]:
    """The parts of a union, and the choices of a literal, one by one."""
    if get_origin(hint) in (Union, types.UnionType):
        return [option for part in get_args(hint) for option in _options(part)]
    if get_origin(hint) is Annotated:
        return _options(get_args(hint)[0])
    return [hint]


def _is(option: Any, value: Any) -> bool:
    if get_origin(option) is Literal:
        return isinstance(value, str) and value in get_args(option)
    if get_origin(option) is tuple:
        return _is_tuple(get_args(option), value)
    if option is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if option is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, option)


def _is_tuple(parts: tuple[Any, ...], value: Any) -> bool:
    if not isinstance(value, tuple):
        return False
    items = cast(tuple[Any, ...], value)
    if parts[-1] is Ellipsis:
        return all(_fault(parts[0], item) is None for item in items)
    return len(items) == len(parts) and all(_fault(p, item) is None for p, item in zip(parts, items, strict=True))


def _words(options: Sequence[Any]) -> str:
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", Path: "a path"}
    words: list[str] = []
    for option in options:
        if get_origin(option) is Literal:
            words += map(str, get_args(option))
        elif get_origin(option) is tuple:
            words.append(f"{len(get_args(option))} values")
        elif option is not types.NoneType:
            words.append(names.get(option, str(option)))
    return ", ".join(words[:-1]) + f" or {words[-1]}" if len(words) > 1 else words[0]


def _nearest(hint: Any, value: Any) -> str:
    choices = [choice for option in _options(hint) if get_origin(option) is Literal for choice in get_args(option)]
    near = get_close_matches(value, choices, n=1, cutoff=0.6) if isinstance(value, str) else []
    return f". Perhaps you meant {near[0]}" if near else ""


def _short(value: Any) -> str:
    try:
        text = str(value) if isinstance(value, int | float) else repr(value)
    except ValueError:  # Python does not print whole numbers of more than 4,300 digits
        text = "a whole number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _decoded(hint: Any, value: Any) -> Any:
    """A JSON value as the annotation wants it: a path for text, a tuple for a list."""
    options = _options(hint)
    if isinstance(value, str) and Path in options:
        return Path(value)
    if isinstance(value, list) and any(get_origin(option) is tuple for option in options):
        return tuple(cast(list[Any], value))
    return value
