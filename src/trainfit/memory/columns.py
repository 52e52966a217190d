"""A trace as columns of numbers. A trace of a large model has hundreds of thousands of tensors, and a search prices it at
a dozen settings: numpy changes a column in a millisecond where a loop over tensors takes a hundred. Imports no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainfit.errors import TrainfitError
from trainfit.timing.counts import OpCount
from trainfit.tracing.events import CATEGORIES, SCHEMA, Category, TensorInfo, Trace
from trainfit.tracing.stored_trace import StoredTrace

Integers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Columns:
    """The tensors of a trace, one array for each field, and its events. Index i of every array is tensor i."""

    nbytes: Integers
    """Bytes asked for."""
    stream: Integers
    """CUDA stream that allocates it."""
    category: Integers
    """Index into `CATEGORIES`."""
    op: Integers
    """Index into `names`, as `module` and `phase` are."""
    module: Integers
    """The module that ran."""
    phase: Integers
    """The phase of the step."""
    names: tuple[str, ...]
    """Operators, modules and phases, each once."""
    events: Integers
    """As `Trace.events`: i + 1 where tensor i is allocated, -(i + 1) where it is freed."""
    marks: tuple[tuple[int, str], ...]
    """(index into `events`, name): the named phase begins at that event."""

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Columns":
        """Read what `Trace.to_record` gave. Raises TrainfitError when another version made it."""
        if record.get("schema") != SCHEMA:
            raise TrainfitError(f"trace has schema {record.get('schema')}, this version reads {SCHEMA}: trace again")
        nbytes, stream, category, op, module, phase = _transposed(record["tensors"])
        return cls(
            nbytes=nbytes,
            stream=stream,
            category=category,
            op=op,
            module=module,
            phase=phase,
            names=tuple(record["names"]),
            events=np.array(record["events"], dtype=np.int64),
            marks=tuple((index, name) for index, name in record["marks"]),
        )

    @classmethod
    def of(cls, trace: Trace) -> "Columns":
        """The columns of a trace."""
        return cls.from_record(trace.to_record())

    def trace(self) -> Trace:
        """The trace with an object for each tensor."""
        categories = [CATEGORIES[number] for number in self.category.tolist()]
        ops, modules, phases = ([self.names[i] for i in each.tolist()] for each in (self.op, self.module, self.phase))
        rows = zip(self.nbytes.tolist(), categories, ops, modules, phases, self.stream.tolist(), strict=True)
        tensors = tuple(
            TensorInfo(id=number, nbytes=nbytes, category=category, op=op, module=module, phase=phase, stream=stream)
            for number, (nbytes, category, op, module, phase, stream) in enumerate(rows)
        )
        return Trace(tensors=tensors, events=tuple(self.events.tolist()), marks=self.marks)

    def tensor(self, number: int) -> TensorInfo:
        """One tensor, as an object."""
        return TensorInfo(
            id=number,
            nbytes=int(self.nbytes[number]),
            category=CATEGORIES[self.category[number]],
            op=self.names[self.op[number]],
            module=self.names[self.module[number]],
            phase=self.names[self.phase[number]],
            stream=int(self.stream[number]),
        )

    def of_category(self, category: Category) -> NDArray[np.bool_]:
        """For each tensor, whether it is of a category."""
        return self.category == _CATEGORY_NUMBERS[category]

    def peak_bytes(self) -> int:
        """The peak of the bytes that the tensors request."""
        changes = np.sign(self.events) * self.nbytes[np.abs(self.events) - 1]
        return int(np.cumsum(changes).max(initial=0))

    def with_rows(self, rows: Sequence[TensorInfo]) -> "Columns":
        """With further tensors, which no event allocates yet; their ids do not count."""
        more = Columns.of(Trace(tensors=tuple(rows), events=()))
        offset = len(self.names)
        return replace(
            self,
            nbytes=np.concatenate([self.nbytes, more.nbytes]),
            stream=np.concatenate([self.stream, more.stream]),
            category=np.concatenate([self.category, more.category]),
            op=np.concatenate([self.op, more.op + offset]),
            module=np.concatenate([self.module, more.module + offset]),
            phase=np.concatenate([self.phase, more.phase + offset]),
            names=self.names + more.names,
        )

    def with_events(self, places: Sequence[int], events: Sequence[int]) -> "Columns":
        """With further events, each before the event that has the index of its place now, and after the marks there."""
        where = np.array(places, dtype=np.int64)
        marks = tuple((index + int((where < index).sum()), name) for index, name in self.marks)
        return replace(self, events=np.insert(self.events, where, np.array(events, dtype=np.int64)), marks=marks)


@dataclass(frozen=True, kw_only=True, eq=False)
class ColumnTrace:
    """`StoredTrace` with its trace in columns."""

    columns: Columns
    """The trace."""
    ops: tuple[OpCount, ...]
    """Operators of the last window."""
    made_up: tuple[str, ...] = ()
    """Operators whose values the trace replaced by placeholders."""
    upper_bounds: tuple[str, ...] = ()
    """Operators whose output is priced at its largest size."""
    blocks: int = 0
    """Blocks of the model that activation checkpointing may recompute."""

    @classmethod
    def of(cls, traced: "StoredTrace | ColumnTrace") -> "ColumnTrace":
        """A trace in columns, which it may be already."""
        if isinstance(traced, ColumnTrace):
            return traced
        return cls(
            columns=Columns.of(traced.trace),
            ops=traced.ops,
            made_up=traced.made_up,
            upper_bounds=traced.upper_bounds,
            blocks=traced.blocks,
        )

    def stored(self) -> StoredTrace:
        """With an object for each tensor."""
        return StoredTrace(
            trace=self.columns.trace(),
            ops=self.ops,
            made_up=self.made_up,
            upper_bounds=self.upper_bounds,
            blocks=self.blocks,
        )


_CATEGORY_NUMBERS = {category: number for number, category in enumerate(CATEGORIES)}


def _transposed(rows: Sequence[Sequence[int]]) -> Integers:
    """The six columns of a trace's rows of tensors."""
    return np.ascontiguousarray(np.array(rows, dtype=np.int64).reshape(-1, 6).T)
