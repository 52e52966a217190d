"""`trainfit check-data`: what a data set holds, and everything that is wrong with it."""

import json
import sys
import time
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class CheckData:
    """Read a data set, decode every image, and list all defects; changes no file."""

    data: tyro.conf.Positional[str]
    """Folder of the data set, its COCO JSON or YOLO data file, or `sample`."""
    format: Literal["coco", "yolo", "voc"] | None = None
    """The format, where looking does not tell."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print JSON (schema 1) instead of text."""
    decode: bool = True
    """Decode every image; without it, only what the files' heads and ends tell."""
    allow_outside: bool = False
    """Read files that the data set names but does not hold: absolute paths, `..`, links."""


def check_data(arguments: Annotated[CheckData, tyro.conf.arg(name="")]) -> int:
    """Say what a data set holds, and every defect with file and id; exit code 1 where training would refuse it."""
    from trainfit import api
    from trainfit.reports.check_data import check_data_json, check_data_text

    dataset = api.check_data(
        arguments.data,
        format=arguments.format,
        decode=arguments.decode,
        allow_outside=arguments.allow_outside,
        progress=_Progress(),
    )
    if arguments.as_json:
        print(json.dumps(check_data_json(dataset), indent=2))
    else:
        print(check_data_text(dataset, ascii_only=not _prints_blocks()))
    return int(any(finding.severity == "error" for finding in dataset.findings))


def _prints_blocks() -> bool:
    try:
        "█".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


class _Progress:
    """On stderr from the second second on: one live line in a terminal, else a line every ten seconds."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()
        self.shown = False
        self.next_s = time.monotonic() + 1

    def __call__(self, done: int, total: int) -> None:
        """Show how many images are decoded."""
        now = time.monotonic()
        if now < self.next_s and not (self.shown and done == total):
            return
        self.shown = True
        self.next_s = now + (0.2 if self.live else 10)
        start, end = ("\r", "\n" if done == total else "") if self.live else ("", "\n")
        print(f"{start}decoded {done} of {total} images", end=end, file=sys.stderr, flush=True)
