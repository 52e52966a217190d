"""Windows of one coupled loss: how they are cut, and what the sizes of their tensors are proportional to. Imports no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from trainfit.models.setting import Setting

CONSTANT, PAIRS, ROWS, LOGITS, LAST_ROWS, LAST_LOGITS, OF_CUTS = range(7)
"""What a size is proportional to: nothing, the pairs of the window; the rows of a full chunk, and these times the pairs; the
rows of the last chunk, and these times the pairs. From `OF_CUTS` on the micro-batch of each cut, and its last micro-batch."""
ANY_RATIO = 1.05
"""The ratio of micro-batches that is traced for all of them. It gives both cuts of both traced windows as many micro-batches,
and all of these other sizes."""


def full(law: int) -> int:
    """What a tensor of a full micro-batch or chunk follows where that of the last one follows `law`."""
    if law >= OF_CUTS:
        return law - (law - OF_CUTS) % 2
    return {LAST_ROWS: ROWS, LAST_LOGITS: LOGITS}.get(law, law)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """The window in micro-batches: of the step, or of a tower that runs by itself on others."""

    size: int
    """Pairs of each micro-batch but the last."""
    parts: int
    """Number of micro-batches."""
    last: int
    """Pairs of the last micro-batch."""

    @classmethod
    def of(cls, pairs: int, size: int) -> "Cut":
        """A window in micro-batches of a size."""
        parts = -(-pairs // size)
        return cls(size=size, parts=parts, last=pairs - size * (parts - 1))


@dataclass(frozen=True, kw_only=True)
class Window:
    """The cuts of a window, and the rows of the loss at one time."""

    cuts: tuple[Cut, ...]
    """The step's micro-batches; then those of a tower with a cut of its own."""
    chunk_rows: int
    """Rows of the similarity matrix that are computed at one time."""

    @classmethod
    def of(cls, pairs: int, micro_batch: int, *, chunk_rows: int, ratio: float | None = None) -> "Window":
        """A window in micro-batches, and with a `ratio` a tower on so many times the micro-batch (`step.contrastive`)."""
        own = Cut.of(pairs, micro_batch)
        if ratio is None:
            return cls(cuts=(own,), chunk_rows=chunk_rows)
        largest = min(pairs, micro_batch)
        return cls(cuts=(own, Cut.of(pairs, 1 if largest == 1 else math.ceil(largest * ratio))), chunk_rows=chunk_rows)

    @property
    def pairs(self) -> int:
        """Pairs of the window."""
        own = self.cuts[0]
        return own.size * (own.parts - 1) + own.last

    @property
    def chunks(self) -> int:
        """Chunks of rows of the loss."""
        return -(-self.pairs // self.chunk_rows)

    @property
    def is_plain(self) -> bool:
        """Whether nothing runs again, because each cut is a single micro-batch."""
        return all(cut.parts == 1 for cut in self.cuts)

    def evaluated(self, micro_batch: int) -> "Window":
        """The window with which an evaluation micro-batch has its sizes."""
        return replace(self, cuts=(replace(self.cuts[0], size=micro_batch), *self.cuts[1:]))

    def values(self) -> tuple[int, ...]:
        """What sizes are proportional to, by `CONSTANT` and those that follow it."""
        rows = min(self.chunk_rows, self.pairs)
        last = self.pairs - self.chunk_rows * (self.chunks - 1)
        of_cuts: list[int] = []
        for cut in self.cuts:
            of_cuts += (cut.size, cut.last)
        return 1, self.pairs, rows, rows * self.pairs, last, last * self.pairs, *of_cuts

    def to_record(self) -> list[Any]:
        """Plain JSON values, as `from_record` reads them."""
        return [self.chunk_rows, *([cut.size, cut.parts, cut.last] for cut in self.cuts)]

    @classmethod
    def from_record(cls, record: Sequence[Any]) -> "Window":
        """Read what `to_record` gave."""
        chunk_rows, *cuts = record
        made = (Cut(size=size, parts=parts, last=last) for size, parts, last in cuts)
        return cls(cuts=tuple(made), chunk_rows=chunk_rows)


def traced_windows(chunk_rows: int, *, has_ratio: bool = False) -> tuple[Window, Window]:
    """The two windows that are traced: of two and three micro-batches, with two and three chunks. The last micro-batches are
    smaller, so that their tensors can be distinguished from those of the others.
    """
    half = chunk_rows // 2
    ratio = ANY_RATIO if has_ratio else None
    return (
        Window.of(chunk_rows + 4, half + 11, chunk_rows=chunk_rows, ratio=ratio),
        Window.of(2 * chunk_rows + half + 12, chunk_rows - 5, chunk_rows=chunk_rows, ratio=ratio),
    )


def ratio_of(setting: Setting) -> float | None:
    """How many times the micro-batch a tower runs on that has a cut of its own; None: all run together."""
    knob = setting.family.ratio_knob
    return getattr(setting, knob) if knob is not None else None


def window_of(setting: Setting, pairs: int | None = None) -> Window:
    """The window of a setting; of `pairs` where its last micro-batch is smaller."""
    count = setting.micro_batch * setting.accumulation if pairs is None else pairs
    rows = setting.family.coupled_rows(setting)
    return Window.of(count, setting.micro_batch, chunk_rows=rows, ratio=ratio_of(setting))
