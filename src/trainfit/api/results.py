"""Results as text, JSON and HTML, and as files, as the commands print and write them. Imports a renderer when it is needed."""

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from trainfit.errors import TrainfitError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainfit.planning.plan import Plan
    from trainfit.reports.emit import Emitted
    from trainfit.reports.run_report import RunReport

_RENDERERS = {
    "Plan": {"text": "plan:plan_text", "json": "plan:plan_json", "html": "plan_html:plan_html"},
    "Prediction": {"text": "profile:profile_text", "json": "profile:profile_json", "html": "profile_html:profile_html"},
    "RunReport": {"text": "run_report:run_text", "json": "run_report:run_json", "html": "run_html:run_html"},
    "RunSummary": {"text": "run_summary:summary_text"},
    "DataCheck": {"text": "check_data:check_data_text", "json": "check_data:check_data_json"},
    "Evaluation": {"text": "evaluation:evaluation_text", "json": "evaluation:evaluation_json"},
    "Measured": {"text": "measure:rows_text", "json": "measure:rows_json"},
    "Explanation": {"text": "explain:explain_text", "json": "explain:explain_json"},
    "Exactness": {"text": "exactness:exactness_text", "json": "exactness:exactness_json"},
    "Emitted": {"text": "emit:emitted_text"},
}
"""Class of a result -> form -> module of `reports` and its function."""


def as_text(result: Any) -> str:
    """Return a result as the text that its command prints.

    Args:
        result: A `Plan`, `Prediction`, `RunReport`, `RunSummary`, `DataCheck`, `Evaluation`, `Explanation`, `Exactness` or
            `Emitted`; a `Measured`, or the sequence of them that `trainfit.measure` returns.

    Raises:
        TrainfitError: there is no text form of this object.
    """
    return _rendered(result, "text")


def as_json(result: Any) -> dict[str, Any]:
    """Return a result as the JSON values that its command prints with --json; `schema` is the version of their form.

    Args:
        result: A `Plan`, `Prediction`, `RunReport`, `DataCheck`, `Evaluation`, `Explanation` or `Exactness`; a `Measured`, or
            the sequence of them that `trainfit.measure` returns.

    Raises:
        TrainfitError: there is no JSON form of this object.
    """
    return _rendered(result, "json")


def as_html(result: Any) -> str:
    """Return a result as one self-contained HTML page, as its command writes it with --html.

    Args:
        result: A `Plan`, `Prediction` or `RunReport`.

    Raises:
        TrainfitError: there is no HTML form of this object.
    """
    return _rendered(result, "html")


def _rendered(result: Any, form: str) -> Any:
    kind = type(result).__name__
    if isinstance(result, list | tuple) and result:
        kind = type(cast("Sequence[Any]", result)[0]).__name__
    elif kind == "Measured":
        result = (result,)
    renderer = _RENDERERS.get(kind, {}).get(form)
    if renderer is None:
        supported = [name for name, forms in _RENDERERS.items() if form in forms]
        raise TrainfitError(f"there is no {form} of a {kind}, only of: {', '.join(supported)}")
    module, _, function = renderer.partition(":")
    return getattr(import_module(f"trainfit.reports.{module}"), function)(result)


def save_plan(plan: "Plan", path: str | Path) -> Path:
    """Write the plan file that `train`, `measure` and `report` take, as `trainfit plan --out` does. An existing file is
    replaced. Returns its path.

    Raises:
        TrainfitError: nothing fits, or the file cannot be written.
    """
    from trainfit.planning.plan import to_json

    if plan.chosen is None:
        raise TrainfitError(f"nothing fits {plan.gpu.name}: there is no plan of {plan.model} to write")
    file = Path(path)
    try:
        file.write_text(json.dumps(to_json(plan), indent=2) + "\n")
    except OSError as error:
        raise TrainfitError(f"{file} cannot be written ({error.strerror}): choose another place") from error
    return file


def emit(plan: "Plan", tool: str) -> "Emitted":
    """Write a plan as the configuration of another tool, with the same effective batch: `trainfit plan --emit`.

    Args:
        plan: A result of `trainfit.plan`.
        tool: "rfdetr", "detectron2", "open_clip", "lightning", "transformers" or "accelerate".

    Returns:
        The text of a file or command, and notes on how the tool differs from the plan.

    Raises:
        TrainfitError: no such tool, nothing fits, a tool for other models, or nothing that fits can be expressed.
    """
    from trainfit.reports import emit as tools

    return tools.emit(plan, tool)


def report(run: str | Path) -> "RunReport":
    """Read the report of a run from the files of its folder: `trainfit report`.

    Args:
        run: Run folder; the run may still be in progress.

    Raises:
        TrainfitError: no run folder, or a file with a value that trainfit does not write.
    """
    from trainfit.reports.run_report import read_run, run_text

    folder = Path(run)
    try:
        result = read_run(folder)
        run_text(result)  # a row with invalid values is rejected here, not when it is rendered
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise TrainfitError(
            f"{folder}: metrics.jsonl, telemetry.jsonl or plan.json has a value that trainfit does not write "
            f"({reason:.150}): remove that line"
        ) from error
    return result
