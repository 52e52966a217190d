"""Runs a trained model on images and videos in bounded memory."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from trainfit.tasks.media import Medium, read_frames
from trainfit.training.inference import LoadedModel, infer

MICRO_BATCH = 4


@dataclass(frozen=True, kw_only=True)
class Detected:
    """Output of the model for an image, or for a frame of a video."""

    medium: Medium
    """The image or video."""
    frame: int | None
    """Number of the frame from 0; None for an image."""
    time_s: float | None
    picture: Path
    """The image file; of a video a file that is there until the next result is asked for."""
    output: Any
    """The output of the task."""


def detect_in(loaded: LoadedModel, media: Sequence[Medium], *, every: int = 1) -> Iterator[Detected]:
    """The outputs for all images and for every so many frames of videos, in order.

    Raises:
        TrainfitError: a file can no longer be read.
    """
    with TemporaryDirectory(prefix="trainfit-frames-") as folder:
        pictures = _pictures(media, every, Path(folder))
        while batch := list(islice(pictures, MICRO_BATCH)):
            outputs = infer(loaded, [picture for *_, picture in batch], micro_batch=MICRO_BATCH)
            for (medium, frame, time_s, picture), output in zip(batch, outputs, strict=True):
                yield Detected(medium=medium, frame=frame, time_s=time_s, picture=picture, output=output)


def _pictures(
    media: Iterable[Medium], every: int, folder: Path
) -> Iterator[tuple[Medium, int | None, float | None, Path]]:
    """(medium, frame, time, image file); the file of a frame is overwritten a micro-batch later."""
    places = count()
    for medium in media:
        if not medium.is_video:
            yield medium, None, None, medium.path
            continue
        for frame in read_frames(medium, every):
            path = folder / f"{next(places) % MICRO_BATCH}.bmp"
            frame.image.save(path)
            yield medium, frame.number, frame.time_s, path
