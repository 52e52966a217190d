"""Model names, and the family that each belongs to. Families, and torch, are imported when a model is asked for."""

import importlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from trainfit.errors import TrainfitError
from trainfit.models.setting import Setting

if TYPE_CHECKING:
    import torch

    from trainfit.models.fixed_step import FixedStep
    from trainfit.models.workload import Workload

_PUBLISHED = {
    "rfdetr-nano": (384, 32, 300),
    "rfdetr-small": (512, 32, 300),
    "rfdetr-medium": (576, 32, 300),
    "rfdetr-large": (704, 32, 300),
    "rfdetr-seg-nano": (312, 12, 100),
    "rfdetr-seg-small": (384, 24, 100),
    "rfdetr-seg-medium": (432, 24, 200),
    "rfdetr-seg-large": (504, 24, 200),
    "rfdetr-seg-xlarge": (624, 24, 300),
    "rfdetr-seg-2xlarge": (768, 24, 300),
    "rtdetr-seg-nano": (384, 32, 300),
    "rtdetr-seg-small": (512, 32, 300),
    "rtdetr-seg-base": (560, 56, 300),
    "rtdetr-seg-medium": (576, 32, 300),
    "rtdetr-seg-large": (560, 56, 300),
}
"""(resolution, block, queries): upstream's configurations (a test compares), here so that planning needs no torch.
rtdetr-seg: detection sizes with a mask head, as the RT-DETR-Seg guide names them."""
MODELS = (*_PUBLISHED, "maskrcnn-r50-v1", "maskrcnn-r50-v2")


def model_name(typed: str) -> str:
    """The canonical name of a model as people type it: "RF-DETR Nano", "rfdetr_nano", "rf-detr-nano".

    "clip:ARCH" is any architecture of open_clip, "timm:NAME" any classifier of timm, "module:function" the user's own
    (`models/custom`): they are looked up when they are built.

    Raises:
        TrainfitError: no such model; the message names the nearest.
    """
    if ":" in typed:
        return typed.strip()
    name = re.sub("[ _]", "-", typed.strip().lower()).replace("rf-detr", "rfdetr").replace("rt-detr", "rtdetr")
    if name in MODELS:
        return name
    near = get_close_matches(name, MODELS, n=1, cutoff=0.6)
    hint = f" Perhaps you meant {near[0]}." if near else ""
    raise TrainfitError(
        f"no model named {typed!r}.{hint} Models: {', '.join(MODELS)}, clip:ARCH, timm:NAME, module:function"
    )


@dataclass(frozen=True, kw_only=True)
class Published:
    """What a model was published with."""

    resolution: int
    """Side of the square input in pixels."""
    block: int
    """Legal resolutions are its multiples."""
    queries: int


def published(name: str) -> Published | None:
    """Resolution, its block and the queries of an RF-DETR; None for the other families."""
    if name not in _PUBLISHED:
        return None
    resolution, block, queries = _PUBLISHED[name]
    return Published(resolution=resolution, block=block, queries=queries)


def family(name: str) -> str:
    """The folder of a canonical name's family."""
    if ":" in name:
        return {"clip": "clip", "timm": "classifier"}.get(name.partition(":")[0], "custom")
    return name.partition("-")[0].replace("rtdetr", "rfdetr")


def build_step(*, setting: Mapping[str, Any], device: "torch.device") -> "FixedStep":
    """The training step of a setting (`Setting.to_json`) with its worst window: the factory of a traced or measured step."""
    chosen = Setting.from_json(setting)
    return importlib.import_module(f"trainfit.models.{family(chosen.model)}.step").build_step(chosen, device)


def build_eval_step(*, setting: Mapping[str, Any], device: "torch.device") -> "FixedStep":
    """The same for evaluation: the first `run` trains a window, every later one evaluates."""
    chosen = Setting.from_json(setting)
    return importlib.import_module(f"trainfit.models.{family(chosen.model)}.step").build_eval_step(chosen, device)


def make_workload(name: str, classes: tuple[str, ...], knobs: Mapping[str, Any]) -> "Workload":
    """The workload of a model; `knobs` are the family's own (see `models/rfdetr/workload.py`), None where not chosen.

    Raises:
        TrainfitError: the family can be predicted but not yet trained.
    """
    name = model_name(name)
    if family(name) != "rfdetr":
        raise TrainfitError(f"training of {name} is not there yet; `trainfit predict {name}` works")
    from trainfit.models.rfdetr.workload import RfDetr, RfDetrKnobs

    chosen = {key: value for key, value in knobs.items() if value is not None}
    return RfDetr(name, classes, RfDetrKnobs(**chosen))


def from_metadata(metadata: Mapping[str, str]) -> "Workload":
    """The workload that a weights file was made by; see `Workload.metadata`.

    Raises:
        TrainfitError: the metadata is not trainfit's.
    """
    try:
        name, classes, knobs = metadata["model"], json.loads(metadata["classes"]), json.loads(metadata["knobs"])
    except KeyError as error:
        raise TrainfitError(f"not a weights file of trainfit: its metadata lacks {error}") from error
    return make_workload(name, tuple(classes), knobs)
