"""Writes what `trainfit detect` detects, one result at a time, so that a long video needs no memory."""

import json
import sys
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from trainfit.errors import TrainfitError
from trainfit.tasks.media import Medium, VideoWriter
from trainfit.tasks.task import CocoForm, Inference, task_of

if TYPE_CHECKING:
    from trainfit.training.detecting import Detected


class _File:
    """A text file that appears under its name when it is complete; without a path, the standard output."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.partial = path.with_name(f".{path.name}.partial") if path else None
        self.stream: TextIO = self.partial.open("w") if self.partial else sys.stdout

    def write(self, text: str) -> None:
        self.stream.write(text)

    def close(self, *, whole: bool) -> None:
        if self.path is None or self.partial is None:
            return
        self.stream.close()
        if whole:
            self.partial.replace(self.path)
            print(f"wrote {self.path}", file=sys.stderr)
        else:
            self.partial.unlink()
            print(f"{self.path} is not written, as it would not be whole", file=sys.stderr)


class JsonRows:
    """A JSON object `{"schema": 1, "detections": [...]}` with one row per line."""

    def __init__(self, path: Path | None) -> None:
        """Open a file, or the standard output."""
        self._file = _File(path)
        self._separator = "\n"
        self._file.write('{"schema": 1, "detections": [')

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows."""
        for row in rows:
            self._file.write(self._separator + json.dumps(row))
            self._separator = ",\n"

    def __enter__(self) -> Self:
        """The file itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Close the object; an incomplete file is removed."""
        self._file.write("]}\n")
        self._file.close(whole=kind is None)


class CocoFile:
    """A COCO file: `categories` from 1 in the order of the classes, `annotations` with scores, and `images`."""

    def __init__(self, path: Path, task: str, classes: Sequence[str]) -> None:
        """Open a file.

        Raises:
            TrainfitError: the task has no form in COCO's files.
        """
        form: object = task_of(task)
        if not isinstance(form, CocoForm):
            raise TrainfitError(f"--coco is for detections, not for the task {task!r}: use --out")
        self._form = form
        self._classes = classes
        self._file = _File(path)
        self._ids = count(1)
        self._images: list[dict[str, Any]] = []
        categories = [{"id": number, "name": name} for number, name in enumerate(classes, 1)]
        self._file.write(f'{{"categories": {json.dumps(categories)}, "annotations": [')
        self._separator = "\n"

    def add(self, detection: "Detected", rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the rows of an image, or of a frame."""
        medium = detection.medium
        image = {"id": len(self._images) + 1, "file_name": str(medium.path)}
        frame = {} if detection.frame is None else {"frame": detection.frame}
        self._images.append(image | {"width": medium.width, "height": medium.height} | frame)
        for row in rows:
            ids = {"id": next(self._ids), "image_id": image["id"]}
            self._file.write(self._separator + json.dumps(ids | self._form.coco_annotation(row, self._classes)))
            self._separator = ",\n"

    def __enter__(self) -> Self:
        """The file itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Write the images; an incomplete file is removed."""
        self._file.write(f'], "images": {json.dumps(self._images)}}}\n')
        self._file.close(whole=kind is None)


class Drawings:
    """A folder of pictures, and of a video for each video. Of files with the same name the later get a number."""

    def __init__(self, folder: Path, task: Inference, classes: Sequence[str], every: int) -> None:
        """Begin; the folder is there."""
        self._folder = folder
        self._task = task
        self._classes = classes
        self._every = every
        self._taken: set[str] = set()
        self._video: tuple[Medium, Path, VideoWriter] | None = None

    def add(self, detection: "Detected", rows: Sequence[Mapping[str, Any]]) -> None:
        """Draw the rows of an image, or of a frame."""
        medium = detection.medium
        picture = self._task.drawn(detection.picture, rows, self._classes)
        if self._video is not None and self._video[0] != medium:
            self._end_video()
        if not medium.is_video:
            path = self._free(medium.stem, ".png")
            picture.save(path)
            print(f"wrote {path}", file=sys.stderr)
            return
        if self._video is None:
            path = self._free(medium.stem, ".mp4")
            self._video = (medium, path, VideoWriter(path, medium, self._every))
        self._video[2].write(picture)

    def _free(self, stem: str, suffix: str) -> Path:
        names = (f"{stem}{suffix}" if number == 1 else f"{stem}-{number}{suffix}" for number in count(1))
        name = next(name for name in names if name not in self._taken)
        self._taken.add(name)
        return self._folder / name

    def _end_video(self, *, whole: bool = True) -> None:
        if self._video is not None:
            _, path, writer = self._video
            self._video = None
            writer.close()
            print(f"wrote {path}{'' if whole else ' up to there'}", file=sys.stderr)

    def __enter__(self) -> Self:
        """The drawings themselves."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """End the last video; one that was broken off holds the frames so far."""
        self._end_video(whole=kind is None)
