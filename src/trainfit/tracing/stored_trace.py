"""The record of a traced step, as it is stored and sent between processes. Imports no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainfit.timing.counts import OpCount
from trainfit.tracing.events import Trace


@dataclass(frozen=True, kw_only=True)
class StoredTrace:
    """What a traced step did (`tracing.trace.trace_step`)."""

    trace: Trace
    """Every allocation and free since the model was built; marks "window 0", "window 1", ..."""
    ops: tuple[OpCount, ...]
    """Operators of the last window."""
    made_up: tuple[str, ...] = ()
    """Operators that got a made-up value, because the real one is unknown in a trace."""
    upper_bounds: tuple[str, ...] = ()
    """Those of them that got the largest possible shape."""
    blocks: int = 0
    """Blocks of the model that activation checkpointing may recompute."""

    def to_record(self) -> dict[str, Any]:
        """Plain JSON values, as `from_record` reads them."""
        return {
            "trace": self.trace.to_record(),
            "ops": [row.to_row() for row in self.ops],
            "made_up": self.made_up,
            "upper_bounds": self.upper_bounds,
            "blocks": self.blocks,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "StoredTrace":
        """Read what `to_record` gave. Raises TrainfitError when another version made it."""
        return cls(
            trace=Trace.from_record(record["trace"]),
            ops=tuple(map(OpCount.from_row, record["ops"])),
            made_up=tuple(record["made_up"]),
            upper_bounds=tuple(record["upper_bounds"]),
            blocks=record["blocks"],
        )

    def to_json(self) -> str:
        """`to_record` as text."""
        return json.dumps(self.to_record(), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "StoredTrace":
        """Read what `to_json` wrote. Raises TrainfitError when another version wrote it."""
        return cls.from_record(json.loads(text))
