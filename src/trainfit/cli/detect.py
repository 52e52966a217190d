"""trainfit detect."""

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro


def detect(
    run: tyro.conf.Positional[Path],
    images: tyro.conf.Positional[tuple[Path, ...]],
    /,
    *,
    model: str | None = None,
    threshold: float = 0.5,
    draw: Path | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """Find objects in images with a trained run.

    Args:
        run: Run folder, or a weights file: of trainfit, of the upstream project, or `pretrained` (downloads it).
        images: Image files.
        model: Model that upstream's weights are of, for instance rfdetr-nano.
        threshold: Least score that is shown.
        draw: Folder for pictures with the boxes drawn in.
        device: Where to run.
        as_json: Print JSON.
    """
    from trainfit.errors import TrainfitError
    from trainfit.reports.words import printable
    from trainfit.tasks.task import inference_of
    from trainfit.training import inference
    from trainfit.training.distributed import choose_device

    if not images:
        raise TrainfitError("name at least one image: trainfit detect RUN IMAGE")
    loaded = inference.load_model(run, choose_device(device, 0), model=model)
    for remark in loaded.remarks:
        print(remark, file=sys.stderr)
    task = inference_of(str(loaded.workload.setting.family.task))
    rows: list[dict[str, object]] = []
    for path, output in zip(images, inference.infer(loaded, images), strict=True):
        own = task.rows(path, output, loaded.workload.classes, threshold)
        rows += own
        if draw:
            print(f"wrote {task.draw(path, own, draw)}")
    if as_json:
        print(json.dumps({"schema": 1, "detections": rows}, indent=2))
    else:
        for row in rows:
            print(printable(task.row_text(row)))
        if not rows:
            print(f"nothing found with a score of {threshold} or more")
    return 0
