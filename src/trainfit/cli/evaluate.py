"""trainfit evaluate."""

import json
import sys
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, cast

from trainfit.errors import TrainfitError
from trainfit.measuring.card import Device
from trainfit.values import In, Range, require_valid


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """The model to evaluate, and the data to evaluate it on."""

    run: Annotated[Path | None, In(positional=True)] = None
    """Run folder, or a weights file of one."""
    data: str
    """Data set: a folder or file that the model's task reads, or `sample`."""
    weights: Path | None = None
    """Weights file instead of a run: of trainfit, of the upstream project, or `pretrained` (downloads it)."""
    model: str | None = None
    """Name of the model, for weights of the upstream project; a run names its own."""
    split: Literal["train", "val", "test"] = "val"
    """Which records."""
    micro_batch: Annotated[int, Range(1, 100_000)] = 4
    """Images per forward."""
    only_classes: str = ""
    """Names of the data set's classes that count, with commas between; all unless given."""
    max_detections: Annotated[int | None, Range(1)] = None
    """Detections for each image and class that count (detection only); as many as upstream counts unless given."""
    device: Device = "auto"
    """Device to run on."""
    allow_outside: bool = False
    """Read files that the data set names but does not hold."""
    pictures: Annotated[Path | None, In("output")] = None
    """Folder for validation pictures, curves and the confusion matrix, as PNG."""
    as_json: Annotated[bool, In("output")] = False
    """Print JSON (schema 1) instead of text."""


def evaluate(arguments: Evaluate, _given: AbstractSet[str]) -> int:
    """Evaluate a trained run, or a published checkpoint, on a data set."""
    from trainfit import api
    from trainfit.cli.files import require_folder
    from trainfit.reports.evaluation import evaluation_json, evaluation_text
    from trainfit.tasks.charts import write_graphics

    require_valid(arguments)
    require_folder(arguments.pictures, "--pictures")
    options = {} if arguments.max_detections is None else {"max_detections": arguments.max_detections}
    evaluation = api.evaluate(
        _source(arguments.run, arguments.weights),
        data=arguments.data,
        model=arguments.model,
        split=arguments.split,
        micro_batch=arguments.micro_batch,
        device=arguments.device,
        allow_outside=arguments.allow_outside,
        only_classes=arguments.only_classes,
        note=lambda line: print(line, file=sys.stderr),
        **options,
    )
    if arguments.pictures:
        write_graphics(evaluation.graphics, arguments.pictures, lambda line: print(line, file=sys.stderr))
        print(f"wrote {arguments.pictures}", file=sys.stderr)
    if arguments.as_json:
        print(json.dumps(evaluation_json(evaluation), indent=2))
    else:
        print(evaluation_text(evaluation))
    return 0


def _source(run: Path | None, weights: Path | None) -> Path:
    if run is not None and weights is not None:
        raise TrainfitError(f"{run} and --weights {weights} cannot both be evaluated: give one of them")
    if run is None and weights is None:
        raise TrainfitError("nothing to evaluate: name a run folder, or give --weights FILE --model NAME")
    return cast(Path, run or weights)
