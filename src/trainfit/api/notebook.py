"""trainfit in Jupyter, Colab and Kaggle: how cells show plans and runs, and a progress bar."""

import sys
from typing import Any

SHOWN = {
    ("trainfit.planning.plan", "Plan"): "plan_card",
    ("trainfit.reports.run_report", "RunReport"): "run_card",
    ("trainfit.training.summary", "RunSummary"): "summary_card",
}
"""(module, class) -> the function of `reports.notebook` that makes its HTML."""


def shell() -> Any:
    """The running IPython kernel with a display; None elsewhere, also in IPython's terminal."""
    if "IPython" not in sys.modules:
        return None
    from IPython.core.getipython import get_ipython

    running: Any = get_ipython()
    return running if running is not None and hasattr(running, "kernel") else None


def install() -> None:
    """Tell the kernel how cells show plans and runs; nothing is imported until one is shown."""
    running = shell()
    if running is None:
        return
    formatter = running.display_formatter.formatters["text/html"]
    for (module, name), function in SHOWN.items():
        formatter.for_type_by_name(module, name, _later(function))


def _later(function: str) -> Any:
    def card(value: Any) -> str:
        from trainfit.reports import notebook

        return getattr(notebook, function)(value)

    return card


def progress() -> Any:
    """A `training.telemetry.Progress` below the running cell; None outside of a notebook."""
    if shell() is None:
        return None
    from IPython.display import HTML, display

    from trainfit.reports.notebook import NotebookProgress

    handle: Any = display(HTML(""), display_id=True)
    return NotebookProgress(lambda html: handle.update(HTML(html)))
