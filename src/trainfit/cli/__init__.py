"""The command line: one small file a command."""

import io
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tyro

from trainfit.cli.arguments import setting_type, typed
from trainfit.cli.guide import translate
from trainfit.errors import TrainfitError
from trainfit.reports.words import printable


def commands(words: Sequence[str]) -> Mapping[str, Callable[..., int]]:
    """Command name -> function; its parameters are the flags, its result the exit code.

    `words` is the command line: flags of a model's commands are those of its family.
    """
    from trainfit.cli.check_data import check_data
    from trainfit.cli.detect import detect
    from trainfit.cli.evaluate import evaluate
    from trainfit.cli.measure import Measure, measure
    from trainfit.cli.plan import Plan, plan
    from trainfit.cli.predict import Predict, predict
    from trainfit.cli.report import report
    from trainfit.cli.train import train

    kind: Any = setting_type(words[1:])
    return {
        "plan": typed(plan, Plan[kind], words),
        "train": train,
        "predict": typed(predict, Predict[kind], words),
        "measure": typed(measure, Measure[kind], words),
        "check-data": check_data,
        "detect": detect,
        "evaluate": evaluate,
        "report": report,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; what the user can repair ends as one line on stderr."""
    # Upstream's imports meet torch's deprecations; a user can do nothing about them.
    warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of damaged images, which are reported by name
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the locale cannot write is escaped
    try:
        words = translate(sys.argv[1:] if arguments is None else arguments)
        code = tyro.extras.subcommand_cli_from_dict(dict(commands(words)), prog="trainfit", args=words)
    except TrainfitError as error:
        print(f"trainfit: error: {printable(str(error))}", file=sys.stderr)
        code = error.exit_code
    except BrokenPipeError:  # whoever read the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:
        print(f"trainfit: error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("trainfit: stopped", file=sys.stderr)
        code = 130
    raise SystemExit(code)
