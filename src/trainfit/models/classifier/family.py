"""The classifiers of timm as a family. Imports no torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from trainfit.models.family import Family, register
from trainfit.models.setting import Setting
from trainfit.values import In

PREFIX = "timm:"
PIXELS_OF_A_SAMPLE = 640**2


@dataclass(frozen=True, kw_only=True)
class ClassifierSetting(Setting):
    """A setting of a classifier."""

    resolution: int | None = None
    """Side of the square input in pixels; as published unless given."""
    freeze: Annotated[Literal["none", "body"], In("model")] = "none"
    """body: only the layer that ends in the classes is trained, and BatchNorm keeps its statistics."""
    channels_last: bool = False
    """Store images and convolution weights as NHWC."""


def match(typed: str) -> str | None:
    """Any name that begins with "timm:"; timm says whether there is such a model when it is built."""
    return typed if typed.startswith(PREFIX) and typed != PREFIX else None


def has_published_weights(setting: ClassifierSetting) -> bool:
    """Whether timm offers weights of the model; imports timm."""
    import timm

    published = timm.get_pretrained_cfg(setting.model.removeprefix(PREFIX))
    return published is not None and bool(published.has_weights)


@register
def family() -> Family:
    """The family of timm's models."""
    return Family(
        name="classifier",
        setting=ClassifierSetting,
        models=("timm:NAME",),
        match=match,
        workload="trainfit.models.classifier.workload",
        published=has_published_weights,
        task="classes",
        extra="timm",
        packages=("timm",),
        learns=("optimizer",),
        shapes_weights=("resolution",),
        sample_bytes=lambda setting: 3 * (setting.resolution**2 if setting.resolution else PIXELS_OF_A_SAMPLE),
    )
