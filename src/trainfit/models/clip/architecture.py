"""Architectures of open_clip: their configurations, and models built from them."""

import importlib
import json
import logging
import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from trainfit.errors import TrainfitError
from trainfit.models.clip.family import Freeze, Loss, refuse
from trainfit.models.clip.names import PREFIX

SIGLIP_SCALE = math.log(10)
"""Initial logarithm of the scale for --siglip (open_clip 3.3 open_clip_train/main.py)."""
SIGLIP_BIAS = -10.0
"""Initial bias for --siglip (open_clip 3.3 open_clip_train/main.py)."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How images are resized and normalised for a model."""

    size: tuple[int, int]
    """(height, width)."""
    mean: tuple[float, float, float]
    """Subtracted from the channels of an image in 0 to 1."""
    std: tuple[float, float, float]
    """What the channels are divided by after that."""
    resize_mode: str = "shortest"
    """Which side of an image gets the size, as open_clip names it."""
    interpolation: str = "bicubic"
    """Interpolation of the resize, as open_clip names it."""


def open_clip() -> Any:
    """Import open_clip.

    Raises:
        TrainfitError: it is not installed.
    """
    try:
        import open_clip as package
    except ImportError as error:
        raise TrainfitError("CLIP models need open_clip: pip install 'trainfit[clip]'") from error
    return package


def architecture_of(model: str) -> str:
    """The name under which open_clip has a model's configuration; a JSON file is registered with open_clip first.

    Raises:
        TrainfitError: no such architecture, or a file that is not a configuration.
    """
    refuse(model)
    name = model.removeprefix(PREFIX)
    if name.endswith(".json"):
        return _register(Path(name))
    known = open_clip().list_models()
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f" Perhaps you meant {PREFIX}{near[0]}." if near else ""
        raise TrainfitError(f"open_clip has no architecture {name!r}.{hint}")
    return name


def _register(path: Path) -> str:
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise TrainfitError(f"{path}: not a configuration of open_clip ({error}): give a JSON file") from error
    required = ("embed_dim", "vision_cfg", "text_cfg")
    missing = [key for key in required if not isinstance(record, dict) or key not in record]
    if missing:
        raise TrainfitError(f"{path}: not a configuration of open_clip: it has no {', '.join(missing)}")
    if open_clip().get_model_config(path.stem) != record:
        open_clip().add_model_config(path)
    return path.stem


def config_of(architecture: str) -> dict[str, Any]:
    """The configuration of an architecture."""
    return open_clip().get_model_config(architecture) or {}


def has_caption(architecture: str) -> bool:
    """Whether it is a CoCa, which has a caption loss."""
    return "multimodal_cfg" in config_of(architecture)


@cache
def preprocessing(architecture: str, resolution: int | None = None) -> Preprocessing:
    """The preprocessing of an architecture's first published weights, or OpenAI's if none are published."""
    package = open_clip()
    tags = package.list_pretrained_tags_by_model(architecture)
    published: Mapping[str, Any] = package.get_pretrained_cfg(architecture, tags[0]) if tags else {}
    side = resolution or config_of(architecture).get("vision_cfg", {}).get("image_size", 224)
    return Preprocessing(
        size=(side, side) if isinstance(side, int) else tuple(side),
        mean=tuple(published.get("mean") or package.OPENAI_DATASET_MEAN),
        std=tuple(published.get("std") or package.OPENAI_DATASET_STD),
        resize_mode=published.get("resize_mode") or "shortest",
        interpolation=published.get("interpolation") or "bicubic",
    )


def build_model(
    architecture: str,
    *,
    resolution: int | None = None,
    loss: Loss = "auto",
    freeze: Freeze = "none",
    unlocked_groups: int | None = None,
    device: Literal["cpu", "meta"] = "cpu",
) -> torch.nn.Module:
    """A model of open_clip with random weights, in train mode; on the device `meta` it has no values.

    Raises:
        TrainfitError: open_clip is not installed, no such architecture, or a loss that is not the architecture's.
    """
    architecture = architecture_of(architecture)
    caption = has_caption(architecture)
    if caption and loss == "siglip":
        raise TrainfitError(f"{PREFIX}{architecture} has CLIP's loss and a caption loss: leave --loss siglip out")
    changes: dict[str, Any] = {} if caption else {"output_dict": False}
    if loss == "siglip" and "init_logit_bias" not in config_of(architecture):
        changes |= {"init_logit_scale": SIGLIP_SCALE, "init_logit_bias": SIGLIP_BIAS}
    if loss == "clip":
        changes["init_logit_bias"] = None
    with quiet(), torch.device(device):
        try:
            model: Any = open_clip().create_model(
                architecture,
                load_weights=False,
                pretrained_text=False,
                force_image_size=resolution,
                device=device,
                **changes,
            )
        except (ImportError, OSError) as error:  # towers of other packages, and their configurations from the hub
            raise TrainfitError(f"{PREFIX}{architecture} cannot be built ({error})") from error
    if (
        caption
    ):  # open_clip 3.3 leaves it as the memory was; the scale is that of its `MultimodalTransformer.init_parameters`
        projection = model.text_decoder.text_projection
        torch.nn.init.normal_(projection, std=projection.shape[0] ** -0.5)
    model.trainfit_preprocessing = preprocessing(architecture, resolution)
    freeze_parts(model, freeze)
    if unlocked_groups:
        unlock(model, freeze, unlocked_groups)
    return model.train()


def freeze_parts(model: Any, freeze: Freeze) -> None:
    """Freeze parts of the model; frozen BatchNorm keeps its statistics."""
    visual = {id(parameter) for parameter in model.visual.parameters()}
    text = model.text if hasattr(model, "text") else model
    if freeze == "image":
        model.visual.requires_grad_(False)
    if freeze == "text":
        others = ("logit_scale", "logit_bias")
        for name, parameter in text.named_parameters():
            if id(parameter) not in visual and name not in others:
                parameter.requires_grad_(False)
    if freeze in ("batchnorm", "image"):
        model.visual = _without_batchnorm(model.visual)


def unlock(model: Any, freeze: Freeze, groups: int) -> None:
    """Train the last groups of layers of a frozen tower after all, as open_clip counts them.

    Raises:
        TrainfitError: the tower has no groups, or no more than these.
    """
    image = freeze == "image"
    tower: Any = model.visual if image else getattr(model, "text", model)
    try:
        if image:
            tower.lock(unlocked_groups=groups)
        else:
            model.lock_text_tower(unlocked_layers=groups)
    except (
        AssertionError,
        AttributeError,
        KeyError,
        RuntimeError,
    ) as error:  # ResNets, and towers without a projection
        raise TrainfitError(
            f"--unlocked-groups {groups}: the {freeze} tower cannot be frozen in part; leave it out"
        ) from error
    of_images = {id(parameter) for parameter in model.visual.parameters()}
    own = tower.parameters() if image else (p for p in tower.parameters() if id(p) not in of_images)
    if all(parameter.requires_grad for parameter in own):
        raise TrainfitError(
            f"--unlocked-groups {groups} leaves nothing of the {freeze} tower frozen: leave --freeze out"
        )


def _without_batchnorm(module: torch.nn.Module) -> torch.nn.Module:
    utils: Any = importlib.import_module("open_clip.utils")
    if any(type(each).__module__.startswith("timm.") for each in module.modules()):
        timm: Any = importlib.import_module("timm.utils")
        module = timm.freeze_batch_norm_2d(module)
    return utils.freeze_batch_norm_2d(module)


def batchnorm_layers(model: torch.nn.Module) -> int:
    """Layers whose output depends on the other samples of a micro-batch."""
    kinds = torch.nn.modules.batchnorm._BatchNorm  # pyright: ignore[reportPrivateUsage]
    return sum(isinstance(module, kinds) for module in model.modules())


@contextmanager
def quiet() -> Generator[None]:
    """Suppress open_clip's messages in the root logger: trainfit's own remarks contain what matters."""
    root = logging.getLogger()
    disabled = root.disabled
    root.disabled = True
    try:
        yield
    finally:
        root.disabled = disabled
