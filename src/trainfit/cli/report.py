"""trainfit report."""

import json
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from trainfit import api
from trainfit.cli.files import require_writable, write
from trainfit.reports.run_html import run_html
from trainfit.reports.run_report import run_json, run_text
from trainfit.values import In


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run did: loss and scores, speed, how the time was spent, memory, and every out-of-memory error."""

    run: Annotated[Path, In(positional=True)]
    """Run folder; the run may still be in progress."""
    as_json: bool = False
    """Print JSON (schema 1) instead of text."""
    html: Path | None = None
    """Write the report as one HTML page, with curves."""
    force: bool = False
    """Overwrite that page."""


def report(arguments: Report, _given: AbstractSet[str]) -> int:
    """Show what a run did, or does: from its files alone."""
    page = arguments.html
    require_writable((page,), force=arguments.force)
    result = api.report(arguments.run)
    print(json.dumps(run_json(result)) if arguments.as_json else run_text(result))
    if page is not None:
        write(page, run_html(result))
    return 0
