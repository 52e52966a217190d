"""The trace of a step over one coupled window, at any micro-batch and accumulation, from its traces at two windows.

Such a window (`step.contrastive`) runs its micro-batches forward without gradients, computes the loss of all pairs in chunks of
rows, and runs the micro-batches again. The events of two windows are the same, except that the larger one has one more
micro-batch (forward, and again forward and backward) and one more chunk of rows: blocks that repeat. Every size is constant or
proportional to the micro-batch, to the pairs of the window, or to the rows of a chunk; the ratio of the sizes in the two traces
tells which, because no two of these ratios are equal.

A composed trace has every tensor at its exact size. Of many equal repetitions only `REPLAYED` more than in the larger trace are
replayed; the features that the others would keep are allocated all the same, so that the peak of the tensors is exact.
"""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from trainfit.memory.columns import Columns, Integers
from trainfit.memory.profile import last_window
from trainfit.timing.counts import OpCount

REPLAYED = 1
"""Repetitions beyond those of the larger trace that are replayed in full."""
CONSTANT, MICRO_BATCH, PAIRS, ROWS, LOGITS, LAST_ROWS, LAST_LOGITS = range(7)
"""What a size is proportional to: nothing, the micro-batch, the pairs of the window; the rows of a full chunk, and these times
the pairs; the rows of the last chunk, and these times the pairs."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """Micro-batches of equal size, and the rows of the loss at one time."""

    micro_batch: int
    accumulation: int
    chunk_rows: int

    @property
    def pairs(self) -> int:
        """Pairs of the window."""
        return self.micro_batch * self.accumulation

    @property
    def chunks(self) -> int:
        """Chunks of rows of the loss."""
        return -(-self.pairs // self.chunk_rows)

    def values(self) -> tuple[int, ...]:
        """What sizes are proportional to, by `CONSTANT` to `LAST_LOGITS`."""
        rows = min(self.chunk_rows, self.pairs)
        last = self.pairs - self.chunk_rows * (self.chunks - 1)
        return 1, self.micro_batch, self.pairs, rows, rows * self.pairs, last, last * self.pairs


def traced_windows(chunk_rows: int) -> tuple[Window, Window]:
    """The two windows that are traced: of two and three micro-batches, with two and three chunks."""
    return (
        Window(micro_batch=chunk_rows // 2 + 11, accumulation=2, chunk_rows=chunk_rows),
        Window(micro_batch=chunk_rows - 5, accumulation=3, chunk_rows=chunk_rows),
    )


@dataclass(frozen=True, kw_only=True)
class Block:
    """A repetition: events that the smaller trace has once less. An equal block follows."""

    begin: int
    end: int
    of_loss: bool
    """Whether it is a chunk of the loss, not a micro-batch."""


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
    upper_bounds: tuple[str, ...]
    blocks: int
    """Blocks of the model that activation checkpointing may recompute."""

    def at(
        self,
        micro_batch: int,
        accumulation: int,
        *,
        eval_micro_batch: int | None = None,
        replayed: int | None = REPLAYED,
    ) -> Columns:
        """The trace of a window; `replayed`: as `REPLAYED`, None for all repetitions.

        `eval_micro_batch`: of the evaluation that is the trace's last window; the micro-batch unless given.
        """
        window = replace(self.windows[1], micro_batch=micro_batch, accumulation=accumulation)
        sizes = self._sizes(window)
        if eval_micro_batch is not None:
            events = self.columns.events[last_window(self.columns) :]
            first = int((events[events > 0] - 1).min(initial=len(sizes)))
            of_evaluation = self._sizes(replace(window, micro_batch=eval_micro_batch))
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
            "windows": [astuple(window) for window in self.windows],
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
        few, many = (
            Window(micro_batch=micro_batch, accumulation=accumulation, chunk_rows=rows)
            for micro_batch, accumulation, rows in record["windows"]
        )
        small, large = (tuple(map(OpCount.from_row, rows)) for rows in record["ops"])
        return cls(
            windows=(few, many),
            columns=Columns.from_record(record["trace"]),
            follows=np.array(record["follows"], dtype=np.int64),
            repeats=tuple(Block(begin=begin, end=end, of_loss=loss) for begin, end, loss in record["repeats"]),
            ops=(small, large),
            made_up=tuple(record["made_up"]),
            upper_bounds=tuple(record["upper_bounds"]),
            blocks=record["blocks"],
        )

    def ops_at(self, micro_batch: int, accumulation: int) -> tuple[OpCount, ...]:
        """Operators of a window: rows of one operator, phase and type together.

        Of A micro-batches A - 1 run forward twice; what a micro-batch takes is a line in its pairs. Known limit: the logits of
        a window grow with the square of its pairs, and are taken to grow with these.
        """
        few, many = (_sums(rows) for rows in self.ops)
        window = replace(self.windows[1], micro_batch=micro_batch, accumulation=accumulation)
        windows = (*self.windows, window)
        sizes = [each.micro_batch for each in windows]
        rows: list[OpCount] = []
        for key, values in many.items():
            calls = [self._calls(key, each.accumulation) for each in windows]
            pairs = zip(few.get(key, values), values, strict=True)
            count, flops, nbytes = (_on_line(low, high, calls, sizes) for low, high in pairs)
            op, phase, dtype = key
            rows.append(OpCount(op=op, phase=phase, dtype=dtype, count=max(1, round(count)), flops=flops, bytes=nbytes))
        return tuple(rows)

    def _calls(self, key: tuple[str, str, str], accumulation: int) -> float:
        """How much an operator does in a phase, up to a factor: as much as it allocates. One that works in place adds to the
        gradients that the first backward made, or prepares inputs; those of the update work on lists of tensors, once.
        """
        if not self._ends_in_window:
            return 1
        op, phase, _ = key
        total, of_micro_batch = self._allocations.get((op, phase), (0, 0))
        if total:
            return total + (accumulation - self.windows[1].accumulation) * of_micro_batch
        if phase == "optimizer" or "_foreach" in op:
            return 1
        return accumulation if phase == "forward" else accumulation - 1

    @cached_property
    def _ends_in_window(self) -> bool:
        """Whether the trace ends with the coupled window; else an evaluation follows it, which runs one micro-batch."""
        return any(block.begin >= last_window(self.columns) for block in self.repeats)

    @cached_property
    def _allocations(self) -> dict[tuple[str, str], tuple[int, int]]:
        """By operator and phase the bytes that it allocates in the last window of the larger trace, and in a micro-batch of
        it; chunks of the loss are left out.
        """
        columns = self.columns
        nbytes: dict[tuple[str, str], tuple[int, int]] = {}
        inside = {index: block for block in self.repeats for index in range(block.begin, 2 * block.end - block.begin)}
        for index in range(last_window(columns), len(columns.events)):
            number = int(columns.events[index]) - 1
            block = inside.get(index)
            if number < 0 or (block is not None and block.of_loss):
                continue
            key = columns.names[columns.op[number]], _merged(columns.names[columns.phase[number]])
            total, repeated = nbytes.get(key, (0, 0))
            size = int(columns.nbytes[number])
            again = size if block is not None and index < block.end else 0
            nbytes[key] = total + size, repeated + again
        return nbytes

    @cached_property
    def kept_buffers(self) -> frozenset[int]:
        """Copies of the model's buffers, which are made only where micro-batches run again."""
        columns = self.columns
        is_clone = np.array([name == "aten.clone" for name in columns.names])[columns.op]
        in_update = np.array([name == "update" for name in columns.names])[columns.phase]
        begins, ends = self.lives
        kept = np.zeros(len(begins), dtype=bool)
        for block in self.repeats:
            if not block.of_loss:
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
        self.omitted = source.kept_buffers if window.accumulation == 1 else frozenset[int]()
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
        if block.of_loss:
            return self.window.chunks - traced.chunks
        return self.window.accumulation - traced.accumulation

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
        replaces (the sum of the losses) the last one before them remains.
        """
        op = self.source.columns.op
        events = self.old_events[begin:end]
        left = {int(op[event - 1]): event - 1 for event in events if event > 0 and self.ends[event - 1] >= end}
        for event in events:
            numbers = self.numbers.pop(-event - 1, None) if event < 0 else None
            if numbers is None:
                continue
            replaced_by = left.get(int(op[-event - 1]))
            if replaced_by is None:
                self.events += (-(number + 1) for number in numbers)
            else:
                self.numbers[replaced_by] = numbers

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


def _sums(rows: Sequence[OpCount]) -> dict[tuple[str, str, str], tuple[float, float, float]]:
    """(kernels, FLOPs, bytes) of the rows of one operator, phase and type."""
    sums: dict[tuple[str, str, str], tuple[float, float, float]] = {}
    for row in rows:
        key = row.op, _merged(row.phase), row.dtype
        count, flops, nbytes = sums.get(key, (0.0, 0.0, 0.0))
        sums[key] = count + row.count, flops + row.flops, nbytes + row.bytes
    return sums


def _merged(phase: str) -> str:
    """Inputs of the first micro-batch are a phase of their own, those of the others are loaded in "forward"."""
    return "forward" if phase == "inputs" else phase


def _on_line(few: float, many: float, calls: Sequence[float], micro_batches: Sequence[int]) -> float:
    """A count at the last of three windows: what a call does is a line in the micro-batch."""
    low = few / calls[0]
    high = many / calls[1]
    slope = (low - high) / (micro_batches[0] - micro_batches[1])
    return max(0.0, calls[2] * (low + slope * (micro_batches[2] - micro_batches[0])))
