"""The trace of a step over one coupled window, however it is cut, from its traces at two windows.

Such a window (`step.contrastive`) runs its micro-batches forward without gradients, computes the loss of all pairs in chunks of
rows, and runs the micro-batches again. The events of two windows are the same, except that the larger one has one more
micro-batch of each cut (forward, and again forward and backward) and one more chunk of rows: blocks that repeat. Every size is
constant or proportional to the micro-batch, to the last one, to the pairs of the window, or to the rows of a chunk; the ratio of
the sizes in the two traces tells which (`windows.traced_windows`).

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
from trainfit.memory.windows import CONSTANT, Window
from trainfit.timing.counts import OpCount

REPLAYED = 1
"""Repetitions beyond those of the larger trace that are replayed in full."""
OF_LOSS = -1
NOT_MADE = -1


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
    def kept(self) -> tuple[Integers, ...]:
        """Of each of `repeats` the tensors that all repetitions keep beyond the next."""
        begins, ends = self.lives
        return tuple(
            np.flatnonzero((begins >= block.begin) & (begins < block.end) & (ends >= 2 * block.end - block.begin))
            for block in self.repeats
        )

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
    """The events of a window, made from those of the larger traced one, many at a time."""

    def __init__(self, source: WindowTrace, window: Window, replayed: int | None) -> None:
        self.source = source
        self.window = window
        self.replayed = replayed
        self.made = 0
        """Tensors so far."""
        self.copied: list[Integers] = []
        """The tensor of the source that each tensor is a copy of."""
        self.length = 0
        """Events so far."""
        self.events: list[Integers] = []
        self.marks: list[tuple[int, str]] = []
        self.numbers = np.full(len(source.columns.nbytes), NOT_MADE)
        """The copy of each tensor of the source."""
        self.others: dict[int, list[Integers]] = {}
        """Tensor of the source that is not freed yet -> its copies in repetitions."""
        omitted = sorted(source.kept_buffers) if window.is_plain else []
        self.is_omitted = np.zeros(len(self.numbers), dtype=bool)
        self.is_omitted[omitted] = True

    def columns(self, sizes: Integers) -> Columns:
        """The window's trace; `sizes`: of each tensor of the source."""
        at = 0
        for block, kept in zip(self.source.repeats, self.source.kept, strict=True):
            more = self._more(block)
            self._copy(at, block.begin if more < 0 else block.end)
            at = block.end
            if more < 0:
                at += (block.end - block.begin) * (-more - 1)
                self._leave_out(block.begin, at)
            whole = more if self.replayed is None else min(more, self.replayed)
            for _ in range(whole):
                self._repeat(block, kept)
            self._keep(kept, max(0, more - max(0, whole)))
        self._copy(at, len(self.source.columns.events))
        old = self.source.columns
        copied = np.concatenate(self.copied)
        return replace(
            old,
            nbytes=sizes[copied],
            stream=old.stream[copied],
            category=old.category[copied],
            op=old.op[copied],
            module=old.module[copied],
            phase=old.phase[copied],
            events=np.concatenate(self.events),
            marks=tuple(self.marks),
        )

    def _more(self, block: Block) -> int:
        """How many repetitions the window has more than the source."""
        traced = self.source.windows[1]
        if block.of == OF_LOSS:
            return self.window.chunks - traced.chunks
        return self.window.cuts[block.of].parts - traced.cuts[block.of].parts

    def _copy(self, begin: int, end: int) -> None:
        """The source's events from `begin` to `end`, with the frees of all copies where the source frees a tensor."""
        events = self.source.columns.events[begin:end]
        tensors = np.abs(events) - 1
        allocates = events > 0
        new = tensors[allocates]
        new = new[~self.is_omitted[new]]
        self.numbers[new] = self._allocate(new)
        numbers = self.numbers[tensors]
        there = numbers != NOT_MADE
        copies = there.astype(np.int64)
        places: list[int] = []
        frees: list[Integers] = []
        for tensor in [each for each in self.others if begin <= self.source.lives[1][each] < end]:
            place = int(self.source.lives[1][tensor]) - begin
            freed = -1 - np.concatenate(self.others.pop(tensor))[::-1]
            places += [int(there[:place].sum())] * len(freed)
            frees.append(freed)
            copies[place] += len(freed)
        own = np.where(allocates, numbers + 1, -numbers - 1)[there]
        self._mark(begin, copies, self.source.columns.marks)
        self._add(np.insert(own, places, np.concatenate(frees)) if frees else own)

    def _leave_out(self, begin: int, end: int) -> None:
        """Of events that are left out only what is freed of tensors before them remains. Of a value that each repetition
        replaces (the sum of each loss) the last one before them remains; such values are replaced in the order of their making.
        """
        op = self.source.columns.op
        events = self.source.columns.events[begin:end]
        allocated = events[events > 0] - 1
        left: dict[int, list[int]] = {}
        for tensor in allocated[self.source.lives[1][allocated] >= end].tolist():
            left.setdefault(int(op[tensor]), []).append(tensor)
        freed = -events[events < 0] - 1
        for tensor in freed[self.numbers[freed] != NOT_MADE].tolist():
            number = self.numbers[tensor]
            others = self.others.pop(tensor, [])
            self.numbers[tensor] = NOT_MADE
            replacing = left.get(int(op[tensor]))
            if replacing:
                instead = replacing.pop(0)
                self.numbers[instead] = number
                if others:
                    self.others[instead] = others
            else:
                self._add(-1 - np.concatenate([[number], *others])[::-1])

    def _repeat(self, block: Block, kept: Integers) -> None:
        """A repetition of the block that was copied last. What the next one frees is freed at its end, what all keep with what
        the source has.
        """
        events = self.source.columns.events[block.begin : block.end]
        tensors = np.abs(events) - 1
        allocates = events > 0
        new = tensors[allocates]
        of_source = np.full(len(self.numbers), NOT_MADE)
        of_source[new] = self._allocate(new)
        numbers = of_source[tensors]
        there = numbers != NOT_MADE
        names = [(at, name) for at, name in self.source.columns.marks if name != "inputs" and name[:7] != "window "]
        self._mark(block.begin, there.astype(np.int64), names)
        self._add(np.where(allocates, numbers + 1, -numbers - 1)[there])
        for tensor in kept.tolist():
            self.others.setdefault(tensor, []).append(of_source[tensor : tensor + 1])
        left = new[self.source.lives[1][new] >= block.end]
        self._add(-1 - of_source[left[~np.isin(left, kept)]])

    def _keep(self, kept: Integers, times: int) -> None:
        """What so many repetitions keep, and nothing else of them."""
        if times and len(kept):
            numbers = self._allocate(np.tile(kept, times))
            self._add(numbers + 1)
            for tensor, copies in zip(kept.tolist(), numbers.reshape(times, -1).T, strict=True):
                self.others.setdefault(tensor, []).append(copies)

    def _mark(self, begin: int, copies: Integers, marks: Sequence[tuple[int, str]]) -> None:
        """Marks of the source's events from `begin` on, of each of which `copies` says how many events are made."""
        before = self.length + np.cumsum(copies) - copies
        self.marks += [(int(before[at - begin]), name) for at, name in marks if begin <= at < begin + len(copies)]

    def _allocate(self, tensors: Integers) -> Integers:
        """Numbers of new copies of tensors of the source."""
        self.copied.append(tensors)
        self.made += len(tensors)
        return np.arange(self.made - len(tensors), self.made)

    def _add(self, events: Integers) -> None:
        self.events.append(events)
        self.length += len(events)
