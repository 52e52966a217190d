"""The trace of a step over one coupled window, however it is cut, from its traces at two windows.

Such a window (`step.contrastive`) runs its micro-batches forward without gradients, computes the loss of all pairs in chunks of
rows, and runs the micro-batches again. The events of two windows are the same, except that the larger one has one more
micro-batch of each cut (forward, and again forward and backward) and one more chunk of rows: blocks that repeat. Every size is
constant or proportional to the micro-batch, to the last one, to the pairs of the window, or to the rows of a chunk; the ratio of
the sizes in the two traces tells which (`windows.traced_windows`).

A composed trace has every tensor at its exact size. Of many equal repetitions only `REPLAYED` more than in the larger trace are
replayed; the features that the others would keep are allocated all the same, so that the peak of the tensors is exact.
"""

from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from trainfit.memory.columns import Columns, Integers
from trainfit.memory.profile import last_window
from trainfit.memory.windows import CONSTANT, Window
from trainfit.timing.counts import OpCount

REPLAYED = 1
"""Repetitions beyond those of the larger trace that are replayed in full."""
OF_LOSS = -1


@dataclass(frozen=True, kw_only=True)
class Block:
    """A repetition: events that the smaller trace has once less. An equal block follows."""

    begin: int
    """Index of its first event."""
    end: int
    """Index behind its last event."""
    of: int
    """The cut whose micro-batch it is, by its index in `Window.cuts`; `OF_LOSS`: a chunk of the loss."""


@dataclass(frozen=True, kw_only=True, eq=False)
class WindowTrace:
    """Traces of one step over two windows, aligned."""

    windows: tuple[Window, Window]
    """The smaller and the larger one."""
    columns: Columns
    """The trace of the larger one."""
    follows: Integers
    """What each tensor's size is proportional to."""
    repeats: tuple[Block, ...]
    """In order."""
    ops: tuple[tuple[OpCount, ...], tuple[OpCount, ...]]
    """Operators of the last window of both."""
    made_up: tuple[str, ...]
    """Operators whose values the traces replaced by placeholders."""
    upper_bounds: tuple[str, ...]
    """Operators whose output is priced at its largest size."""
    blocks: int
    """Blocks of the model that activation checkpointing may recompute."""

    def at(self, window: Window, *, eval_micro_batch: int | None = None, replayed: int | None = REPLAYED) -> Columns:
        """The trace of a window; `replayed`: as `REPLAYED`, None for all repetitions.

        `eval_micro_batch`: of the evaluation that is the trace's last window; the micro-batch unless given.
        """
        sizes = self._sizes(window)
        if eval_micro_batch is not None:
            events = self.columns.events[last_window(self.columns) :]
            first = int((events[events > 0] - 1).min(initial=len(sizes)))
            of_evaluation = self._sizes(window.evaluated(eval_micro_batch))
            sizes = np.concatenate([sizes[:first], of_evaluation[first:]])
        return _Composition(self, window, replayed).columns(sizes)

    def _sizes(self, window: Window) -> Integers:
        """Bytes of each tensor of the larger traced window in another window."""
        before = np.array(self.windows[1].values())[self.follows]
        after = np.array(window.values())[self.follows]
        return np.where(self.follows == CONSTANT, self.columns.nbytes, -(-self.columns.nbytes * after // before))

    def to_record(self) -> dict[str, Any]:
        """Plain JSON values, as `from_record` reads them."""
        return {
            "windows": [window.to_record() for window in self.windows],
            "trace": self.columns.trace().to_record(),
            "follows": self.follows.tolist(),
            "repeats": [astuple(block) for block in self.repeats],
            "ops": [[row.to_row() for row in rows] for rows in self.ops],
            "made_up": self.made_up,
            "upper_bounds": self.upper_bounds,
            "blocks": self.blocks,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "WindowTrace":
        """Read what `to_record` gave. Raises TrainfitError when another version made it."""
        few, many = map(Window.from_record, record["windows"])
        small, large = (tuple(map(OpCount.from_row, rows)) for rows in record["ops"])
        return cls(
            windows=(few, many),
            columns=Columns.from_record(record["trace"]),
            follows=np.array(record["follows"], dtype=np.int64),
            repeats=tuple(Block(begin=begin, end=end, of=of) for begin, end, of in record["repeats"]),
            ops=(small, large),
            made_up=tuple(record["made_up"]),
            upper_bounds=tuple(record["upper_bounds"]),
            blocks=record["blocks"],
        )

    @cached_property
    def kept_buffers(self) -> frozenset[int]:
        """Copies of the model's buffers, which are made only where micro-batches run again."""
        columns = self.columns
        is_clone = np.array([name == "aten.clone" for name in columns.names])[columns.op]
        in_update = np.array([name == "update" for name in columns.names])[columns.phase]
        begins, ends = self.lives
        kept = np.zeros(len(begins), dtype=bool)
        for block in self.repeats:
            if block.of != OF_LOSS:
                kept |= is_clone & in_update & (begins < block.begin) & (ends >= 2 * block.end - block.begin)
        return frozenset(np.flatnonzero(kept).tolist())

    @cached_property
    def lives(self) -> tuple[Integers, Integers]:
        """The event that allocates each tensor, and that which frees it: the number of events where none does."""
        events = self.columns.events
        begins = np.zeros(len(self.columns.nbytes), dtype=np.int64)
        ends = np.full(len(self.columns.nbytes), len(events))
        allocates = events > 0
        begins[events[allocates] - 1] = np.flatnonzero(allocates)
        ends[-events[~allocates] - 1] = np.flatnonzero(~allocates)
        return begins, ends


class _Composition:
    """The events of a window, made from those of the larger traced one."""

    def __init__(self, source: WindowTrace, window: Window, replayed: int | None) -> None:
        self.source = source
        self.window = window
        self.replayed = replayed
        self.old_events: list[int] = source.columns.events.tolist()
        self.ends: list[int] = source.lives[1].tolist()
        self.copied: list[int] = []
        """The tensor of the source that each tensor is a copy of."""
        self.events: list[int] = []
        self.marks: list[tuple[int, str]] = []
        self.numbers: dict[int, list[int]] = {}
        """Tensor of the source that is not freed yet -> its copies."""
        self.omitted = source.kept_buffers if window.is_plain else frozenset[int]()
        self.marks_at: dict[int, list[str]] = {}
        for index, name in source.columns.marks:
            self.marks_at.setdefault(index, []).append(name)

    def columns(self, sizes: Integers) -> Columns:
        """The window's trace; `sizes`: of each tensor of the source."""
        at = 0
        for block in self.source.repeats:
            more = self._more(block)
            self._copy(at, block.begin if more < 0 else block.end)
            at = block.end
            if more < 0:
                at += (block.end - block.begin) * (-more - 1)
                self._leave_out(block.begin, at)
            for number in range(more):
                self._repeat(block, whole=self.replayed is None or number < self.replayed)
        self._copy(at, len(self.old_events))
        old = self.source.columns
        copied = np.array(self.copied, dtype=np.int64)
        return replace(
            old,
            nbytes=sizes[copied],
            stream=old.stream[copied],
            category=old.category[copied],
            op=old.op[copied],
            module=old.module[copied],
            phase=old.phase[copied],
            events=np.array(self.events, dtype=np.int64),
            marks=tuple(self.marks),
        )

    def _more(self, block: Block) -> int:
        """How many repetitions the window has more than the source."""
        traced = self.source.windows[1]
        if block.of == OF_LOSS:
            return self.window.chunks - traced.chunks
        return self.window.cuts[block.of].parts - traced.cuts[block.of].parts

    def _copy(self, begin: int, end: int) -> None:
        for index in range(begin, end):
            self._mark(index)
            event = self.old_events[index]
            if event < 0:
                self.events += (-(number + 1) for number in reversed(self.numbers.pop(-event - 1, ())))
            elif event - 1 not in self.omitted:
                self.numbers[event - 1] = [self._allocate(event - 1)]

    def _leave_out(self, begin: int, end: int) -> None:
        """Of events that are left out only what is freed of tensors before them remains. Of a value that each repetition
        replaces (the sum of each loss) the last one before them remains; such values are replaced in the order of their making.
        """
        op = self.source.columns.op
        events = self.old_events[begin:end]
        left: dict[int, list[int]] = {}
        for event in events:
            if event > 0 and self.ends[event - 1] >= end:
                left.setdefault(int(op[event - 1]), []).append(event - 1)
        for event in events:
            numbers = self.numbers.pop(-event - 1, None) if event < 0 else None
            if numbers is None:
                continue
            replacing = left.get(int(op[-event - 1]))
            if replacing:
                self.numbers[replacing.pop(0)] = numbers
            else:
                self.events += (-(number + 1) for number in numbers)

    def _repeat(self, block: Block, *, whole: bool) -> None:
        """A repetition of the block that was copied last. What the next one frees is freed at its end, what all keep with what
        the source has.
        """
        own: dict[int, int] = {}
        for index in range(block.begin, block.end):
            event = self.old_events[index]
            tensor = abs(event) - 1
            if whole:
                self._mark_again(index)
            if event > 0 and (whole or self._is_kept(tensor, block)):
                own[tensor] = self._allocate(tensor)
            elif event < 0 and tensor in own:
                self.events.append(-(own.pop(tensor) + 1))
        for tensor, number in own.items():
            if self._is_kept(tensor, block):
                self.numbers[tensor].append(number)
            else:
                self.events.append(-(number + 1))

    def _is_kept(self, tensor: int, block: Block) -> bool:
        """Whether all repetitions keep it beyond the next."""
        return self.ends[tensor] >= 2 * block.end - block.begin

    def _mark(self, index: int) -> None:
        self.marks += ((len(self.events), name) for name in self.marks_at.get(index, ()))

    def _mark_again(self, index: int) -> None:
        names = (name for name in self.marks_at.get(index, ()) if name != "inputs" and not name.startswith("window "))
        self.marks += ((len(self.events), name) for name in names)

    def _allocate(self, tensor: int) -> int:
        self.copied.append(tensor)
        self.events.append(len(self.copied))
        return len(self.copied) - 1
