"""YOLO: a `data.yaml` with class names and splits, one label text file an image."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trainfit.errors import TrainfitError
from trainfit.tasks.detection.admit import RawImage, RawObject, admit, relative
from trainfit.tasks.detection.samples import Dataset, Finding, ImageRecord, Segmentation
from trainfit.tasks.images import IMAGE_SUFFIXES, ImageHeader, read_headers


def find_yolo(path: Path) -> Path | None:
    """The data file: `path` itself, `data.yaml`, or the one YAML file of the folder that has `names`."""
    if path.is_file():
        return path if path.suffix in (".yaml", ".yml") else None
    for name in ("data.yaml", "data.yml"):
        if (path / name).is_file():
            return path / name
    files = [file for file in sorted([*path.glob("*.yaml"), *path.glob("*.yml")]) if b"names:" in file.read_bytes()]
    return files[0] if len(files) == 1 else None


def read_yolo(path: Path) -> Dataset:
    """Reads a YOLO data set; images have running ids in the order of their paths.

    A label line is `class cx cy w h` or, as a polygon of three points or more, `class x y x y ...`, as fractions of
    the upright image. The label of `.../images/a.jpg` is `.../labels/a.txt`; without a part named `images` it lies
    beside the image. An image without a label file has no objects.

    Raises:
        TrainfitError: no data file, a broken one, or one without `names` or `train`.
    """
    file = find_yolo(path)
    if file is None:
        raise TrainfitError(f"{path}: no YOLO data file; looked for data.yaml, or one *.yaml with names")
    document = _parse(file)
    names = _names(file, document)
    root = file.parent
    findings: list[Finding] = []
    splits: dict[str, tuple[ImageRecord, ...]] = {}
    for key, split in (("train", "train"), ("val", "val"), ("valid", "val"), ("test", "test")):
        if document.get(key) is None or split in splits:
            continue
        images = _images(file, document, key, findings)
        if images is not None:
            splits[split], found = admit(list(_raw_images(images, root, len(names), findings)), root, split)
            findings += found
    return Dataset(
        root=root,
        format="yolo",
        classes=names,
        category_ids=tuple(range(len(names))),
        splits=splits,
        findings=tuple(findings),
    )


def _parse(file: Path) -> Mapping[str, Any]:
    try:
        document = yaml.safe_load(file.read_text("utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        where = f" at line {mark.line + 1} column {mark.column + 1}" if mark else ""
        raise TrainfitError(f"{file}: broken YAML{where}; repair the file") from error
    if not isinstance(document, dict) or document.get("names") is None or document.get("train") is None:
        raise TrainfitError(f"{file}: needs the keys `names` and `train`; add them")
    return document


def _names(file: Path, document: Mapping[str, Any]) -> tuple[str, ...]:
    names = document["names"]
    if isinstance(names, dict) and sorted(names, key=str) == sorted(range(len(names)), key=str):
        names = [names[position] for position in range(len(names))]
    count = document.get("nc", len(names))
    if not isinstance(names, list) or len(names) != count:
        raise TrainfitError(f"{file}: `names` must be a list, or keys 0, 1, 2, ..., of {count} names (`nc`); repair it")
    return tuple(map(str, names))


def _images(file: Path, document: Mapping[str, Any], key: str, findings: list[Finding]) -> list[Path] | None:
    """The images of a split: its folder, list of folders, or text list; None if a split other than train is not there.

    Entries are relative to `path`, else to the data file. Roboflow writes "../train/images" for "train/images".
    """
    bases = [file.parent / str(document.get("path") or "."), file.parent]
    entries = document[key] if isinstance(document[key], list) else [document[key]]
    images: list[Path] = []
    for entry in map(str, entries):
        tries = [base / text for text in (entry, entry.removeprefix("../")) for base in bases]
        found = next((path for path in tries if path.exists()), None)
        if found is None and key == "train":
            raise TrainfitError(f"{file}: `train` is {entry!r}, but neither {' nor '.join(map(str, tries[:2]))} exists")
        if found is None:
            what = f"`{key}` is {entry!r}, which is not there: the split is left out"
            findings.append(Finding(severity="note", kind="missing split", where=file.name, message=what))
            return None
        images += _listed(found, bases) if found.is_file() else _in_folder(found)
    return [Path(os.path.normpath(image)) for image in images]  # one file, one path: the checks compare them


def _in_folder(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)


def _listed(file: Path, bases: Iterable[Path]) -> list[Path]:
    lines = [Path(line.strip()) for line in file.read_text("utf-8").splitlines() if line.strip()]
    candidates = ([base / line for base in (file.parent, *bases)] for line in lines)
    return [next((path for path in paths if path.is_file()), paths[0]) for paths in candidates]


def _label_file(image: Path) -> Path:
    parts = list(image.parts)
    if "images" in parts[:-1]:
        position = len(parts) - 2 - parts[-2::-1].index("images")
        parts[position] = "labels"
    return Path(*parts).with_suffix(".txt")


def _raw_images(images: Sequence[Path], root: Path, classes: int, findings: list[Finding]) -> Iterator[RawImage]:
    object_id = 1
    for number, (image, header) in enumerate(zip(images, read_headers(images), strict=True)):
        objects: list[RawObject] = []
        label = _label_file(image)
        if isinstance(header, ImageHeader) and label.is_file():
            for where, line in _lines(label, root, findings):
                parsed = _object(line, where, header.upright, classes, object_id)
                if isinstance(parsed, Finding):
                    findings.append(parsed)
                else:
                    objects.append(parsed)
                    object_id += 1
        yield RawImage(
            where=relative(image, root), id=number, path=image, header=header, size=None, objects=tuple(objects)
        )


def _lines(label: Path, root: Path, findings: list[Finding]) -> list[tuple[str, str]]:
    where = relative(label, root)
    try:
        lines = label.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        what = f"is no UTF-8 text at byte {error.start}: its objects are left out"
        findings.append(Finding(severity="skipped", kind="malformed label", where=where, message=what))
        return []
    return [(f"{where} line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]


def _object(line: str, where: str, size: tuple[int, int], classes: int, object_id: int) -> RawObject | Finding:
    try:
        index, *values = map(float, line.split())
        well_formed = index.is_integer() and (len(values) == 4 or (len(values) >= 6 and len(values) % 2 == 0))
    except ValueError:
        index, values, well_formed = 0.0, [], False
    if not well_formed:
        what = f"is {line.strip()[:60]!r}, neither `class cx cy w h` nor `class x y x y x y ...`; left out"
        return Finding(severity="skipped", kind="malformed label", where=where, message=what)
    if not 0 <= index < classes:
        what = f"class {index:.0f}, but the data file names 0 to {classes - 1}; add a name there or mend the label"
        return Finding(severity="error", kind="unknown class", where=where, message=what)
    points = [value * size[position % 2] for position, value in enumerate(values)]
    polygon: Segmentation | None = None
    if len(points) == 4:
        cx, cy, width, height = points
        box = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
    else:
        polygon = [points]
        box = (min(points[::2]), min(points[1::2]), max(points[::2]), max(points[1::2]))
    return RawObject(where=where, id=object_id, class_index=int(index), box=box, segmentation=polygon)
