"""A family that is no part of trainfit: a small convolutional network for classes. Imports no torch."""

from dataclasses import dataclass
from typing import Annotated

from trainfit.models.family import Family, register
from trainfit.models.setting import Setting
from trainfit.values import Range

SIDE = 32


@dataclass(frozen=True, kw_only=True)
class ToySetting(Setting):
    """A setting of the toy."""

    width: Annotated[int, Range(1, 1024)] = 8
    """Channels of each convolution."""


@register
def family() -> Family:
    """The family of one model, "toy"."""
    return Family(
        name="toy",
        setting=ToySetting,
        models=("toy",),
        match=lambda typed: "toy" if typed == "toy" else None,
        workload="toy_workload",
        task="toy_task",
        sample_bytes=lambda _: 3 * SIDE**2,
    )
