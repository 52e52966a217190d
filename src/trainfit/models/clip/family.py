"""CLIP and SigLIP of open_clip as a family. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from trainfit.models.family import Family, register
from trainfit.models.setting import Setting

PREFIX = "clip:"
PIXELS_OF_A_SAMPLE = 640**2


@dataclass(frozen=True, kw_only=True)
class ClipSetting(Setting):
    """A setting of a CLIP or SigLIP model."""

    resolution: int | None = None
    """Side of the square input in pixels; as published unless given."""
    contrastive: Literal["cached", "plain"] = "cached"
    """cached: the loss of the whole window, exactly; plain: each micro-batch is contrasted with itself alone and the losses
    are averaged, which is another loss where accumulation is more than 1."""


def match(typed: str) -> str | None:
    """Any name that begins with "clip:"; open_clip says whether there is such an architecture when it is built."""
    return typed if typed.startswith(PREFIX) and typed != PREFIX else None


@register
def family() -> Family:
    """The family of open_clip's architectures."""
    return Family(
        name="clip",
        setting=ClipSetting,
        models=("clip:ARCH",),
        match=match,
        workload="trainfit.models.clip.workload",
        extra="clip",
        packages=("open_clip_torch",),
        coupled=lambda setting: setting.contrastive == "cached",
        learns=("optimizer",),
        sample_bytes=lambda setting: 3 * (setting.resolution**2 if setting.resolution else PIXELS_OF_A_SAMPLE),
    )
