"""trainfit evaluate."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, cast

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
    """COCO AP of a trained run, or of a published checkpoint, on a data set, per class.

    Args:
        run: Run folder, or a weights file of one.
        data: Data set: a folder, a COCO JSON file, or `sample`.
        weights: Weights file instead of a run: of trainfit, of the upstream project, or `pretrained` (downloads it).
        model: Model that upstream's weights are of, for instance rfdetr-nano.
        split: Which images.
        micro_batch: Images per forward.
        max_detections: Detections for each image and class that count; by default as many as upstream counts.
        device: Where to run.
        allow_outside: Read files that the data set names but does not hold.
        as_json: Print JSON.
    """
    from trainfit.reports.tables import table_text
    from trainfit.tasks.task import task_of
    from trainfit.training.distributed import choose_device
    from trainfit.training.evaluation import evaluate_model
    from trainfit.training.inference import load_detector

    source = _source(run, weights, max_detections)
    detector = load_detector(source, choose_device(device, 0), model=model)
    task = task_of(str(detector.workload.setting.family.task))
    dataset = task.read(data, allow_outside=allow_outside)
    for remark in (*detector.remarks, *_unknown_classes(detector.workload.classes, dataset.classes, source, data)):
        print(remark, file=sys.stderr)
    if split not in dataset.splits:
        raise TrainfitError(f"{data} has no split {split!r}: --split is one of {', '.join(dataset.splits)}")
    records = dataset.splits[split]
    metric = task.metric(records, detector.workload, classes=dataset.classes, max_detections=max_detections)
    evaluation = evaluate_model(
        detector.model,
        detector.workload,
        records,
        metric,
        micro_batch=micro_batch,
        precision=detector.precision,
        device=detector.device,
    )
    results = evaluation.details
    if as_json:
        print(json.dumps({"schema": 1, **{kind: dataclasses.asdict(r) for kind, r in results.items()}}, indent=2))
    else:
        print("\n".join(map(table_text, evaluation.tables)))
        limit = next(iter(results.values())).max_detections
        print(f"Up to {limit} detections for each image and class count (COCO's own limit: --max-detections 100).")
    return 0


def _source(run: Path | None, weights: Path | None, max_detections: int | None) -> Path:
    if max_detections is not None and max_detections < 1:
        raise TrainfitError(f"--max-detections must be at least 1, not {max_detections}")
    if run is not None and weights is not None:
        raise TrainfitError(f"{run} and --weights {weights} cannot both be evaluated: give one of them")
    if run is None and weights is None:
        raise TrainfitError("nothing to evaluate: name a run folder, or give --weights FILE --model NAME")
    return cast(Path, run or weights)


def _unknown_classes(known: Sequence[str], wanted: Sequence[str], source: Path, data: str) -> list[str]:
    """A remark on classes of the data set that the model does not have.

    Raises:
        TrainfitError: it has none of them.
    """
    from trainfit.tasks.detection.class_names import positions

    unknown = [name for name, row in zip(wanted, positions(wanted, known), strict=True) if row is None]
    if len(unknown) == len(wanted):
        trained = ", ".join(name for name in known if name)
        raise TrainfitError(f"{data} has the classes {', '.join(wanted)}, {source} was trained on others: {trained}")
    if not unknown:
        return []
    return [f"{source} does not know {', '.join(unknown)}: nothing is detected of them, so their AP is 0"]
