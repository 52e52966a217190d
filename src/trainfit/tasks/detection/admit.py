"""Decides which of the records that a reader read training may use: every check without decoding. Reads no file."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainfit.tasks.detection.masks import rle_fault, usable_polygons
from trainfit.tasks.detection.samples import ImageRecord, Segmentation, packed
from trainfit.tasks.findings import Finding, Findings, Severity
from trainfit.tasks.folder import OUTSIDE, shown
from trainfit.tasks.images import ImageDefect, ImageHeader

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels."""
SMALLEST_BOX = 0.1
"""Pixels: a box whose part in the image is narrower or lower has no area once it is scaled and rounded to float32."""
MOST_OBJECTS = 2_000
"""Objects of one image: their masks alone take 0.8 GiB at 640 px."""
LONGEST_PATH = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class RawObject:
    """One object as a reader found it; its class is known, its box is not checked."""

    where: str
    """File and place in it, for messages."""
    id: int
    """Unique in its split."""
    class_index: int
    """Index of its class."""
    box: Box
    """Its box in pixels, as annotated."""
    crowd: bool = False
    """Whether it stands for several objects (COCO's iscrowd)."""
    area: float | None = None
    """Its area in pixels as annotated; None if it is computed."""
    segmentation: Segmentation | None = None
    """Its mask; None if it has none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RawImage:
    """One image as a reader found it."""

    where: str
    """File and place in it, for messages."""
    id: int
    """Unique in its split."""
    path: Path
    """The image file."""
    header: ImageHeader | ImageDefect
    """What the file's first bytes say, or why they say nothing."""
    size: tuple[int, int] | None
    """(width, height) as annotated; None if the format has no size."""
    objects: Sequence[RawObject]
    """Its objects."""


def admit(raws: Sequence[RawImage], root: Path, split: str) -> tuple[tuple[ImageRecord, ...], list[Finding]]:
    """The images of one split that training may use, and a finding for everything left out, mended or noted.

    - Image missing, unreadable or truncated: skipped. The same file twice: skipped when both list the same objects,
      else an error.
    - Annotated size differs from the file's: the file is right, and the boxes are kept as written if all of them fit
      (mended). The image is skipped if one does not fit, or if both sizes have the same shape: then the file was
      most likely resized after annotation, and boxes that fit by chance would still be wrong.
    - Image outside of the data set: an error, and not opened. With more than `MOST_OBJECTS` objects: skipped.
    - Box: not finite, negative size, less than `SMALLEST_BOX` in the image: skipped; overhanging by more than 1 px:
      clipped (mended); by at most 1 px: rounding, left as it is.
    - Polygon with fewer than three points or an endless outline: dropped (mended), the object keeps its box; an RLE
      whose counts are not those of the image: object skipped.
    - Objects with the class and box of another: noted.
    """
    findings = Findings(split)
    records: list[ImageRecord] = []
    for raw in _distinct_files(raws, root, findings):
        size = _canvas(raw, root, findings)
        if size is not None:
            records.append(_record(raw, size, findings))
    if crowds := sum(int(record.crowd.sum()) for record in records):
        findings.append(_finding("note", "crowds", split, f"{crowds} objects are crowds: training ignores them"))
    return tuple(records), findings.all()


def relative(path: Path, root: Path) -> str:
    """`path` as findings name it: relative to the data set where it lies in it, cut off where it is endless."""
    name = (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()
    return name if len(name) <= LONGEST_PATH else f"{name[:LONGEST_PATH]}..."


def _finding(severity: Severity, kind: str, where: str, message: str) -> Finding:
    return Finding(severity=severity, kind=kind, where=where, message=message)


def _distinct_files(raws: Sequence[RawImage], root: Path, findings: Findings) -> list[RawImage]:
    first: dict[Path, RawImage] = {}
    for raw in raws:
        seen = first.setdefault(raw.path, raw)
        if seen is raw:
            continue
        same = Counter((o.class_index, o.box) for o in seen.objects) == Counter(
            (o.class_index, o.box) for o in raw.objects
        )
        what = f"{relative(raw.path, root)} is listed already by {seen.where}, "
        what += "with the same objects" if same else "with other objects; put all of them under one entry"
        findings.append(_finding("skipped" if same else "error", "duplicate file name", raw.where, what))
    return list(first.values())


def _canvas(raw: RawImage, root: Path, findings: Findings) -> tuple[int, int] | None:
    """The (width, height) that the record gets, or None if the image is left out."""
    file = relative(raw.path, root)
    header = raw.header
    lost = f"its {len(raw.objects)} objects are left out"
    if isinstance(header, ImageDefect):
        severity = "error" if header.kind == OUTSIDE else "skipped"
        findings.append(_finding(severity, header.kind, raw.where, f"{file}: {header.message}; {lost}"))
        return None
    if len(raw.objects) > MOST_OBJECTS:
        what = f"{file} has {len(raw.objects)} objects, more than {MOST_OBJECTS}; cut it into tiles; {lost}"
        findings.append(_finding("skipped", "too many objects", raw.where, what))
        return None
    if header.orientation != 1:
        applied = raw.size in (None, header.upright)
        what = f"{file}: orientation {header.orientation} is {'applied' if applied else 'ignored, as annotated'}"
        findings.append(_finding("note", "EXIF orientation", raw.where, what))
    if raw.size in (None, header.upright, header.size):
        return raw.size or header.upright
    width, height = raw.size
    real_width, real_height = header.upright
    what = f"annotated {width} x {height}, but {file} is {real_width} x {real_height}"
    resized = min(width, height) > 0 and _same_shape(raw.size, header.upright)
    if resized or not all(_overhang(o.box, header.upright) <= 1 for o in raw.objects):
        why = "it seems to have been resized after annotation" if resized else "boxes lie outside of it"
        findings.append(_finding("skipped", "wrong image size", raw.where, f"{what}: {why}; {lost}"))
        return None
    findings.append(_finding("mended", "wrong image size", raw.where, f"{what}: the file's size is used"))
    return header.upright


def _same_shape(annotated: tuple[int, int], real: tuple[int, int]) -> bool:
    """Whether one size is the other scaled, within the rounding of a pixel."""
    scale = real[0] / annotated[0]
    return abs(annotated[1] * scale - real[1]) <= max(1.0, scale)


def _overhang(box: Box, size: tuple[int, int]) -> float:
    """How many pixels a box reaches out of the image; infinite for a box that is not finite."""
    if not all(map(math.isfinite, box)):
        return math.inf
    return max(-box[0], -box[1], box[2] - size[0], box[3] - size[1], 0.0)


def _record(raw: RawImage, size: tuple[int, int], findings: Findings) -> ImageRecord:
    kept: list[RawObject] = []
    boxes: list[Box] = []
    segmentations: list[Segmentation | None] = []
    for thing in raw.objects:
        fault = _box_fault(thing.box, size) or _mask_fault(thing.segmentation, size)
        if fault is not None:
            findings.append(_finding("skipped", fault[0], thing.where, f"{fault[1]}; the object is left out"))
            continue
        kept.append(thing)
        boxes.append(_clipped(thing, size, findings))
        segmentations.append(_segmentation(thing, size, findings))
    if twice := len(kept) - len({(thing.class_index, thing.box) for thing in kept}):
        what = f"{twice} objects have the class and the box of another one"
        findings.append(_finding("note", "identical objects", raw.where, what))
    if not kept:
        findings.append(_finding("note", "image without objects", raw.where, "used as background"))
    array = np.array(boxes, np.float64).reshape(-1, 4)
    sides = array[:, 2:] - array[:, :2]
    return ImageRecord(
        id=raw.id,
        path=raw.path,
        width=size[0],
        height=size[1],
        boxes=array,
        classes=np.array([thing.class_index for thing in kept], np.int64),
        crowd=np.array([thing.crowd for thing in kept], np.bool_),
        areas=np.array([thing.area or side[0] * side[1] for thing, side in zip(kept, sides, strict=True)], np.float64),
        segmentations=tuple(map(packed, segmentations)),
        object_ids=np.array([thing.id for thing in kept], np.int64),
    )


def _box_fault(box: Box, size: tuple[int, int]) -> tuple[str, str] | None:
    """Kind and message, if the object cannot be used for its box."""
    x0, y0, x1, y1 = box
    text = f"box x {x0:g} to {x1:g}, y {y0:g} to {y1:g}"
    if not all(map(math.isfinite, box)):
        return "box not finite", text
    if x1 < x0 or y1 < y0:
        return "negative-size box", text
    if x1 - x0 < SMALLEST_BOX or y1 - y0 < SMALLEST_BOX:
        return "zero-size box", text
    inside = min(x1, size[0]) - max(x0, 0), min(y1, size[1]) - max(y0, 0)
    if min(inside) < SMALLEST_BOX:
        return "box outside the image", f"{text}, image {size[0]} x {size[1]}"
    return None


def _clipped(thing: RawObject, size: tuple[int, int], findings: Findings) -> Box:
    if _overhang(thing.box, size) <= 1:
        return thing.box
    x0, y0, x1, y1 = thing.box
    box = (max(x0, 0.0), max(y0, 0.0), min(x1, float(size[0])), min(y1, float(size[1])))
    what = f"box x {x0:g} to {x1:g}, y {y0:g} to {y1:g}, image {size[0]} x {size[1]}; clipped to the image"
    findings.append(_finding("mended", "box overhangs the image", thing.where, what))
    return box


def _mask_fault(mask: Segmentation | None, size: tuple[int, int]) -> tuple[str, str] | None:
    if not isinstance(mask, dict):
        return None
    if list(mask["size"]) != [size[1], size[0]]:
        return "mask of another size", f"RLE size {shown(mask['size'])} (height, width), image {size[0]} x {size[1]}"
    fault = rle_fault(mask, size[1], size[0])
    return None if fault is None else ("broken RLE", f"RLE: {fault}")


def _segmentation(thing: RawObject, size: tuple[int, int], findings: Findings) -> Segmentation | None:
    """The mask as training draws it: an RLE with whole numbers for its size, or the polygons that can be drawn."""
    mask = thing.segmentation
    if isinstance(mask, dict):
        return {"size": [size[1], size[0]], "counts": mask["counts"]}
    if mask is None:
        return None
    good, remark = usable_polygons(mask, size[1], size[0])
    if remark is not None:
        findings.append(_finding("mended", "broken polygon", thing.where, remark))
    return good or None
