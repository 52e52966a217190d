"""`trainfit detect` on videos that come as they are made: standard input, named pipes, cameras. None is waited for without end."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import pytest
import torch

import trainfit
from conftest import run
from trainfit.errors import TrainfitError
from trainfit.tasks import streams
from trainfit.tasks.detection.samples import ImageDetections
from trainfit.tasks.media import find_media, read_frames
from trainfit.tasks.streams import VideoStream, is_stream
from trainfit.training import detecting, inference
from videos import write_video

FRAMES = 12


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The micro-batches of a model that detects one box in everything."""
    taken: list[int] = []

    def outputs(_: Any, paths: list[Path], *, micro_batch: int) -> list[ImageDetections]:
        assert len(paths) <= micro_batch
        taken.append(len(paths))
        box: dict[str, Any] = {
            "boxes": torch.tensor([[1.0, 2.0, 3.0, 4.0]]),
            "scores": torch.tensor([0.9]),
            "classes": torch.tensor([0]),
        }
        return [ImageDetections(image_id=number, **box) for number in range(len(paths))]

    setting = SimpleNamespace(family=SimpleNamespace(task="detection"))
    loaded = SimpleNamespace(workload=SimpleNamespace(setting=setting, classes=("cat",)), remarks=())

    def load_model(*_: Any, **__: Any) -> Any:
        return loaded

    monkeypatch.setattr(inference, "load_model", load_model)
    monkeypatch.setattr(detecting, "infer", outputs)
    return taken


@pytest.fixture
def stdin() -> Iterator[Callable[..., None]]:
    """A function that pipes bytes into standard input; `ends=False` keeps the pipe open after them."""
    before = os.dup(0)
    still_open: list[int] = []
    threads: list[threading.Thread] = []

    def feed(content: bytes, *, ends: bool = True) -> None:
        reading, writing = os.pipe()
        os.dup2(reading, 0)
        os.close(reading)

        def write() -> None:
            with os.fdopen(os.dup(writing), "wb") as pipe:
                pipe.write(content)
            if ends:
                os.close(writing)

        if not ends:
            still_open.append(writing)
        threads.append(threading.Thread(target=write))
        threads[-1].start()

    yield feed
    os.dup2(before, 0)
    os.close(before)
    for thread in threads:
        thread.join(timeout=10)
    for descriptor in still_open:
        os.close(descriptor)


def rows_of(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text())["detections"]


def test_a_piped_video_is_as_the_file(
    tmp_path: Path, sizes: list[int], stdin: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """The same rows as of the file, one frame at a time as they come; drawn into stdin.mp4."""
    stdin(write_video(tmp_path / "clip.mkv", FRAMES))
    words = ("--every", 2, "--draw", tmp_path / "drawn")
    assert run("detect", "RUN", "-", "--out", tmp_path / "piped.json", *words) == 0
    assert sizes == [1] * (FRAMES // 2)
    assert capsys.readouterr().out.splitlines()[1].startswith("frame 2  -  cat")
    assert run("detect", "RUN", tmp_path / "clip.mkv", "--out", tmp_path / "file.json", *words) == 0
    piped, file = rows_of(tmp_path / "piped.json"), rows_of(tmp_path / "file.json")
    assert len(piped) == FRAMES // 2
    assert [row | {"file": ""} for row in piped] == [row | {"file": ""} for row in file]
    (drawn,) = find_media([tmp_path / "drawn" / "stdin.mp4"], print)
    assert len(list(read_frames(drawn))) == FRAMES // 2


def test_a_piped_mp4_is_answered_with_the_formats_of_a_pipe(
    tmp_path: Path, sizes: list[int], stdin: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    stdin(write_video(tmp_path / "clip.mp4", 2600))  # more than FFmpeg reads to know what is in it
    assert run("detect", "RUN", "-") == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(
        "-: it broke off before its first picture; a pipe takes Matroska, MPEG-TS, WebM or Motion JPEG: "
    )
    assert sizes == []


def test_a_stream_that_stalls_is_ended(
    tmp_path: Path,
    sizes: list[int],
    stdin: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In bounded time, with one line; what was detected is written."""
    monkeypatch.setattr(streams, "STALL_S", 0.5)
    content = write_video(tmp_path / "clip.ts", 400)  # more than FFmpeg reads to know what is in it
    stdin(content[: len(content) * 9 // 10], ends=False)
    begin_s = time.monotonic()
    assert run("detect", "RUN", "-", "--out", tmp_path / "a.json") == 1
    assert time.monotonic() - begin_s < 20
    err = capsys.readouterr().err.splitlines()
    assert err == [f"wrote {tmp_path / 'a.json'}", "-: it gave nothing for 0.5 seconds, and is taken as ended"]
    assert len(rows_of(tmp_path / "a.json")) == len(sizes) > 100


@pytest.mark.parametrize(
    ("content", "ends", "message"),
    [
        (b"", False, "-: it gave no video for 0.3 seconds"),
        (b"", True, "-: unreadable video"),
        (b"no video" * 1000, True, "-: unreadable video"),
    ],
)
def test_a_stream_without_a_video_is_one_line(
    content: bytes,
    ends: bool,
    message: str,
    stdin: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(streams, "STALL_S", 0.3)

    def load_model(*_: Any, **__: Any) -> Any:
        pytest.fail("loaded")

    monkeypatch.setattr(inference, "load_model", load_model)
    stdin(content, ends=ends)
    assert run("detect", "RUN", "-") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("-", "standard input, which is the terminal"),
        ("rtsp://camera/1", "trainfit opens no URLs: pipe it"),
        ("317", "no file of this name, and no camera /dev/video317"),
        ("/dev/video317", "no camera /dev/video317"),
    ],
)
def test_what_is_no_stream_is_one_line(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    def terminal(descriptor: int) -> bool:
        return descriptor == 0

    monkeypatch.setattr(os, "isatty", terminal)
    assert run("detect", "RUN", name) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_named_pipe(tmp_path: Path, sizes: list[int]) -> None:
    content = write_video(tmp_path / "clip.mkv", FRAMES)
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(content))
    writer.start()
    assert len(trainfit.detect("RUN", [tmp_path / "pipe"], frames=FRAMES)) == FRAMES == len(sizes)
    writer.join(timeout=10)


@pytest.fixture
def camera(monkeypatch: pytest.MonkeyPatch) -> None:
    """A camera without an end: FFmpeg's moving test picture."""

    def opened(_: str) -> Any:
        return av.open("testsrc=size=64x48:rate=30", format="lavfi")

    monkeypatch.setattr(streams, "_opened_camera", opened)


@pytest.mark.usefixtures("camera")
def test_a_camera_has_no_end(
    tmp_path: Path, sizes: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--frames` ends it, and Ctrl-C, which keeps what was detected; the call asks for a number of frames."""
    assert run("detect", "RUN", 0, "--frames", 3, "--draw", tmp_path) == 0
    assert (tmp_path / "video0.mp4").exists()
    with pytest.raises(TrainfitError, match="0 is a camera, which has no end"):
        trainfit.detect("RUN", [0])
    assert len(trainfit.detect("RUN", [0], every=2, frames=4)) == 4
    sizes.clear()
    one = detecting.infer

    def stopped(*words: Any, **named: Any) -> Any:
        if len(sizes) == 5:
            raise KeyboardInterrupt
        return one(*words, **named)

    monkeypatch.setattr(detecting, "infer", stopped)
    capsys.readouterr()
    assert run("detect", "RUN", "/dev/video0", "--out", tmp_path / "a.json", "--coco", tmp_path / "c.json") == 130
    assert len(rows_of(tmp_path / "a.json")) == 5
    assert len(json.loads((tmp_path / "c.json").read_text())["images"]) == 5
    assert capsys.readouterr().err.splitlines()[-1] == "trainfit: stopped"


def test_a_camera_without_a_new_picture_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg says "try again" between two pictures; for too long, the camera is taken as ended."""
    monkeypatch.setattr(streams, "STALL_S", 0.2)
    calls: list[float] = []

    def opened(_: str) -> Any:
        container = av.open("testsrc=size=64x48:rate=30", format="lavfi")

        def decode(video: int) -> Iterator[Any]:
            calls.append(time.monotonic())
            if len(calls) in (1, 2, 4) or len(calls) > 6:
                raise av.BlockingIOError(11, "try again")
            yield next(container.decode(video=video))
            raise av.BlockingIOError(11, "try again")

        fake = SimpleNamespace(streams=container.streams, decode=decode, close=container.close)
        return FakeContainer(fake)

    monkeypatch.setattr(streams, "_opened_camera", opened)
    stream = VideoStream("0")
    frames = list(stream.frames())
    assert [frame.number for frame in frames] == [0, 1, 2]
    assert stream.fault == "it gave no picture for 0.2 seconds, and is taken as ended"
    assert 0.2 < calls[-1] - calls[5] < 2


class FakeContainer:
    """A container whose decoding is replaced."""

    def __init__(self, parts: Any) -> None:
        """Take the parts."""
        self.streams = parts.streams
        self.decode = parts.decode
        self._close = parts.close

    def __enter__(self) -> "FakeContainer":
        """The container itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self._close()


def test_names_of_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file or folder named as a camera is a file; nothing else is taken for a stream."""
    monkeypatch.chdir(tmp_path)
    assert [is_stream(name) for name in ("-", "0", "12", "/dev/video3", "a.mp4", "0.jpg")] == [
        *[True] * 4,
        False,
        False,
    ]
    (tmp_path / "0").mkdir()
    assert not is_stream("0")
    assert is_stream("1")
