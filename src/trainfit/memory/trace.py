"""Run whole training steps where no GPU is, and return what they did to its memory.

`trace_step` changes torch for the process that it runs in; everyone but tests uses `trace_in_subprocess`.
"""

import gc
import importlib
import json
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from trainfit.errors import TrainfitError
from trainfit.memory import fake_autocast, fake_cuda, fakeify, worker
from trainfit.memory.events import Trace
from trainfit.memory.fake_cuda import Target
from trainfit.memory.recorder import Recorder
from trainfit.memory.shadow import Shadows, tensors_in
from trainfit.timing.counts import OpCount

SCHEMA = 1
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
        """Blocks of the model that activation checkpointing may compute again; 0 where there are none."""
        ...

    def run(self) -> object:
        """One full window: inputs, forward and backward of every micro-batch, clip, optimizer step, EMA."""
        ...


@dataclass(frozen=True, kw_only=True)
class TraceSpec:
    """What `trace_in_subprocess` traces."""

    factory: str
    """"module:function" that builds the step: called with `device` (a torch.device) and `kwargs`."""
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Plain JSON values for the factory."""
    target: Target
    """The card."""
    device: Device = "cuda"
    """"cuda": fake tensors, seconds. "cpu": the step really runs on the CPU: slow, needs the memory, and has the
    kernels of the CPU (no CUDA autocast, no flash attention)."""
    steps: int = 2
    """Windows to run. The first one makes the optimizer state; the last one is the steady state."""


@dataclass(frozen=True, kw_only=True)
class TraceResult:
    """What the traced step did."""

    trace: Trace
    """Every allocation and free, from the building of the model on; marks "window 0", "window 1", ..."""
    ops: tuple[OpCount, ...]
    """Operators of the last window."""
    made_up: tuple[str, ...] = ()
    """Operators that needed a value which a trace doesn't know, and were given a made-up one."""
    upper_bounds: tuple[str, ...] = ()
    """Those of them whose value decides a shape: they got the largest, so the trace is an upper bound there."""
    blocks: int = 0
    """Blocks that activation checkpointing may compute again."""

    @property
    def upper_bound(self) -> bool:
        """Whether the trace may have allocated more than any real step would."""
        return bool(self.upper_bounds)

    @property
    def peak_bytes(self) -> int:
        """The most bytes that tensors held at once in the last window (before any allocator rounding)."""
        start = max((index for index, name in self.trace.marks if name.startswith("window ")), default=0)
        held = peak = 0
        for index, (allocated, tensor) in enumerate(self.trace):
            held += tensor.nbytes if allocated else -tensor.nbytes
            peak = max(peak, held) if index >= start else held
        return peak

    def to_json(self) -> str:
        """The result as JSON."""
        record = {
            "schema": SCHEMA,
            "trace": json.loads(self.trace.to_json()),
            "ops": [row.to_row() for row in self.ops],
            "made_up": self.made_up,
            "upper_bounds": self.upper_bounds,
            "blocks": self.blocks,
        }
        return json.dumps(record, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "TraceResult":
        """Read what `to_json` wrote. Raises TrainfitError when another version wrote it."""
        record = json.loads(text)
        if record.get("schema") != SCHEMA:
            raise TrainfitError(f"trace result has schema {record.get('schema')}, not {SCHEMA}: trace again")
        return cls(
            trace=Trace.from_json(json.dumps(record["trace"])),
            ops=tuple(map(OpCount.from_row, record["ops"])),
            made_up=tuple(record["made_up"]),
            upper_bounds=tuple(record["upper_bounds"]),
            blocks=record["blocks"],
        )


def trace_step(
    build: Callable[[torch.device], Step], *, target: Target, device: Device = "cuda", steps: int = 2
) -> TraceResult:
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
    return TraceResult(
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


def trace_in_subprocess(spec: TraceSpec) -> TraceResult:
    """Trace in a process of its own, after a self-test. Raises TrainfitError with the message of what went wrong."""
    return TraceResult.from_json(worker.run(asdict(spec), spec.factory))


def load_factory(name: str) -> Callable[..., Step]:
    """The function that "module:function" names."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)
