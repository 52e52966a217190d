"""Command lines whose flags depend on the model: a command takes the knobs of the model's family."""

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Annotated, Any, TypeVar

import tyro

from trainfit.models.family import find
from trainfit.models.setting import Setting

AnySetting = TypeVar("AnySetting", bound=Setting)


def setting_type(words: Sequence[str]) -> type[Setting]:
    """The kind of setting that a command line is about: that of the first word that names a model.

    Words behind a flag come last, because they may be its value. Without a model: the knobs that every family has.
    """
    free = [word for before, word in zip(("", *words), words, strict=False) if not before.startswith("--")]
    for word in (*free, *words):
        found = None if word.startswith("-") else find(word)
        if found is not None:
            return found[0].setting
    return Setting


def given_flags(words: Sequence[str]) -> frozenset[str]:
    """Names of the flags that stand in a command line, as fields are named: "--no-micro-batch 4" gives "micro_batch"."""
    flags = (word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--"))
    return frozenset(flag.removeprefix("no_") for flag in flags)


def typed(command: Callable[[Any, AbstractSet[str]], int], arguments: Any, words: Sequence[str]) -> Callable[..., int]:
    """A command as tyro takes it: `arguments` is the type of its flags, and the flags that are given go with them."""

    def run(flags: Any) -> int:
        return command(flags, given_flags(words))

    run.__annotations__ = {"flags": Annotated[arguments, tyro.conf.arg(name="")], "return": int}
    run.__doc__ = command.__doc__
    return run
