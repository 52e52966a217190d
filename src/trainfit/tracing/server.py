"""A process that has imported torch and forks for each trace, so that a plan that needs several imports torch once.

`answer` starts it, and asks it again as long as module path, environment and working folder are the same. It ends with the
process that started it, and when nothing was asked for `IDLE_S`. As a program this module is that process. Linux alone:
elsewhere a fork of a process that has imported torch is not safe, and each trace has a process of its own (`process.ask`).
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainfit import process

IDLE_S = 60.0
POLL_S = 0.01
WORKER = "trainfit.tracing.worker"


class _Server:
    """The process, as those see it that ask it."""

    def __init__(self, surroundings: object) -> None:
        self.surroundings = surroundings
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trainfit.tracing.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        process.running(self.process)
        self._lock = threading.Lock()
        self._send(json.dumps(sys.path))

    def _send(self, line: str) -> None:
        assert self.process.stdin is not None
        with self._lock:
            self.process.stdin.write(f"{line}\n".encode())
            self.process.stdin.flush()

    def prepare(self, modules: Sequence[str]) -> None:
        """Have it import modules now, for a request that comes later."""
        with contextlib.suppress(OSError):  # it has ended: `ask` meets it again
            self._send(json.dumps([None, list(modules)]))

    def ask(self, folder: Path, modules: Sequence[str], ends: int) -> int | None:
        """The exit status of the fork for the request in a folder; None where the server ended before it began.

        Raises:
            KeyboardInterrupt: another thread has ended all processes since there were `ends` such ends.
        """
        try:
            self._send(json.dumps([str(folder), list(modules)]))
        except OSError:
            return None
        code = folder / "code"
        while not code.exists():
            if process.ends() != ends:
                raise KeyboardInterrupt
            if self.process.poll() is not None and not code.exists():
                return -signal.SIGKILL if (folder / "begun").exists() else None
            time.sleep(POLL_S)
        return int(code.read_text())

    def end(self) -> None:
        """Kill it, and with it what it does."""
        self.process.kill()
        self.process.wait()
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()


_lock = threading.Lock()
_servers: list[_Server] = []


def _server() -> _Server:
    """One for the surroundings as they are."""
    surroundings = (tuple(sys.path), dict(os.environ), Path.cwd())
    with _lock:
        if _servers and (_servers[0].surroundings != surroundings or _servers[0].process.poll() is not None):
            _servers.pop().end()
        if not _servers:
            _servers.append(_Server(surroundings))
        return _servers[0]


@atexit.register
def end() -> None:
    """End the process, if there is one."""
    with _lock:
        while _servers:
            _servers.pop().end()


def prepare(modules: Sequence[str]) -> None:
    """Start the process, which imports modules while this one goes on: a trace will be asked for."""
    if sys.platform == "linux":
        _server().prepare(modules)


def answer(request: Mapping[str, Any], modules: Sequence[str]) -> tuple[str | None, str]:
    """As `process.ask` of the worker: its text, or None and its last words. `modules` are imported once, before it forks."""
    if sys.platform != "linux":
        return process.ask(WORKER, request, OMP_NUM_THREADS="1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps({**request, "path": sys.path}))
        code = None
        ends = process.ends()
        try:
            while code is None:
                code = _server().ask(folder, modules, ends)
        except BaseException:  # also what Ctrl-C raises: nobody waits for the trace any more
            end()
            raise
        text = folder / "answer.json"
        return (text.read_text(), "") if text.exists() else (None, process.last_words(code, folder / "log"))


def main() -> None:
    """Take requests from stdin, a line each, until it is closed.

    The modules that it imports make a million objects that stay: collecting garbage among them would take a tenth of the
    time, here and in each fork, and would have a fork copy them.
    """
    gc.disable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    children: dict[int, Path] = {}
    waiting = b""
    started = False
    idle = time.monotonic()
    while children or time.monotonic() - idle < IDLE_S:
        ready, _, _ = select.select([0], [], [], POLL_S if children else 1.0)
        if ready:
            data = os.read(0, 1 << 16)
            if not data:
                return
            *lines, waiting = (waiting + data).split(b"\n")
            for line in map(json.loads, lines):
                if not started:
                    sys.path[:] = line
                    started = True
                else:
                    folder, modules = line
                    if folder is not None:
                        (Path(folder) / "begun").touch()
                    _import(modules)
                    if folder is not None:
                        children[_begin(Path(folder))] = Path(folder)
        if children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                folder = children.pop(pid)
                (folder / "code.part").write_text(str(os.waitstatus_to_exitcode(status)))
                (folder / "code.part").replace(folder / "code")
                idle = time.monotonic()


def _import(modules: Sequence[str]) -> None:
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception:  # the fork meets it again, and says so in its own way
            break
    gc.freeze()


def _begin(folder: Path) -> int:
    """Fork for the request in a folder; the process id."""
    parent = os.getpid()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        process.killed_with_parent()
        gc.enable()
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if os.getppid() == parent:
            from trainfit.tracing import worker

            worker.main(folder / "request.json", folder / "answer.json")
            code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
