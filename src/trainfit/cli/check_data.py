"""`trainfit check-data`: what a data set holds, and everything that is wrong with it."""

import json
import sys
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


def check_data(arguments: CheckData) -> int:
    """Say what a data set holds, and every defect with file and id; exit code 1 where training would refuse it."""
    from trainfit.reports.check_data import check_data_json, check_data_text
    from trainfit.tasks.detection.check import check_dataset
    from trainfit.tasks.detection.read import read_dataset

    dataset = read_dataset(arguments.data, format=arguments.format)
    if arguments.decode:
        dataset = check_dataset(dataset, progress=_progress if sys.stderr.isatty() else None)
    print(json.dumps(check_data_json(dataset), indent=2) if arguments.as_json else check_data_text(dataset))
    return int(any(finding.severity == "error" for finding in dataset.findings))


def _progress(done: int, total: int) -> None:
    if done % 50 == 0 or done == total:
        print(f"\rdecoded {done} of {total} images", end="\n" if done == total else "", file=sys.stderr, flush=True)
