"""Videos that come as they are made: cameras, standard input and named pipes. A stream that gives nothing ends."""

import errno
import os
import re
import select
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from trainfit.errors import TrainfitError
from trainfit.tasks.images import MOST_PIXELS

if TYPE_CHECKING:
    from PIL import Image

STANDARD_INPUT = ("-", "/dev/stdin")
CAMERA = re.compile(r"(?:/dev/video)?(\d{1,3})")
CAMERA_FORMAT = "v4l2"
"""FFmpeg's name of Linux's interface to cameras (libavdevice)."""
STALL_S = 10.0
"""Seconds without a byte or a picture after which a stream is taken as ended."""
LOOK_US = 1_000_000
"""Microseconds of a pipe's video that FFmpeg reads to know its rate; its own default is 5 s."""
WAIT_S = 0.005
"""Seconds between two looks at a camera that has no new picture."""
DEFAULT_RATE = Fraction(25)
"""Frames a second of a video that does not say it."""


class _StalledError(Exception):
    """A stream gave nothing for `STALL_S`."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A picture of a video."""

    number: int
    """Number of the frame, counted from 0."""
    time_s: float
    """Seconds from the beginning of the video, or from the first frame of a stream."""
    image: "Image.Image"
    """The decoded frame."""


class VideoStream:
    """An open stream of pictures, which is read once.

    Known limits: a camera's pictures that come while the model computes wait in the driver, and are dropped there once its
    buffers are full; FFmpeg reads `LOOK_US` of a pipe before the first picture.
    """

    def __init__(self, name: str) -> None:
        """Open a stream by its name, and wait for its first bytes.

        Raises:
            TrainfitError: there is no such stream, it gives nothing for `STALL_S`, or what it gives is no video.
        """
        import av

        self.name = name
        self.is_camera = CAMERA.fullmatch(name) is not None
        self.fault = ""
        """Why it ended before its end; empty while it runs, and where it came to its end."""
        try:
            self._container: Any = _opened_camera(name) if self.is_camera else _opened_pipe(name)
        except _StalledError as error:
            raise TrainfitError(f"{name}: it gave no video for {STALL_S:g} seconds") from error
        except (av.FFmpegError, OSError, ValueError) as error:
            raise TrainfitError(f"{name}: {_why_not(name, error)}") from error
        if not self._container.streams.video:
            raise TrainfitError(f"{name}: it has no picture")
        video = self._container.streams.video[0]
        self.width = int(video.width)
        self.height = int(video.height)
        self.rate = Fraction(video.average_rate or DEFAULT_RATE)
        if self.width * self.height > MOST_PIXELS or self.width < 1:
            raise TrainfitError(f"{name}: its pictures are {self.width} x {self.height}")

    def frames(self, every: int = 1) -> Iterator[Frame]:
        """Every so many frames, from the first, until the stream ends; `fault` then says whether that was its end."""
        with self._container:
            yield from self._frames_of(every)

    def _frames_of(self, every: int) -> Iterator[Frame]:
        begin_s: float | None = None
        for number, frame in enumerate(self._pictures()):
            time_s = float(number / self.rate if frame.time is None else frame.time)
            begin_s = time_s if begin_s is None else begin_s
            if number % every == 0:
                yield Frame(number=number, time_s=time_s - begin_s, image=cast("Image.Image", frame.to_image()))

    def _pictures(self) -> Iterator[Any]:
        import av

        last_s = time.monotonic()
        is_decoded = False
        while True:
            try:
                for frame in self._container.decode(video=0):
                    is_decoded = True
                    yield frame
                    last_s = time.monotonic()
            except av.BlockingIOError:  # a camera without a new picture
                if time.monotonic() - last_s > STALL_S:
                    self.fault = f"it gave no picture for {STALL_S:g} seconds, and is taken as ended"
                    return
                time.sleep(WAIT_S)
                continue
            except _StalledError:
                self.fault = f"it gave nothing for {STALL_S:g} seconds, and is taken as ended"
            except (av.FFmpegError, OSError) as error:
                hint = (
                    ""
                    if is_decoded
                    else " before its first picture; a pipe takes Matroska, MPEG-TS, WebM or Motion JPEG"
                )
                self.fault = f"it broke off{hint}: {reason(error)}"
            return


def is_stream(name: str) -> bool:
    """Whether a name is that of a camera (its number, or /dev/videoN), of standard input (`-`) or of a named pipe.

    Raises:
        TrainfitError: it is a URL.
    """
    if "://" in name:
        raise TrainfitError(
            f"{name}: trainfit opens no URLs: pipe it, for instance ffmpeg -i URL -f matroska - | trainfit detect RUN -"
        )
    if name in STANDARD_INPUT:
        return True
    path = Path(name)
    if CAMERA.fullmatch(name):
        return name.startswith("/dev/") or not path.exists()
    return path.is_fifo()


def stem_of(name: str) -> str:
    """What files that belong to a stream are named after."""
    camera = CAMERA.fullmatch(name)
    if camera:
        return f"video{camera[1]}"
    return "stdin" if name in STANDARD_INPUT else Path(name).stem


def reason(error: Exception) -> str:
    """The first line of an error, without the file's name."""
    import av

    text = (error.strerror if isinstance(error, OSError | av.FFmpegError) else "") or str(error)
    return text.splitlines()[0][:200] if text else type(error).__name__


def _opened_camera(name: str) -> Any:
    import av

    match = CAMERA.fullmatch(name)
    assert match is not None
    device = f"/dev/video{match[1]}"
    if not sys.platform.startswith("linux"):
        raise TrainfitError(
            f"{name}: cameras are read on Linux alone: pipe it, for instance ffmpeg ... -f matroska - | trainfit detect RUN -"
        )
    if not Path(device).exists():
        cameras = ", ".join(sorted(map(str, Path("/dev").glob("video[0-9]*"))))
        raise TrainfitError(f"{name}: no file of this name, and no camera {device}; cameras here: {cameras or 'none'}")
    return av.open(device, format=CAMERA_FORMAT, options={"fflags": "nonblock"}, timeout=(STALL_S, STALL_S))


def _opened_pipe(name: str) -> Any:
    import av

    return av.open(_input(name), "r", options={"analyzeduration": str(LOOK_US)})


class _Pipe:
    """The end of a pipe as PyAV reads it: a read that waits longer than `STALL_S` fails."""

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor = descriptor
        self.name = name

    def read(self, size: int) -> bytes:
        """At most so many bytes; none at the end."""
        ready, _, _ = select.select([self._descriptor], [], [], STALL_S)
        if not ready:
            raise _StalledError
        return os.read(self._descriptor, size)


def _input(name: str) -> _Pipe | BinaryIO:
    """Standard input or a named pipe; a file that was redirected into standard input can be sought in."""
    if name not in STANDARD_INPUT:
        return _Pipe(os.open(name, os.O_RDONLY | os.O_NONBLOCK), name)
    if os.isatty(0):
        raise TrainfitError(
            f"{name} reads a video from standard input, which is the terminal: pipe one, for instance "
            "ffmpeg -i IN -f matroska - | trainfit detect RUN -"
        )
    descriptor = os.dup(0)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    return _Pipe(descriptor, name)


def _why_not(name: str, error: Exception) -> str:
    if CAMERA.fullmatch(name):
        return f"the camera cannot be opened ({reason(error)})"
    if isinstance(error, OSError) and error.errno == errno.EBADF:
        return "standard input is closed: pipe a video into it"
    return (
        f"unreadable video: {reason(error)} (most MP4 files cannot be piped: ffmpeg -i IN -f matroska - makes a stream)"
    )
