"""The registry of tools that `plan --emit` writes configurations for, and functions that the writers share. Imports no torch.

A family that brings the models of a tool registers it in its own `emit.py` (`Family.emit`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from trainfit.models.setting import Setting

MEANS = (
    "Each micro-batch's loss is normalised by itself and the losses are averaged: not the gradient of one large batch."
)


RATE = 1e-4
"""Default learning rate of a recipe (a test compares with `models.workload.OptimizerSettings`)."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """The setting to write: the plan's choice, or the nearest that the tool can express."""

    setting: Setting
    """Micro-batch and accumulation are those of every GPU; all micro-batches are equal."""
    gpus: int
    """Number of GPUs."""
    effective_batch: int
    """Images per optimizer step on all GPUs together."""
    workers: int
    """Loader processes per GPU."""
    rate_factor: float | None
    """Factor of the default learning rates at this effective batch; None if the family has no recipe."""
    parameter_bytes: int
    """Bytes of the model's parameters, which EMA weights on the GPU would need in addition."""
    spare_bytes: int
    """Bytes of the memory budget that the plan does not need."""

    @property
    def checkpoints(self) -> bool:
        """Whether any block is checkpointed."""
        return self.setting.checkpointing not in ("none", 0)

    @property
    def torchrun(self) -> str:
        """Command that starts one process per GPU."""
        return f"torchrun --nproc-per-node {self.gpus}"


Writer = Callable[[Job], tuple[str, Sequence[str]]]
"""Job -> (text, notes). Raises TrainfitError if the tool cannot express the job."""


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A tool that plans can be written for."""

    name: str
    """Name of the tool, as `--emit` takes it."""
    families: tuple[str, ...]
    """Families whose models it trains; empty: any."""
    accumulates: bool
    """Whether it trains with several micro-batches for each optimizer step."""
    checkpoints: Callable[[Setting], bool]
    """Whether it saves at least the memory that the setting's checkpointing saves."""
    write: Writer
    """Writes a job as the tool reads it."""


TOOLS: dict[str, Tool] = {}


def _any_blocks(_: Setting) -> bool:
    return True


def register(
    name: str,
    *,
    families: tuple[str, ...] = (),
    accumulates: bool = True,
    checkpoints: Callable[[Setting], bool] = _any_blocks,
) -> Callable[[Writer], Writer]:
    """Decorate the function that writes the configuration of a tool; see `Tool`.

    Raises:
        ValueError: another tool has this name.
    """

    def add(write: Writer) -> Writer:
        if name in TOOLS:
            raise ValueError(f"two tools are named {name}")
        TOOLS[name] = Tool(name=name, families=families, accumulates=accumulates, checkpoints=checkpoints, write=write)
        return write

    return add


def call(name: str, arguments: Mapping[str, object]) -> str:
    """The text of a Python call, with one argument per line."""
    lines = "".join(f"    {key}={value!r},\n" for key, value in arguments.items())
    return f"{name}(\n{lines})\n"


def rounded(value: float) -> float:
    """A value rounded to three significant digits."""
    return float(f"{value:.3g}")


def means(setting: Setting) -> list[str]:
    """`MEANS` if the setting accumulates gradients."""
    return [MEANS] * (setting.accumulation > 1)
