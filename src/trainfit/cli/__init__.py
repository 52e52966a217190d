"""The command line: one small file a command."""

import gc
import sys
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any

from trainfit.cli import signals, streams
from trainfit.errors import TrainfitError
from trainfit.reports.words import printable

HELP_ALL = "--help-all"
"""The help with the flags that `--help` leaves out."""


COMMANDS = {
    "plan": "plan:plan:PlanFlags",
    "train": "train:train:",
    "predict": "predict:predict:PredictFlags",
    "measure": "measure:measure:MeasureFlags",
    "check-data": "check_data:check_data:CheckData",
    "check-exactness": "check_exactness:check_exactness:CheckExactness",
    "detect": "detect:detect:Detect",
    "evaluate": "evaluate:evaluate:Evaluate",
    "explain": "explain:explain:Explain",
    "export": "export:export:Export",
    "report": "report:report:Report",
}
"""Command -> its file, its function, and the dataclass that the function takes; that of `train` is a recipe."""
OF_A_FAMILY = ("plan", "predict", "measure")
"""Commands whose flags are those of the family that the command line names."""


def commands(words: Sequence[str]) -> Mapping[str, Callable[..., Callable[[], int]]]:
    """Command name -> function; the parameters are the flags, the result runs the command and returns its exit code.

    `words` is the command line: flags of a model's commands are those of its family. If it begins with a command, the others
    have no flags, and their files are not imported.
    """
    from trainfit.cli.arguments import typed

    named = words[0] if words and words[0] in COMMANDS else None
    return {name: typed(*_declared(name, words)) if named in (name, None) else _not_this_command for name in COMMANDS}


def _not_this_command() -> Callable[[], int]:
    """Another command than the one that runs."""
    raise AssertionError("another command was named")


def _leaves(words: Sequence[str]) -> Mapping[str, Sequence[Any]]:
    """The command that the command line names -> its flags as `cli.config` takes them."""
    from trainfit.cli.flags import leaves_of

    declared = {name: _declared(name, words) for name in words[:1] if name in COMMANDS}
    return {name: leaves_of(flags, chosen) for name, (_, flags, _, chosen) in declared.items()}


def _declared(name: str, words: Sequence[str]) -> tuple[Callable[[Any, Any], int], Any, Sequence[str], Container[str]]:
    """Of a command: its function, the dataclass that it takes, `words`, and the fields that it chooses if they are not given."""
    from trainfit.cli.arguments import setting_type

    file, function, flags = COMMANDS[name].split(":")
    module = import_module(f"trainfit.cli.{file}")
    if name == "train":
        from trainfit.training.recipe import BATCH, recipe_type

        return module.train, recipe_type(setting_type(words[1:])), words, BATCH
    kind = getattr(module, flags)
    return getattr(module, function), kind[setting_type(words[1:])] if name in OF_A_FAMILY else kind, words, ()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; what the user can repair ends as one line on stderr.

    Without `arguments` this is the whole process: those of the command line are taken, and its streams are prepared.
    """
    # Upstream's imports meet torch's deprecations; a user can do nothing about them.
    warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of damaged images, which are reported by name
    if arguments is None and sys.argv[1:2] in (["plan"], ["predict"]):
        gc.disable()  # a trace is a million objects without cycles, and the process ends with its answer
    with signals.Signals() as handlers:
        code = _run(arguments, handlers)
    if arguments is None:
        signals.end_quietly()
    raise SystemExit(code)


def _run(arguments: Sequence[str] | None, handlers: signals.Signals) -> int:
    try:
        if arguments is None:
            streams.prepare()
        code = _command(sys.argv[1:] if arguments is None else arguments, handlers)
    except TrainfitError as error:
        _complain(str(error))
        code = error.exit_code
    except OSError as error:
        _complain(f"{error.filename or 'a file'}: {error.strerror or error}")
        code = 2
    except signals.Stopped as stopped:
        print("trainfit: stopped", file=sys.stderr)
        code = stopped.exit_code
    except KeyboardInterrupt:
        print("trainfit: stopped", file=sys.stderr)
        code = 130
    return streams.exit_code(code)


def _command(arguments: Sequence[str], handlers: signals.Signals) -> int:
    import tyro

    from trainfit.cli.arguments import todays_flags
    from trainfit.cli.config import PRINT_CONFIG, with_config
    from trainfit.cli.foreign_flags import with_own_flags
    from trainfit.cli.mistyped import flags_of_leaves, parsed, require_command, require_flags
    from trainfit.models.family import families

    words = list(arguments) or ["--help"]
    if words[:1] == ["--version"]:
        print(f"trainfit {version('trainfit')}")
        return 0
    words = with_config(words, _leaves, _note)
    for family in families().values():
        words = family.translate(words)
    words = todays_flags(words)
    leaves = _leaves(words)
    require_command(words, COMMANDS)
    if words[0] in leaves:
        flags = flags_of_leaves(leaves[words[0]])
        words = with_own_flags(words, flags, _note)
        require_flags(words, flags)
    known = dict(commands(words))
    handlers.ready = True
    about = (
        "Plan, predict, measure and run training that fits a GPU. COMMAND --help has the flags that most runs need, "
        "--help-all all of them; --config FILE reads flags from YAML, --print-config writes them; --version the version."
    )
    words = ["--help" if word == HELP_ALL else word for word in words if word != PRINT_CONFIG]
    if words[0] in COMMANDS:  # the others need not be parsed, which takes 50 ms
        own = known[words[0]]
        return parsed(lambda: tyro.cli(own, prog=f"trainfit {words[0]}", args=words[1:]))()
    return parsed(lambda: tyro.extras.subcommand_cli_from_dict(known, prog="trainfit", description=about, args=words))()


def _note(text: str) -> None:
    print(f"trainfit: {printable(text)}", file=sys.stderr)


def _complain(text: str) -> None:
    print(f"trainfit: error: {printable(text)}", file=sys.stderr)
