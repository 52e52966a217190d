"""What pictures of any task need: letters that can be read, and boxes with labels."""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from trainfit.tasks.palette import Color

Area = tuple[float, float, float, float]
Font = ImageFont.FreeTypeFont
_OPACITY = 0.45


def ink_on(background: Color) -> Color:
    """Black or white, whichever is read better (relative luminance of ITU-R BT.709)."""
    red, green, blue = background
    return (0, 0, 0) if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 140 else (255, 255, 255)


@cache
def font(size: int) -> Font:
    """Letters of a height in pixels: DejaVu Sans, which comes with matplotlib."""
    spec = find_spec("matplotlib")  # importing it takes a second
    assert spec is not None
    assert spec.origin is not None
    return ImageFont.truetype(Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def draw_objects(
    image: Image.Image,
    boxes: Sequence[Area],
    labels: Sequence[str],
    colors: Sequence[Color],
    masks: Sequence[NDArray[np.bool_]] = (),
) -> Image.Image:
    """A copy of an RGB image with masks, boxes and labels; the first object lies on top.

    Args:
        image: The picture.
        boxes: x0, y0, x1, y1 in pixels of the picture, one an object.
        labels: A line of text for each.
        colors: One for each.
        masks: (height, width) of the picture for each, or none at all.
    """
    pixels = np.array(image, np.uint8)
    for mask, ink in reversed(list(zip(masks, colors, strict=False))):
        pixels[mask] = ((1 - _OPACITY) * pixels[mask] + _OPACITY * np.array(ink)).astype(np.uint8)
    drawn = Image.fromarray(pixels)
    pen = ImageDraw.Draw(drawn)
    width = max(1, round(max(image.size) / 400))
    for box, ink in reversed(list(zip(boxes, colors, strict=True))):
        pen.rectangle(_sorted(box), outline=ink, width=width)
    letters = font(max(10, min(32, round(max(image.size) / 45))))
    taken: list[Area] = []
    for box, words, ink in zip(boxes, labels, colors, strict=True):
        taken.append(_draw_label(pen, image.size, box, words, ink, letters, taken))
    return drawn


def _sorted(box: Area) -> Area:
    x0, y0, x1, y1 = box
    return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)


def _draw_label(
    pen: ImageDraw.ImageDraw,
    size: tuple[int, int],
    box: Area,
    words: str,
    ink: Color,
    letters: Font,
    taken: Sequence[Area],
) -> Area:
    """Write a label above its box, inside it or below it: the first place inside the picture that no label has taken."""
    left, top, right, bottom = letters.getbbox(words)
    width = right - left + 6
    height = bottom - top + 4
    x = min(max(0.0, box[0]), max(0.0, size[0] - width))
    places = [(x, y, x + width, y + height) for y in (box[1] - height, box[1], box[3], box[3] - height)]
    inside = [place for place in places if place[1] >= 0 and place[3] <= size[1]] or [(x, 0.0, x + width, height)]
    place = next((each for each in inside if not any(_overlap(each, other) for other in taken)), inside[0])
    pen.rectangle(place, fill=ink)
    pen.text((place[0] + 3 - left, place[1] + 2 - top), words, fill=ink_on(ink), font=letters)
    return place


def _overlap(one: Area, other: Area) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
