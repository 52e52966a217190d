"""A command run in a forked process with limits of time and memory: used by a test and by benchmarks/fuzz_files.py."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainfit.cli import main, streams

LIMIT_S = 30.0
LIMIT_BYTES = 2 << 30


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a case."""

    verdict: str
    """accepted, named, traceback, hang, memory, or no line."""
    seconds: float
    output: str


def run_limited(arguments: Sequence[str], folder: Path, *, limit_s: float = LIMIT_S) -> Outcome:
    """Run a command in a forked process that may live for `limit_s` and grow by `LIMIT_BYTES`."""
    log = folder / "output.txt"
    began = time.monotonic()
    inherited_bytes = _resident_bytes(os.getpid())
    child = os.fork()
    if child == 0:
        os._exit(_run_here(arguments, folder, log))
    peak_bytes = 0
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        seconds = time.monotonic() - began
        if done:
            break
        peak_bytes = max(peak_bytes, _resident_bytes(child) - inherited_bytes)
        if seconds > limit_s or peak_bytes > LIMIT_BYTES:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Outcome(verdict="hang" if seconds > limit_s else "memory", seconds=seconds, output=log.read_text())
        time.sleep(0.01)
    output = log.read_text(errors="replace")
    return Outcome(verdict=_verdict(os.waitstatus_to_exitcode(status), output, folder), seconds=seconds, output=output)


def _verdict(code: int, output: str, folder: Path) -> str:
    if (folder / "executed").exists():
        return "code was run"
    if "Traceback" in output or code not in (0, 2, 3):
        return "traceback"
    if code == 0:
        return "accepted"
    errors = [line for line in output.splitlines() if line.startswith("trainfit: error: ")]
    return "named" if len(errors) == 1 and len(errors[0]) < 2000 else "no line"


def _run_here(arguments: Sequence[str], folder: Path, log: Path) -> int:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(folder)
    if (folder / "cache").exists():
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    try:
        streams.prepare()  # as `main` does for a process of its own
        main(arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 97
    except BaseException:
        traceback.print_exc()
        return 98
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 99


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
