"""The tracing process: `run` starts it and asks it for a trace; as a program this module is that process."""

import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainfit.errors import TrainfitError
from trainfit.process import end_with_parent
from trainfit.tracing.server import answer

IMPORTS = ("trainfit.tracing.trace", "trainfit.tracing.selftest", "trainfit.models.build")
"""Modules that every trace needs."""


def run(request: Mapping[str, Any], name: str, modules: Sequence[str] = ()) -> str:
    """The JSON of a StoredTrace for `request` (see `TraceRequest.to_json`), made in a separate process. Needs no torch.

    `modules` are imported before, once for several requests; none of a user's own, whose code may change.

    Raises:
        TrainfitError: the step cannot be built or traced, or the process died; `name` is what was traced.
    """
    # One thread: a trace computes almost nothing, and spinning threads slow down a busy machine.
    text, last_words = answer(request, (*IMPORTS, *modules))
    if text is None:
        raise TrainfitError(f"tracing {name}: {last_words}")
    if text.startswith('{"error"'):
        raise TrainfitError(json.loads(text)["error"])
    return text


def main(request: Path, answer: Path) -> None:
    """Trace what `request` names and write a StoredTrace, or {"error": message}, to `answer`."""
    record = json.loads(request.read_text())
    sys.path[:] = record["path"]

    from trainfit.tracing.fake_cuda import Target
    from trainfit.tracing.selftest import selftest
    from trainfit.tracing.trace import trace_step

    for name in record.get("families", ()):
        importlib.import_module(name)
    target = Target(**record["target"] | {"capability": tuple(record["target"]["capability"])})
    try:
        if record["device"] == "cuda":
            selftest(target)
            if record.get("prepare") is not None:
                _imported(record["prepare"])(target.capability)
        factory = _imported(record["factory"])
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


def _imported(name: str) -> Any:
    """The function named by "module:function"."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


if __name__ == "__main__":
    end_with_parent()
    main(Path(sys.argv[1]), Path(sys.argv[2]))
