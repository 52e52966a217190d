"""Weights in and out: our safetensors files, upstream's checkpoints, upstream's download."""

import json
import pickle
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from rfdetr.assets.model_weights import download_pretrain_weights
from rfdetr.config import ModelConfig
from rfdetr.models.lwdetr import LWDETR
from rfdetr.models.weights import load_pretrain_weights
from rfdetr.utilities.io import _safe_torch_load  # pyright: ignore[reportPrivateUsage]
from safetensors import SafetensorError, safe_open

from trainfit.errors import TrainfitError

RESIZED = ("class_embed.", "refpoint_embed.", "query_feat.", "position_embeddings", "_kp_active_mask")
"""Tensors that upstream's loader fits to another number of classes, queries, groups or another resolution."""


MASK_HEAD = "segmentation_head."
"""What the names of the mask head's tensors begin with."""


def load_weights(model: LWDETR, config: ModelConfig, weights: str, *, name: str, classes: tuple[str, ...]) -> list[str]:
    """Fill `model`; returns remarks for the user.

    Raises:
        TrainfitError: no such file, not a checkpoint, a checkpoint of another model, no network for `pretrained`.
    """
    if weights == "pretrained":
        path = _download(config)
    else:
        path = Path(weights)
        if not path.is_file():
            raise TrainfitError(
                f"--weights: no such file: {weights} (a .safetensors of trainfit, a .pth, or `pretrained`)"
            )
    if path.suffix == ".safetensors":
        return _load_ours(model, path, name=name, classes=classes)
    return _load_upstream(model, config, path, name=name)


def _download(config: ModelConfig) -> Path:
    default = type(config).model_fields["pretrain_weights"].default
    path = Path(str(type(config).expand_path(default)))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        download_pretrain_weights(str(path))
    except (OSError, ValueError) as error:  # requests' exceptions are OSErrors; ValueError: wrong checksum
        reason = type(error).__name__
        raise TrainfitError(
            f"could not download {path.name} ({reason}); get the file elsewhere and pass --weights PATH/{path.name}"
        ) from error
    if not path.is_file():
        raise TrainfitError(
            f"could not download {path.name}; get the file elsewhere and pass --weights PATH/{path.name}"
        )
    return path


def attach_mask_head(model: LWDETR, path: Path, *, classes: tuple[str, ...]) -> list[str]:
    """Fill all of `model` but its mask head from a detector run's file, tensor for tensor; returns remarks.

    Upstream's own loader refuses this (rfdetr 1.11.2 utilities/state_dict.py `validate_checkpoint_compatibility`).

    Raises:
        TrainfitError: what the file lacks is not exactly the mask head (the keys are listed), or other classes.
    """
    state, metadata = _read_ours(path)
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


def _read_ours(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
        return safetensors.torch.load_file(path), metadata
    except (SafetensorError, OSError) as error:
        raise TrainfitError(f"{path}: not a readable safetensors file ({error})") from error


def _load_ours(model: LWDETR, path: Path, *, name: str, classes: tuple[str, ...]) -> list[str]:
    state, metadata = _read_ours(path)
    made_for = metadata.get("model", "an unknown model")
    if made_for != name:
        raise TrainfitError(
            f"{path} holds weights of {made_for}, not {name}: train {made_for}, or pass other --weights"
        )
    remarks: list[str] = []
    trained = tuple(json.loads(metadata["classes"]))
    if trained != classes:
        remarks.append(
            f"{path.name} was trained on other classes {trained}: the class heads start as they were cut or tiled"
        )
    _fit_and_load(model, state, path, name=name)
    return remarks


def _fit_and_load(model: LWDETR, state: dict[str, torch.Tensor], path: Path, *, name: str) -> None:
    """Load through a head of the file's size, then bring the head to the model's, as upstream does."""
    outputs = model.class_embed.out_features
    _check_same_architecture(model, state, path, name=name)
    model.reinitialize_detection_head(state["class_embed.bias"].shape[0])
    position = "backbone.0.encoder.encoder.embeddings.position_embeddings"
    if state[position].shape != model.state_dict()[position].shape:
        from rfdetr.models.weights import interpolate_position_embeddings

        interpolate_position_embeddings(state, round((model.state_dict()[position].shape[1] - 1) ** 0.5))
    model.load_state_dict(state)
    model.reinitialize_detection_head(outputs)


def _load_upstream(model: LWDETR, config: ModelConfig, path: Path, *, name: str) -> list[str]:
    try:
        checkpoint: Any = _safe_torch_load(path)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise TrainfitError(f"{path}: not a checkpoint that loads safely ({type(error).__name__})") from error
    state = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if state is None and isinstance(checkpoint, dict) and "state_dict" in checkpoint:
        state = {
            key.removeprefix("model.").removeprefix("_orig_mod."): v for key, v in checkpoint["state_dict"].items()
        }
    if not isinstance(state, dict) or "class_embed.bias" not in state:
        raise TrainfitError(f"{path}: not a checkpoint of RF-DETR (no `model` with a `class_embed`)")
    _check_same_architecture(model, state, path, name=name)
    outputs = model.class_embed.out_features
    config = config.model_copy(update={"pretrain_weights": str(path)})
    try:
        load_pretrain_weights(model, config)
    except (ValueError, RuntimeError) as error:
        raise TrainfitError(f"{path}: does not fit {name}: {str(error).splitlines()[0]}") from error
    assert model.class_embed.out_features == outputs
    found = state["class_embed.bias"].shape[0]
    return [] if found == outputs else [f"{path.name} has {found - 1} classes: the class heads were cut or tiled"]


def _check_same_architecture(model: LWDETR, state: Mapping[str, torch.Tensor], path: Path, *, name: str) -> None:
    """The same tensors of the same shapes, but for those that the loader fits."""
    own = {key: value.shape for key, value in model.state_dict().items()}
    missing = sorted(own.keys() - state.keys() - {"_kp_active_mask"})
    extra = sorted(state.keys() - own.keys() - {"_kp_active_mask"})
    other = sorted(
        key
        for key in own.keys() & state.keys()
        if own[key] != state[key].shape and not any(part in key for part in RESIZED)
    )
    for what, keys in (("lacks", missing), ("has besides", extra), ("has other shapes for", other)):
        if keys:
            raise TrainfitError(
                f"{path} is a checkpoint of another model than {name}: it {what} {len(keys)} tensors, first {keys[0]}"
            )


def export_upstream(
    config: ModelConfig, weights: Mapping[str, torch.Tensor], classes: tuple[str, ...], path: Path
) -> None:
    """Write `{"model": ..., "args": ...}`: what upstream's `pretrain_weights=` takes and `weights_only` loads."""
    fields = ("num_classes", "num_queries", "group_detr", "patch_size", "segmentation_head", "resolution")
    args = {field: getattr(config, field) for field in fields} | {"class_names": list(classes)}
    torch.save({"model": dict(weights), "args": args}, path)
