"""A user's own model, loss and data as a family. Imports no torch."""

import re
from dataclasses import dataclass

from trainfit.models.family import Family, register
from trainfit.models.setting import Setting

PIXELS_OF_A_SAMPLE = 640**2


@dataclass(frozen=True, kw_only=True)
class CustomSetting(Setting):
    """A setting of a user's own model: the user's function reads from it what it needs."""

    resolution: int | None = None
    """Side of the input in pixels, for a function that reads it."""
    objects_per_image: int = 100
    """Objects in the fullest image, for a function that reads it."""


def match(typed: str) -> str | None:
    """A name of Python's modules, a colon, a name of a function."""
    return typed if re.fullmatch(r"[\w.]+:\w+", typed) else None


@register
def family() -> Family:
    """The family of "module:function"."""
    return Family(
        name="custom",
        setting=CustomSetting,
        models=("module:function",),
        match=match,
        workload="trainfit.models.custom.workload",
        last=True,
        cacheable=False,
        learns=("optimizer",),
        sample_bytes=lambda setting: 3 * (setting.resolution**2 if setting.resolution else PIXELS_OF_A_SAMPLE),
    )
