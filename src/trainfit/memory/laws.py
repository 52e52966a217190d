"""How a step's sizes follow what a data set brings: its objects and its classes. Imports no torch.

Two traces that differ in one knob alone go through the same operators, and a size of the one is found in the other at the
same place. What it grows by is a law of its operator, module, phase and size, not of its place: `laws` refuses traces where
that is ambiguous. So the laws of one traced case hold for every case with the same kernels: each window, evaluation, and
training that computes blocks again.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from trainfit.memory.scaling import ScaledTrace
from trainfit.timing.counts import OpCount
from trainfit.tracing.events import TensorInfo
from trainfit.tracing.stored_trace import StoredTrace

Kind = tuple[str, str, str, int]
"""Operator, module, phase and bytes of a tensor at the base."""
Row = tuple[str, str, str]
"""Operator, phase and data type of a row of counts."""


@dataclass(frozen=True, kw_only=True)
class Laws:
    """What changes with one knob, as a line through two of its values: every other size is constant."""

    knob: str
    """Field of a setting."""
    base: int
    """Its value in the trace that the laws are applied to."""
    other: int
    """Its value in the trace that they were found with."""
    least: int
    most: int
    """They hold from here to here."""
    sizes: Mapping[Kind, int]
    """Bytes at `other`."""
    counts: Mapping[Row, tuple[float, float, float]]
    """Kernels, FLOPs and bytes at `other`, each over that at the base."""

    def holds(self, value: int) -> bool:
        """Whether they tell of this value of the knob."""
        return self.least <= value <= self.most

    def ratio(self, kind: Kind, value: int) -> tuple[int, int]:
        """(numerator, denominator) of a size at `value` over that at the base."""
        at_other = self.sizes.get(kind)
        if at_other is None:
            return 1, 1
        at_base, span = kind[3], self.other - self.base
        moved = at_base * span + (at_other - at_base) * (value - self.base)
        return (moved, at_base * span) if span > 0 else (-moved, -at_base * span)

    def counted(self, row: OpCount, value: int) -> OpCount:
        """A row of counts at `value`."""
        ratios = self.counts.get((row.op, row.phase, row.dtype))
        if ratios is None:
            return row
        share = (value - self.base) / (self.other - self.base)
        count, flops, nbytes = (max(0.0, 1 + share * (ratio - 1)) for ratio in ratios)
        return replace(row, count=max(1, round(row.count * count)), flops=row.flops * flops, bytes=row.bytes * nbytes)

    def to_record(self) -> dict[str, Any]:
        """Plain JSON values, as `from_record` reads them."""
        own = {name: getattr(self, name) for name in ("knob", "base", "other", "least", "most")}
        sizes = [[*kind, nbytes] for kind, nbytes in sorted(self.sizes.items())]
        return own | {"sizes": sizes, "counts": [[*row, *ratios] for row, ratios in sorted(self.counts.items())]}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Laws":
        """What `to_record` gave."""
        own = {name: record[name] for name in ("knob", "base", "other", "least", "most")}
        sizes = {(op, module, phase, base): other for op, module, phase, base, other in record["sizes"]}
        counts = {(op, phase, dtype): (n, flops, size) for op, phase, dtype, n, flops, size in record["counts"]}
        return cls(**own, sizes=sizes, counts=counts)


def find_laws(
    pairs: Sequence[tuple[StoredTrace, StoredTrace]], *, knob: str, values: tuple[int, int], holds: tuple[int, int]
) -> Laws | None:
    """The laws that take the first trace of each pair to the second; `values` of the knob are theirs.

    None: the step does other things at the one value than at the other, or two tensors that cannot be told apart grow by
    different laws.
    """
    sizes: dict[Kind, int] = {}
    for at_base, at_other in pairs:
        if at_base.trace.events != at_other.trace.events:
            return None
        for one, other in zip(at_base.trace.tensors, at_other.trace.tensors, strict=True):
            kind = kind_of(one)
            if (
                kind[:3] != (other.op, other.module, other.phase)
                or sizes.setdefault(kind, other.nbytes) != other.nbytes
            ):
                return None
    changed = {kind: nbytes for kind, nbytes in sizes.items() if nbytes != kind[3]}
    at_base, at_other = pairs[0]
    return Laws(
        knob=knob,
        base=values[0],
        other=values[1],
        least=holds[0],
        most=holds[1],
        sizes=changed,
        counts=_ratios(at_base.ops, at_other.ops),
    )


def kind_of(tensor: TensorInfo) -> Kind:
    """What its law is found by."""
    return tensor.op, tensor.module, tensor.phase, tensor.nbytes


def _ratios(at_base: Iterable[OpCount], at_other: Iterable[OpCount]) -> dict[Row, tuple[float, float, float]]:
    """Of the rows that differ; rows of one operator, phase and type are taken together."""
    base, other = _sums(at_base), _sums(at_other)
    ratios = {
        row: tuple(_over(b, a) for a, b in zip(base[row], other.get(row, base[row]), strict=True)) for row in base
    }
    return {row: (each[0], each[1], each[2]) for row, each in ratios.items() if each != (1, 1, 1)}


def _sums(rows: Iterable[OpCount]) -> dict[Row, list[float]]:
    sums: dict[Row, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for row in rows:
        of_row = sums[row.op, row.phase, row.dtype]
        for index, value in enumerate((row.count, row.flops, row.bytes)):
            of_row[index] += value
    return sums


def _over(one: float, other: float) -> float:
    return one / other if other else 1.0


def moved(scaled: ScaledTrace, laws: Sequence[tuple[Laws, int]]) -> ScaledTrace:
    """A scaled trace at other values of knobs: each with its laws, which were found at the larger micro-batch.

    A size that follows several knobs follows their product; at the smaller micro-batch it follows them as at the larger.
    """
    tensors = list(scaled.trace.tensors)
    small = list(scaled.small_bytes)
    kinds = {kind for each, _ in laws for kind in each.sizes}
    for number, tensor in enumerate(tensors):
        kind = kind_of(tensor)
        if kind not in kinds:
            continue
        ratios = [each.ratio(kind, value) for each, value in laws]
        over, under = prod(ratio[0] for ratio in ratios), prod(ratio[1] for ratio in ratios)
        tensors[number] = replace(tensor, nbytes=_times(tensor.nbytes, over, under))
        small[number] = _times(small[number], over, under)
    return replace(
        scaled,
        trace=replace(scaled.trace, tensors=tuple(tensors)),
        small_bytes=tuple(small),
        ops=(_counted(scaled.ops[0], laws), _counted(scaled.ops[1], laws)),
    )


def _times(nbytes: int, over: int, under: int) -> int:
    return max(0, -(-nbytes * over // under))


def _counted(rows: Sequence[OpCount], laws: Sequence[tuple[Laws, int]]) -> tuple[OpCount, ...]:
    for each, value in laws:
        rows = [each.counted(row, value) for row in rows]
    return tuple(rows)


def missing(scaled: Iterable[ScaledTrace], laws: Laws) -> set[Kind]:
    """Sizes with a law that no tensor of the traces has: the laws are not of this step."""
    return set(laws.sizes) - {kind_of(tensor) for each in scaled for tensor in each.trace.tensors}
