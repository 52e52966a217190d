"""Command lines whose flags depend on the model: a command takes the knobs of the model's family."""

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from trainfit.errors import TrainfitError
from trainfit.files import read_json
from trainfit.models.family import find
from trainfit.models.setting import Setting
from trainfit.training.run_files import RECIPE

AnySetting = TypeVar("AnySetting", bound=Setting)


def setting_type(words: Sequence[str]) -> type[Setting]:
    """The kind of setting that a command line is about: that of the first word that names a model.

    Words behind a flag come last, because they may be its value. Without a model: that of the plan or run that a flag
    names; else the knobs that every family has.
    """
    free = [word for before, word in zip(("", *words), words, strict=False) if not before.startswith("--")]
    for word in (*free, *words):
        found = None if word.startswith("-") else find(word)
        if found is not None:
            return found[0].setting
    for before, word in pairwise(words):
        found = find(_model_in(before, Path(word)))
        if found is not None:
            return found[0].setting
        if before == "--from":  # its knobs are not known, so the other flags could not be read either
            raise TrainfitError(f"--from: {word} is no run folder with evaluated weights: train it first")
    return Setting


def _model_in(flag: str, path: Path) -> str:
    """The model of the plan or run that a flag names; empty where it cannot be read: its command says why."""
    files = {"--plan": path, "--resume": path / RECIPE, "--from": path / RECIPE}
    try:
        return str(read_json(files[flag])["model"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def given_flags(words: Sequence[str]) -> frozenset[str]:
    """Names of the flags that stand in a command line, as fields are named: "--no-micro-batch 4" gives "micro_batch"."""
    flags = (word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--"))
    return frozenset(flag.removeprefix("no_") for flag in flags)


def plain_switches(words: Sequence[str]) -> list[str]:
    """`--ema` and `--no-ema` as tyro reads a switch that may also be left open: `--ema True` and `--ema False`."""
    result: list[str] = []
    for word, after in zip(words, (*words[1:], ""), strict=True):
        if word == "--no-ema":
            result += ["--ema", "False"]
        elif word == "--ema" and after not in ("True", "False", "None"):
            result += ["--ema", "True"]
        else:
            result.append(word)
    return result


def typed(command: Callable[[Any, AbstractSet[str]], int], arguments: Any, words: Sequence[str]) -> Callable[..., int]:
    """A command as tyro takes it: `arguments` is the type of its flags, and the flags that are given go with them."""

    def run(flags: Any) -> int:
        return command(flags, given_flags(words))

    run.__annotations__ = {"flags": Annotated[arguments, tyro.conf.arg(name="")], "return": int}
    run.__doc__ = command.__doc__
    return run
