"""Plans, predictions and runs for notebooks, and a progress bar."""

from base64 import b64encode
from collections.abc import Callable
from html import escape
from typing import Any

from trainfit.planning.plan import Plan
from trainfit.reports.plan import plan_text, sentence, train_command
from trainfit.reports.plan_svg import plan_svg
from trainfit.reports.progress import step_line
from trainfit.reports.run_html import charts_html
from trainfit.reports.run_report import RunReport, read_run, run_text
from trainfit.reports.words import printable
from trainfit.training.run_files import RECIPE
from trainfit.training.telemetry import Progress, StepUpdate

_MONO = "style='white-space:pre-wrap;font-size:12px;line-height:1.45'"


def plan_card(plan: Plan) -> str:
    """The picture of a plan, its command, and the whole report in a collapsed section. The picture cannot restyle the page."""
    picture = b64encode(plan_svg(plan).encode()).decode()
    command = f"<pre {_MONO}>{escape(train_command(plan))}</pre>" if plan.chosen else ""
    return (
        f"<img alt='{escape(sentence(plan), quote=True)}' style='max-width:820px;width:100%' "
        f"src='data:image/svg+xml;base64,{picture}'>{command}"
        f"<details><summary>The whole plan</summary><pre {_MONO}>{escape(plan_text(plan))}</pre></details>"
    )


def run_card(report: RunReport) -> str:
    """The text of `trainfit report` on a run, and its curves in a frame of their own."""
    page = escape(charts_html(report), quote=True)
    frame = f"<iframe srcdoc='{page}' style='width:100%;height:420px;border:0'></iframe>" if report.windows else ""
    return f"<pre {_MONO}>{escape(run_text(report))}</pre>{frame}"


def summary_card(summary: Any) -> str:
    """The card of the run that a `training.summary.RunSummary` is about; its fields where the folder is gone."""
    if not (summary.folder / RECIPE).exists():
        return f"<pre {_MONO}>{escape(repr(summary))}</pre>"
    return run_card(read_run(summary.folder))


class NotebookProgress(Progress):
    """A `training.telemetry.Progress` as a bar with one line below it, and the last notes."""

    def __init__(self, show: Callable[[str], None]) -> None:
        """`show` replaces what it showed before by HTML."""
        self._show = show
        self._notes: list[str] = []
        self._bar = ""

    def note(self, text: str) -> None:
        """Show a line; the last eight stay visible."""
        self._notes = [*self._notes[-7:], printable(text)]
        self._draw()

    def step(self, update: StepUpdate) -> None:
        """Update the bar."""
        self._bar = _bar(update.step, update.total_steps, step_line(update))
        self._draw()

    def evaluated(self, done: int, total: int) -> None:
        """Show how far the evaluation is."""
        self._bar = _bar(done, total, f"evaluating: {done}/{total} images")
        self._draw()

    def _draw(self) -> None:
        self._show(f"{self._bar}<pre {_MONO}>{escape(chr(10).join(self._notes))}</pre>")


def _bar(done: int, total: int, words: str) -> str:
    return f"<progress value='{done}' max='{total}' style='width:100%'></progress><div {_MONO}>{escape(words)}</div>"
