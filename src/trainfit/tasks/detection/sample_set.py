"""The built-in sample set: shapes on noise, drawn here, so that everything can be tried without any data."""

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from trainfit.errors import TrainfitError

SAMPLE_SET_VERSION = 1
"""Part of the cache folder's name; to be raised when the drawings change."""

SHAPES = ("circle", "square", "triangle", "star")
_COLOURS = np.array([(214, 48, 49), (41, 98, 214), (38, 166, 60), (241, 196, 15)], np.float64)
_CANVASES = ((128, 128), (160, 120), (120, 160), (192, 128), (128, 192), (192, 192), (256, 192))
# The first images: few objects and large, so that a small model learns them by heart within minutes.
_FIRST_COUNTS = (2, 1, 4, 0, 3, 6, 2, 5)
_CROWDED = {"train": 60, "valid": 30}
_OVERSAMPLING = 4


def write_sample_set(folder: Path, *, seed: int = 0, train: int = 48, val: int = 16) -> Path:
    """Draws the set into a new folder, as a Roboflow COCO export (`train/`, `valid/`), and returns the folder.

    Four classes, each of a shape and a colour; boxes and polygons are exact, objects don't overlap. 0 to 60 objects an
    image, canvases of 120 to 256 px. The same `seed` draws the same pixels; an image's own depend on its number alone,
    so that a smaller set is the beginning of a larger one. Appears whole or not at all, also for two writers.

    Raises:
        TrainfitError: the folder exists already.
    """
    if folder.exists():
        raise TrainfitError(f"{folder}: exists already; remove it or choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".sample-") as scratch:
        draft = Path(scratch) / "set"
        _write_split(draft / "train", [seed, 0], train)
        _write_split(draft / "valid", [seed, 1], val)
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same drawings
                raise
    return folder


def _write_split(folder: Path, seed: list[int], count: int) -> None:
    folder.mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(count):
        rng = np.random.default_rng([*seed, number])
        image, objects = _draw(rng, number, _CROWDED[folder.name])
        name = f"{number:03d}.png"
        image.save(folder / name)
        images.append({"id": number, "file_name": name, "width": image.width, "height": image.height})
        for category, polygon in objects:
            annotations.append(_annotation(len(annotations) + 1, number, category, polygon))
    categories = [{"id": n, "name": name, "supercategory": "shape"} for n, name in enumerate(SHAPES)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "_annotations.coco.json").write_text(json.dumps(document))


def _annotation(number: int, image: int, category: int, polygon: NDArray[np.float64]) -> dict[str, Any]:
    points = polygon.round(2)
    low = points.min(axis=0)
    high = points.max(axis=0)
    x, y = points.T
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": [round(float(value), 2) for value in (*low, *(high - low))],
        "area": round(float(abs(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2, 2),
        "iscrowd": 0,
        "segmentation": [points.ravel().tolist()],
    }


def _draw(
    rng: np.random.Generator, number: int, crowded: int
) -> tuple[Image.Image, list[tuple[int, NDArray[np.float64]]]]:
    """One image and its objects: class and polygon (n, 2) in pixels."""
    if number < len(_FIRST_COUNTS):
        wanted = _FIRST_COUNTS[number]
        size = _CANVASES[number % 3]
        radii = (0.14, 0.22)
    elif number == len(_FIRST_COUNTS):
        wanted = crowded
        size = _CANVASES[-1]
        radii = (0.04, 0.06)
    else:
        wanted = int(min(40, rng.geometric(0.16) - 1))
        size = _CANVASES[rng.integers(len(_CANVASES))]
        radii = (0.06, 0.16)
    image = _background(rng, size)
    objects: list[tuple[int, NDArray[np.float64]]] = []
    taken: list[tuple[float, float, float]] = []
    for _ in range(200 * wanted):  # rejected places included; the last few may not fit
        if len(objects) == wanted:
            break
        radius = rng.uniform(*radii) * min(size)
        x, y = rng.uniform(radius + 1, np.array(size) - radius - 1)
        if any(math.hypot(x - other[0], y - other[1]) < radius + other[2] + 1 for other in taken):
            continue
        taken.append((x, y, radius))
        category = int(rng.integers(len(SHAPES)))
        polygon = np.array([x, y]) + radius * _outline(SHAPES[category], rng.uniform(0, 2 * math.pi))
        objects.append((category, polygon))
        colour = np.clip(_COLOURS[category] + rng.normal(0, 12, 3), 0, 255)
        _paint(image, polygon, (int(colour[0]), int(colour[1]), int(colour[2])))
    return image, objects


def _outline(shape: str, turn: float) -> NDArray[np.float64]:
    """Corners (n, 2) in the unit circle."""
    corners = {"circle": 24, "square": 4, "triangle": 3, "star": 10}[shape]
    angles = turn + np.arange(corners) * 2 * math.pi / corners
    radii = np.where(np.arange(corners) % 2, 0.45, 1.0) if shape == "star" else np.ones(corners)
    return radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _background(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Dull clouds of two scales and a little grain."""
    texture = np.full((size[1], size[0], 3), rng.uniform(90, 170))
    for cells, strength in ((4, 22.0), (24, 12.0), (max(size), 5.0)):
        grid = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        layer = np.asarray(Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC), np.float64)
        grey = layer.mean(axis=2, keepdims=True)  # a third of the colour only: the shapes are what is colourful
        texture += strength * ((2 * grey + layer) / 3 / 127.5 - 1)
    return Image.fromarray(np.clip(texture, 0, 255).astype(np.uint8))


def _paint(image: Image.Image, polygon: NDArray[np.float64], colour: tuple[int, int, int]) -> None:
    """Fills a polygon with smooth edges; pixel i spans i to i + 1, as in COCO."""
    low = np.floor(polygon.min(axis=0)).astype(int)
    high = np.ceil(polygon.max(axis=0)).astype(int)
    extent = (int(high[0] - low[0]), int(high[1] - low[1]))
    mask = Image.new("L", (extent[0] * _OVERSAMPLING, extent[1] * _OVERSAMPLING))
    points = [(float(x), float(y)) for x, y in (polygon - low) * _OVERSAMPLING - 0.5]
    ImageDraw.Draw(mask).polygon(points, fill=255)
    smooth = mask.resize(extent, Image.Resampling.BOX)
    image.paste(colour, (int(low[0]), int(low[1])), smooth)
