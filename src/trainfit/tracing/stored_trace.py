"""The record of a traced step, as it is stored and sent between processes. Imports no torch."""

import json
from dataclasses import dataclass

from trainfit.timing.counts import OpCount
from trainfit.tracing.events import Trace


@dataclass(frozen=True, kw_only=True)
class StoredTrace:
    """What a traced step did (`tracing.trace.trace_step`)."""

    trace: Trace
    """Every allocation and free, from the building of the model on; marks "window 0", "window 1", ..."""
    ops: tuple[OpCount, ...]
    """Operators of the last window."""
    made_up: tuple[str, ...] = ()
    """Operators that were given a made-up value, because a trace does not know it."""
    upper_bounds: tuple[str, ...] = ()
    """Those of them that got the largest possible shape."""
    blocks: int = 0
    """Blocks of the model that activation checkpointing may compute again."""

    def to_json(self) -> str:
        """As `from_json` reads it."""
        own = {"made_up": self.made_up, "upper_bounds": self.upper_bounds, "blocks": self.blocks}
        record = {"trace": json.loads(self.trace.to_json()), "ops": [row.to_row() for row in self.ops], **own}
        return json.dumps(record, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "StoredTrace":
        """What `to_json` wrote. Raises TrainfitError when another version wrote it."""
        record = json.loads(text)
        return cls(
            trace=Trace.from_json(json.dumps(record["trace"])),
            ops=tuple(map(OpCount.from_row, record["ops"])),
            made_up=tuple(record["made_up"]),
            upper_bounds=tuple(record["upper_bounds"]),
            blocks=record["blocks"],
        )
