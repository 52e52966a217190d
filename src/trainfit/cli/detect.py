"""trainfit detect."""

import sys
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from trainfit.cli.files import require_folder, require_writable
from trainfit.errors import TrainfitError
from trainfit.measuring.card import Device
from trainfit.values import In, Range, require_valid

if TYPE_CHECKING:
    from trainfit.tasks.media import Medium


@dataclass(frozen=True, kw_only=True)
class Detect:
    """Objects that a trained run detects in images, videos and streams."""

    run: Annotated[Path, In(positional=True)]
    """Run folder, or a weights file: of trainfit, of the upstream project, or `pretrained` (downloads it)."""
    images: Annotated[tuple[str, ...], In(positional=True)]
    """Images, videos, folders of them, or patterns in quotes ('shots/**/*.jpg'); 0, 1 ... or /dev/videoN for a camera; - for
    a video on standard input."""
    model: str | None = None
    """Name of the model, for weights of the upstream project; a run names its own."""
    threshold: Annotated[float, Range(0, 1)] = 0.5
    """Smallest score that is shown."""
    every: Annotated[int, Range(1, 1_000_000)] = 1
    """Take every N-th frame of a video."""
    frames: Annotated[int | None, Range(1)] = None
    """Stop each video after so many frames that were taken; a camera goes on until Ctrl-C unless given."""
    draw: Annotated[Path | None, In("output")] = None
    """Folder for pictures with masks, boxes and labels drawn in; of a video an MP4 file."""
    out: Annotated[Path | None, In("output")] = None
    """JSON file for the detections, as --json prints them."""
    coco: Annotated[Path | None, In("output")] = None
    """JSON file for the detections, as COCO's annotations."""
    force: Annotated[bool, In("output")] = False
    """Overwrite these files."""
    device: Device = "auto"
    """Device to run on."""
    as_json: Annotated[bool, In("output")] = False
    """Print JSON (schema 1) instead of text."""


def detect(arguments: Detect, _given: AbstractSet[str]) -> int:
    """Detect objects in images, videos and streams with a trained run."""
    from trainfit.tasks.media import find_media

    require_valid(arguments)
    if not arguments.images:
        raise TrainfitError("name at least one image: trainfit detect RUN IMAGE")
    media = find_media(arguments.images, _note)
    require_writable((arguments.out, arguments.coco), force=arguments.force)
    require_folder(arguments.draw, "--draw")
    streams = [medium.stream for medium in media if medium.stream is not None]
    shown = 0
    stopped: KeyboardInterrupt | None = None
    with ExitStack() as files:
        try:
            for text in _detected(arguments, media, files):
                if not arguments.as_json:
                    print(text, flush=bool(streams))
                shown += 1
        except KeyboardInterrupt as interrupt:
            if not streams:
                raise
            stopped = interrupt  # the way to end a camera: the files of what was detected so far are written
    if stopped is not None:
        raise stopped
    if not shown and not arguments.as_json:
        print(f"nothing with a score of {arguments.threshold} or more")
    faults = [f"{stream.name}: {stream.fault}" for stream in streams if stream.fault]
    for fault in faults:
        _note(fault)
    return int(bool(faults))


def _detected(arguments: Detect, media: "list[Medium]", files: ExitStack) -> Iterator[str]:
    """A line for each row, while the rows are written wherever they are wanted."""
    from trainfit.cli.detections import CocoFile, Drawings, JsonRows
    from trainfit.reports.words import printable
    from trainfit.tasks.task import inference_of
    from trainfit.training import inference
    from trainfit.training.detecting import detect_in
    from trainfit.training.distributed import choose_device

    loaded = inference.load_model(arguments.run, choose_device(arguments.device, 0), model=arguments.model)
    for remark in loaded.remarks:
        _note(remark)
    name = str(loaded.workload.setting.family.task)
    task = inference_of(name)
    classes = loaded.workload.classes
    rows_files: list[JsonRows] = []
    if arguments.as_json:
        rows_files.append(files.enter_context(JsonRows(None)))
    if arguments.out:
        rows_files.append(files.enter_context(JsonRows(arguments.out)))
    coco = files.enter_context(CocoFile(arguments.coco, name, classes)) if arguments.coco else None
    drawings = files.enter_context(Drawings(arguments.draw, task, classes, arguments.every)) if arguments.draw else None
    for detection in detect_in(loaded, media, every=arguments.every, frames=arguments.frames):
        rows = task.rows(detection.medium.path, detection.output, classes, arguments.threshold)
        if drawings:  # from the image file, which of a video is not `file`
            drawings.add(detection, rows)
        if detection.frame is not None:
            at: dict[str, Any] = {"frame": detection.frame, "time_s": round(detection.time_s or 0.0, 3)}
            rows = [row | at for row in rows]
        for file in rows_files:
            file.add(rows)
        if coco:
            coco.add(detection, rows)
        for row in rows:
            moment = "" if detection.frame is None else f"frame {detection.frame}  "
            yield printable(moment + task.row_text(row))


def _note(line: str) -> None:
    print(line, file=sys.stderr)
