"""Describes how the predicted memory depends on the number of objects in the fullest image."""

from dataclasses import replace
from typing import Protocol

from trainfit.gpus.catalogue import GIB
from trainfit.gpus.context import ByteRange
from trainfit.models.setting import DetectionSetting, Setting

FEW = 10
"""Objects in the fullest image of a data set with few of them: COCO's images have 7 in the mean."""


class Needs(Protocol):
    """The part of `memory.priced.Pricer` that is used here."""

    def known(self, setting: Setting) -> bool:
        """Whether `needs` answers without tracing."""
        ...

    def needs(self, setting: Setting) -> ByteRange:
        """The least that training of one process runs in, its CUDA context included."""
        ...


def objects_lines(prices: Needs, setting: Setting) -> tuple[str, ...]:
    """What training needs with few objects in the fullest image and with as many as the setting has, in a sentence.

    Nothing where the model detects no objects, where their number was given (by a flag or by data), or where few of them
    would take a trace.
    """
    if not isinstance(setting, DetectionSetting) or setting.objects_per_image != DetectionSetting.objects_per_image:
        return ()
    fewer = replace(setting, objects_per_image=FEW)
    if not (prices.known(setting) and prices.known(fewer)):
        return ()
    few, many = (_range(prices.needs(each)) for each in (fewer, setting))
    if few == many:
        return (f"Training needs as much with {FEW} objects in the fullest image as with {setting.objects_per_image}.",)
    return (f"Objects in the fullest image: with {FEW} training needs {few}, with {setting.objects_per_image} {many}.",)


def _range(needs: ByteRange) -> str:
    return f"{needs.low_bytes / GIB:.2f} to {needs.high_bytes / GIB:.2f} GiB"
