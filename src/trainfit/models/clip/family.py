"""CLIP, SigLIP and CoCa of open_clip as a family. Imports no torch."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from trainfit.errors import TrainfitError
from trainfit.models.clip.names import PREFIX, match
from trainfit.models.clip.schedule import lr_factor
from trainfit.models.clip.upstream_flags import translate
from trainfit.models.family import Capability, Family, register
from trainfit.models.setting import Setting
from trainfit.values import In, Range

PIXELS_OF_A_SAMPLE = 640**2
CHUNK_ROWS = 256
"""Rows of the logits that exist at one time: 32 MiB per matrix at 32,768 pairs."""
Loss = Literal["auto", "clip", "siglip"]
Freeze = Literal["none", "batchnorm", "image", "text"]
REFUSED = {
    "naflex": "NaFlex batches hold images of many sizes by a budget of tokens",
    "clap": "CLAP is trained on audio",
    "genlip": "GenLIP has no contrastive loss",
    "genlap": "GenLAP has no contrastive loss",
}
"""Part of a name -> why models with it are not trained here."""
KERNELS_ALIKE: dict[Capability, Capability] = {(8, 6): (8, 0), (10, 0): (9, 0), (6, 1): (7, 5)}
"""These differ in kernels for attention heads of more than 128 numbers, or not of a multiple of 8 (`tracing.fake_cuda`)."""
LARGEST_HEAD, HEAD_MULTIPLE = 128, 8
TIMM_VIT = "vit_"
"""How timm names its vision transformers, whose heads have 32 to 128 numbers, multiples of 8 (timm 1.0 vision_transformer.py)."""


@dataclass(frozen=True, kw_only=True)
class ClipSetting(Setting):
    """A setting of a CLIP, SigLIP or CoCa model."""

    resolution: Annotated[int | None, Range(1, 8192)] = None
    """Side of the square input in pixels; as published unless given."""
    contrastive: Literal["cached", "plain"] = "cached"
    """cached: the loss of the whole window, exactly; plain: each micro-batch is contrasted with itself alone and the losses
    are averaged, which is another loss where accumulation is more than 1."""
    loss: Loss = "auto"
    """clip: softmax over each row and column; siglip: a sigmoid for each pair, with a bias. auto: siglip where the architecture
    has a bias. CoCa's caption loss comes besides."""
    positives: Literal["pairs", "texts"] = "pairs"
    """texts: pairs of the window with the same text are positives of each other, not negatives."""
    text_ratio: Annotated[float | None, Range(0.01, 100), In("memory")] = None
    """The towers run one after the other, the text tower on this many times the micro-batch. Together unless given."""
    freeze: Freeze = "none"
    """What is not trained. image, text: that tower (LiT), which costs no pass with gradients; batchnorm: statistics, gains and
    biases of BatchNorm, which the cached loss needs."""
    unlocked_groups: Annotated[int | None, Range(1, 1000)] = None
    """Of the tower that --freeze image or text names, so many groups of layers from the end are trained: the projection is the
    first, the last block the second."""
    distill_model: str | None = None
    """Teacher: ARCH=FILE (or ARCH=TAG of open_clip's weights), or a weights file of trainfit."""
    recompute: Annotated[Literal["both", "image", "text"], In("memory")] = "both"
    """The tower whose blocks --checkpointing counts."""


def image_pixels(setting: "ClipSetting") -> int:
    """Pixels of the model's input; `PIXELS_OF_A_SAMPLE` where the architecture's file does not say."""
    if setting.resolution is not None:
        return setting.resolution**2
    try:
        size: Any = _configuration(setting.model)["vision_cfg"].get("image_size", 224)
        return size[0] * size[1] if isinstance(size, list) else size**2
    except (LookupError, TypeError, AttributeError):
        return PIXELS_OF_A_SAMPLE


def has_caption_config(model: str) -> bool:
    """Whether a model is a CoCa, by its architecture's file."""
    return "multimodal_cfg" in _configuration(model)


def packages_for(setting: "ClipSetting") -> tuple[str, ...]:
    """Distributions, besides open_clip, that the towers come from."""
    towers = [tower for tower in _configuration(setting.model).values() if isinstance(tower, dict)]
    names = {"timm": "timm_model_name", "transformers": "hf_model_name"}
    return tuple(name for name, key in names.items() if any(key in tower for tower in towers))


def alike(setting: "ClipSetting") -> Mapping[Capability, Capability]:
    """`KERNELS_ALIKE` where the attention heads of both towers are of sizes for which it holds; nothing where they may not be."""
    configuration = _configuration(setting.model)
    if setting.distill_model is not None or "multimodal_cfg" in configuration:
        return {}
    heads = (_image_head(configuration), _text_head(configuration))
    fine = all(0 < head <= LARGEST_HEAD and head % HEAD_MULTIPLE == 0 for head in heads)
    return KERNELS_ALIKE if fine else {}


def _image_head(configuration: Mapping[str, Any]) -> int:
    """Numbers of an attention head of the image tower, with open_clip's defaults; 0 where the configuration does not say."""
    tower: Any = configuration.get("vision_cfg")
    if not isinstance(tower, dict) or tower.get("attentional_pool"):
        return 0
    if "timm_model_name" in tower:
        return 64 if str(tower["timm_model_name"]).startswith(TIMM_VIT) else 0
    head = tower.get("head_width", 64)
    return head if isinstance(head, int) else 0


def _text_head(configuration: Mapping[str, Any]) -> int:
    """Numbers of an attention head of the text tower, with open_clip's defaults; 0 where the configuration does not say."""
    tower: Any = configuration.get("text_cfg")
    if not isinstance(tower, dict) or "hf_model_name" in tower:
        return 0
    width, heads = tower.get("width", 512), tower.get("heads", 8)
    is_said = isinstance(width, int) and isinstance(heads, int) and heads > 0 and width % heads == 0
    return width // heads if is_said else 0


@cache
def _configuration(model: str) -> dict[str, Any]:
    """The configuration of a model, read without importing open_clip; empty where there is no readable file."""
    name = model.removeprefix(PREFIX)
    spec = find_spec("open_clip")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = (
        [Path(name)] if name.endswith(".json") else [Path(each, "model_configs", f"{name}.json") for each in folders]
    )
    for file in files:
        try:
            record = json.loads(file.read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(record, dict):
            return record
    return {}


def refuse(model: str) -> None:
    """Reject models of open_clip's later versions that are trained in another way.

    Raises:
        TrainfitError: the model is not supported; the message gives the reason.
    """
    words = re.split(r"[^a-z0-9]+", Path(model.removeprefix(PREFIX)).stem.lower())
    for part, reason in REFUSED.items():
        if any(word.startswith(part) for word in words):
            raise TrainfitError(f"{model} is not supported: {reason}. Use a CLIP, SigLIP or CoCa architecture")


def check_recipe(recipe: Any) -> None:
    """Refuse what cannot be trained together."""
    refuse(recipe.model)
    if recipe.unlocked_groups and recipe.freeze not in ("image", "text"):
        raise TrainfitError("--unlocked-groups goes with --freeze image or --freeze text")
    if recipe.loss == "siglip" and recipe.distill_model is not None:
        raise TrainfitError("--distill-model goes with --loss clip: its loss compares distributions over rows")
    if recipe.contrastive == "plain" and (recipe.distill_model or recipe.positives == "texts"):
        raise TrainfitError("--contrastive plain goes without --distill-model and --positives texts")


def assumptions(setting: ClipSetting) -> Sequence[str]:
    """What a prediction takes for granted."""
    lines: list[str] = []
    if setting.contrastive == "plain":
        lines.append("Each micro-batch is contrasted with itself alone: not the loss of the effective batch.")
    return lines


@register
def family() -> Family:
    """The family of open_clip's architectures."""
    return Family(
        name="clip",
        setting=ClipSetting,
        models=("clip:ARCH",),
        match=match,
        workload="trainfit.models.clip.workload",
        checkpoint="trainfit.models.clip.workload:from_upstream",
        emit="trainfit.models.clip.emit",
        task="pairs",
        augments=frozenset({"crop"}),
        extra="clip",
        packages=("open_clip_torch",),
        packages_for=packages_for,
        alike=alike,
        asks_batch="every pair is contrasted with every other of it, so that it decides what is learned (CLIP and SigLIP were "
        "published with 32,768, open_clip's guide has 1,024 to 4,096)",
        coupled=lambda setting: setting.contrastive == "cached",
        coupled_rows=lambda _: CHUNK_ROWS,
        ratio_knob="text_ratio",
        prepare_trace="trainfit.models.clip.tracing:prepare",
        learns=("optimizer",),
        assumptions=assumptions,
        check_recipe=check_recipe,
        translate=translate,
        lr_factor=lr_factor,
        recipe={
            "epochs": 32,
            "lr": 5e-4,
            "weight_decay": 0.2,
            "schedule": "cosine",
            "clip_norm": 0.0,
        },
        not_flags=("warmup_epochs",),
        shapes_weights=("resolution", "loss"),
        sample_bytes=lambda setting: 3 * image_pixels(setting),
    )
