"""Command lines that name no command or no flag, or lack a word: one line each, with the nearest that there is."""

import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stderr
from difflib import get_close_matches
from typing import TypeVar

from trainfit.cli.flags import Leaf
from trainfit.errors import TrainfitError
from trainfit.values import flag, flag_words

T = TypeVar("T")
ALWAYS = ("--help", "--help-all", "--print-config", "--version")
TYRO = "--tyro-"
COMPLETION = f"{TYRO}print-completion"
SHELLS = ("bash", "zsh", "tcsh")
PLAIN = (
    (r"Missing value for argument 'flags\.(?:own|setting)-([\w-]+)'.*", "{0}: a value is missing"),
    (r"Missing value for argument '(--[\w-]+)'.*", "{0}: a value is missing behind it"),
    (r"Missing from (trainfit [\w-]+): (\S+) .*", "{1} is missing: {0} {1} ..., and {0} --help says what it is"),
    (r"Error parsing (\S+): invalid literal for int\(\) with base 10: (.*)", "{0} must be a whole number, not {1}"),
    (r"Error parsing (\S+): could not convert string to float: (.*)", "{0} must be a number, not {1}"),
    (
        r"Error parsing (\S+): no type matching INT\|\{(.*?)\} .* from \[(.*?)\]\..*",
        "{0} must be a whole number or one of {1}, not {2}",
    ),
    (
        r"Error parsing (\S+): no type matching .* from \[(.*?)\]\..* for int\(\).*",
        "{0} must be a whole number, not {1}",
    ),
    (r"Error parsing (\S+): no type matching .* from \[(.*?)\]\..* string to float.*", "{0} must be a number, not {1}"),
    (r"invalid choice (.*) for argument '(\S+)'\. Expected one of \((.*?),?\)\.", "{1} must be one of {2}, not {0}"),
    (r"Unrecognized options: (.*)", "too many words: {0}; which flag are they for?"),
)
"""What tyro says, and the same in our words."""


def flags_of_leaves(leaves: Iterable[Leaf]) -> list[str]:
    """Every spelling of a command's flags."""
    return [spelling for leaf in leaves if not leaf.where.positional for spelling in _spellings(leaf)]


def _spellings(leaf: Leaf) -> Iterator[str]:
    name = flag(leaf.name)
    yield name
    if leaf.hint is bool or leaf.open:
        yield f"--no-{name[2:]}"


def require_command(words: Sequence[str], known: Iterable[str]) -> None:
    """Refuse a command that does not exist, and in its place a flag that there is not.

    Raises:
        TrainfitError: with the nearest.
    """
    names = list(known)
    command, *values = words
    if command == COMPLETION and values[:1] and values[0] not in SHELLS:
        raise TrainfitError(f"{COMPLETION}: {values[0]!r} is none of {', '.join(SHELLS)}")
    if command in (*names, *ALWAYS) or command.startswith(TYRO) or command == "-h":
        return
    if command.startswith("-"):
        raise TrainfitError(f"trainfit has no flag {command} before its command; trainfit --help lists the commands")
    near = get_close_matches(command, names, n=1, cutoff=0.5)
    hint = f"Perhaps you meant {near[0]}" if near else f"The commands are {', '.join(names)}"
    raise TrainfitError(f"no command {command!r}. {hint}")


def require_flags(words: Sequence[str], known: Sequence[str]) -> None:
    """Refuse the first flag that a command does not have.

    Raises:
        TrainfitError: with the nearest.
    """
    for word in flag_words(words[1:]):
        if not word.startswith("--") or word in known or word in ALWAYS or word.startswith(TYRO) or word == "--":
            continue
        longer = [name for name in known if name.startswith(word)]
        near = longer[:1] or get_close_matches(word, known, n=1, cutoff=0.6)
        hint = f"Perhaps you meant {near[0]}" if near else f"trainfit {words[0]} --help-all lists them all"
        raise TrainfitError(f"trainfit {words[0]} has no flag {word}. {hint}")


def parsed(parse: Callable[[], T]) -> T:
    """What the parser makes of a command line; its box with an error as one line.

    Raises:
        TrainfitError: the command line cannot be parsed.
        SystemExit: help was printed.
    """
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            return parse()
    except SystemExit as end:
        if end.code in (0, None):
            raise
        raise TrainfitError(_line(box.getvalue())) from None


def _line(box: str) -> str:
    """The text of tyro's error: what stands above the first ruler in a box, or between the first two without one."""
    boxed = box.startswith("╭")
    lines = [line.strip("│ ").strip() for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    parts: list[list[str]] = [[]]
    for line in lines:
        if line and not line.strip("─-"):
            parts.append([])
        else:
            parts[-1].append(line)
    words = " ".join(" ".join(parts[0 if boxed or len(parts) == 1 else 1]).split())
    for pattern, plain in PLAIN:
        if match := re.match(pattern, words):
            return plain.format(*match.groups())
    return words
