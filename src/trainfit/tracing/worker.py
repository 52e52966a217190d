"""The tracing process: traces the step that a request names, and writes the trace. It imports torch; `client` does not."""

import importlib
import json
import sys
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from trainfit.errors import TrainfitError
from trainfit.process import end_with_parent

WITHOUT_SHAPES = ("_fused_sgd_", "_fused_sgd_.tensor_lr", "_fused_adagrad_", "_fused_adagrad_.tensor_lr")
"""Operators of optimizers for which torch 2.15 has no shape function, as it has for those of Adam."""


def main(request: Path, answer: Path) -> None:
    """Trace what `request` names and write a StoredTrace, both of training and evaluation, or {"error": message}, to `answer`."""
    record = json.loads(request.read_text())
    sys.path[:] = record["path"]

    from trainfit.tracing.both import trace_both
    from trainfit.tracing.fake_cuda import Target
    from trainfit.tracing.selftest import selftest
    from trainfit.tracing.trace import trace_step

    for name in record.get("families", ()):
        importlib.import_module(name)
    target = Target(**record["target"] | {"capability": tuple(record["target"]["capability"])})
    try:
        if record["device"] == "cuda":
            selftest(target)
            _register_shapes()
            if record.get("prepare") is not None:
                _imported(record["prepare"])(target.capability)
        build = partial(_built, _imported(record["factory"]), record["kwargs"])
        if record.get("both"):
            training, evaluation = trace_both(build, target=target, file=answer.with_name("evaluation.json"))
            text = json.dumps({"training": training.to_record(), "evaluation": evaluation.to_record()})
        else:
            text = trace_step(build, target=target, device=record["device"], steps=record["steps"]).to_json()
    except TrainfitError as error:
        answer.write_text(json.dumps({"error": str(error)}))
        return
    answer.write_text(text)


@cache
def _register_shapes() -> None:
    import torch

    for name in WITHOUT_SHAPES:
        torch.library.register_fake(f"aten::{name}", _changed_in_place)


def _changed_in_place(*_args: Any, **_kwargs: Any) -> None:
    """Shape function of an operator that returns nothing."""


def _built(factory: Any, arguments: Mapping[str, Any], device: Any) -> Any:
    return factory(device=device, **arguments)


def _imported(name: str) -> Any:
    """The function named by "module:function"."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


if __name__ == "__main__":
    end_with_parent()
    main(Path(sys.argv[1]), Path(sys.argv[2]))
