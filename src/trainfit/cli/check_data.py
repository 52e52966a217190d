"""`trainfit check-data`: what a data set holds, and everything that is wrong with it."""

import json
import sys
import time
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from trainfit.tasks.augment import parse
from trainfit.values import In, Range, require_valid


@dataclass(frozen=True, kw_only=True)
class CheckData:
    """Read a data set, decode every record, and list all defects; changes no file."""

    data: Annotated[str, In(positional=True)]
    """Folder or file of the data set, or `sample`."""
    task: str | None = None
    """What the data are for, for instance detection; recognised by the files unless given."""
    format: str | None = None
    """One of the task's formats, for instance coco, yolo or voc; detected unless given."""
    as_json: bool = False
    """Print JSON (schema 1) instead of text."""
    decode: bool = True
    """Decode every record; without it, only what the files' heads and ends tell."""
    allow_outside: bool = False
    """Read files that the data set names but does not hold: absolute paths, `..`, links."""
    show: Annotated[Path | None, In("output")] = None
    """Write an HTML page of samples as training makes them."""
    model: Annotated[str | None, In("output")] = None
    """Model that sees the samples of --show; one of the task's unless given."""
    augment: Annotated[str, In("output")] = "default"
    """Augmentation of --show, as `trainfit train --augment`."""
    samples: Annotated[int, Range(1, 1000), In("output")] = 12
    """Records that --show shows."""
    force: Annotated[bool, In("output")] = False
    """Overwrite the page."""


def check_data(arguments: CheckData, _given: AbstractSet[str] = frozenset()) -> int:
    """List what a data set holds and its defects; exit code 1 if training refuses it."""
    from trainfit import api
    from trainfit.cli.files import require_writable, write
    from trainfit.reports.check_data import check_data_json, check_data_text
    from trainfit.tasks.task import recognised_task

    require_valid(arguments)
    parse(arguments.augment)
    require_writable([arguments.show], force=arguments.force)
    task = arguments.task or recognised_task(arguments.data)
    if arguments.show is not None and arguments.model is None:
        api.default_model(task)
    check = api.check_data(
        arguments.data,
        task=task,
        format=arguments.format,
        decode=arguments.decode,
        allow_outside=arguments.allow_outside,
        progress=_Progress(),
    )
    if arguments.as_json:
        print(json.dumps(check_data_json(check), indent=2))
    else:
        print(check_data_text(check, ascii_only=not _prints_blocks()))
    if arguments.show is not None:
        page = api.samples_page(
            check, task=task, model=arguments.model, augment=arguments.augment, count=arguments.samples
        )
        write(arguments.show, page)
    return 0 if check.usable else 1


def _prints_blocks() -> bool:
    try:
        "█".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


class _Progress:
    """Progress on stderr after the first second: one live line in a terminal, else a line every ten seconds."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()
        self.shown = False
        self.next_s = time.monotonic() + 1

    def __call__(self, done: int, total: int) -> None:
        """Show how many records are decoded."""
        now = time.monotonic()
        if now < self.next_s and not (self.shown and done == total):
            return
        self.shown = True
        self.next_s = now + (0.2 if self.live else 10)
        start = "\r" if self.live else ""
        end = "" if self.live and done < total else "\n"
        print(f"{start}decoded {done} of {total}", end=end, file=sys.stderr, flush=True)
