"""Model names, and the family that each belongs to. Families are imported when one of their models is asked for."""

import json
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from trainfit.errors import TrainfitError
from trainfit.models.workload import Workload

RFDETR_SIZES = ("nano", "small", "medium", "large")
RFDETR_SEG_SIZES = ("nano", "small", "medium", "large", "xlarge", "2xlarge")
GUIDE_SIZES = ("nano", "small", "base", "medium", "large")
"""Detection sizes with a mask head, as the RT-DETR-Seg guide names them."""
MODELS: tuple[str, ...] = (
    *(f"rfdetr-{size}" for size in RFDETR_SIZES),
    *(f"rfdetr-seg-{size}" for size in RFDETR_SEG_SIZES),
    *(f"rtdetr-seg-{size}" for size in GUIDE_SIZES),
)


def model_name(typed: str) -> str:
    """The canonical name of a model as people type it: "RF-DETR Nano", "rfdetr_nano", "rf-detr-nano".

    Raises:
        TrainfitError: no such model; the message names the nearest.
    """
    name = typed.strip().lower().replace("_", "-").replace(" ", "-").replace("rf-detr", "rfdetr").replace("rt-detr", "rtdetr")
    if name in MODELS:
        return name
    near = get_close_matches(name, MODELS, n=1, cutoff=0.6)
    hint = f" Perhaps you meant {near[0]}." if near else ""
    raise TrainfitError(f"no model named {typed!r}.{hint} Models: {', '.join(MODELS)}")


def make_workload(name: str, classes: tuple[str, ...], knobs: Mapping[str, Any]) -> Workload:
    """The workload of a model; `knobs` are the family's own (see `models/rfdetr/workload.py`), None where not chosen."""
    from trainfit.models.rfdetr.workload import RfDetr, RfDetrKnobs

    chosen = {key: value for key, value in knobs.items() if value is not None}
    return RfDetr(model_name(name), classes, RfDetrKnobs(**chosen))


def from_metadata(metadata: Mapping[str, str]) -> Workload:
    """The workload that a weights file was made by; see `Workload.metadata`.

    Raises:
        TrainfitError: the metadata is not trainfit's.
    """
    try:
        name, classes, knobs = metadata["model"], json.loads(metadata["classes"]), json.loads(metadata["knobs"])
    except KeyError as error:
        raise TrainfitError(f"not a weights file of trainfit: its metadata lacks {error}") from error
    return make_workload(name, tuple(classes), knobs)
