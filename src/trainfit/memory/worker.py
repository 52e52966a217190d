"""The process that `trace_in_subprocess` starts: reads a specification, writes a result or the message of a failure."""

import json
import sys
from pathlib import Path


def main(request: Path, answer: Path) -> None:
    """Trace what `request` names and write a TraceResult, or {"error": message}, to `answer`."""
    record = json.loads(request.read_text())
    sys.path[:] = record["path"]

    from trainfit.errors import TrainfitError
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
