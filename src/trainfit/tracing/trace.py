"""Run whole training steps where no GPU is, and return what they did to its memory.

`trace_step` changes torch for the process that it runs in; everyone but tests goes through `worker.run`.
"""

import gc
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from trainfit.errors import TrainfitError
from trainfit.tracing import fake_autocast, fake_cuda, fakeify
from trainfit.tracing.fake_cuda import Target
from trainfit.tracing.recorder import Recorder
from trainfit.tracing.shadow import Shadows, tensors_in
from trainfit.tracing.stored_trace import StoredTrace

Device = Literal["cuda", "cpu"]


class Step(Protocol):
    """A training step: the object that trains. Nothing in it knows that it is traced."""

    @property
    def model(self) -> nn.Module:
        """What trains."""
        ...

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Its optimizer."""
        ...

    @property
    def ema(self) -> nn.Module | None:
        """The averaged copy of the model, if one is kept on the device."""
        ...

    @property
    def blocks(self) -> int:
        """Blocks of the model that activation checkpointing may recompute; 0 where there are none."""
        ...

    def run(self) -> object:
        """One full window: inputs, forward and backward of every micro-batch, clip, optimizer step, EMA."""
        ...


def trace_step(
    build: Callable[[torch.device], Step], *, target: Target, device: Device = "cuda", steps: int = 2
) -> StoredTrace:
    """Build a step and run `steps` windows of it, recording every allocation on `device`.

    On "cuda" tensors are fake and nothing is computed; this process is changed for good (`fake_cuda.install`). On
    "cpu" the step runs for real. Raises TrainfitError, naming operator and line, for what cannot be traced.
    """
    gc.collect()
    torch.manual_seed(0)
    with ExitStack() as running:
        if device == "cuda":
            fake_cuda.install(target)
            fakeify.patch_modules()
            shadows = Shadows()
            shadows.patch_numpy()
            fake, recorder = FakeTensorMode(allow_non_fake_inputs=True), Recorder("cuda", shadows)
            building, modes = fakeify.FakeCuda(fake, recorder), (fake, recorder)
        else:
            shadows, recorder = None, Recorder("cpu", None)
            building, modes = recorder, (recorder,)
        try:
            with building:
                step = build(torch.device(device))
            fake_autocast.register_torchvision()
            for mode in modes:
                running.enter_context(mode)
            _run(step, recorder, steps)
        except Exception as error:
            raise _explained(error, recorder) from error
    return StoredTrace(
        trace=recorder.finish(),
        ops=recorder.counter.counts(),
        made_up=tuple(sorted(shadows.made_up)) if shadows else (),
        upper_bounds=tuple(sorted(shadows.upper_bounds)) if shadows else (),
        blocks=step.blocks,
    )


def _run(step: Step, recorder: Recorder, steps: int) -> None:
    recorder.categorise(step.model.parameters(), "parameters")
    recorder.categorise(step.model.buffers(), "buffers")
    if step.ema is not None:
        recorder.categorise([*step.ema.parameters(), *step.ema.buffers()], "EMA")
    recorder.watch(step.model, step.optimizer)
    for number in range(steps):
        recorder.categorise(tensors_in(list(step.optimizer.state.values())), "optimizer state")
        recorder.begin_window(number)
        step.run()
    recorder.categorise(tensors_in(list(step.optimizer.state.values())), "optimizer state")


def _explained(error: Exception, recorder: Recorder) -> Exception:
    """A TrainfitError naming the operator and the line of the user's code that called it; others stay as they are."""
    if recorder.failed is None or isinstance(error, TrainfitError):
        return error
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "unknown"
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return TrainfitError(
        f"operator {recorder.failed} cannot be traced, called at {where}: {reason}. Give it a shape function with "
        "torch.library.register_fake, or run it on the CPU: --trace-on cpu"
    )
