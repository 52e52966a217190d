"""The flags of a command, made from the dataclass that the command takes: in groups, with the docstrings as help.

A field is declared once, in the dataclass; `values.In` says where `--help` shows it. tyro gives each nested dataclass a panel of
its own, so the fields of a group are put into a generated class, and the values come back as the dataclass that was asked for.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Container, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from trainfit.models.setting import Setting
from trainfit.values import In, flag

GROUPS = ("model", "card", "data", "batch", "memory", "schedule", "run", "output", "")
"""The panels of `--help`, in order; "" is the one for everything else."""
SETTING = "setting"
"""The field of a command's dataclass that holds a setting; its flags stand beside the command's own."""
_METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """A field that is a flag or a positional argument."""

    owner: str
    """`SETTING`, or "" for a field of the command's own dataclass."""
    name: str
    """Name of the field."""
    hint: Any
    """Its type without annotations."""
    where: In
    """Its group of the help, and how it is given."""
    default: Any
    """Default value, or `MISSING`."""
    text: str
    """Its docstring."""
    chosen: bool
    """Whether the command chooses it where it is not given."""

    @property
    def key(self) -> str:
        """Its name in the generated class: neither another owner's field nor a group has it."""
        return f"{self.owner or 'own'}_{self.name}"

    @property
    def open(self) -> bool:
        """Whether it may be None."""
        return _is_union(self.hint) and NoneType in get_args(self.hint)


def leaves_of(arguments: Any, chosen: Container[str] = ()) -> list[Leaf]:
    """The fields of a command that are flags or positional arguments; see `flags_of` for the arguments."""
    return list(_leaves(arguments, chosen))


def flag_value(leaf: Leaf, flags: Any) -> Any:
    """What an object of the class of `flags_of` holds for a field."""
    group = leaf.where.group
    holder = getattr(flags, group) if group and not leaf.where.positional else flags
    return getattr(holder, leaf.key)


def flags_of(
    arguments: Any, chosen: Container[str] = (), *, rare: bool = True
) -> tuple[type, Callable[[Any, AbstractSet[str]], Any]]:
    """A class for tyro, and a function from its object and the names of the given flags to what the command takes.

    Args:
        arguments: A dataclass, or a generic dataclass with the type of its `setting`, for instance `PlanFlags[DetectionSetting]`.
        chosen: Fields that the command chooses where they are not given, whatever their defaults.
        rare: Whether the class has the fields that `--help` leaves out; without them the function cannot be used.
    """
    leaves = list(_leaves(arguments, chosen))
    shown = [leaf for leaf in leaves if rare or not leaf.where.rare]
    members: list[Any] = [_member(leaf) for leaf in shown if leaf.where.positional]
    for group in GROUPS:
        inside = [_member(leaf) for leaf in shown if leaf.where.group == group and not leaf.where.positional]
        if group and inside:
            kind = make_dataclass(group.title(), inside, frozen=True, kw_only=True)
            kind.__doc__ = ""
            members.append((group, tyro.conf.OmitArgPrefixes[kind], field(default_factory=kind)))
        else:
            members += inside
    made = make_dataclass("Flags", members, kw_only=True)
    made.__doc__ = ""

    def build(flags: Any, given: AbstractSet[str]) -> Any:
        values: dict[str, dict[str, Any]] = {"": {}, SETTING: {}}
        for leaf in leaves:
            typed = leaf.name in given or leaf.where.positional or not leaf.open
            values[leaf.owner][leaf.name] = flag_value(leaf, flags) if typed else leaf.default
        return _constructed(arguments, values)

    return made, build


def _constructed(arguments: Any, values: dict[str, dict[str, Any]]) -> Any:
    kind = get_origin(arguments) or arguments
    own = values[""]
    if get_args(arguments):
        own[SETTING] = get_args(arguments)[0](**values[SETTING])
    return kind(**own)


def _leaves(arguments: Any, chosen: Container[str], owner: str = "") -> Iterator[Leaf]:
    kind = get_origin(arguments) or arguments
    usual = In("model" if issubclass(kind, Setting) else "")
    hints = get_type_hints(kind, include_extras=True)
    texts = field_texts(kind)
    for each in fields(kind):
        if each.name == SETTING and get_args(arguments):
            yield from _leaves(get_args(arguments)[0], chosen, SETTING)
            continue
        hint = hints[each.name]
        extras = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        where = next((extra for extra in extras if isinstance(extra, In)), usual)
        if where.group is not None:
            bare = get_args(hint)[0] if extras else hint
            yield Leaf(
                owner=owner,
                name=each.name,
                hint=bare,
                where=where,
                default=each.default,
                text=texts.get(each.name, ""),
                chosen=each.name in chosen,
            )


def _member(leaf: Leaf) -> tuple[str, Any, Any]:
    """(name, annotation, field) as `make_dataclass` takes it."""
    hint = leaf.hint
    default = leaf.default
    options = [option for option in get_args(hint) if option is not NoneType] if leaf.open else [hint]
    if options == [bool]:
        hint = bool
        default = bool(default)
    shown = tyro.conf.arg(
        name=flag(leaf.name).removeprefix("--"),
        help=leaf.text,
        metavar=leaf.name.upper() if leaf.where.positional else _metavar(options),
        help_behavior_hint=_hint(leaf),
    )
    if leaf.where.positional:
        hint = tyro.conf.Positional[hint]
    elif (
        leaf.where.group in ("output", "") and default is not True
    ):  # of a switch that is on the text would read as its opposite
        hint = tyro.conf.FlagCreatePairsOff[hint]
    return leaf.key, Annotated[hint, shown], _field(default)


def _hint(leaf: Leaf) -> str | None:
    """What follows the help text; None: the default, as tyro writes it."""
    if leaf.default is MISSING:
        return "(required)"
    # The docstring of an open field says what happens without it; "(default: None)" would add nothing.
    return "(optional)" if leaf.open or leaf.chosen or leaf.default in ("", ()) else None


def _field(default: Any) -> Any:
    return field() if default is MISSING else field(default=default)


def _metavar(options: Sequence[Any]) -> str | None:
    """How a value is written, where tyro would write it otherwise."""
    if all(option in _METAVARS for option in options):
        return "|".join(_METAVARS[option] for option in options)
    if len(options) == 1 and get_origin(options[0]) is Literal:
        return "{" + ",".join(map(str, get_args(options[0]))) + "}"
    if len(options) == 1 and get_origin(options[0]) is tuple and Ellipsis not in get_args(options[0]):
        return " ".join(_METAVARS[part] for part in get_args(options[0]))
    return None


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, UnionType)


@cache
def field_texts(kind: type) -> dict[str, str]:
    """Field name -> its docstring, of a dataclass and the classes that it is derived from."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):  # a generated or built-in class has no source
            continue
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for statement, after in pairwise(body):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                texts[statement.target.id] = " ".join(str(after.value.value).split())
    return texts
