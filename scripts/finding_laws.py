"""Finds the laws of sizes that go with the traces of a model, for `scripts/traces`."""

import json
from dataclasses import replace
from functools import cache
from itertools import chain, product
from math import prod
from typing import Any

from making_traces import load, traces_of
from shipped_cases import (
    CANVAS,
    CELL,
    IMAGES,
    MANY,
    OTHER_CANVAS,
    OTHERS,
    SIBLINGS,
    Case,
    Point,
    cases,
    is_rfdetr,
    queries_of,
)

from trainfit.memory import shipped
from trainfit.memory.image_laws import counts_of, find_image_laws, of_one, spread
from trainfit.memory.laws import (
    Kind,
    Laws,
    Variable,
    declared_sizes,
    find_laws,
    kind_of,
    missing,
    with_cap,
)
from trainfit.memory.scaled_traces import PAIRS
from trainfit.memory.scaling import ScaledTrace
from trainfit.models.rfdetr.family import PUBLISHED
from trainfit.models.setting import make_setting
from trainfit.tracing.stored_trace import StoredTrace
from trainfit.tracing.trace_cache import TraceRequest

IMAGE_KNOBS = {"resolution": None, "multi_scale": True}
"""What the size of the image depends on, at the values of the traces."""
SMALLEST_SHARE, LARGEST_SHARE = 0.5, 1.5
"""Laws of the image's size are for resolutions from and to these times the published one."""
MOST_CLASSES, MOST_OBJECTS = 100_000, 1000


@cache
def laws_of(case: Case, number: int) -> dict[str, Laws]:
    """The laws of training and of evaluation at a micro-batch; none where they were not found, with a line that says so."""
    parts = ("training", "evaluation")
    loaded = [[load(case, Point(micro_batch=number, other=other), part) for other in (False, True)] for part in parts]
    pairs = [(one, other) for one, other in loaded if one and other]
    found = find_laws(pairs, variables_of(case)) if len(pairs) == len(parts) else None
    if found is None:
        print(f"{case.model} {case.capability} has no laws at micro-batch {number}", flush=True)
        return {}
    many = [load(case, Point(micro_batch=number, many=True), part) for part in parts]
    further = [(base, more) for (base, _), more in zip(pairs, many, strict=True) if more]
    if further:
        extended = with_cap(found, further, cap=queries_of(case.model), many=MANY, most=MOST_OBJECTS)
        print(f"{case.model} has {'' if extended else 'NO '}laws for more objects than queries", flush=True)
        found = extended or found
    return dict(zip(parts, found, strict=True))


def variables_of(case: Case) -> list[Variable]:
    """What sizes may follow. Matching takes the other side as rows from as many objects as there are queries."""
    setting = case.requests()[0].setting
    objects = PUBLISHED[case.model].queries if is_rfdetr(case.model) else MOST_OBJECTS
    most = {"objects_per_image": objects, "classes": MOST_CLASSES}
    variables = [
        Variable(knob=knob, base=getattr(setting, knob), other=other, least=1, most=most[knob], plus=plus)
        for plus in (0, 1)
        for knob, other in OTHERS.items()
    ]
    variables = [each for each in variables if (each.knob, each.plus) != ("objects_per_image", 1)]
    if is_rfdetr(case.model):
        return variables
    base, other, least = (
        prod(-(-side // CELL) for side in canvas) for canvas in (CANVAS, OTHER_CANVAS, (min(CANVAS), min(CANVAS)))
    )
    return [*variables, Variable(knob="canvas", base=base, other=other, least=least, most=base, cell=CELL)]


def law_entries(model: str, texts: dict[str, str]) -> dict[str, str]:
    """Name -> text of the archive's laws, for every capability and stage those that a tensor of its traces has: `texts`.

    What other kernels or a recomputed block allocate follows what the same place allocates in the traces that laws were found
    with (`for_all`).
    """
    laws: dict[str, str] = {}
    for case, alone in product(cases([model]), (False, True)):
        finder = case.finder
        if case.checkpointing != "none" or finder is None:
            continue
        number = 1 if alone else PAIRS[0][1]
        recomputed = replace(case, checkpointing="all")
        for request, other in zip(case.requests(), recomputed.requests(), strict=True):
            names = {shipped.entry_name(each, alone=alone) for each in (request, other)}
            traced = [traces_of(texts[name], alone=alone) for name in sorted(names) if name in texts]
            own, base = laws_of(finder, number).get(request.part), load(finder, Point(micro_batch=number), request.part)
            if traced and own is not None and base is not None:
                print(f"{shipped.laws_name(request, alone=alone)}: ", end="")
                found = for_all(own, {kind_of(tensor) for tensor in base.trace.tensors}, base, traced)
                laws[shipped.laws_name(request, alone=alone)] = json.dumps(only(found, traced).to_record())
    return laws


def only(laws: Laws, traced: list[ScaledTrace]) -> Laws:
    """Those of sizes that a tensor of a trace has."""
    strange = missing(traced, laws)
    return replace(laws, sizes={kind: factors for kind, factors in laws.sizes.items() if kind not in strange})


def image_variables(model: str) -> list[Variable]:
    """The numbers that sizes may follow with the image."""
    published = PUBLISHED[model].resolution
    least = {"resolution": int(SMALLEST_SHARE * published), "multi_scale": False}
    settings: list[dict[str, Any]] = [
        {},
        {"resolution": PUBLISHED[SIBLINGS[model]].resolution if model in SIBLINGS else IMAGES[model]},
        least,
        {"resolution": int(LARGEST_SHARE * published)},
    ]
    base, other, small, large = (declared_sizes(make_setting(model=model, **knobs)) for knobs in settings)
    return [
        Variable(knob=name, base=base[name], other=other[name], least=ends[0], most=ends[1], declared=True)
        for name in base
        if base[name] != other[name] and (ends := sorted((small[name], large[name])))
    ]


def image_law_entries(model: str, texts: dict[str, str]) -> dict[str, str]:
    """Name -> text of the laws of the image's size, of training and of evaluation, that hold for all traces of a model's archive,
    `texts`; none where they were not found or what they are found with was not traced.
    """
    found: dict[str, str] = {}
    finder = Case(model=model, capability=(8, 0), checkpointing="none")
    for request in finder.requests():
        scaled = traces_of(texts[shipped.entry_name(request)], alone=False)
        base = scaled.priced(scaled.columns).stored()
        other = at_other_size(finder, request)
        if other is None or scaled.micro_batches != PAIRS[0]:
            continue
        laws = find_image_laws(base, other, image_variables(model), IMAGE_KNOBS, request.part)
        if laws is None:
            print(f"{model} {request.part} has no laws of the image's size", flush=True)
            continue
        known = {kind_of(tensor) for tensor in base.trace.tensors}
        sizes_of_one, known_of_one = of_one(scaled, laws.sizes)
        laws_of_one = replace(laws, sizes=sizes_of_one)
        for alone, own, there in ((False, laws, known), (True, laws_of_one, known_of_one)):
            cases_of_part = [
                traces_of(texts[name], alone=alone)
                for name in entry_names(model, request.part, alone=alone)
                if name in texts
            ]
            found[shipped.image_laws_name(request.part, alone=alone)] = json.dumps(
                for_all(own, there, base, cases_of_part).to_record()
            )
    return found


def at_other_size(finder: Case, request: TraceRequest) -> StoredTrace | None:
    """The finder's trace of a part at another resolution; None if it was not traced."""
    sibling = SIBLINGS.get(finder.model)
    if sibling is None:
        return load(finder, Point(micro_batch=PAIRS[0][1], image=True), request.part)
    of_sibling = replace(request, setting=replace(request.setting, model=sibling))
    text = shipped.texts(shipped.archive_path(sibling)).get(shipped.entry_name(of_sibling))
    scaled = None if text is None else traces_of(text, alone=False)
    same = scaled is not None and scaled.micro_batches == PAIRS[0]
    return scaled.priced(scaled.columns).stored() if same else None


def entry_names(model: str, part: str, *, alone: bool) -> list[str]:
    """Names of a model's entries of a part."""
    requests = chain.from_iterable(case.requests() for case in cases([model]))
    return list(dict.fromkeys(shipped.entry_name(each, alone=alone) for each in requests if each.part == part))


def for_all(laws: Laws, known: set[Kind], base: StoredTrace, traces: list[ScaledTrace]) -> Laws:
    """Laws with those of the kinds and rows of further traces; a line says how much of these is not known."""
    sizes, counts, unknown = dict(laws.sizes), dict(laws.counts), dict[Kind, int]()
    for each in traces:
        tensors = each.trace.tensors
        for kind, factors in spread(laws.sizes, known, {kind_of(tensor) for tensor in tensors}).items():
            if factors:
                sizes[kind] = factors
            elif factors is None:
                unknown[kind] = kind[3]
        counts = counts_of(laws.counts, base.ops, each.ops[1]) | counts
    print(f"{len(laws.sizes)} laws, {len(sizes)} with those of all cases; not known {len(unknown)} kinds: ", end="")
    print(
        ", ".join(f"{kind[0]} {kind[1]} {kind[2]} {kind[3]:,}" for kind in sorted(unknown, key=lambda k: -k[3])[:4]),
        flush=True,
    )
    return replace(laws, sizes=sizes, counts=counts)
