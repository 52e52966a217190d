"""The tracing process: `run` starts it; it reads a specification and writes a result, or what went wrong."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainfit.errors import TrainfitError


def run(request: Mapping[str, Any], name: str) -> str:
    """The JSON of a TraceResult for `request` (a `TraceSpec` as a mapping), made in a process of its own. Needs no torch.

    Raises:
        TrainfitError: the step cannot be built or traced, or the process died; `name` is what was traced.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps({**request, "path": sys.path}))
        command = [sys.executable, "-m", "trainfit.memory.worker", str(asked), str(answer)]
        # One thread: a trace computes next to nothing, and spinning threads slow a busy machine many times over.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if not answer.exists():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise TrainfitError(f"tracing {name} ended with exit status {done.returncode}: {last}")
        text = answer.read_text()
    if text.startswith('{"error"'):
        raise TrainfitError(json.loads(text)["error"])
    return text


def main(request: Path, answer: Path) -> None:
    """Trace what `request` names and write a TraceResult, or {"error": message}, to `answer`."""
    record = json.loads(request.read_text())
    sys.path[:] = record["path"]

    from trainfit.memory.fake_cuda import Target
    from trainfit.memory.selftest import selftest
    from trainfit.memory.trace import load_factory, trace_step

    target = Target(
        capability=tuple(record["target"]["capability"]), fused_attention=record["target"]["fused_attention"]
    )
    try:
        if record["device"] == "cuda":
            selftest(target)
        factory = load_factory(record["factory"])
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
