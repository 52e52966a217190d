"""A step's trace at any micro-batch, from its traces at two: a size is a low-degree function of the micro-batch.

The same serves for accumulation, where a window is one loss: its later micro-batches are what the larger trace has more.

Most tensors grow with the micro-batch by an affine law. What code does image by image makes more tensors, not larger
ones: the additional images' tensors are found by aligning the two traces, and take on the growth of all further images.
"""

import json
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, islice
from typing import Any

import numpy as np

from trainfit.memory.columns import Columns, ColumnTrace, Integers
from trainfit.timing.counts import OpCount
from trainfit.tracing.events import TensorInfo, Trace
from trainfit.tracing.stored_trace import StoredTrace

LOOKAHEAD = (32, 16, 8, 4, 3, 2, 1)
"""Numbers of tensors that must agree after an insertion, tried in this order."""
LONGEST_INSERTION = 6000
"""Largest number of consecutive tensors that only the larger trace has."""
LONGEST_OMISSION = 60
"""Largest number of consecutive tensors that only the smaller trace has."""
ROUNDING_BYTES = 512
"""A size may differ from its law by this much, because kernels round their workspaces."""

TOLERANCE = 0.003
"""Allowed relative difference between the peaks of the smaller trace and of the scaled trace at its micro-batch."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ScaledTrace:
    """Traces of one step at two micro-batches, aligned. In evaluation the micro-batch is the evaluation's as well."""

    micro_batches: tuple[int, int]
    """The smaller and the larger micro-batch."""
    columns: Columns
    """The trace at the larger micro-batch."""
    small_bytes: Integers
    """Bytes of each tensor at the smaller micro-batch; 0 if only additional images allocate it."""
    passing: Integers
    """Tensors of an additional image that are freed before the next image: one exists at a time, for any number of images."""
    ops: tuple[tuple[OpCount, ...], tuple[OpCount, ...]]
    """Operators of the last window at both micro-batches."""
    made_up: tuple[str, ...]
    """Operators whose values the traces replaced by placeholders."""
    upper_bounds: tuple[str, ...]
    """Operators whose output is priced at its largest size."""
    blocks: int
    """Blocks of the model that activation checkpointing may recompute."""

    @cached_property
    def trace(self) -> Trace:
        """The trace at the larger micro-batch, with an object for each tensor."""
        return self.columns.trace()

    def at(
        self, micro_batch: int, *, eval_micro_batch: int | None = None, evaluated_from: int | None = None
    ) -> Columns:
        """The trace at `micro_batch`, from event `evaluated_from` on at `eval_micro_batch`.

        Exact at the two micro-batches, and at others for sizes that are affine in the micro-batch. The tensors of additional
        images share the bytes of all images beyond the smaller micro-batch, so that sums are right, and so is a peak caused
        by one image's tensors.
        """
        nbytes = self.sizes(micro_batch)
        if evaluated_from is not None and eval_micro_batch not in (None, micro_batch):
            events = self.columns.events[evaluated_from:]
            until = int((events[events > 0] - 1).min(initial=len(nbytes)))
            nbytes = np.concatenate([nbytes[:until], self.sizes(eval_micro_batch)[until:]])
        return replace(self.columns, nbytes=nbytes)

    def sizes(self, micro_batch: int) -> Integers:
        """Bytes of each tensor at a micro-batch."""
        small, large = self.micro_batches
        before = self.small_bytes
        after = self.columns.nbytes
        if small == large:
            return after
        grown = (after - before) * (micro_batch - small)
        sizes = np.maximum(0, before - (-grown // (large - small)))
        sizes[self.passing] = after[self.passing] if micro_batch > small else 0
        return np.where(before == after, before, sizes)

    @classmethod
    def of_one(cls, traced: StoredTrace, micro_batch: int) -> "ScaledTrace":
        """A trace of one micro-batch alone: its sizes are the same at every one."""
        columns = Columns.of(traced.trace)
        return cls(
            micro_batches=(micro_batch, micro_batch),
            columns=columns,
            small_bytes=columns.nbytes,
            passing=np.zeros(0, dtype=np.int64),
            ops=(traced.ops, traced.ops),
            made_up=traced.made_up,
            upper_bounds=traced.upper_bounds,
            blocks=traced.blocks,
        )

    @classmethod
    def from_record_of_one(cls, record: Mapping[str, Any]) -> "ScaledTrace":
        """Read what `StoredTrace.to_record` gave of micro-batch 1."""
        columns = Columns.from_record(record["trace"])
        ops = tuple(map(OpCount.from_row, record["ops"]))
        return cls(
            micro_batches=(1, 1),
            columns=columns,
            small_bytes=columns.nbytes,
            passing=np.zeros(0, dtype=np.int64),
            ops=(ops, ops),
            made_up=tuple(record["made_up"]),
            upper_bounds=tuple(record["upper_bounds"]),
            blocks=record["blocks"],
        )

    def priced(self, trace: Columns) -> ColumnTrace:
        """`trace`, made from this one, with what goes with it."""
        return ColumnTrace(
            columns=trace,
            ops=self.ops[1],
            made_up=self.made_up,
            upper_bounds=self.upper_bounds,
            blocks=self.blocks,
        )

    def to_record(self) -> dict[str, Any]:
        """Plain JSON values, as `from_record` reads them."""
        return {
            "micro_batches": self.micro_batches,
            "trace": self.trace.to_record(),
            "small_bytes": self.small_bytes.tolist(),
            "passing": sorted(self.passing.tolist()),
            "ops": [[row.to_row() for row in rows] for rows in self.ops],
            "made_up": self.made_up,
            "upper_bounds": self.upper_bounds,
            "blocks": self.blocks,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "ScaledTrace":
        """Read what `to_record` gave. Raises TrainfitError when another version made it."""
        small, large = (tuple(map(OpCount.from_row, rows)) for rows in record["ops"])
        return cls(
            micro_batches=(record["micro_batches"][0], record["micro_batches"][1]),
            columns=Columns.from_record(record["trace"]),
            small_bytes=np.array(record["small_bytes"], dtype=np.int64),
            passing=np.array(record["passing"], dtype=np.int64),
            ops=(small, large),
            made_up=tuple(record["made_up"]),
            upper_bounds=tuple(record["upper_bounds"]),
            blocks=record["blocks"],
        )

    def to_json(self) -> str:
        """`to_record` as text."""
        return json.dumps(self.to_record(), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "ScaledTrace":
        """Read what `to_json` wrote. Raises TrainfitError when another version wrote it."""
        return cls.from_record(json.loads(text))


def scale(small: StoredTrace, large: StoredTrace, micro_batches: tuple[int, int]) -> ScaledTrace | None:
    """Align the traces of one setting at two micro-batches, the smaller first.

    Returns None if the step runs different operators at the two micro-batches, so that each has to be traced separately.
    """
    matches = matched(small.trace.tensors, large.trace.tensors, growth=micro_batches[1] / micro_batches[0])
    sizes = tuple(0 if match is None else small.trace.tensors[match].nbytes for match in matches)
    scaled = ScaledTrace(
        micro_batches=micro_batches,
        columns=Columns.of(large.trace),
        small_bytes=np.array(sizes, dtype=np.int64),
        passing=np.array(_passing(large.trace, matches), dtype=np.int64),
        ops=(small.ops, large.ops),
        made_up=large.made_up,
        upper_bounds=large.upper_bounds,
        blocks=large.blocks,
    )
    true_peak = Columns.of(small.trace).peak_bytes()
    peak = scaled.at(micro_batches[0]).peak_bytes()
    return scaled if abs(peak - true_peak) <= TOLERANCE * true_peak else None


def matched(small: Sequence[TensorInfo], large: Sequence[TensorInfo], *, growth: float) -> list[int | None]:
    """For each tensor of `large` the index of the matching tensor of `small`, or None.

    Phases are matched separately if both traces have the same ones (with more accumulation they do not); backward is matched
    from its end, because it processes the images from the last to the first.
    """
    pairs = [[(name, list(run)) for name, run in groupby(ts, key=lambda t: t.phase)] for ts in (small, large)]
    if [name for name, _ in pairs[0]] != [name for name, _ in pairs[1]]:
        return _align(small, large, growth=growth)
    matches: list[int | None] = []
    for (phase, a), (_, b) in zip(*pairs, strict=True):
        if phase == "backward":
            matches += reversed(_align(a[::-1], b[::-1], growth=growth))
        else:
            matches += _align(a, b, growth=growth)
    return matches


def _align(small: Sequence[TensorInfo], large: Sequence[TensorInfo], *, growth: float) -> list[int | None]:
    """For each tensor of `large` the id of the matching tensor of `small`, in order; None if only the larger trace has it."""
    names: dict[tuple[str, str, str], int] = {}
    a, b = ([(names.setdefault((t.op, t.module, t.phase), len(names)), t.nbytes) for t in ts] for ts in (small, large))

    places_of: dict[int, list[int]] = defaultdict(list)
    for place, (each, _) in enumerate(b):
        places_of[each].append(place)

    def alike(i: int, j: int) -> bool:
        name, nbytes = a[i]
        other_name, other_bytes = b[j]
        if name != other_name:
            return False
        return nbytes <= other_bytes + ROUNDING_BYTES and other_bytes <= growth * nbytes + ROUNDING_BYTES

    def agree(i: int, j: int, count: int) -> bool:
        return all(alike(i + k, j + k) for k in range(min(count, len(a) - i, len(b) - j)))

    def gap(i: int, j: int) -> tuple[int, int]:
        """Numbers of tensors that only the smaller and only the larger trace has here: if possible none of the smaller, and
        such that the traces agree for as long as possible afterwards.
        """
        for omitted, counts in ((1, LOOKAHEAD[:-2]), (LONGEST_OMISSION, LOOKAHEAD[:-2]), (1, LOOKAHEAD[-2:])):
            for count in counts:
                for only_small in range(min(omitted, len(a) - i)):
                    name = a[i + only_small][0]
                    longest = LONGEST_OMISSION if only_small else LONGEST_INSERTION
                    places = places_of[name]
                    first, end = bisect_left(places, j), bisect_left(places, j + longest)
                    for place in islice(places, first, end):
                        if agree(i + only_small, place, count):
                            return only_small, place - j
        return 1, 0

    matches: list[int | None] = []
    i = 0
    while len(matches) < len(b):
        if i == len(a):
            matches += [None] * (len(b) - len(matches))
        elif alike(i, len(matches)):
            matches.append(small[i].id)
            i += 1
        else:
            only_small, only_large = gap(i, len(matches))
            i += only_small
            matches += [None] * only_large
    return matches


def _passing(trace: Trace, matches: Sequence[int | None]) -> list[int]:
    """Unmatched tensors that are freed before the next matched one is allocated."""
    allocated = {event - 1: index for index, event in enumerate(trace.events) if event > 0}
    freed = {-event - 1: index for index, event in enumerate(trace.events) if event < 0}
    passing: set[int] = set()
    end = len(trace.events)
    for number in reversed(range(len(matches))):
        if matches[number] is not None:
            end = allocated[number]
        elif freed.get(number, len(trace.events)) <= end:
            passing.add(number)
    return sorted(passing)
