"""How a step's sizes follow what a data set brings, its objects and its classes, and the image. Imports no torch.

Two traces that differ in these knobs alone are aligned, and a size of the one is found in the other at its place. Sizes are
products: bytes of a number, rows, and of a knob or of two (of classes plus one, where a class head has a row for none), so
that the ratio of two sizes tells which, when no two of these ratios are equal. What a size follows is a law of its operator,
module, phase and bytes, not of its place, so that the laws of one traced case hold for every case with the same kernels:
each window, evaluation, and training that recomputes blocks.

Code that works in pieces of bounded size makes more pieces for more objects: pieces are constant, and there are as many as
in the trace that is taken to other values, which is that with the most.

Of the image sizes follow numbers that the setting's family declares (`declared_sizes`). Their laws are others than those of
the data (`memory.image_laws`): a size grows by both.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from itertools import combinations_with_replacement, product
from math import prod
from typing import Any

import numpy as np

from trainfit.memory.columns import Columns, Integers
from trainfit.memory.scaling import TOLERANCE, ScaledTrace, matched
from trainfit.models.setting import Setting
from trainfit.timing.counts import OpCount
from trainfit.tracing.events import TensorInfo
from trainfit.tracing.stored_trace import StoredTrace

TOLERANCE_ABOVE = 0.01
"""By so much the peak may be too high where the laws were found; by `scaling.TOLERANCE` too low."""
MOST_FACTORS = 2
"""Of a size."""
Kind = tuple[str, str, str, int]
"""Operator, module, phase and bytes of a tensor at the base."""
Row = tuple[str, str, str]
"""Operator, phase and data type of a row of counts."""
Change = tuple[float, float, float]
"""Of kernels, FLOPs and bytes, as a share of those at the base."""


@dataclass(frozen=True, kw_only=True)
class Variable:
    """A knob that sizes follow, or the knob plus one; or a number that the setting's family declares."""

    knob: str
    """Field of a setting, or the name of the number."""
    base: int
    """Its value in the trace that the laws are applied to."""
    other: int
    """Its value in the trace that they were found with; of a knob a smaller one."""
    least: int
    """The smallest value that laws hold for."""
    most: int
    """Laws hold from here to here."""
    plus: int = 0
    """What is added to the knob."""
    cap: int | None = None
    """It follows the knob up to here: of objects, as many as there are queries are matched."""
    cell: int = 0
    """Of a knob that is (height, width) in pixels: the side of the cells that it counts in, since models pad to whole cells.
    Its base is the knob left out."""
    declared: bool = False
    """Whether it is one of `declared_sizes`, and no field."""

    def value(self, setting: Setting) -> int:
        """Its value in a setting, of a field."""
        value = getattr(setting, self.knob)
        if not self.cell:
            return value
        return self.base if value is None else prod(-(-side // self.cell) for side in value)

    def ratio(self, value: int) -> tuple[int, int]:
        """(numerator, denominator) of the variable at a value of the knob over that at the base."""
        if self.cap is not None:
            return min(value, self.cap) + self.plus, min(self.base, self.cap) + self.plus
        return value + self.plus, self.base + self.plus


@dataclass(frozen=True, kw_only=True)
class Laws:
    """What follows the knobs; every other size is constant."""

    variables: tuple[Variable, ...]
    """What sizes follow."""
    sizes: Mapping[Kind, tuple[int, ...]]
    """Indices into `variables`, for each factor one."""
    counts: Mapping[Row, tuple[Change, ...]]
    """For each variable what the row changes by when it goes from its base to its other value; it changes along a line."""
    behind: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Fields of a setting that the declared variables depend on -> their values at the base."""

    def knobs(self) -> dict[str, Any]:
        """The knobs, and their values in the setting of the trace that the laws are applied to."""
        own = [each for each in self.variables if not each.declared]
        return {each.knob: None if each.cell else each.base for each in own} | dict(self.behind)

    def values(self, setting: Setting) -> dict[str, int]:
        """The values that the laws take of a setting."""
        declared = declared_sizes(setting) if self.behind else {}
        return {each.knob: declared[each.knob] if each.declared else each.value(setting) for each in self.variables}

    def hold(self, values: Mapping[str, int]) -> bool:
        """Whether they tell of these values of the knobs."""
        return all(each.least <= values[each.knob] <= each.most for each in self.variables)

    def move_image(self, values: Mapping[str, int]) -> bool:
        """Whether these values of the knobs are of another size of the image than that at the base."""
        return bool(self.behind) or any(each.cell and values[each.knob] != each.base for each in self.variables)

    def counted(self, row: OpCount, values: Mapping[str, int]) -> OpCount:
        """A row of counts at other values."""
        changes = self.counts.get((row.op, row.phase, row.dtype))
        if changes is None:
            return row
        shares = [(values[each.knob] - each.base) / (each.other - each.base) for each in self.variables]
        count, flops, nbytes = (
            max(0.0, 1 + sum(s * change[index] for s, change in zip(shares, changes, strict=True)))
            for index in range(3)
        )
        return replace(row, count=max(1, round(row.count * count)), flops=row.flops * flops, bytes=row.bytes * nbytes)

    def to_record(self) -> dict[str, Any]:
        """Plain JSON values, as `from_record` reads them."""
        return {
            "variables": [asdict(each) for each in self.variables],
            "sizes": [[*kind, factors] for kind, factors in sorted(self.sizes.items())],
            "counts": [[*row, changes] for row, changes in sorted(self.counts.items())],
            "behind": dict(self.behind),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Laws":
        """What `to_record` gave."""
        sizes = {(op, module, phase, base): tuple(factors) for op, module, phase, base, factors in record["sizes"]}
        counts = {
            (op, phase, dtype): tuple((n, flops, nbytes) for n, flops, nbytes in changes)
            for op, phase, dtype, changes in record["counts"]
        }
        variables = tuple(Variable(**each) for each in record["variables"])
        return cls(variables=variables, sizes=sizes, counts=counts, behind=record.get("behind", {}))


def declared_sizes(setting: Setting) -> Mapping[str, int]:
    """Numbers by name that sizes of a setting's traces follow and that are no fields, for instance the cells of an image.

    The function `traced_sizes` of the family's module of this name, beside its workload, has them; most families have none.
    """
    package = setting.family.workload.rpartition(".")[0]
    name = f"{package}.traced_sizes"
    return import_module(name).traced_sizes(setting) if package and find_spec(name) else {}


def find_laws(
    pairs: Sequence[tuple[StoredTrace, StoredTrace]], variables: Sequence[Variable]
) -> tuple[Laws, ...] | None:
    """The laws that take the first trace of each pair, at the base of all variables, to the second, at their other values;
    for each pair, with its counts.

    The first variable is what code makes more pieces for. Of tensors that nothing distinguishes and that grow differently,
    the largest counts; a size that is no product of variables stays. None: what the laws make of a first trace has not the
    peak of the second.
    """
    growth = prod(each.base / each.other for each in variables)
    like_of = [like_sizes(base, other, growth) for base, other in pairs]
    sizes = factors_of(largest_likes([base for base, _ in pairs], like_of), variables)
    all_laws: list[Laws] = []
    for (base, other), like in zip(pairs, like_of, strict=True):
        pieces = [one for one, nbytes in zip(base.trace.tensors, like, strict=True) if nbytes is None]
        laws = Laws(variables=tuple(variables), sizes=sizes, counts=_changes(base, other, sizes, variables, pieces))
        values = {each.knob: each.other for each in variables}
        if not reach(laws, base, other, values):
            return None
        all_laws.append(laws)
    return tuple(all_laws)


def with_cap(
    found: Sequence[Laws], pairs: Sequence[tuple[StoredTrace, StoredTrace]], *, cap: int, many: int, most: int
) -> tuple[Laws, ...] | None:
    """Laws of `find_laws` that hold beyond the largest value of the first variable's knob: of objects, only as many as there are
    queries are matched. None where they would not reach the peak of a second trace.

    Args:
        found: Laws up to `cap`, one of each pair.
        pairs: A trace at the base, and one that differs from it in the knob alone.
        cap: The most that some sizes follow.
        many: The knob's value in the second trace of each pair, above `cap`.
        most: The laws hold up to here.
    """
    like_of = [like_sizes(base, more, many**MOST_FACTORS) for base, more in pairs]
    likes = largest_likes([base for base, _ in pairs], like_of)
    extended: list[Laws] = []
    for laws, (base, more) in zip(found, pairs, strict=True):
        every = replace(laws.variables[0], most=most)
        variables = (every, *laws.variables[1:], replace(every, cap=cap))
        values = {each.knob: each.base for each in variables} | {every.knob: many}
        sizes = dict(laws.sizes)
        for kind, factors in laws.sizes.items():
            for choice in product(*((0, len(laws.variables)) if each == 0 else (each,) for each in factors)):
                if _times(kind[3], _ratio(variables, choice, values)) == likes.get(kind):
                    sizes[kind] = choice
                    break
        counts = {row: (*changes, (0.0, 0.0, 0.0)) for row, changes in laws.counts.items()}
        extended.append(replace(laws, variables=variables, sizes=sizes, counts=counts))
        if not reach(extended[-1], base, more, values):
            return None
    return tuple(extended)


def reach(laws: Laws, base: StoredTrace, other: StoredTrace, values: Mapping[str, int]) -> bool:
    """Whether laws take one trace to the peak of another."""
    predicted = moved(ScaledTrace.of_one(base, 1), [laws], values).columns.peak_bytes()
    true = Columns.of(other.trace).peak_bytes()
    return (1 - TOLERANCE) * true <= predicted <= (1 + TOLERANCE_ABOVE) * true


def like_sizes(base: StoredTrace, other: StoredTrace, growth: float) -> list[int | None]:
    """For each tensor of `base` the bytes of the matching tensor of `other`, which is at most `growth` times smaller, or as many
    times larger where it has the larger peak; None if there is none.
    """
    old = base.trace.tensors
    new = other.trace.tensors
    if len(old) == len(new) and all(kind_of(a)[:3] == kind_of(b)[:3] for a, b in zip(old, new, strict=True)):
        return [tensor.nbytes for tensor in new]
    if Columns.of(other.trace).peak_bytes() <= Columns.of(base.trace).peak_bytes():
        return [None if match is None else new[match].nbytes for match in matched(new, old, growth=growth)]
    sizes: list[int | None] = [None] * len(old)
    for tensor, match in zip(new, matched(old, new, growth=growth), strict=True):
        if match is not None:
            sizes[match] = tensor.nbytes
    return sizes


def largest_likes(bases: Sequence[StoredTrace], like_of: Sequence[Sequence[int | None]]) -> dict[Kind, int]:
    """Of each kind of tensor of some traces the most bytes that `like_sizes` found for one; what has no match is left out."""
    likes: dict[Kind, int] = {}
    for base, like in zip(bases, like_of, strict=True):
        for tensor, nbytes in zip(base.trace.tensors, like, strict=True):
            if nbytes is not None:
                likes[kind_of(tensor)] = max(nbytes, likes.get(kind_of(tensor), 0))
    return likes


def factors_of(likes: Mapping[Kind, int], variables: Sequence[Variable]) -> dict[Kind, tuple[int, ...]]:
    """The laws of sizes, of which `likes` has the bytes at the other values; a size that is no product of variables has none."""
    products: list[tuple[int, ...]] = []
    for count in range(1, MOST_FACTORS + 1):
        products += combinations_with_replacement(range(len(variables)), count)
    return {
        kind: factors
        for kind, nbytes in likes.items()
        if nbytes != kind[3] and (factors := _factors(kind[3], nbytes, variables, products)) is not None
    }


def _factors(
    at_base: int, at_other: int, variables: Sequence[Variable], products: Sequence[tuple[int, ...]]
) -> tuple[int, ...] | None:
    """The first of `products` that grows as a size does."""
    for factors in products:
        over, under = _ratio(variables, factors, {each.knob: each.other for each in variables})
        if at_other * under == at_base * over:
            return factors
    return None


def _ratio(variables: Sequence[Variable], factors: Sequence[int], values: Mapping[str, int]) -> tuple[int, int]:
    ratios = [variables[index].ratio(values[variables[index].knob]) for index in factors]
    return prod(ratio[0] for ratio in ratios), prod(ratio[1] for ratio in ratios)


def kind_of(tensor: TensorInfo) -> Kind:
    """What its law is found by."""
    return tensor.op, tensor.module, tensor.phase, tensor.nbytes


def _changes(
    base: StoredTrace,
    other: StoredTrace,
    sizes: Mapping[Kind, tuple[int, ...]],
    variables: Sequence[Variable],
    pieces: Iterable[TensorInfo],
) -> dict[Row, tuple[Change, ...]]:
    """Of the rows that differ; rows of one operator, phase and type are taken together. The number of kernels follows the first
    variable. Of FLOPs and bytes each variable has the share that it has of the bytes that the operator's tensors change by,
    or all tensors; `pieces`, which the other trace does not have, are the first variable's.
    """
    weights: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0] * len(variables))
    shrunk = [1 - (each.other + each.plus) / (each.base + each.plus) for each in variables]
    for tensor in base.trace.tensors:
        for index in sizes.get(kind_of(tensor), ()):
            for key in ((tensor.op, tensor.phase), ("", "")):
                weights[key][index] += tensor.nbytes * shrunk[index]
    for tensor in pieces:
        for key in ((tensor.op, tensor.phase), ("", "")):
            weights[key][0] += tensor.nbytes
    at_base = sums_of(base.ops)
    at_other = sums_of(other.ops)
    changes: dict[Row, tuple[Change, ...]] = {}
    for row, sums in at_base.items():
        kernels, flops, nbytes = (b / a - 1 if a else 0.0 for a, b in zip(sums, at_other.get(row, sums), strict=True))
        if any((kernels, flops, nbytes)):
            of_row = weights.get((row[0], row[1])) or weights["", ""]
            total = sum(of_row) or 1
            changes[row] = tuple(
                (kernels * (v == 0), flops * w / total, nbytes * w / total) for v, w in enumerate(of_row)
            )
    return changes


def sums_of(rows: Iterable[OpCount]) -> dict[Row, list[float]]:
    """Kernels, FLOPs and bytes of the rows of each operator, phase and data type."""
    sums: dict[Row, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for row in rows:
        of_row = sums[row.op, row.phase, row.dtype]
        for index, value in enumerate((row.count, row.flops, row.bytes)):
            of_row[index] += value
    return sums


def moved(scaled: ScaledTrace, all_laws: Sequence[Laws], values: Mapping[str, int]) -> ScaledTrace:
    """A scaled trace, at whose larger micro-batch laws were found, at other values of the knobs of all of them.

    At the smaller micro-batch a size follows them as at the larger.
    """
    ratios: dict[Kind, tuple[int, int]] = {}
    for laws in all_laws:
        for kind, factors in laws.sizes.items():
            over, under = _ratio(laws.variables, factors, values)
            before = ratios.get(kind, (1, 1))
            ratios[kind] = before[0] * over, before[1] * under
    columns = scaled.columns
    nbytes = columns.nbytes.copy()
    small_bytes = scaled.small_bytes.copy()
    for kind, tensors in _tensors_of(columns, ratios):
        ratio = ratios[kind]
        nbytes[tensors] = _times(kind[3], ratio)
        small = small_bytes[tensors]
        for size in np.unique(small).tolist():
            small_bytes[tensors[small == size]] = _times(size, ratio)
    few, many = scaled.ops
    for laws in all_laws:
        few, many = (tuple(laws.counted(row, values) for row in rows) for rows in (few, many))
    return replace(scaled, columns=replace(columns, nbytes=nbytes), small_bytes=small_bytes, ops=(few, many))


def _tensors_of(columns: Columns, kinds: Iterable[Kind]) -> Iterator[tuple[Kind, Integers]]:
    """Each of `kinds` that the trace has, with the tensors that are of it."""
    count = len(columns.names)
    keys = (columns.op * count + columns.module) * count + columns.phase
    order = np.lexsort((columns.nbytes, keys))
    keys = keys[order]
    nbytes = columns.nbytes[order]
    starts = np.flatnonzero(np.append(True, (np.diff(keys) != 0) | (np.diff(nbytes) != 0))[: len(keys)])
    ends = np.append(starts[1:], len(keys))
    names = columns.names
    there: dict[Kind, Integers] = {}
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        tensor = order[start]
        place = names[columns.op[tensor]], names[columns.module[tensor]], names[columns.phase[tensor]]
        there[*place, int(nbytes[start])] = order[start:end]
    for kind in kinds:
        if kind in there:
            yield kind, there[kind]


def _times(nbytes: int, ratio: tuple[int, int]) -> int:
    return -(-nbytes * ratio[0] // ratio[1])


def missing(scaled: Iterable[ScaledTrace], laws: Laws) -> set[Kind]:
    """Sizes with a law that no tensor of the traces has: the laws are not of this step."""
    return set(laws.sizes) - {kind_of(tensor) for each in scaled for tensor in each.trace.tensors}
