"""Weights in and out: our safetensors files, upstream's checkpoints, upstream's download."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from rfdetr.assets.model_weights import download_pretrain_weights
from rfdetr.config import ModelConfig
from rfdetr.models.lwdetr import LWDETR
from rfdetr.models.weights import (
    _load_model_state,  # pyright: ignore[reportPrivateUsage]
    interpolate_position_embeddings,
)
from rfdetr.utilities.state_dict import validate_checkpoint_compatibility

from trainfit.errors import TrainfitError
from trainfit.models.rfdetr.weights_file import RfDetrFile, read_weights
from trainfit.step.lora import has_adapters, is_adapter, merged
from trainfit.tasks.detection.class_names import positions
from trainfit.weights import load_weights as read_tensors
from trainfit.weights import not_downloaded, require_kinds

MASK_HEAD = "segmentation_head."
"""What the names of the mask head's tensors begin with."""
QUERIES = ("refpoint_embed.weight", "query_feat.weight")
"""Tensors that hold the queries of all groups, group after group."""
CLASS_HEADS = re.compile(r"(.*\.)?(enc_out_)?class_embed\.(\d+\.)?(weight|bias)")
"""Tensors with a row for each class: the decoder's head, and the encoder's of each query group."""
GROUP_COPIES = re.compile(r"transformer\.enc_out\w*\.(\d+)\..*")
"""Tensors of the encoder's heads, of which each query group has its own."""
TOLERATED = 8
"""Tensors that a file may lack, or have besides, and still be of this model; one decoder layer alone has 22."""


def load_weights(model: LWDETR, config: ModelConfig, weights: str, *, name: str, classes: tuple[str, ...]) -> list[str]:
    """Fill `model`; returns remarks for the user.

    Raises:
        TrainfitError: no such file, not a checkpoint, a checkpoint of another model, no network for `pretrained`.
    """
    return fill(model, config, read_weights(find_weights(config, weights)), name=name, classes=classes)


def find_weights(config: ModelConfig, weights: str) -> Path:
    """The file that `weights` names; `pretrained` is downloaded.

    Raises:
        TrainfitError: no such file, or no network for `pretrained`.
    """
    if weights == "pretrained":
        return _download(config)
    path = Path(weights)
    if not path.is_file():
        raise TrainfitError(f"--weights: no such file: {weights} (a .safetensors of trainfit, a .pth, or `pretrained`)")
    return path


def fill(
    model: LWDETR, config: ModelConfig, file: RfDetrFile, *, name: str, classes: tuple[str, ...] | None
) -> list[str]:
    """Fill `model`, of the configuration `config`, from a file; returns remarks for the user.

    What upstream's loader fits is fitted in the same way (rfdetr 1.11.2 models/weights.py `load_pretrain_weights`; a
    test compares every tensor): fewer queries and groups, another resolution, another number of classes. Beyond it,
    the rows of the class heads follow the names of the classes; without `classes` they stay the file's.

    Raises:
        TrainfitError: the file is of another model, or has fewer queries or groups than `model`.
    """
    _require_made_for(config, file, name)
    adapted = has_adapters(model)
    state = dict(file.state) if adapted else merged(file.state)
    require_kinds(model, state, file.path)
    _require_shapes(model, state, file, name, ranks_only=True)
    _fit_queries(state, config, file)
    interpolate_position_embeddings(state, config.positional_encoding_size)
    outputs = model.class_embed.out_features
    if file.class_rows != outputs:
        model.reinitialize_detection_head(file.class_rows)
    _require_shapes(model, state, file, name)
    try:
        keys = _load_model_state(model, state, backbone_lora=False)
    except ImportError as error:  # a checkpoint with LoRA adapters, which upstream merges with peft
        raise TrainfitError(f"{file.path} was saved by a LoRA run: install peft to load it") from error
    missing = [key for key in keys.missing_keys if not is_adapter(key)]
    remarks = _incomplete(missing, keys.unexpected_keys, config, file, name)
    if file.class_rows != outputs:
        model.reinitialize_detection_head(outputs)
    return remarks if classes is None else remarks + _follow_class_names(model, file, classes)


def _download(config: ModelConfig) -> Path:
    default = type(config).model_fields["pretrain_weights"].default
    path = Path(str(type(config).expand_path(default)))
    path.parent.mkdir(parents=True, exist_ok=True)
    reason = "no file came"
    try:
        download_pretrain_weights(str(path))
    except (OSError, ValueError) as error:  # requests' exceptions are OSErrors; ValueError: wrong checksum
        reason = type(error).__name__
    if not path.is_file():
        raise TrainfitError(not_downloaded(path, reason))
    return path


def attach_mask_head(model: LWDETR, path: Path, *, classes: tuple[str, ...]) -> list[str]:
    """Fill all of `model` but its mask head from a detector run's file, tensor for tensor; returns remarks.

    Upstream's own loader refuses this (rfdetr 1.11.2 utilities/state_dict.py `validate_checkpoint_compatibility`).

    Raises:
        TrainfitError: what the file lacks is not exactly the mask head (the keys are listed), or other classes.
    """
    state, metadata = read_tensors(path)
    state = merged(state)
    trained = tuple(json.loads(metadata.get("classes", "[]")))
    if trained != classes:
        raise TrainfitError(
            f"{path} was trained on the classes {trained}, the data set has {classes}: the mask stage keeps the "
            "detector as it is, so train the detector stage on the same classes"
        )
    own = {key: value.shape for key, value in model.state_dict().items()}
    head = {key for key in own if key.startswith(MASK_HEAD)}
    faults = {
        "lacks": own.keys() - state.keys() - head,
        "already has": state.keys() & head,
        "has besides": state.keys() - own.keys(),
        "has other shapes for": {k for k in own.keys() & state.keys() if own[k] != state[k].shape},
    }
    listed = "; ".join(f"it {what} {_some(keys)}" for what, keys in faults.items() if keys)
    if listed:
        raise TrainfitError(
            f"{path} is not the detector of this model without its mask head: {listed}. Give the run of a detector "
            "stage, and leave --resolution, --num-queries and --groups out"
        )
    model.load_state_dict(state, strict=False)
    parameters = sum(p.numel() for name, p in model.named_parameters() if name.startswith(MASK_HEAD))
    return [f"mask head of {parameters} parameters attached to {path}; everything else is frozen"]


def _some(keys: Collection[str], most: int = 12) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(sorted(keys)[:most]) + more


def _require_made_for(config: ModelConfig, file: RfDetrFile, name: str) -> None:
    if file.made_for not in (None, name):
        raise TrainfitError(
            f"{file.path} holds weights of {file.made_for}, not {name}: train {file.made_for}, or pass other --weights"
        )
    try:
        validate_checkpoint_compatibility({"model": file.state, "args": file.config}, config)
    except ValueError as error:  # another patch size, a mask head too many or too few
        raise TrainfitError(f"{file.path}: does not fit {name}: {str(error).splitlines()[0]}") from error


def _require_shapes(
    model: LWDETR, state: Mapping[str, torch.Tensor], file: RfDetrFile, name: str, *, ranks_only: bool = False
) -> None:
    """Raise where a tensor has another shape than the model's, or with `ranks_only` another number of dimensions."""
    own = model.state_dict()
    shared = [key for key in own.keys() & state.keys() if key != "_kp_active_mask"]
    if ranks_only:
        other = [key for key in shared if own[key].ndim != state[key].ndim]
    else:
        other = [key for key in shared if own[key].shape != state[key].shape]
    if other:
        raise TrainfitError(
            f"{file.path} is a checkpoint of another model than {name}: it has other shapes for {len(other)} tensors, "
            f"first {min(other)}"
        )


def _fit_queries(state: dict[str, torch.Tensor], config: ModelConfig, file: RfDetrFile) -> None:
    """Take the model's queries and groups out of the file's, group by group.

    Where the file does not say how its queries are grouped the first rows are taken, as upstream does.
    """
    groups = config.group_detr
    queries = config.num_queries
    layout = file.query_layout
    if layout is not None and (groups > layout[0] or queries > layout[1]):
        raise TrainfitError(
            f"{file.path} has {layout[0]} query groups of {layout[1]} queries, fewer than {groups} of {queries}: "
            f"give --groups {min(groups, layout[0])} and --num-queries {min(queries, layout[1])} or less"
        )
    for key in QUERIES:
        packed = state.get(key)
        if packed is None:
            continue
        if layout is not None and packed.shape[0] == layout[0] * layout[1]:
            state[key] = packed.unflatten(0, layout)[:groups, :queries].flatten(0, 1)
        else:
            state[key] = packed[: groups * queries]


def _incomplete(
    missing: Sequence[str], unexpected: Sequence[str], config: ModelConfig, file: RfDetrFile, name: str
) -> list[str]:
    """A remark on tensors that only the file, or only the model, has; upstream's loader lets them pass with a warning.

    Raises:
        TrainfitError: there are more than `TOLERATED` of one kind, so that the file is of another model.
    """
    lacks = [key for key in missing if key != "_kp_active_mask"]
    besides = [key for key in unexpected if key != "_kp_active_mask" and not _of_left_out_group(key, config.group_detr)]
    parts: list[str] = []
    for what, keys in (("lacks", lacks), ("has besides", besides)):
        if len(keys) > TOLERATED:
            raise TrainfitError(
                f"{file.path} is a checkpoint of another model than {name}: it {what} {len(keys)} tensors, first "
                f"{min(keys)}"
            )
        if keys:
            parts.append(f"it {what} {_some(keys)}")
    outcome = "what it lacks starts at random" if lacks else "what it has besides is not used"
    return [f"{file.path.name} is not quite {name}: {'; '.join(parts)} ({outcome})"] if parts else []


def _of_left_out_group(key: str, groups: int) -> bool:
    """Whether a tensor belongs to a query group that the model has not."""
    match = GROUP_COPIES.fullmatch(key)
    return match is not None and int(match[1]) >= groups


def _follow_class_names(model: LWDETR, file: RfDetrFile, classes: tuple[str, ...]) -> list[str]:
    """Give each class the head rows that its name has in the file; returns a remark where they moved.

    Where no name is the file's, the heads stay as upstream's loader leaves them: the file's rows in order, cut or
    repeated to the number of classes.
    """
    outputs = len(classes) + 1
    name = file.path.name
    matched = positions(classes, file.class_names)
    if not any(row is not None for row in matched):
        if not file.class_names and file.class_rows == outputs:
            return []
        reason = "names none of these classes" if file.class_names else f"has {file.class_rows - 1} unnamed classes"
        return [f"{name} {reason}: the class heads start from its rows in order, cut or repeated to {outputs}"]
    rows = starting_rows(matched, file.class_names)
    if rows == list(range(file.class_rows)) and None not in matched:
        return []
    with torch.no_grad():
        for key, own in model.state_dict().items():
            if CLASS_HEADS.fullmatch(key) and key in file.state:
                own.copy_(file.state[key][rows])
    others = [each for each, row in zip(classes, matched, strict=True) if row is None]
    if not others:
        return [f"class heads: all {len(classes)} classes start from the rows of their names in {name}"]
    own_names = [each for each in classes if each not in others]
    return [
        f"class heads: {_some(own_names)} start from the rows of their names in {name}; {_some(others)}, which it does "
        "not name, start from other rows, as upstream's would"
    ]


def starting_rows(matched: Sequence[int | None], names: Sequence[str]) -> list[int]:
    """The row of a file's class head that each output starts from: one for each class, and the last, which is no class.

    `matched` has the row of each class's name, `names` the name of each of the file's rows. A class without a row of
    its name takes the one at its own position, where upstream's loader would start it, unless that row is another
    class's by name: then the next that is not. The last output takes a row that is no class in the file.
    """
    rows_by_name = {row for row in matched if row is not None}
    free = [row for row in range(len(names)) if row not in rows_by_name] or list(range(len(names)))
    nameless = [row for row, name in enumerate(names) if not name]
    rows: list[int] = []
    passed_over = 0
    for position, row in enumerate([*matched, nameless[-1] if nameless else None]):
        if row is not None:
            rows.append(row)
        elif position % len(names) not in rows_by_name:
            rows.append(position % len(names))
        else:
            rows.append(free[passed_over % len(free)])
            passed_over += 1
    return rows


def export_upstream(
    config: ModelConfig, weights: Mapping[str, torch.Tensor], classes: tuple[str, ...], path: Path
) -> None:
    """Write `{"model": ..., "args": ...}`: what upstream's `pretrain_weights=` takes and `weights_only` loads."""
    fields = ("num_classes", "num_queries", "group_detr", "patch_size", "segmentation_head", "resolution", "num_select")
    args = {field: getattr(config, field) for field in fields} | {"class_names": list(classes)}
    torch.save({"model": dict(weights), "args": args}, path)
