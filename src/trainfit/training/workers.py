"""Loader processes: each makes whole windows, in order, and a failure in one reaches the trainer as one line.

A torch `DataLoader` waits without end for a worker that could not hand over its window (no space in /dev/shm, no file
descriptor left) or that is stopped. Here a worker reports the image it is at, its failures are data, and the trainer looks at
the process itself while it waits.
"""

import gc
import os
import shutil
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle, islice
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from trainfit.errors import TrainfitError
from trainfit.training.headroom import available_host_bytes
from trainfit.training.packets import Spooled, receive, send

try:
    import resource
except ImportError:  # Windows
    resource = None

PREFETCH = 2
"""Windows that are in the making or wait, for each worker; as torch's DataLoader."""
LOOK_S = 1.0
"""Seconds between two checks of a worker that the trainer waits for."""
JOIN_S = 5.0
"""Seconds that a killed process is given to end."""
NOTE_S = 30
"""Seconds without a window after which a line says what is waited for, and between two such lines."""
STOPPED_S = 20
"""Seconds after which a stopped worker (SIGSTOP, a debugger) is given up."""
STUCK_S = 600
"""Seconds after which a worker that reads one image is given up: a disk may be slow, but not for ever."""
MEMORY_SHARE = 0.5
"""Share of the free host memory that windows made ahead may take."""
FILES_PER_WORKER = 5
"""Open files of the trainer for each worker: two pipes, the process, a task and a window on their way."""
SPARE_FILES = 24
"""Open files of the trainer for everything else."""
LONGEST_REPORT = 400
"""Characters: a report is written as a whole or not at all if it is shorter than 4096 bytes (PIPE_BUF)."""
_REPAIR = "take fewer --workers or a smaller --effective-batch, or raise the limits (ulimit -n, container memory)"

Make = Callable[[Any, Callable[[str], None]], Any]
"""(task, report) -> result, in a worker; it reports the name of each item that it begins."""


class LoaderDiedError(TrainfitError):
    """A loader process is gone or stuck; raised while data is waited for, never in the middle of a step."""


@dataclass(frozen=True, kw_only=True)
class _Failure:
    """A failure in a worker."""

    reason: str
    """What happened, in a sentence."""
    known: bool = False
    """Whether the reason says all, how it is repaired included."""


def run_workers(
    make: Make,
    tasks: Iterable[Any],
    workers: int,
    *,
    least_ahead: int = 1,
    what: str = "windows",
    note: Callable[[str], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Any]:
    """`make` of each task in worker processes; results in the order of the tasks.

    A task travels with all that it needs, so that a worker reads nothing of the trainer's memory: a forked process copies
    what it reads. As many results are made ahead as half of the free host memory holds, `PREFETCH` a worker at most.

    Args:
        make: What a worker does; it can be pickled.
        tasks: One for each result.
        least_ahead: Results that are made ahead even where `PREFETCH` a worker are fewer, if there is room for them.
        what: Results in a word, for messages.
        workers: Processes, at least one; fewer are started where the limit of open files is too low.
        note: Called with a line for the user: what is less than wanted, and what it has been waiting for.
        stop: Asked while a result is waited for; the results end early where it returns True.

    Raises:
        LoaderDiedError: a worker died, was stopped, failed, or was at one item for `STUCK_S`.
    """
    crew = _start(make, _fitting(workers, note))
    turns = cycle(crew)
    todo = iter(tasks)
    pending = deque[_Worker]()
    ahead = len(crew)
    sized = False
    try:
        while True:
            for task in islice(todo, ahead - len(pending)):
                worker = next(turns)
                worker.ask(task)
                pending.append(worker)
            if not pending:
                return
            worker = pending.popleft()
            if not worker.wait(note, stop):
                return
            result, nbytes = worker.answer()
            if not sized:  # the first result says how large they are
                folder = result.folder if isinstance(result, Spooled) else None
                ahead = _ahead(max(PREFETCH * len(crew), least_ahead), nbytes, folder, what, note)
                sized = True
            yield result
    finally:
        for worker in crew:
            worker.end()


def _fitting(workers: int, note: Callable[[str], None]) -> int:
    """How many workers the limit of open files allows, after it has been raised as far as this process may."""
    if resource is None:
        return workers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # some systems refuse their own hard limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    folder = Path("/proc/self/fd")
    if soft == resource.RLIM_INFINITY or not folder.is_dir():
        return workers
    fits = max(1, (soft - len(list(folder.iterdir())) - SPARE_FILES) // FILES_PER_WORKER)
    if fits < workers:
        note(f"{fits} loader processes, not {workers}: {soft} open files are allowed; raise the limit (ulimit -n)")
    return min(fits, workers)


def _start(make: Make, workers: int) -> "list[_Worker]":
    crew: list[_Worker] = []
    try:
        for _ in range(workers):
            crew.append(_Worker(make))
    except OSError as error:
        for worker in crew:
            worker.end()
        raise LoaderDiedError(
            f"loader process {len(crew) + 1} of {workers} cannot be started ({_reason(error)}): {_REPAIR}"
        ) from error
    return crew


def _ahead(wanted: int, nbytes: int, folder: Path | None, what: str, note: Callable[[str], None]) -> int:
    """Number of results of this size that may wait at once, in host memory or in a folder."""
    free = available_host_bytes() if folder is None else shutil.disk_usage(folder).free
    if free is None:
        return wanted
    fits = max(1, int(MEMORY_SHARE * free / nbytes))
    if fits < wanted:
        place = "host memory" if folder is None else str(folder)
        sizes = f"one takes {nbytes / 2**20:.0f} MiB of {place}, {free / 2**20:.0f} MiB are free"
        note(f"{fits} {what} are loaded ahead, not {wanted}: {sizes}")
    return min(fits, wanted)


class _Worker:
    """A loader process, as the trainer sees it."""

    def __init__(self, make: Make) -> None:
        context = get_context()
        self._packets, packets = context.Pipe()
        self._reports, reports = context.Pipe(duplex=False)
        arguments = (make, packets, reports, os.getpid())
        # A daemon: it is ended where the trainer ends, however that comes about.
        self._process: BaseProcess = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        packets.close()
        reports.close()
        self._item = ""

    def ask(self, task: object) -> None:
        """Send it a task without waiting."""
        try:
            send(self._packets, task)
        except (BrokenPipeError, ConnectionResetError):
            raise self._died() from None
        except (OSError, MemoryError) as error:
            raise LoaderDiedError(f"no task can be given to a loader process ({_reason(error)}): {_REPAIR}") from error

    def answer(self) -> tuple[Any, int]:
        """Its next result, and the bytes that it takes; `wait` has returned True."""
        try:
            return receive(self._packets)
        except (EOFError, ConnectionResetError):
            raise self._died() from None
        except (OSError, MemoryError) as error:
            raise LoaderDiedError(f"a loaded window cannot be taken over ({_reason(error)}): {_REPAIR}") from error

    def end(self) -> None:
        """End the process: it has nothing to save. SIGKILL ends a stopped one too."""
        self._process.kill()
        self._process.join(JOIN_S)
        self._packets.close()
        self._reports.close()

    def wait(self, note: Callable[[str], None], stop: Callable[[], bool]) -> bool:
        """Wait until a result is there or the process is gone: True, or until `stop` returns True: False."""
        waited_s = at_item_s = stopped_s = 0.0
        noted = 1
        looked = time.monotonic()
        while True:
            ready = wait([self._packets, self._reports], LOOK_S)
            if self._packets in ready:
                return True
            if stop():
                return False
            # No more than twice the wait: the trainer itself may have been stopped meanwhile (Ctrl-Z).
            passed_s = min(time.monotonic() - looked, 2 * LOOK_S)
            looked = time.monotonic()
            waited_s += passed_s
            at_item_s += passed_s
            stopped_s = stopped_s + passed_s if _is_stopped(self._process.pid) else 0.0
            if ready:
                self._take_report()
                at_item_s = 0.0
            self._check(at_item_s, stopped_s)
            if waited_s > noted * NOTE_S:
                noted += 1
                note(f"waiting for data for {waited_s:.0f} s; loader process {self._process.pid} reads {self._item}")

    def _check(self, at_item_s: float, stopped_s: float) -> None:
        process = f"loader process {self._process.pid}"
        if stopped_s > STOPPED_S:
            raise LoaderDiedError(f"{process} has been stopped for {stopped_s:.0f} s (SIGSTOP, or a debugger)")
        if at_item_s > STUCK_S:
            raise LoaderDiedError(
                f"{process} has been reading {self._item} for {at_item_s:.0f} s: is its disk still there?"
            )

    def _take_report(self) -> None:
        """Read one report: the item that the worker is at.

        Raises:
            LoaderDiedError: it reports a failure, or will report nothing any more.
        """
        try:
            report = self._reports.recv()
        except (EOFError, ConnectionResetError):
            raise self._died() from None
        if isinstance(report, _Failure):
            if report.known:
                raise LoaderDiedError(report.reason)
            raise LoaderDiedError(f"loader process {self._process.pid} failed ({report.reason}): {_REPAIR}")
        self._item = report

    def _died(self) -> LoaderDiedError:
        self._process.join(JOIN_S)
        return LoaderDiedError(
            f"loader process {self._process.pid} (exit code {self._process.exitcode}) died, most likely killed because host "
            "memory ran out: take fewer --workers"
        )


def _is_stopped(pid: int | None) -> bool:
    """Whether a process is stopped; never where the system does not tell."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:
        return False


def _reason(error: BaseException) -> str:
    """An exception in a few words, with the line of code that raised it unless the system did."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, MemoryError):
        return "out of memory"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {text} at {Path(frame.filename).name}:{frame.lineno}"


# ---- in the worker


def _serve(make: Make, packets: Connection, reports: Connection, trainer: int) -> None:
    """What a worker does until the trainer ends it, or is gone."""
    for name in ("SIGINT", "SIGHUP"):  # from the terminal, to all processes: the trainer decides
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()  # a collection would write to, and so copy, what is shared with the trainer
    torch.set_num_threads(1)
    os.set_blocking(reports.fileno(), False)

    def report(item: str) -> None:
        with suppress(BlockingIOError):  # the trainer has not read for long: it is not waiting
            reports.send(item[:LONGEST_REPORT])

    try:
        while _is_asked(packets, trainer):
            task, _ = receive(packets)
            send(packets, make(task, report))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except BaseException as error:
        os.set_blocking(reports.fileno(), True)
        known = isinstance(error, TrainfitError)
        reason = str(error) if known else _reason(error)
        reports.send(_Failure(reason=reason[:LONGEST_REPORT], known=known))


def _is_asked(packets: Connection, trainer: int) -> bool:
    """Whether there is a task; False when the trainer is gone. Other workers may hold the trainer's end of the pipe open."""
    while not packets.poll(LOOK_S):
        if os.getppid() != trainer:
            return False
    return True
