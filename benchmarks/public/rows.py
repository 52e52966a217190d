"""What a public source published of one training step, and the step to trace for it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trainfit.models.family import DrawnSizes

DATA = Path(__file__).parents[2].parent / "shared/data"
"""The figures of others lie beside the checkout; nothing is downloaded here."""
Quantity = Literal["allocated", "reserved", "device_total", "nvml_minus_start", "context"]
"""allocated, reserved: torch's peaks; device_total: the card's used memory; nvml_minus_start: the same less the first sample."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step that is traced once, at a batch of which every batch's trace can be made."""

    source: str
    """Module of this folder whose `build(device, **arguments)` makes the step."""
    arguments: Mapping[str, Any]
    """Plain JSON values."""
    capability: tuple[int, int]
    """CUDA capability of the card that measured."""
    steps: int = 2
    """Steps that are traced."""
    fused_attention: bool = True
    """False: attention as torch before 2.0 ran it."""

    @property
    def name(self) -> str:
        """The same for the same trace alone."""
        rest = [self.capability, self.steps, self.fused_attention]
        return json.dumps([self.source, self.arguments, rest], sort_keys=True)


@dataclass(frozen=True, kw_only=True)
class Cap:
    """A run repeated with a share of the card."""

    limit_mib: float
    oom: bool
    """Whether it failed."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One published figure."""

    source: str
    group: str
    """Class of the model: rows of one kind are judged together."""
    name: str
    card: str
    """Name in the catalogue."""
    card_mib: float | None = None
    """Its memory as torch reported it, where the source says so; the catalogue has the lowest total that was seen."""
    quantity: Quantity
    measured_mib: float
    case: Case | None = None
    bounds: tuple[Case, ...] = ()
    """The same step with the least and the most of what the source does not publish and `case` assumes; the interval spans both."""
    batch: int = 1
    """Images in the step."""
    traced_batch: int = 1
    """Images in the traced step; `batch` where the trace needs no scaling."""
    after_step: int = 0
    """The peak counts from this step on: a script may reset its counters after a warm-up."""
    oom: bool = False
    """The run failed: the figure is no measurement of the need."""
    seconds: float | None = None
    """Measured seconds a step."""
    drawn: DrawnSizes | None = None
    """Where the measured time is a mean over sizes: these, against the traced one."""
    fitted_time: bool = False
    """An efficiency of the roofline was fitted to its seconds: shown, and not judged."""
    others_mib: Mapping[str, float] = field(default_factory=dict)
    """What other predictors said of the same run."""
    caps: tuple[Cap, ...] = ()
    """Repetitions under a limit on reserved memory."""


def records(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
