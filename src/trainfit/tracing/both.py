"""Traces of training and of evaluation in one run: both begin with the building of the model and a training window."""

import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainfit import process
from trainfit.errors import TrainfitError
from trainfit.tracing.fake_cuda import Target
from trainfit.tracing.stored_trace import StoredTrace
from trainfit.tracing.trace import trace_step


class ForkedStep:
    """A step whose second window is training in this process and evaluation in a fork of it.

    Not the other way round: autograd does not run backward in a fork of a process that has run it.
    """

    def __init__(self, step: Any) -> None:
        """Wrap a step of an evaluation (`models.build.build_eval_step`)."""
        self.step = step
        self.model = step.model
        self.optimizer = step.optimizer
        self.ema = step.ema
        self.blocks = step.blocks
        self.windows = 0
        self.child = -1

    def run(self) -> object:
        """The first window; after a fork, the second."""
        self.windows += 1
        if self.windows == 2:
            self.child = os.fork()
            if self.child:
                self.step.evaluate = None
            else:
                process.killed_with_parent()
        return self.step.run()


def trace_both(build: Callable[[torch.device], Any], *, target: Target, file: Path) -> tuple[StoredTrace, StoredTrace]:
    """Trace training and evaluation; `file` is where the fork leaves the trace of evaluation, and does not exist afterwards.

    `build` returns the step of an evaluation (`models.build.build_eval_step`).

    Raises:
        TrainfitError: as `trace_step`.
        SystemExit: evaluation failed in another way, which the fork printed.
    """
    steps: list[ForkedStep] = []

    def forked(device: torch.device) -> ForkedStep:
        steps.append(ForkedStep(build(device)))
        return steps[0]

    try:
        training = trace_step(forked, target=target)
    except BaseException as error:
        if not steps or steps[0].child != 0:
            raise
        if not isinstance(error, TrainfitError):
            traceback.print_exc()
            os._exit(1)
        file.write_text(json.dumps({"error": str(error)}))
        os._exit(0)
    if steps[0].child == 0:
        file.write_text(training.to_json())
        os._exit(0)
    _, status = os.waitpid(steps[0].child, 0)
    if os.WIFSIGNALED(status):  # for instance out of memory: this process ends as the fork did
        os.kill(os.getpid(), os.WTERMSIG(status))
    if status != 0:
        raise SystemExit(1)
    record = json.loads(file.read_text())
    file.unlink()
    if "error" in record:
        raise TrainfitError(record["error"])
    return training, StoredTrace.from_record(record)
