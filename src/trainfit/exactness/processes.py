"""A loop on several ranks, each a process of its own on the CPU, against one process with the whole window."""

import faulthandler
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from trainfit.errors import TrainfitError
from trainfit.exactness.loop import Deviation, OwnLoop, resolve
from trainfit.exactness.record import Run
from trainfit.exactness.runs import Runner, parameter_errors

TIMEOUT_S = 300.0
"""How long the ranks may take, most of which is the import of torch on a busy machine."""


def run_ranks(
    loop: OwnLoop | Callable[[], OwnLoop] | str,
    windows: Sequence[Sequence[Sequence[Any]]],
    *,
    ranks: int,
    accumulation: int,
    double: bool,
    timeout_s: float = TIMEOUT_S,
) -> list[Run]:
    """Each rank's run on its share of every micro-batch; the process group (gloo) is there before the loop begins.

    Raises:
        TrainfitError: a rank failed or did not end in time, or the loop cannot be sent to another process.
    """
    if isinstance(loop, OwnLoop):
        raise TrainfitError(
            "with several ranks give a function that returns the loop, or its name: a process of its own makes it"
        )
    sizes = [[len(m) // ranks for m in window] for window in windows]
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        try:
            with _deaf():
                group = torch.multiprocessing.spawn(
                    _rank,
                    args=(timeout_s, folder, loop, sizes, ranks, accumulation, double, port),
                    nprocs=ranks,
                    join=False,
                )
            ended = _join(group, timeout_s)
        except Exception as error:
            messages = [file.read_text() for file in sorted(Path(folder).glob("*.txt"))]
            raise TrainfitError(
                messages[0] if messages else f"a rank failed: {' '.join(str(error).split())[-300:]}"
            ) from error
        if not ended:
            raise TrainfitError(
                f"the ranks did not end within {timeout_s:g} s: {_places(Path(folder), ranks)}; one waits for what another "
                "does not do"
            )
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


@contextmanager
def _deaf() -> Generator[None]:
    """Processes that begin here do not hear Ctrl-C, which a terminal sends to all: this process ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _join(group: Any, timeout_s: float) -> bool:
    """Whether all ranks ended in time; they are killed otherwise, and where this process is stopped."""
    end = time.monotonic() + timeout_s
    try:
        while time.monotonic() < end:
            if group.join(timeout=1.0):
                return True
        return False
    finally:
        for process in group.processes:
            if process.is_alive():
                process.kill()
                process.join()


def _places(folder: Path, ranks: int) -> str:
    """Where each rank stands: the innermost line of its stack that is in no installed package."""
    places: list[str] = []
    for rank in range(ranks):
        file = folder / f"{rank}.stack"
        lines = [line.strip() for line in file.read_text().splitlines()] if file.exists() else []
        own = [line for line in lines if line.startswith("File") and "packages" not in line and "/python3" not in line]
        places.append(f"rank {rank} {f'in {own[0]}' if own else 'in its start'}")
    return ", ".join(places)


@contextmanager
def alone() -> Generator[None]:
    """A process group of this process alone, for a loop that needs one."""
    made = not dist.is_initialized()
    if made:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        if made:
            dist.destroy_process_group()


def _rank(rank: int, timeout_s: float, folder: str, *arguments: Any) -> None:
    """One process: `_run`, whose place is written to the folder where it does not end in time."""
    torch.set_num_threads(1)
    with (Path(folder) / f"{rank}.stack").open("w") as stack:
        faulthandler.dump_traceback_later(0.8 * timeout_s, file=stack)
        try:
            _run(rank, folder, *arguments)
        finally:
            faulthandler.cancel_dump_traceback_later()


def _run(
    rank: int,
    folder: str,
    loop: Any,
    sizes: Sequence[Sequence[int]],
    ranks: int,
    accumulation: int,
    double: bool,
    port: int,
) -> None:
    """The loop on one rank; its run is written to the folder."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, timeout=timedelta(seconds=TIMEOUT_S))
    try:
        own = resolve(loop)
        windows: list[list[list[Any]]] = []
        start = 0
        for window in sizes:
            windows.append([])
            for size in window:
                windows[-1].append(list(own.items[start + rank * size : start + (rank + 1) * size]))
                start += size * ranks
        run = Runner(own, micro_batch=1, double=double).run(windows, accumulation=accumulation)
        torch.save(run, Path(folder) / f"{rank}.pt")
    except TrainfitError as error:
        (Path(folder) / f"{rank}.txt").write_text(f"rank {rank}: {error}")
        raise
    finally:
        dist.destroy_process_group()


def synchronised(many: Sequence[Run], reference: Run, limit: float) -> list[Deviation]:
    """Whether all ranks stepped on the same gradient, and whether it is that of the whole window."""
    steps = min(len(run.windows) for run in many)
    for number in range(min(steps, len(reference.windows))):
        gradients = [run.windows[number].gradients for run in many]
        apart = max(max(parameter_errors(g, gradients[0]).values(), default=0.0) for g in gradients)
        if apart > limit:
            return [
                Deviation(
                    cause="not synchronised",
                    explanation=f"the ranks step on different gradients ({apart:.2g} apart): exchange them in the last "
                    "micro-batch of every window",
                )
            ]
        truth = reference.windows[number].gradients
        if max(parameter_errors(gradients[0], truth).values(), default=0.0) > limit:
            ratio = sum(float((gradients[0][n] * t).sum()) for n, t in truth.items() if n in gradients[0]) / max(
                sum(float((t * t).sum()) for t in truth.values()), 1e-300
            )
            return [
                Deviation(
                    cause="normaliser",
                    explanation=f"all ranks agree, but on {ratio:.4g} x the gradient of the whole window: count over the "
                    f"window of all {len(many)} ranks; with ranks=1 the check looks closer",
                )
            ]
    return []
