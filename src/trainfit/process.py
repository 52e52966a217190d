"""Starting a Python process of one's own, and what became of it. Imports no torch."""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
"""Of prctl(2)."""
PACKAGES = "site-packages"
"""A folder in the path of every installed package."""
_running: set["subprocess.Popen[bytes]"] = set()
_ends: list[None] = []


def running(process: "subprocess.Popen[bytes]") -> None:
    """Let `end_running` kill a process too."""
    _running.add(process)


def ends() -> int:
    """How often `end_running` was called: a thread that sees another number than before starts no process again."""
    return len(_ends)


def end_running() -> None:
    """Kill the processes that `ask` is waiting for, in whichever thread."""
    _ends.append(None)
    for process in tuple(_running):
        process.kill()


def killed_with_parent() -> None:
    """Have the system kill this process, a fork, when the process that forked it ends. Linux alone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end_with_parent() -> None:
    """End this process, which `ask` started, when its parent ends, however that does.

    The parent holds the other end of stdin and never writes to it; the operating system closes it with the parent.
    """

    def wait() -> None:
        os.read(0, 1)  # not sys.stdin: a thread that waits in a buffer's lock aborts Python's own end
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def ask(module: str, request: Mapping[str, Any], **environment: str) -> tuple[str | None, str]:
    """What `python -m MODULE REQUEST ANSWER` wrote to ANSWER, the request in a file with this process's module path.

    If it wrote none: None, and its exit status or signal with the last line it printed. It is ended, whatever happens here.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, answer, log = (Path(folder) / name for name in ("request.json", "answer.json", "log"))
        asked.write_text(json.dumps({**request, "path": sys.path}))
        command = [sys.executable, "-m", module, str(asked), str(answer)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=output, env=os.environ | environment
            )
        _running.add(process)
        try:
            process.wait()
        finally:
            _running.discard(process)
            process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()
        return (answer.read_text(), "") if answer.exists() else (None, last_words(process.returncode, log))


def last_words(code: int, log: Path) -> str:
    """Exit status or signal of a process that gave no answer, the last line it wrote, and the place in a user's code."""
    text = log.read_text(errors="replace").strip()
    lines = text.splitlines() or ["no message"]
    if code == -signal.SIGKILL:
        return "killed: the machine's own memory may have run out"
    place = users_line(text)
    return f"exit status {code}: {lines[-1]}{f' ({place})' if place else ''}"


def users_line(traceback: str) -> str:
    """File and line of the last call in a traceback that is neither in this package nor in an installed one; "" for none."""
    package = str(Path(__file__).parent)
    calls = re.findall(r'^ +File "([^"<>]+)", line (\d+)', traceback, re.MULTILINE)
    own = [
        (file, line) for file, line in calls if not file.startswith((package, sys.base_prefix)) and PACKAGES not in file
    ]
    return f"{own[-1][0]}, line {own[-1][1]}" if own else ""
