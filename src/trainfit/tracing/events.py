"""What a traced step did to memory: a table of tensors and the order in which they were allocated and freed."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from trainfit.errors import TrainfitError

SCHEMA = 1

EMPTY_CACHE = "torch.cuda.empty_cache"
"""Operator of a tensor of zero bytes that marks where cuDNN's search for the fastest convolution algorithm releases all cached
blocks."""

Category = Literal[
    "parameters",
    "buffers",
    "gradients",
    "optimizer state",
    "activations",
    "temporary",
    "EMA",
    "inputs",
    "workspace",
    "other",
]
CATEGORIES: tuple[Category, ...] = get_args(Category)


@dataclass(kw_only=True, slots=True)
class TensorInfo:
    """One allocation of device memory: a tensor's storage or a library's workspace.

    Not frozen, for speed alone (a trace has tens of thousands): nothing changes one.
    """

    id: int
    """Its index in `Trace.tensors`."""
    nbytes: int
    """Bytes requested, before any rounding by the allocator. 0 allocates nothing."""
    category: Category = "other"
    """What the memory is for."""
    op: str = ""
    """Operator that allocated it, for instance `aten.convolution`."""
    module: str = ""
    """Qualified name of the innermost module that ran."""
    phase: str = ""
    """Phase of the step, for instance `forward`."""
    stream: int = 0
    """CUDA stream that it belongs to; 0 is the default stream."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """The ordered allocations and frees of a step. Plain integers, so that a replay costs microseconds per event."""

    tensors: tuple[TensorInfo, ...]
    """Every allocation; `tensors[i].id == i`."""
    events: tuple[int, ...]
    """`i + 1`: tensor i was allocated; `-(i + 1)`: it was freed. A tensor is allocated once and freed at most once."""
    marks: tuple[tuple[int, str], ...] = ()
    """(index into events, name): the named phase begins at that event. In order of index."""

    def __iter__(self) -> Iterator[tuple[bool, TensorInfo]]:
        """Yield (allocated?, tensor) for each event in order: the readable form, for everything but the replay."""
        for event in self.events:
            yield event > 0, self.tensors[abs(event) - 1]

    def to_record(self) -> dict[str, Any]:
        """The trace in plain JSON values; names repeat thousands of times and are listed once."""
        names: dict[str, int] = {}

        def number(name: str) -> int:
            return names.setdefault(name, len(names))

        rows = [
            (t.nbytes, t.stream, CATEGORIES.index(t.category), number(t.op), number(t.module), number(t.phase))
            for t in self.tensors
        ]
        return {"schema": SCHEMA, "names": list(names), "tensors": rows, "events": self.events, "marks": self.marks}

    def to_json(self) -> str:
        """`to_record` as text."""
        return json.dumps(self.to_record(), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Trace":
        """Read what `to_json` wrote. Raises TrainfitError when another version wrote it."""
        return cls.from_record(json.loads(text))

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Trace":
        """Read what `to_record` gave. Raises TrainfitError when another version made it."""
        if record.get("schema") != SCHEMA:
            raise TrainfitError(f"trace has schema {record.get('schema')}, this version reads {SCHEMA}: trace again")
        names = record["names"]
        tensors = (
            TensorInfo(
                id=i,
                nbytes=nbytes,
                stream=stream,
                category=CATEGORIES[category],
                op=names[op],
                module=names[module],
                phase=names[phase],
            )
            for i, (nbytes, stream, category, op, module, phase) in enumerate(record["tensors"])
        )
        marks = tuple((index, name) for index, name in record["marks"])
        return cls(tensors=tuple(tensors), events=tuple(record["events"]), marks=marks)
