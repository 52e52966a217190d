"""One colour for each class, in pictures and on pages. Imports nothing."""

import colorsys

Color = tuple[int, int, int]
_FIRST = ("#4ea5b7", "#e38a42", "#6aa84f", "#9575cd", "#e889ab", "#c0a000", "#7f8fa9", "#b5654a", "#2f7fd0", "#3aa38c")
"""Legible on light and on dark paper."""
_GOLDEN = 0.6180339887
"""Steps of this share of the circle never come near an earlier hue soon."""


def color(number: int) -> Color:
    """The colour of a class, by its place among the classes, as red, green and blue up to 255."""
    if number < len(_FIRST):
        text = _FIRST[number]
        return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)
    bright = 0.95 if number % 2 else 0.7
    red, green, blue = colorsys.hsv_to_rgb(number * _GOLDEN % 1, 0.85, bright)
    return round(255 * red), round(255 * green), round(255 * blue)


def hex_color(number: int) -> str:
    """The same colour as HTML and SVG write it."""
    return "#{:02x}{:02x}{:02x}".format(*color(number))
