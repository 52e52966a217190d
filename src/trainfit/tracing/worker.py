"""The tracing process: traces the step that a request names, and writes the trace. It imports torch; `client` does not."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from trainfit.errors import TrainfitError
from trainfit.process import end_with_parent


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
