"""The loader hands over every window, or says in one line within a bounded time why it cannot."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from functools import partial
from multiprocessing import Pipe, active_children
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from trainfit.models.images import crowded_sample
from trainfit.tasks.augment import Augmentation
from trainfit.tasks.detection.samples import ImageRecord, Sample
from trainfit.training import loader, packets, workers
from trainfit.training.evaluation import evaluate_model
from trainfit.training.headroom import _private_bytes  # pyright: ignore[reportPrivateUsage]
from trainfit.training.loader import Loaded, WindowPlan, training_loader
from trainfit.training.workers import LoaderDiedError

IMAGES = 24


def record(number: int, objects: int = 1) -> ImageRecord:
    return ImageRecord(
        id=number,
        path=Path(f"{number}.jpg"),
        width=64,
        height=64,
        boxes=np.full((objects, 4), float(number)),
        classes=np.full(objects, number),
        crowd=np.zeros(objects, np.bool_),
        areas=np.ones(objects),
        segmentations=tuple((np.arange(100.0) + n,) for n in range(objects)),
        object_ids=np.arange(objects),
    )


DEFAULT = Augmentation(own=frozenset({"crop", "flip"}))


def draw(record: ImageRecord, *, size: int, augment: AbstractSet[str], generator: torch.Generator) -> Sample:
    """Random pixels, and masks that hold the record's id."""
    del augment
    for polygons in record.segmentations:
        assert isinstance(polygons, tuple)
        assert polygons[0].sum() > 0
    return Sample(
        image=torch.randint(0, 256, (3, size, size), generator=generator, dtype=torch.uint8),
        boxes=torch.from_numpy(record.boxes).float(),
        classes=torch.from_numpy(record.classes),
        masks=torch.full((len(record.classes), size, size), record.id % 2 == 0),
        image_id=record.id,
        original_size=(64, 64),
    )


def windows(
    decode: Any = draw,
    *,
    processes: int,
    batch: int = 5,
    steps: int = 9,
    records: list[ImageRecord] | None = None,
    **options: Any,
) -> Iterator[Loaded]:
    records = records or [record(n) for n in range(IMAGES)]
    plan = WindowPlan(images=len(records), effective_batch=batch, sizes=(32, 48), seed=3)
    return training_loader(records, decode, plan, steps=range(2, steps), augment=DEFAULT, workers=processes, **options)


@pytest.mark.parametrize("processes", [1, 3])
def test_windows_of_processes_are_those_of_one_process(processes: int) -> None:
    for theirs, ours in zip(windows(processes=processes), windows(processes=0), strict=True):
        for a, b in zip(theirs, ours, strict=True):
            assert isinstance(a, Sample)
            assert isinstance(b, Sample)
            assert (a.image_id, a.original_size) == (b.image_id, b.original_size)
            assert all(
                torch.equal(getattr(a, kind), getattr(b, kind)) for kind in ("image", "boxes", "classes", "masks")
            )
            a.image.zero_()  # a sample may be written to
    assert not active_children()


def test_a_packet_carries_any_object_of_tensors() -> None:
    one, other = Pipe()
    value: dict[str, Any] = {
        "empty": torch.zeros((0, 4)),
        "transposed": torch.arange(6).view(2, 3).T,
        "bfloat16": torch.ones(3, dtype=torch.bfloat16),
        "samples": [crowded_sample(16, 16, objects=n, classes=3, masks=True) for n in (0, 2)],
        "text": ("ö", None, 1.5),
    }
    sent = packets.send(one, value)
    found, received = packets.receive(other)
    assert sent == received
    for kind in ("empty", "transposed", "bfloat16"):
        assert torch.equal(found[kind], value[kind])
    assert torch.equal(found["samples"][1].masks, value["samples"][1].masks)
    assert found["text"] == value["text"]
    one.close()
    with pytest.raises(EOFError):
        packets.receive(other)
    other.close()


def failing(kind: str, record: ImageRecord, **_: object) -> Sample:
    """What goes wrong in a process after some images."""
    if record.id == 7:
        if kind == "files":
            raise OSError(errno.EMFILE, "Too many open files")
        if kind == "memory":
            raise MemoryError
        if kind == "bug":
            raise KeyError("no such class")
        os.kill(os.getpid(), getattr(signal, kind))
    return crowded_sample(8, 8, objects=0, classes=1, masks=False)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("files", "failed (Too many open files): take fewer --workers"),
        ("memory", "failed (out of memory): take fewer --workers"),
        ("bug", "failed (KeyError: 'no such class' at test_loader.py:"),
        ("SIGKILL", "(exit code -9) died"),
        ("SIGTERM", "(exit code -15) died"),
        ("SIGSTOP", "has been stopped for"),
    ],
)
def test_what_goes_wrong_in_a_process_is_one_line(kind: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "STOPPED_S", 1)
    began = time.monotonic()
    with pytest.raises(LoaderDiedError, match=r"^loader process \d+ .*") as caught:
        list(windows(partial(failing, kind), processes=2))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 30
    assert not active_children()


def test_a_window_that_cannot_be_handed_over_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the worker's own hand-over: torch's DataLoader drops such a window, and waits for it for ever."""
    trainer, anonymous_file = os.getpid(), packets._anonymous_file  # pyright: ignore[reportPrivateUsage]

    def full(_folder: Path | None = None) -> Any:
        if os.getpid() != trainer:
            raise OSError(errno.ENOSPC, "No space left on device")
        return anonymous_file()

    monkeypatch.setattr(packets, "_anonymous_file", full)
    with pytest.raises(LoaderDiedError, match="No space left on device"):
        list(windows(processes=2))


def slow(seconds: float, *_: object, **_options: object) -> Sample:
    time.sleep(seconds)
    return crowded_sample(8, 8, objects=0, classes=1, masks=False)


def test_a_slow_disk_is_no_dead_process_and_what_is_waited_for_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "NOTE_S", 0.3)
    monkeypatch.setattr(workers, "STUCK_S", 1.5)
    notes: list[str] = []
    assert len(list(windows(partial(slow, 0.3), processes=1, batch=6, steps=3, note=notes.append))) == 1
    assert any(note.startswith("waiting for data for") and note.endswith(".jpg") for note in notes)
    with pytest.raises(LoaderDiedError, match=r"has been reading \d+\.jpg for \d+ s"):
        list(windows(partial(slow, 30), processes=1, steps=3))


def test_ctrl_c_ends_the_waiting() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            list(windows(partial(slow, 30), processes=1))
        assert time.monotonic() - began < 10
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not active_children()


def test_a_wait_ends_when_it_is_to_stop() -> None:
    began = time.monotonic()
    stop = iter([False, True])
    assert list(windows(partial(slow, 30), processes=1, stop=lambda: next(stop))) == []
    assert time.monotonic() - began < 10
    assert not active_children()


def test_a_wait_without_processes_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "NOTE_S", 0.25)
    notes: list[str] = []
    assert len(list(windows(partial(slow, 0.1), processes=0, batch=6, steps=3, note=notes.append))) == 1
    assert all(note.startswith("waiting for data for") and note.endswith(".jpg") for note in notes)
    assert len(notes) in (1, 2)


def test_evaluation_reports_what_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "NOTE_S", 0.25)

    def outputs(_: object, samples: list[Sample]) -> list[Sample]:
        return samples

    workload = SimpleNamespace(eval_size=32, decoder=lambda: partial(slow, 0.1), outputs=outputs)
    counted, notes = list[Any](), list[str]()
    metric = SimpleNamespace(add=counted.extend, result=lambda: len(counted))
    done = evaluate_model(
        torch.nn.Linear(1, 1),
        cast(Any, workload),
        [record(n) for n in range(6)],
        cast(Any, metric),
        micro_batch=6,
        precision="fp32",
        device=torch.device("cpu"),
        note=notes.append,
    )
    assert cast(Any, done) == 6
    assert notes
    assert notes[0].startswith("waiting for data for")


def test_windows_ahead_keep_to_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "available_host_bytes", lambda: 100_000)
    notes: list[str] = []
    assert len(list(windows(processes=2, note=notes.append))) == 7
    assert len(notes) == 1
    assert "windows are loaded ahead, not 4" in notes[0]


def test_a_low_limit_of_open_files_takes_fewer_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    used = len(list(Path("/proc/self/fd").iterdir()))
    allowed = used + workers.SPARE_FILES + 2 * workers.FILES_PER_WORKER
    limits: list[Any] = []

    def set_limit(_: int, given: tuple[int, int]) -> None:
        limits.append(given)

    def get_limit(_: int) -> tuple[int, int]:
        return allowed // 2, allowed

    monkeypatch.setattr(resource, "getrlimit", get_limit)
    monkeypatch.setattr(resource, "setrlimit", set_limit)
    notes: list[str] = []
    some = windows(processes=8, note=notes.append)
    next(some)
    assert len(active_children()) in (1, 2)
    assert f"not 8: {allowed} open files are allowed" in notes[0]
    assert limits == [(allowed, allowed)]
    cast(Any, some).close()
    assert not active_children()


def reading(coordinates: list[list[float]], record: ImageRecord, **options: Any) -> Sample:
    """As a loader process did that read lists of floats in the trainer's memory: reading a float writes its counter."""
    assert sum(coordinates[record.id]) > 0
    return draw(record, **options)


def growth(records: list[ImageRecord], decode: Any) -> int:
    """By how many bytes a process's private memory grows while it makes 50 windows of 20 images."""
    private: list[int] = []
    for number, _ in enumerate(windows(decode, processes=1, batch=20, steps=54, records=records)):
        if number in (1, 51):
            (child,) = active_children()
            private.append(_private_bytes(child.pid or 0) or 0)
    return private[1] - private[0]


def test_polygons_do_not_grow_a_process() -> None:
    """A forked process copies the pages that it writes to: with lists of floats in the trainer those of all coordinates.

    What it writes to anyway, the objects around the arrays and free pieces of the heap, is up to 15 MiB in a long test run.
    """
    records = [record(number, objects=20) for number in range(2000)]
    coordinates = [[n + k / 7 for k in range(2000)] for n in range(2000)]
    copied = growth(records, partial(reading, coordinates))
    assert copied > 40 * 2**20
    assert growth(records, draw) < copied / 2


LIMITED = """
import resource, sys
from functools import partial
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from trainfit.models.rfdetr.data import make_sample
from trainfit.tasks.augment import parse
from trainfit.tasks.detection.read import read_dataset
from trainfit.training.loader import WindowPlan, training_loader
records = read_dataset(sys.argv[1]).splits["train"] * 40
plan = WindowPlan(images=len(records), effective_batch=256, sizes=(96,), seed=0)
decode = partial(make_sample, masks=True)
for window in training_loader(records, decode, plan, steps=range(2), augment=parse("default"), workers=4):
    print(len(window), sum(len(sample.masks) for sample in window) > 256)
"""


def test_a_large_window_with_masks_under_docker_s_limits() -> None:
    """/dev/shm of 16 MiB and 256 open files: each window's masks alone are larger, each has some 1,000 tensors."""
    small = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=16m tmpfs /dev/shm && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*small, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a file system of 16 MiB cannot be mounted on /dev/shm here (unshare, mount)")
    command = [*small, sys.executable, "-c", LIMITED, "sample"]
    done = subprocess.run(command, capture_output=True, check=False, timeout=120, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["256 True"] * 2


def resident_bytes() -> dict[str, int]:
    """Memory of this process and its children by kind, in bytes."""
    found = {"RssAnon": 0, "RssFile": 0, "RssShmem": 0}
    for pid in (os.getpid(), *(child.pid for child in active_children())):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in found:
                found[name] += int(value.split()[0]) * 1024
    return found


def large(record: ImageRecord, *, size: int, augment: AbstractSet[str], generator: torch.Generator) -> Sample:
    del record, augment, size
    image = torch.randint(0, 256, (3, 256, 256), generator=generator, dtype=torch.uint8)
    none = torch.zeros(0)
    return Sample(image=image, boxes=none, classes=none, masks=None, image_id=0, original_size=(64, 64))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("processes", [0, 1])
def test_host_memory_does_not_follow_the_window(processes: int, tmp_path: Path) -> None:
    """Windows of 150 MiB wait in a file where there is a folder for it, and are the same as in memory."""
    records = [record(n, objects=0) for n in range(800)]
    sums: dict[bool, list[int]] = {}
    for folder in (tmp_path, None):
        before = resident_bytes()
        plan = WindowPlan(images=len(records), effective_batch=800, sizes=(32,), seed=3)
        most = dict.fromkeys(before, 0)
        for window in training_loader(
            records, large, plan, steps=range(2), augment=DEFAULT, workers=processes, folder=folder
        ):
            assert len(window) == 800
            assert bool(window.maps) == (folder is not None)
            for start in range(0, 800, 100):  # what a micro-batch does
                sums.setdefault(folder is None, []).append(sum(int(s.image.sum()) for s in window[start : start + 100]))
                most = {kind: max(most[kind], now - before[kind]) for kind, now in resident_bytes().items()}
                window.release()
        if folder is not None:
            assert most["RssShmem"] < 16 * 2**20
            assert most["RssFile"] < 64 * 2**20
            assert most["RssAnon"] < 110 * 2**20 or processes  # a process starts with what it imports
    assert not list(tmp_path.iterdir())
    assert sums[False] == sums[True]


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_folder: Path | None = None) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(packets, "_anonymous_file", full)
    monkeypatch.setattr(loader, "IN_MEMORY_BYTES", 1000)
    with pytest.raises(LoaderDiedError, match=r"a window cannot wait in .* \(No space left on device\): make room"):
        next(windows(processes=0, folder=tmp_path))
