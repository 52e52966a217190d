"""What writes a plan for another tool: the registry, and what the writers share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from trainfit.models.setting import Setting
from trainfit.planning.plan import Plan

MEANS = "The micro-batches' losses, each normalised by itself, are averaged: not the gradient of one large batch."


RATE, RATE_ENCODER = 1e-4, 1.5e-4
"""The recipe's learning rates (a test compares with `models.workload.OptimizerSettings`), which are RF-DETR's own."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is written: the plan's choice, or the nearest that the tool can express."""

    plan: Plan
    setting: Setting
    """Its micro-batch and accumulation are those of every GPU; all micro-batches are equal."""

    @property
    def checkpoints(self) -> bool:
        """Whether any block is checkpointed."""
        return self.setting.checkpointing not in ("none", 0)

    @property
    def torchrun(self) -> str:
        """How its processes start."""
        return f"torchrun --nproc-per-node {self.plan.gpus}"


Writer = Callable[[Job], tuple[str, Sequence[str]]]
"""Text and notes. Raises TrainfitError where the tool cannot express the job."""


@dataclass(frozen=True, kw_only=True)
class Tool:
    """One tool that plans can be written for."""

    name: str
    families: tuple[str, ...]
    """Of models; empty: any."""
    accumulates: bool
    checkpoints: Callable[[Setting], bool]
    """Whether it saves at least the memory that the setting's checkpointing saves."""
    write: Writer


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
    """Make a function the writer for a tool; see `Tool`. Raises ValueError for a name that is taken."""

    def add(write: Writer) -> Writer:
        if name in TOOLS:
            raise ValueError(f"two tools are named {name}")
        TOOLS[name] = Tool(name=name, families=families, accumulates=accumulates, checkpoints=checkpoints, write=write)
        return write

    return add


def call(name: str, arguments: Mapping[str, object]) -> str:
    """A Python call, an argument a line."""
    lines = "".join(f"    {key}={value!r},\n" for key, value in arguments.items())
    return f"{name}(\n{lines})\n"


def rounded(value: float) -> float:
    """To three digits."""
    return float(f"{value:.3g}")


def means(setting: Setting) -> list[str]:
    """`MEANS` where there is accumulation."""
    return [MEANS] * (setting.accumulation > 1)
