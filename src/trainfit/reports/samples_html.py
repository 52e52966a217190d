"""Samples as a model sees them, as one self-contained HTML page."""

import base64
import colorsys
import io
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
import torch
from PIL import Image

from trainfit.reports import svg
from trainfit.reports.words import printable
from trainfit.training.lines import counted
from trainfit.training.preview import Preview, Shown

STYLE = """<style>
body { max-width: 1400px; }
.samples { max-width: 100%; display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: .3rem .6rem; margin: 1.2rem 0 0; }
.samples p { grid-column: 1 / -1; margin: 0; overflow-wrap: anywhere; font-size: 13px; }
.samples figcaption { font: 13px system-ui, sans-serif; color: var(--soft); }
.samples svg text { fill: #fff; font-weight: 600; paint-order: stroke; stroke: #000; }
</style>"""
JPEG_QUALITY = 88
MASK_ALPHA = 110
GOLDEN = (5**0.5 - 1) / 2
Colours = Mapping[str, tuple[int, int, int]]


def samples_html(shown: Sequence[Preview], classes: Sequence[str], *, title: str, lines: Sequence[str]) -> str:
    """The page: `lines` describe it, and each record has a row; colours follow the order of `classes`."""
    colours = {name: colour_of(place) for place, name in enumerate(classes)}
    parts = [STYLE, f"<h1>{escape(title)}</h1>", *(f"<p class='soft'>{escape(line)}</p>" for line in lines)]
    for preview in shown:
        caption = f"{preview.path}: {preview.caption}" if preview.caption else preview.path
        cells = [_figure("not augmented", preview.plain, colours)]
        cells += [_figure(f"epoch {number}", sample, colours) for number, sample in enumerate(preview.drawn, 1)]
        parts.append(f"<div class='samples'><p>{escape(printable(caption))}</p>{''.join(cells)}</div>")
    return svg.page(title, parts)


def colour_of(place: int) -> tuple[int, int, int]:
    """The colour of a class; hues of classes that follow each other are far apart (steps of the golden ratio)."""
    red, green, blue = colorsys.hls_to_rgb(place * GOLDEN % 1, 0.55, 0.85)
    return round(255 * red), round(255 * green), round(255 * blue)


def _figure(caption: str, sample: Shown, colours: Colours) -> str:
    _, height, width = sample.image.shape
    picture = _data(Image.fromarray(sample.image.permute(1, 2, 0).numpy()), "jpeg")
    shapes = [f"<image href='{picture}' width='{width}' height='{height}'/>"]
    if sample.masks is not None and len(sample.masks):
        overlay = _overlay(sample.masks, sample.names, colours)
        shapes.append(f"<image href='{overlay}' width='{width}' height='{height}'/>")
    if sample.boxes:
        shapes += _boxes(sample, colours, size=max(height, width))
    words = f"{caption}, {width} x {height}"
    if sample.boxes:
        words += f", {counted(len(sample.boxes), 'object')}"
    elif sample.names:
        words += f": {', '.join(sample.names)}"
    return (
        f"<figure>{svg.picture(width, height, caption, shapes)}"
        f"<figcaption>{escape(printable(words))}</figcaption></figure>"
    )


def _boxes(sample: Shown, colours: Colours, *, size: int) -> list[str]:
    """Boxes with class names that stay legible: their height is a thirtieth of the image's."""
    line = max(1.0, size / 250)
    text = size / 28
    shapes: list[str] = []
    for (x0, y0, x1, y1), name in zip(sample.boxes, sample.names, strict=True):
        colour = "rgb({},{},{})".format(*colours[name])
        shapes.append(
            f"<rect x='{x0:.1f}' y='{y0:.1f}' width='{x1 - x0:.1f}' height='{y1 - y0:.1f}' fill='none' stroke='{colour}' "
            f"stroke-width='{line:.1f}'/><text x='{x0 + line:.1f}' y='{max(y0 - line, text):.1f}' "
            f"style='font-size:{text:.1f}px;stroke-width:{text / 6:.1f}px'>{escape(printable(name))}</text>"
        )
    return shapes


def _overlay(masks: torch.Tensor, names: Sequence[str], colours: Colours) -> str:
    """All masks in one picture, the small ones over the large ones."""
    pixels = np.zeros((*masks.shape[1:], 4), np.uint8)
    order = sorted(range(len(names)), key=lambda row: -int(masks[row].sum()))
    for row in order:
        pixels[masks[row].numpy()] = (*colours[names[row]], MASK_ALPHA)
    return _data(Image.fromarray(pixels), "png")


def _data(image: Image.Image, kind: str) -> str:
    """The picture as a `data:` address."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": JPEG_QUALITY} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
