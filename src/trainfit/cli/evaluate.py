"""trainfit evaluate."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

import tyro


def evaluate(
    run: tyro.conf.Positional[Path],
    /,
    *,
    data: str,
    split: Literal["train", "val", "test"] = "val",
    micro_batch: int = 4,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """COCO AP of a trained run on a data set, per class.

    Args:
        run: Run folder, or a weights file of one.
        data: Data set: a folder, a COCO JSON file, or `sample`.
        split: Which images.
        micro_batch: Images per forward.
        device: Where to run.
        as_json: Print JSON.
    """
    from trainfit.errors import TrainfitError
    from trainfit.reports.ap_table import ap_table
    from trainfit.tasks.detection.read import read_dataset, require_no_errors
    from trainfit.training.distributed import choose_device
    from trainfit.training.evaluation import evaluate_model
    from trainfit.training.inference import load_detector

    detector = load_detector(run, choose_device(device, 0))
    dataset = read_dataset(data)
    require_no_errors(dataset)
    if dataset.classes != detector.workload.classes:
        raise TrainfitError(
            f"{data} has the classes {dataset.classes}, {run} was trained on {detector.workload.classes}"
        )
    if split not in dataset.splits:
        raise TrainfitError(f"{data} has no split {split!r}: --split is one of {', '.join(dataset.splits)}")
    results = evaluate_model(
        detector.model,
        detector.workload,
        dataset.splits[split],
        micro_batch=micro_batch,
        precision=detector.precision,
        device=detector.device,
    )
    if as_json:
        print(json.dumps({"schema": 1, **{kind: dataclasses.asdict(r) for kind, r in results.items()}}, indent=2))
    else:
        print("\n".join(map(ap_table, results.values())))
    return 0
