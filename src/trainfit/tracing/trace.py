"""Runs whole training steps without a GPU, and returns every allocation and free that they make.

`trace_step` changes torch for the process that it runs in; everything but tests calls it through `client.run`.
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
    """A training step: the same object that trains. Nothing in it depends on being traced."""

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        ...

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of its parameters."""
        ...

    @property
    def ema(self) -> nn.Module | None:
        """The model with the EMA weights, if they are on the device."""
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

    On "cuda" tensors are fake and nothing is computed; this process is changed permanently (`fake_cuda.install`). On
    "cpu" the step really runs.

    Raises:
        TrainfitError: an operator cannot be traced; the message names it and the line that called it.
    """
    gc.collect()
    torch.manual_seed(0)
    with ExitStack() as running:
        if device == "cuda":
            fake_cuda.install(target)
            fakeify.patch_modules()
            shadows = Shadows()
            shadows.patch_numpy()
            fake = FakeTensorMode(allow_non_fake_inputs=True)
            recorder = Recorder("cuda", shadows)
            building = fakeify.FakeCuda(fake, recorder)
            modes = (fake, recorder)
        else:
            shadows = None
            recorder = Recorder("cpu", None)
            building = recorder
            modes = (recorder,)
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
    """A TrainfitError that names the operator and the line of the user's code that called it; other errors unchanged."""
    if recorder.failed is None or isinstance(error, TrainfitError):
        return error
    internal = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(internal)]
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "unknown"
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return TrainfitError(
        f"operator {recorder.failed} cannot be traced, called at {where}: {reason}. Give it a shape function with "
        "torch.library.register_fake, or run it on the CPU: --trace-on cpu"
    )
