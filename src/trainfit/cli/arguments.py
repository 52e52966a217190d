"""Command lines whose flags depend on the model: a command takes the knobs of the model's family."""

from collections.abc import Callable, Container, Sequence
from collections.abc import Set as AbstractSet
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from trainfit.cli.config import PRINT_CONFIG, config_text
from trainfit.cli.flags import flags_of, leaves_of
from trainfit.errors import TrainfitError
from trainfit.files import read_json
from trainfit.models.family import find
from trainfit.models.setting import Setting
from trainfit.training.run_files import RECIPE

AnySetting = TypeVar("AnySetting", bound=Setting)


def setting_type(words: Sequence[str]) -> type[Setting]:
    """The kind of setting that a command line is about: that of the first word that names a model.

    Words after a flag are tried last, because they may be its value. Without a model, it is that of the plan or run that a
    flag names; else the setting has the knobs of every family.
    """
    free = [word for before, word in zip(("", *words), words, strict=False) if not before.startswith("--")]
    for word in (*free, *words):
        match = None if word.startswith("-") else find(word)
        if match is not None:
            return match[0].setting
    for before, word in pairwise(words):
        match = find(_model_in(before, Path(word)))
        if match is not None:
            return match[0].setting
        if before == "--weights" and Path(word).is_dir():  # without its knobs the other flags could not be read either
            raise TrainfitError(f"--weights: {word} is not a run folder with evaluated weights: train it first")
    return Setting


def _model_in(flag: str, path: Path) -> str:
    """The model of the plan or run that a flag names; empty where it cannot be read: its command says why."""
    files = {"--plan": path, "--resume": path / RECIPE, "--weights": path / RECIPE}
    try:
        return str(read_json(files[flag])["model"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def given_flags(words: Sequence[str]) -> frozenset[str]:
    """Names of the flags that stand in a command line, as fields are named: "--no-micro-batch 4" gives "micro_batch"."""
    flags = (word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--"))
    return frozenset(flag.removeprefix("no_") for flag in flags)


def todays_flags(words: Sequence[str]) -> list[str]:
    """A command line of version 0.1 with the flags of today.

    `train --from RUN` is `--weights RUN`, `--ema True` or `--ema False` is `--ema` or `--no-ema`, and `--augment` and
    `--no-augment` without a value are `--augment default` and `--augment none`.

    Raises:
        TrainfitError: `--from` and `--weights` are both given.
    """
    result: list[str] = []
    for word, after in zip(words, (*words[1:], "--"), strict=True):
        name, equals, value = word.partition("=")
        if word == "--no-augment" or (word == "--augment" and after.startswith("-")):
            result += ["--augment", "none" if word == "--no-augment" else "default"]
            continue
        if name == "--from" and words[0] == "train":
            if any(each.partition("=")[0] == "--weights" for each in words):
                raise TrainfitError("--from is what --weights RUN was called: give one of the two")
            result.append("--weights" + equals + value)
        elif result and result[-1] == "--ema" and word in ("True", "False"):
            result[-1] = "--ema" if word == "True" else "--no-ema"
        else:
            result.append(word)
    return result


def typed(
    command: Callable[[Any, AbstractSet[str]], int], arguments: Any, words: Sequence[str], chosen: Container[str] = ()
) -> Callable[..., Callable[[], int]]:
    """A command as tyro takes it: a function from its flags to one that runs it.

    Args:
        command: Takes its arguments, and the names of the flags that stand in the command line.
        arguments: The dataclass of its flags.
        words: The command line.
        chosen: Fields that the command chooses where they are not given.
    """
    given = given_flags(words) - {PRINT_CONFIG[2:].replace("-", "_")}
    made, build = flags_of(arguments, chosen, rare=not {"-h", "--help"} & set(words))

    def run(flags: Any) -> int:
        if PRINT_CONFIG in words:
            print(config_text(words[0], leaves_of(arguments, chosen), flags, given), end="")
            return 0
        return command(build(flags, given), given)

    def parsed(flags: Any) -> Callable[[], int]:
        return lambda: run(flags)

    parsed.__doc__ = command.__doc__
    parsed.__annotations__ = {"flags": Annotated[made, tyro.conf.arg(name="")]}
    return parsed
