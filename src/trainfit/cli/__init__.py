"""The command line: one small file a command."""

import gc
import sys
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from trainfit.cli import signals, streams
from trainfit.errors import TrainfitError
from trainfit.reports.words import printable

HELP_ALL = "--help-all"
"""The help with the flags that `--help` leaves out."""


def commands(words: Sequence[str]) -> Mapping[str, Callable[..., Callable[[], int]]]:
    """Command name -> function; the parameters are the flags, the result runs the command and returns its exit code.

    `words` is the command line: flags of a model's commands are those of its family.
    """
    from trainfit.cli.arguments import typed

    return {name: typed(command, flags, words, chosen) for name, (command, flags, chosen) in _declared(words).items()}


def _leaves(words: Sequence[str]) -> Mapping[str, Sequence[Any]]:
    """Command name -> its flags as `cli.config` takes them."""
    from trainfit.cli.flags import leaves_of

    return {name: leaves_of(flags, chosen) for name, (_, flags, chosen) in _declared(words).items()}


def _declared(words: Sequence[str]) -> Mapping[str, tuple[Callable[[Any, Any], int], Any, Container[str]]]:
    """Command name -> its function, the dataclass that it takes, and the fields that it chooses where they are not given."""
    from trainfit.cli.arguments import setting_type
    from trainfit.cli.check_data import CheckData, check_data
    from trainfit.cli.check_exactness import CheckExactness, check_exactness
    from trainfit.cli.detect import Detect, detect
    from trainfit.cli.evaluate import Evaluate, evaluate
    from trainfit.cli.explain import Explain, explain
    from trainfit.cli.export import Export, export
    from trainfit.cli.measure import MeasureFlags, measure
    from trainfit.cli.plan import PlanFlags, plan
    from trainfit.cli.predict import PredictFlags, predict
    from trainfit.cli.report import Report, report
    from trainfit.cli.train import train
    from trainfit.training.recipe import BATCH, recipe_type

    kind: Any = setting_type(words[1:])
    return {
        "plan": (plan, PlanFlags[kind], ()),
        "train": (train, recipe_type(kind), BATCH),
        "predict": (predict, PredictFlags[kind], ()),
        "measure": (measure, MeasureFlags[kind], ()),
        "check-data": (check_data, CheckData, ()),
        "check-exactness": (check_exactness, CheckExactness, ()),
        "detect": (detect, Detect, ()),
        "evaluate": (evaluate, Evaluate, ()),
        "explain": (explain, Explain, ()),
        "export": (export, Export, ()),
        "report": (report, Report, ()),
    }


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
    words = with_config(words, _leaves)
    for family in families().values():
        words = family.translate(words)
    words = todays_flags(words)
    leaves = _leaves(words)
    require_command(words[0], leaves)
    if words[0] in leaves:
        flags = flags_of_leaves(leaves[words[0]])
        words = with_own_flags(words, flags, lambda line: print(f"trainfit: {line}", file=sys.stderr))
        require_flags(words, flags)
    known = dict(commands(words))
    handlers.ready = True
    about = (
        "Plan, predict, measure and run training that fits a GPU. COMMAND --help has the flags that most runs need, "
        "--help-all all of them; --config FILE reads flags from YAML, --print-config writes them; --version the version."
    )
    words = ["--help" if word == HELP_ALL else word for word in words if word != PRINT_CONFIG]
    command = parsed(
        lambda: tyro.extras.subcommand_cli_from_dict(known, prog="trainfit", description=about, args=words)
    )
    return command()


def _complain(text: str) -> None:
    print(f"trainfit: error: {printable(text)}", file=sys.stderr)
