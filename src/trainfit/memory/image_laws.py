"""How a step's sizes follow the size of the image: laws of a whole model, found from two traces of one case. Imports no torch.

Nearly every activation follows the image, so that a trace that computes blocks again, or is for another card, has kinds of
tensors that the case with the two traces does not have. These follow what tensors of the same operator, module and bytes
follow there, in any phase; else of the same module and bytes; else of the same bytes. The laws of all cases of a model are
one table.

What works in pieces of bounded size makes as many as in the trace that is taken to other sizes, each larger or smaller: sums
are right, and a peak within a piece is that of another piece.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from trainfit.memory.laws import (
    MOST_FACTORS,
    Change,
    Kind,
    Laws,
    Row,
    Variable,
    factors_of,
    kind_of,
    largest_likes,
    like_sizes,
    reach,
    sums_of,
)
from trainfit.memory.scaling import ScaledTrace
from trainfit.timing.counts import OpCount
from trainfit.tracing.stored_trace import StoredTrace

Factors = tuple[int, ...]
ATTENTION = "attention"
"""In the name of an operator whose FLOPs grow with pairs of tokens."""


def find_image_laws(
    base: StoredTrace, other: StoredTrace, variables: Sequence[Variable], behind: Mapping[str, object], part: str
) -> Laws | None:
    """The laws that take a trace to another at an image of another size; None where they do not reach its peak.

    Args:
        base: The trace that laws are applied to.
        other: One with the same pieces.
        variables: Declared numbers; "PART cells" and "PART token pairs" are among them.
        behind: `Laws.behind`.
        part: "training" or "evaluation": the image of the operators that are counted.
    """
    ratios = sorted(max(each.base / each.other, each.other / each.base) for each in variables)
    growth = float(np.prod(ratios[-MOST_FACTORS:]))
    likes = largest_likes([base], [like_sizes(base, other, growth)])
    laws = Laws(
        variables=tuple(variables),
        sizes=factors_of(likes, variables),
        counts=_changes(base.ops, other.ops, variables, part),
        behind=behind,
    )
    return laws if reach(laws, base, other, {each.knob: each.other for each in variables}) else None


def _changes(
    base: Iterable[OpCount], other: Iterable[OpCount], variables: Sequence[Variable], part: str
) -> dict[Row, tuple[Change, ...]]:
    """Of the rows that differ. FLOPs of attention follow the pairs of tokens, all else the cells."""
    names = [each.knob for each in variables]
    cells, pairs = names.index(f"{part} cells"), names.index(f"{part} token pairs")
    at_other = sums_of(other)
    changes: dict[Row, tuple[Change, ...]] = {}
    for row, sums in sums_of(base).items():
        kernels, flops, nbytes = (b / a - 1 if a else 0.0 for a, b in zip(sums, at_other.get(row, sums), strict=True))
        if any((kernels, flops, nbytes)):
            of_row: list[Change] = [(0.0, 0.0, 0.0)] * len(variables)
            is_attention = ATTENTION in row[0]
            of_row[cells] = (kernels, 0.0 if is_attention else flops, nbytes)
            of_row[pairs] = (0.0, flops if is_attention else 0.0, 0.0)
            changes[row] = tuple(of_row)
    return changes


def spread(sizes: Mapping[Kind, Factors], known: Iterable[Kind], kinds: Iterable[Kind]) -> dict[Kind, Factors | None]:
    """What further kinds of tensors follow: () is nothing, None is not known.

    Args:
        sizes: Laws that were found.
        known: All kinds of the trace that they were found with; those without a law are constant.
        kinds: Of another case of the model.
    """
    known = set(known)
    of_place: dict[tuple[object, ...], Counter[Factors]] = defaultdict(Counter)
    for kind in known:
        for place in _places(kind):
            of_place[place][sizes.get(kind, ())] += 1
    factors_of: dict[Kind, Factors | None] = {}
    for kind in kinds:
        places = [of_place[place] for place in _places(kind) if place in of_place]
        unanimous = next((place for place in places if len(place) == 1), None)
        counter = unanimous or (places[0] if places else None)
        if kind in known:
            factors_of[kind] = sizes.get(kind, ())
        else:
            factors_of[kind] = counter.most_common(1)[0][0] if counter else None
    return factors_of


def _places(kind: Kind) -> tuple[tuple[object, ...], ...]:
    """What another kind may have in common with a kind, the most telling first."""
    op, module, _, nbytes = kind
    return (op, module, nbytes), (module, nbytes), (nbytes,)


def of_one(scaled: ScaledTrace, sizes: Mapping[Kind, Factors]) -> tuple[dict[Kind, Factors], set[Kind]]:
    """The laws at micro-batch 1, and all kinds there, of those of a scaled trace at its larger micro-batch."""
    factors_of: dict[Kind, Factors] = {}
    known: set[Kind] = set()
    for tensor, nbytes in zip(scaled.trace.tensors, scaled.sizes(1).tolist(), strict=True):
        kind = (tensor.op, tensor.module, tensor.phase, nbytes)
        known.add(kind)
        if factors := sizes.get(kind_of(tensor)):
            factors_of[kind] = factors
    return factors_of, known


def counts_of(
    changes: Mapping[Row, tuple[Change, ...]], known: Iterable[OpCount], rows: Iterable[OpCount]
) -> dict[Row, tuple[Change, ...]]:
    """Changes of the rows of another case. A row that is not among those `known` changes as its operator does in another type, or
    in another phase, attention by another kernel as attention does; what is done once a window does not.
    """
    alike: dict[tuple[str, ...], tuple[Change, ...]] = {}
    for op, phase, dtype in sorted(changes, key=lambda row: row[1] != "forward"):
        for key in ((_name(op), phase), (_name(op),)):
            alike.setdefault(key, changes[op, phase, dtype])
    phases = {phase for _, phase, _ in changes}
    there = {(each.op, each.phase, each.dtype) for each in known}
    of_row: dict[Row, tuple[Change, ...]] = {}
    for each in rows:
        row = each.op, each.phase, each.dtype
        if row in there or each.phase not in phases:
            change = changes.get(row)
        else:
            change = alike.get((_name(each.op), each.phase)) or alike.get((_name(each.op),))
        if change is not None:
            of_row[row] = change
    return of_row


def _name(op: str) -> str:
    """An operator's name; that of fused attention says which direction alone."""
    if ATTENTION not in op:
        return op
    return f"{ATTENTION} backward" if "backward" in op else ATTENTION
