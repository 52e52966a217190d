"""Weights in and out: trainfit's safetensors files, open_clip's checkpoints, open_clip's downloads."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trainfit.errors import TrainfitError
from trainfit.models.clip.architecture import open_clip, quiet
from trainfit.models.hub import not_downloaded, quiet_hub
from trainfit.weights import first_line, read_checkpoint, require_sound

COUNTER = "num_batches_tracked"
"""Of BatchNorm; a frozen one has no such buffer, and open_clip's has."""


def load_into(model: torch.nn.Module, architecture: str, weights: str) -> list[str]:
    """Fill a model from a file of trainfit or open_clip, a tag of open_clip's published weights, or `pretrained`.

    What open_clip's loader fits is fitted in the same way: position embeddings of another resolution, weights of
    OpenAI's and of SigLIP's format. Returns remarks for the user.

    Raises:
        TrainfitError: no such file or tag, no network, or weights of another model.
    """
    path, remarks = _find(architecture, weights)
    try:
        state = _read(model, path)
    except (AssertionError, AttributeError, LookupError, RuntimeError) as error:  # of open_clip's conversions
        raise TrainfitError(f"{path} is not of {architecture}: {first_line(error)}") from error
    missing = [name for name in model.state_dict() if name not in state and not name.endswith(COUNTER)]
    if missing:
        raise TrainfitError(f"{path} is not of {architecture}: it lacks {missing[0]} and {len(missing) - 1} more")
    try:
        with quiet():
            model.load_state_dict({name: value for name, value in state.items() if name in model.state_dict()})
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]] or [first_line(error)]
        raise TrainfitError(f"{path} is not of {architecture}: {lines[0]}") from error
    return remarks


def _find(architecture: str, weights: str) -> tuple[Path, list[str]]:
    path = Path(weights)
    if path.is_file():
        return path, []
    package = open_clip()
    tags = list(package.list_pretrained_tags_by_model(architecture))
    tag = tags[0] if weights == "pretrained" and tags else weights
    if tag not in tags:
        known = f"; weights of {architecture} are {', '.join(tags)}" if tags else ""
        raise TrainfitError(
            f"--weights: no such file: {weights} (a .safetensors of trainfit, a file of open_clip{known})"
        )
    published = package.get_pretrained_cfg(architecture, tag)
    try:
        with quiet(), quiet_hub():
            file = package.download_pretrained(published)
    except Exception as error:  # urllib's and huggingface_hub's
        hub = published.get("hf_hub")
        place = f"https://huggingface.co/{hub.rstrip('/')}" if hub else published["url"]
        raise TrainfitError(not_downloaded(f"{architecture} {tag}", place, error)) from error
    return Path(file), [f"weights: {architecture} {tag}"]


def _read(model: torch.nn.Module, path: Path) -> dict[str, torch.Tensor]:
    """The file's tensors as open_clip's loader brings them into the model's form."""
    factory: Any = importlib.import_module("open_clip.factory")

    def load(file: Path) -> Any:
        with quiet():
            return factory.load_state_dict(str(file), weights_only=True)

    state: dict[str, Any] = read_checkpoint(path, load)
    odd = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if odd or not state:
        raise TrainfitError(f"{path}: not a checkpoint of open_clip: {odd[0] if odd else 'it'} is not a tensor")
    learned: Any = model
    with quiet():
        state = factory.convert_state_dict(model, state)
        if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
            state = factory.convert_to_custom_text_state_dict(state)
        for name in ("logit_scale", "logit_bias"):
            own = getattr(learned, name)
            if own is not None and name in state:
                state[name] = state[name].reshape(own.shape)
        if (
            learned.logit_bias is not None and "logit_bias" not in state
        ):  # as open_clip: CLIP's weights for SigLIP's loss
            state["logit_bias"] = torch.zeros_like(learned.logit_bias)
        if learned.logit_bias is None:
            state.pop("logit_bias", None)
        factory.resize_pos_embed(state, model)
        factory.resize_text_pos_embed(state, model)
    require_sound(state, path)
    return state


def export_upstream(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write the weights so that `open_clip.create_model(ARCH, pretrained=FILE)` and `open_clip_train --resume` load them."""
    state = {name: value.detach().cpu().clone() for name, value in weights.items()}
    for name in list(state):
        if name.endswith("running_mean"):  # open_clip's BatchNorm counts its batches
            state.setdefault(name.removesuffix("running_mean") + COUNTER, torch.zeros((), dtype=torch.int64))
    torch.save(state, path)
