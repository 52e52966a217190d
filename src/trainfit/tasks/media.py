"""Images and videos that a user names: files, folders, patterns and streams, found and checked before a model is loaded."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from glob import glob, has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from trainfit.errors import TrainfitError
from trainfit.tasks.images import IMAGE_SUFFIXES, MOST_PIXELS, ImageDefect, read_header
from trainfit.tasks.streams import DEFAULT_RATE, Frame, VideoStream, is_stream, reason, stem_of

if TYPE_CHECKING:
    from PIL import Image

VIDEO_SUFFIXES = (
    *(".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"),
    *(".ts", ".mts", ".m2ts", ".wmv", ".asf", ".flv", ".ogv", ".3gp", ".mjpeg", ".gif"),
)


@dataclass(frozen=True, kw_only=True)
class Medium:
    """An image file, or a video."""

    path: Path
    """The file."""
    width: int
    """Width in pixels."""
    height: int
    """Height in pixels."""
    is_video: bool = False
    """Whether it is a video."""
    rate: Fraction = Fraction(0)
    """Frames a second of a video."""
    stream: VideoStream | None = None
    """What is read of a video that is no file: a camera, standard input or a named pipe."""

    @property
    def stem(self) -> str:
        """What files that belong to it are named after."""
        return self.path.stem if self.stream is None else stem_of(self.stream.name)


def find_media(names: Sequence[str | Path | int], note: Callable[[str], None]) -> list[Medium]:
    """The images and videos that files, folders, patterns (`shots/*.jpg`) and streams (`streams.is_stream`) name, each once.

    They are in the order of the names. Of a folder those directly in it, by name. What cannot be read is an error where it was
    named itself, and is left out and noted where a folder or a pattern named it.

    Raises:
        TrainfitError: there is no image or video, or one that was named cannot be read.
    """
    media: dict[Path, Medium] = {}
    for name in map(str, names):
        path = Path(name)
        if is_stream(name):
            if path not in media:
                media[path] = _stream(path)
            continue
        several = path.is_dir() or (has_magic(name) and not path.exists())
        for each in _within(path, name) if several else [path]:
            medium = _opened(each)
            if isinstance(medium, Medium):
                media.setdefault(each, medium)
            elif several:
                note(f"left out: {medium}")
            else:
                raise TrainfitError(medium)
    if not media:
        raise TrainfitError(f"{', '.join(map(str, names))}: nothing in it can be read")
    return list(media.values())


def _within(path: Path, pattern: str) -> list[Path]:
    known = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
    files = path.iterdir() if path.is_dir() else map(Path, glob(pattern, recursive=True))  # noqa: PTH207 - also absolute
    chosen = sorted(file for file in files if file.suffix.lower() in known and file.is_file())
    if not chosen:
        where = f"{path} (its subfolders are not searched: '{path}/**/*.jpg' does)" if path.is_dir() else pattern
        raise TrainfitError(f"no image and no video in {where}: they end in {', '.join(known)}")
    return chosen


def _opened(path: Path) -> Medium | str:
    """What a file is, or why it cannot be used."""
    if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file():
        return _video(path)
    header = read_header(path)
    if isinstance(header, ImageDefect):
        return f"{path}: {header.kind}: {header.message}"
    width, height = header.upright
    return Medium(path=path, width=width, height=height)


def _stream(path: Path) -> Medium:
    stream = VideoStream(str(path))
    size = {"width": stream.width, "height": stream.height}
    return Medium(path=path, is_video=True, rate=stream.rate, stream=stream, **size)


def _video(path: Path) -> Medium | str:
    import av  # here, because most runs of `detect` read images

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                return f"{path}: it has no picture"
            stream = container.streams.video[0]
            if stream.width * stream.height > MOST_PIXELS or stream.width < 1:
                return f"{path}: its pictures are {stream.width} x {stream.height}"
            rate = stream.average_rate or DEFAULT_RATE
            return Medium(path=path, width=stream.width, height=stream.height, is_video=True, rate=rate)
    except (av.FFmpegError, OSError, ValueError) as error:
        return f"{path}: unreadable video: {reason(error)}"


def read_frames(medium: Medium, every: int = 1) -> Iterator[Frame]:
    """Every so many frames of a video, from the first; of a stream until it ends (`VideoStream.frames`).

    Raises:
        TrainfitError: it is damaged further on.
    """
    import av

    if medium.stream is not None:
        yield from medium.stream.frames(every)
        return
    try:
        with av.open(str(medium.path)) as container:
            for number, frame in enumerate(container.decode(video=0)):
                if number % every == 0:
                    yield Frame(number=number, time_s=float(frame.time or number / medium.rate), image=_image(frame))
    except av.FFmpegError as error:
        raise TrainfitError(f"{medium.path}: unreadable video: {reason(error)}") from error


def _image(frame: Any) -> "Image.Image":
    return cast("Image.Image", frame.to_image())


class VideoWriter:
    """An MP4 file of pictures of one size; a context that ends the file."""

    def __init__(self, path: Path, medium: Medium, every: int = 1) -> None:
        """Begin a video with the size of `medium` and its rate, of which every so many frames come."""
        import av

        self._container = av.open(str(path), "w")
        self._stream: Any = self._container.add_stream("libx264", rate=medium.rate / every)
        self._stream.width = medium.width // 2 * 2  # the codec halves the colours' resolution
        self._stream.height = medium.height // 2 * 2
        self._stream.pix_fmt = "yuv420p"

    def write(self, image: "Image.Image") -> None:
        """Add a picture."""
        import av

        cut = image.crop((0, 0, self._stream.width, self._stream.height))
        self._container.mux(self._stream.encode(av.VideoFrame.from_image(cut)))

    def close(self) -> None:
        """Write what is left, and the index."""
        self._container.mux(self._stream.encode(None))
        self._container.close()
