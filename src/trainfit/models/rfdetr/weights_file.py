"""A weights file of RF-DETR as it lies on disk: trainfit's safetensors or one of upstream's checkpoints."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rfdetr.assets.coco_classes import COCO_CLASS_NAMES, COCO_CLASSES
from rfdetr.utilities.io import _safe_torch_load  # pyright: ignore[reportPrivateUsage]

from trainfit.errors import TrainfitError
from trainfit.models.rfdetr.family import PUBLISHED
from trainfit.weights import load_weights, read_checkpoint, require_sound

COCO_ROWS = max(COCO_CLASSES) + 1
"""Rows of a published class head: one for each COCO category id from 0 to 90; ids that COCO left out are nobody's."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RfDetrFile:
    """Tensors, and what the file says of the model that they belong to."""

    path: Path
    """The file."""
    state: Mapping[str, torch.Tensor]
    """Parameter name -> tensor, on the CPU."""
    config: Mapping[str, Any]
    """Upstream's configuration as far as the file has it: num_queries, group_detr, resolution, ..."""
    class_names: tuple[str, ...]
    """The name of each row of the class heads, "" where a row is no class; empty where the file does not say."""
    made_for: str | None = None
    """trainfit's name of the model, in a file of trainfit."""

    @property
    def class_rows(self) -> int:
        """Rows of the class heads."""
        return self.state["class_embed.bias"].shape[0]

    @property
    def query_layout(self) -> tuple[int, int] | None:
        """(groups, queries of each) that the query tensors are packed by; None where the file does not say.

        One of the two is inferred from the other, and numbers that contradict the tensor count as unsaid (both as
        rfdetr 1.11.2 models/weights.py `load_pretrain_weights`).
        """
        packed = self.state.get("refpoint_embed.weight")
        groups, queries = (_count(self.config.get(name)) for name in ("group_detr", "num_queries"))
        if packed is None or (groups is None and queries is None):
            return None
        rows = packed.shape[0]
        groups = groups or rows // cast(int, queries)
        queries = queries or rows // groups
        return (groups, queries) if groups * queries == rows else None


def read_weights(path: Path) -> RfDetrFile:
    """A file of trainfit (.safetensors) or of upstream (.pth, .pt, .ckpt).

    Raises:
        TrainfitError: the file cannot be read safely, or holds no RF-DETR.
    """
    return _read_trainfit(path) if path.suffix == ".safetensors" else _read_upstream(path)


def _read_trainfit(path: Path) -> RfDetrFile:
    state, metadata = load_weights(path)
    try:
        name = metadata["model"]
        classes = json.loads(metadata["classes"])
        knobs = json.loads(metadata["knobs"])
        published = PUBLISHED.get(name)
        queries = knobs["num_queries"] or (published and published.queries)
    except (KeyError, TypeError, ValueError) as error:
        raise TrainfitError(f"{path}: not a weights file of trainfit (its metadata: {error!r})") from error
    _require_model(state, path)
    config = {"num_queries": queries, "group_detr": knobs.get("groups"), "resolution": knobs.get("resolution")}
    names = _row_names(classes, state["class_embed.bias"].shape[0])
    return RfDetrFile(path=path, state=state, config=config, class_names=names, made_for=name)


def _read_upstream(path: Path) -> RfDetrFile:
    checkpoint = read_checkpoint(path, _safe_torch_load)
    if not isinstance(checkpoint, dict):
        raise TrainfitError(f"{path}: not a checkpoint of RF-DETR (no dictionary)")
    content = cast(dict[str, Any], checkpoint)
    tensors = content.get("model")
    if tensors is None and isinstance(content.get("state_dict"), dict):
        own = [key for key in content["state_dict"] if str(key).startswith("model.")]
        tensors = {_bare(key): content["state_dict"][key] for key in own}
    state = _require_model(tensors, path)
    config = _as_dict(content.get("args", content.get("hyper_parameters"))) | _as_dict(content.get("model_config"))
    names = _row_names(config.get("class_names"), state["class_embed.bias"].shape[0])
    return RfDetrFile(path=path, state=state, config=config, class_names=names)


def _bare(key: Any) -> str:
    """A parameter's name without the prefixes of Lightning's and of a compiled module."""
    return str(key).removeprefix("model.").removeprefix("_orig_mod.")


def _require_model(state: Any, path: Path) -> dict[str, torch.Tensor]:
    if not isinstance(state, dict) or "class_embed.bias" not in state:
        raise TrainfitError(f"{path}: not a checkpoint of RF-DETR (no `model` with a `class_embed`)")
    tensors = cast(dict[Any, Any], state)
    for key, value in tensors.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise TrainfitError(f"{path}: not a checkpoint of RF-DETR ({key!r} is no name of a tensor)")
    weight = tensors.get("class_embed.weight")
    bias = tensors["class_embed.bias"]
    if weight is None or weight.ndim != 2 or not len(weight) or bias.shape != weight.shape[:1]:
        raise TrainfitError(f"{path}: not a checkpoint of RF-DETR (its `class_embed` is no linear layer)")
    require_sound(cast(dict[str, torch.Tensor], tensors), path)
    return tensors


def _as_dict(values: Any) -> dict[str, Any]:
    """Upstream's `args`: a dictionary since 1.7, a namespace before."""
    if isinstance(values, dict):
        return cast(dict[str, Any], values)
    return dict(vars(values)) if hasattr(values, "__dict__") else {}


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def _row_names(class_names: Any, rows: int) -> tuple[str, ...]:
    """The class name of each row; see `RfDetrFile.class_names`.

    A head of 91 rows without names of its own, or with COCO's 80 in order, has COCO's ids as rows, as upstream reads
    it too (rfdetr 1.11.2 detr.py `predict`).
    """
    if isinstance(class_names, str):
        class_names = [class_names]
    listed = class_names if isinstance(class_names, list | tuple) else []
    names = [name if isinstance(name, str) else "" for name in cast(list[Any], listed)]
    if rows == COCO_ROWS and names in ([], list(COCO_CLASS_NAMES)):
        return tuple(COCO_CLASSES.get(row, "") for row in range(rows))
    return tuple([*names, *[""] * rows][:rows]) if any(names) else ()
