"""trainfit evaluate."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import tyro

from trainfit.errors import TrainfitError


def evaluate(
    run: tyro.conf.Positional[Path | None] = None,
    /,
    *,
    data: str,
    weights: Path | None = None,
    model: str | None = None,
    split: Literal["train", "val", "test"] = "val",
    micro_batch: int = 4,
    max_detections: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    allow_outside: bool = False,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """How good a trained run, or a published checkpoint, is on a data set.

    Args:
        run: Run folder, or a weights file of one.
        data: Data set: a folder or file that the model's task reads, or `sample`.
        weights: Weights file instead of a run: of trainfit, of the upstream project, or `pretrained` (downloads it).
        model: Model that upstream's weights are of, for instance rfdetr-nano.
        split: Which records.
        micro_batch: Images per forward.
        max_detections: Of detection: detections for each image and class that count; by default as many as upstream counts.
        device: Where to run.
        allow_outside: Read files that the data set names but does not hold.
        as_json: Print JSON.
    """
    from trainfit import api
    from trainfit.reports.tables import table_text

    options = {} if max_detections is None else {"max_detections": max_detections}
    if max_detections is not None and max_detections < 1:
        raise TrainfitError(f"--max-detections must be at least 1, not {max_detections}")
    evaluation = api.evaluate(
        _source(run, weights),
        data=data,
        model=model,
        split=split,
        micro_batch=micro_batch,
        device=device,
        allow_outside=allow_outside,
        note=lambda line: print(line, file=sys.stderr),
        **options,
    )
    if as_json:
        details = {name: _plain(value) for name, value in evaluation.details.items()}
        print(json.dumps({"schema": 1, **details}, indent=2))
    else:
        print("\n".join((*map(table_text, evaluation.tables), *evaluation.notes)))
    return 0


def _plain(value: Any) -> Any:
    """A JSON value, or a dataclass as one."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value


def _source(run: Path | None, weights: Path | None) -> Path:
    if run is not None and weights is not None:
        raise TrainfitError(f"{run} and --weights {weights} cannot both be evaluated: give one of them")
    if run is None and weights is None:
        raise TrainfitError("nothing to evaluate: name a run folder, or give --weights FILE --model NAME")
    return cast(Path, run or weights)
