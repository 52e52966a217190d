"""Runs a trained model on images, videos and streams in bounded memory."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from trainfit.tasks.media import Medium, read_frames
from trainfit.training.inference import LoadedModel, infer

MICRO_BATCH = 4
_Picture = tuple[Medium, int | None, float | None, Path]


@dataclass(frozen=True, kw_only=True)
class Detected:
    """Output of the model for an image, or for a frame of a video."""

    medium: Medium
    """The image or video."""
    frame: int | None
    """Number of the frame from 0; None for an image."""
    time_s: float | None
    """Seconds of the frame from the beginning of the video; None for an image."""
    picture: Path
    """The image file; of a video a file that is there until the next result is asked for."""
    output: Any
    """The output of the task."""


def detect_in(
    loaded: LoadedModel, media: Sequence[Medium], *, every: int = 1, frames: int | None = None
) -> Iterator[Detected]:
    """The outputs for all images and for every so many frames of videos, of each no more than `frames`, in order.

    Of files `MICRO_BATCH` pictures run at one time; each picture of a stream runs when it comes.

    Raises:
        TrainfitError: a file can no longer be read.
    """
    with TemporaryDirectory(prefix="trainfit-frames-") as folder:
        for batch in _batches(_pictures(media, every, frames, Path(folder))):
            outputs = infer(loaded, [picture for *_, picture in batch], micro_batch=MICRO_BATCH)
            for (medium, frame, time_s, picture), output in zip(batch, outputs, strict=True):
                yield Detected(medium=medium, frame=frame, time_s=time_s, picture=picture, output=output)


def _batches(pictures: Iterable[_Picture]) -> Iterator[list[_Picture]]:
    batch: list[_Picture] = []
    for picture in pictures:
        batch.append(picture)
        if len(batch) == MICRO_BATCH or picture[0].stream is not None:
            yield batch
            batch = []
    if batch:
        yield batch


def _pictures(media: Iterable[Medium], every: int, frames: int | None, folder: Path) -> Iterator[_Picture]:
    """(medium, frame, time, image file); the file of a frame is overwritten a micro-batch later."""
    places = count()
    for medium in media:
        if not medium.is_video:
            yield medium, None, None, medium.path
            continue
        for frame in islice(read_frames(medium, every), frames):
            path = folder / f"{next(places) % MICRO_BATCH}.bmp"
            frame.image.save(path)
            yield medium, frame.number, frame.time_s, path
