"""An image file as a sample of a classifier."""

import math
from collections.abc import Set as AbstractSet

import numpy as np
import torch
from PIL import Image

from trainfit.tasks.classes.samples import ClassRecord, LabelledImage
from trainfit.tasks.images import read_image

AREA = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
"""Part of the image's area, and width over height, of a random crop (torchvision's RandomResizedCrop)."""
TRIES = 10
CENTRE = 0.875
"""Side of the centre crop over the short side of the image, in evaluation (timm's default `crop_pct`)."""


def decode(record: ClassRecord, *, size: int, augment: AbstractSet[str], generator: torch.Generator) -> LabelledImage:
    """A random crop (`crop` in `augment`; else the centre), mirrored half of the time (`flip`), at `size` x `size`.

    Crops are drawn as torchvision's RandomResizedCrop draws them, and resampled once.
    """
    image = read_image(record)
    region = _random(image.width, image.height, generator) if "crop" in augment else _centre(image.width, image.height)
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=region)).copy()
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    if "flip" in augment and torch.rand((), generator=generator).item() < 0.5:
        tensor = tensor.flip(2)
    return LabelledImage(image=tensor.contiguous(), label=record.label, record_id=record.id)


def _centre(width: int, height: int) -> tuple[float, float, float, float]:
    return _centred_square(width, height, CENTRE * min(width, height))


def _centred_square(width: int, height: int, side: float) -> tuple[float, float, float, float]:
    left = (width - side) / 2
    top = (height - side) / 2
    return left, top, left + side, top + side


def _random(width: int, height: int, generator: torch.Generator) -> tuple[float, float, float, float]:
    def draw(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    for _ in range(TRIES):
        area = width * height * draw(*AREA)
        ratio = math.exp(draw(math.log(RATIO[0]), math.log(RATIO[1])))
        crop_width = math.sqrt(area * ratio)
        crop_height = math.sqrt(area / ratio)
        if crop_width <= width and crop_height <= height:
            left = draw(0, width - crop_width)
            top = draw(0, height - crop_height)
            return left, top, left + crop_width, top + crop_height
    return _centred_square(width, height, min(width, height))
