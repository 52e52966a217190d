"""Processes of their own: `ask` starts one. As a program this is the tracing process, which `run` asks for a trace."""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainfit.errors import TrainfitError


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
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=os.environ | environment
            )
        try:
            process.wait()
        finally:
            process.kill()
            process.wait()
        return (answer.read_text(), "") if answer.exists() else (None, last_words(process.returncode, log))


def last_words(code: int, log: Path) -> str:
    """Exit status or signal of a process that gave no answer, and the last line it wrote."""
    lines = log.read_text(errors="replace").strip().splitlines() or ["no message"]
    if code == -signal.SIGKILL:
        return "killed: the machine's own memory may have run out"
    return f"exit status {code}: {lines[-1]}"


def run(request: Mapping[str, Any], name: str) -> str:
    """The JSON of a StoredTrace for `request` (see `TraceRequest.to_json`), made in a process of its own. Needs no torch.

    Raises:
        TrainfitError: the step cannot be built or traced, or the process died; `name` is what was traced.
    """
    # One thread: a trace computes next to nothing, and spinning threads slow a busy machine many times over.
    text, last_words = ask("trainfit.memory.worker", request, OMP_NUM_THREADS="1")
    if text is None:
        raise TrainfitError(f"tracing {name}: {last_words}")
    if text.startswith('{"error"'):
        raise TrainfitError(json.loads(text)["error"])
    return text


def main(request: Path, answer: Path) -> None:
    """Trace what `request` names and write a StoredTrace, or {"error": message}, to `answer`."""
    record = json.loads(request.read_text())
    sys.path[:] = record["path"]

    from trainfit.memory.fake_cuda import Target
    from trainfit.memory.selftest import selftest
    from trainfit.memory.trace import trace_step

    target = Target(**record["target"] | {"capability": tuple(record["target"]["capability"])})
    try:
        if record["device"] == "cuda":
            selftest(target)
        module, _, function = record["factory"].partition(":")
        factory = getattr(importlib.import_module(module), function)
        result = trace_step(
            lambda device: factory(device=device, **record["kwargs"]),
            target=target,
            device=record["device"],
            steps=record["steps"],
        )
    except TrainfitError as error:
        answer.write_text(json.dumps({"error": str(error)}))
        return
    answer.write_text(result.to_json())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
