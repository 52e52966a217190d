"""trainfit detect."""

import json
import sys
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from trainfit.errors import TrainfitError
from trainfit.values import In


@dataclass(frozen=True, kw_only=True)
class Detect:
    """What a trained run finds in images."""

    run: Annotated[Path, In(positional=True)]
    """Run folder, or a weights file: of trainfit, of the upstream project, or `pretrained` (downloads it)."""
    images: Annotated[tuple[Path, ...], In(positional=True)]
    """Image files."""
    model: str | None = None
    """Model that upstream's weights are of, for instance rfdetr-nano."""
    threshold: float = 0.5
    """Least score that is shown."""
    draw: Path | None = None
    """Folder for pictures with the boxes drawn in."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run."""
    as_json: bool = False
    """Print JSON (schema 1) instead of text."""


def detect(arguments: Detect, _given: AbstractSet[str]) -> int:
    """Find objects in images with a trained run."""
    from trainfit.reports.words import printable
    from trainfit.tasks.task import inference_of
    from trainfit.training import inference
    from trainfit.training.distributed import choose_device

    if not arguments.images:
        raise TrainfitError("name at least one image: trainfit detect RUN IMAGE")
    loaded = inference.load_model(arguments.run, choose_device(arguments.device, 0), model=arguments.model)
    for remark in loaded.remarks:
        print(remark, file=sys.stderr)
    task = inference_of(str(loaded.workload.setting.family.task))
    rows: list[dict[str, object]] = []
    for path, output in zip(arguments.images, inference.infer(loaded, arguments.images), strict=True):
        own = task.rows(path, output, loaded.workload.classes, arguments.threshold)
        rows += own
        if arguments.draw:
            print(f"wrote {task.draw(path, own, arguments.draw)}", file=sys.stderr)
    if arguments.as_json:
        print(json.dumps({"schema": 1, "detections": rows}, indent=2))
        return 0
    for row in rows:
        print(printable(task.row_text(row)))
    if not rows:
        print(f"nothing with a score of {arguments.threshold} or more")
    return 0
