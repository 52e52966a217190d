"""YOLO: a `data.yaml` with class names and splits, one label text file an image."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainfit.errors import TrainfitError
from trainfit.tasks.detection.admit import RawImage, RawObject, admit, relative
from trainfit.tasks.detection.samples import DetectionDataset, ImageRecord, Segmentation
from trainfit.tasks.findings import Finding, Findings
from trainfit.tasks.folder import (
    LABEL_BYTES,
    OUTSIDE,
    OUTSIDE_REPAIR,
    YAML_BYTES,
    DataFolder,
    Malformed,
    Outside,
    is_file,
    is_file_name,
    named,
    parse_yaml,
    read_regular,
    shown,
)
from trainfit.tasks.images import IMAGE_SUFFIXES, ImageHeader

_NOTHING = (None, "", "~", "null")
"""A key without a value, as `parse_yaml` gives it."""
_NO_IMAGE = "is not an image path; left out"


def find_yolo(path: Path) -> Path | None:
    """The data file: `path` itself, `data.yaml`, or the one YAML file of the folder that has `names`."""
    if path.is_file():
        return path if path.suffix in (".yaml", ".yml") else None
    for name in ("data.yaml", "data.yml"):
        if (path / name).is_file():
            return path / name
    files = [file for file in sorted([*path.glob("*.yaml"), *path.glob("*.yml")]) if _has_names(file)]
    return files[0] if len(files) == 1 else None


def _has_names(file: Path) -> bool:
    try:
        return b"names:" in read_regular(file, YAML_BYTES)
    except (OSError, Malformed):
        return False


def read_yolo(path: Path, *, allow_outside: bool = False) -> DetectionDataset:
    """Reads a YOLO data set; images have running ids in the order of their paths.

    A label line is `class cx cy w h` or, as a polygon of three points or more, `class x y x y ...`, as fractions of
    the upright image. The label of `.../images/a.jpg` is `.../labels/a.txt`; without a part named `images` it lies
    beside the image. An image without a label file has no objects; a line that is written twice is one object.

    Raises:
        TrainfitError: no data file, a broken one, or one without `names` or `train`.
    """
    file = find_yolo(path)
    if file is None:
        raise TrainfitError(f"{path}: no YOLO data file; looked for data.yaml, or one *.yaml with names")
    folder = DataFolder(file.parent, allow_outside=allow_outside)
    document = _parse(file, folder)
    names = _names(file, document)
    findings = Findings(relative(file, folder.root))
    splits: dict[str, tuple[ImageRecord, ...]] = {}
    for key, split in (("train", "train"), ("val", "val"), ("valid", "val"), ("test", "test")):
        if document.get(key) in _NOTHING or split in splits:
            continue
        images = _images(file, document, key, folder, findings)
        if images is not None:
            raws = list(_raw_images(images, folder, len(names), findings))
            splits[split], own = admit(raws, folder.root, split)
            findings.extend(own)
    return DetectionDataset(
        root=folder.root,
        format="yolo",
        classes=names,
        category_ids=tuple(range(len(names))),
        splits=splits,
        findings=tuple(findings.all()),
    )


def _parse(file: Path, folder: DataFolder) -> Mapping[str, Any]:
    try:
        document = parse_yaml(folder.read_text(file, YAML_BYTES))
    except (FileNotFoundError, Malformed) as error:
        raise named(file, error) from error
    if not isinstance(document, dict) or document.get("names") in _NOTHING or document.get("train") in _NOTHING:
        raise TrainfitError(f"{file}: needs the keys `names` and `train`; add them")
    return document


def _names(file: Path, document: Mapping[str, Any]) -> tuple[str, ...]:
    names = document["names"]
    if isinstance(names, dict) and set(names) == set(map(str, range(len(names)))):
        names = [names[str(position)] for position in range(len(names))]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TrainfitError(f"{file}: `names` must be a list of names, or keys 0, 1, 2, ...; it is {shown(names)}")
    count = document.get("nc", str(len(names)))
    if count != str(len(names)):
        raise TrainfitError(f"{file}: `names` must be a list of {shown(count)} names (`nc`), it has {len(names)}")
    return tuple(names)


def _images(
    file: Path, document: Mapping[str, Any], key: str, folder: DataFolder, findings: Findings
) -> list[Path] | None:
    """The images of a split: its folder, list of folders, or text list; None if a split other than train is not there.

    Entries are relative to `path`, else to the data file. Roboflow writes "../train/images" for "train/images".
    """
    bases = [file.parent / _base(file, document), file.parent]
    entries = document[key] if isinstance(document[key], list) else [document[key]]
    images: list[Path] = []
    for entry in entries:
        if not isinstance(entry, str) or not is_file_name(entry):
            raise TrainfitError(
                f"{file}: `{key}` must be a folder, a list of folders or a .txt file, not {shown(entry)}"
            )
        tries = [base / text for text in (entry, entry.removeprefix("../")) for base in bases]
        there = [path for path in tries if os.path.exists(path)]  # noqa: PTH110 - Path.exists raises for long names
        place = next((path for path in there if folder.holds(path)), None)
        if place is None and there:
            raise TrainfitError(f"{file}: `{key}` is {shown(entry)}, which {OUTSIDE_REPAIR}")
        if place is None and key == "train":
            looked = " nor ".join(map(str, tries[:2]))
            raise TrainfitError(f"{file}: `train` is {shown(entry)}, but neither {looked} exists")
        if place is None:
            what = f"`{key}` is {shown(entry)}, which is not there: the split is left out"
            findings.append(Finding(severity="note", kind="missing split", where=file.name, message=what))
            return None
        images += _in_folder(place) if place.is_dir() else _listed(place, bases, folder, findings)
    return [Path(os.path.normpath(image)) for image in images]  # one file, one path: the checks compare them


def _base(file: Path, document: Mapping[str, Any]) -> str:
    base = document.get("path")
    if base in _NOTHING:
        return "."
    if not isinstance(base, str) or not is_file_name(base):
        raise TrainfitError(f"{file}: `path` must be a folder, not {shown(base)}")
    return base


def _in_folder(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)


def _listed(file: Path, bases: Sequence[Path], folder: DataFolder, findings: Findings) -> list[Path]:
    """The images that a text file lists. Lines that name none are not quoted: the file may be anything."""
    images: list[Path] = []
    for number, line in folder.read_lines(file):
        if not is_file_name(line) or Path(line).suffix.lower() not in IMAGE_SUFFIXES:
            where = f"{relative(file, folder.root)} line {number}"
            findings.append(Finding(severity="skipped", kind="no image name", where=where, message=_NO_IMAGE))
            continue
        tries = [base / line for base in (file.parent, *bases)]
        there = [path for path in tries if is_file(path)]
        images.append(next((path for path in there if folder.holds(path)), (there or tries)[0]))
    return images


def _label_file(image: Path, root: Path) -> Path:
    """The last folder `images` becomes `labels`; folders above the data set keep their names."""
    inside = image.is_relative_to(root)
    parts = list((image.relative_to(root) if inside else image).parts)
    if "images" in parts[:-1]:
        position = len(parts) - 2 - parts[-2::-1].index("images")
        parts[position] = "labels"
    label = Path(*parts).with_suffix(".txt")
    return root / label if inside else label


def _raw_images(images: Sequence[Path], folder: DataFolder, classes: int, findings: Findings) -> Iterator[RawImage]:
    object_id = 1
    for number, (image, header) in enumerate(zip(images, folder.headers(images), strict=True)):
        objects: list[RawObject] = []
        if isinstance(header, ImageHeader):
            for where, line in _lines(_label_file(image, folder.root), folder, findings):
                parsed = _object(line, where, header.upright, classes, object_id)
                if isinstance(parsed, Finding):
                    findings.append(parsed)
                else:
                    objects.append(parsed)
                    object_id += 1
        where = relative(image, folder.root)
        yield RawImage(where=where, id=number, path=image, header=header, size=None, objects=tuple(objects))


def _lines(label: Path, folder: DataFolder, findings: Findings) -> list[tuple[str, str]]:
    """Place and text of each object of a label file, those written twice once."""
    where = relative(label, folder.root)
    try:
        text = folder.read_text(label, LABEL_BYTES)
    except FileNotFoundError:
        return []
    except Outside as error:
        findings.append(Finding(severity="error", kind=OUTSIDE, where=where, message=str(error)))
        return []
    except Malformed as error:
        what = f"{error}: its objects are left out"
        findings.append(Finding(severity="skipped", kind="malformed label", where=where, message=what))
        return []
    first: dict[str, tuple[str, str]] = {}
    lines = [(f"{where} line {number}", line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    for place, line in lines:
        first.setdefault(" ".join(line.split()), (place, line))
    if twice := len(lines) - len(first):
        what = f"{twice} lines are copies of earlier ones: left out"
        findings.append(Finding(severity="skipped", kind="identical lines", where=where, message=what))
    return list(first.values())


def _object(line: str, where: str, size: tuple[int, int], classes: int, object_id: int) -> RawObject | Finding:
    try:
        index, *values = map(float, line.split())
        well_formed = index.is_integer() and (len(values) == 4 or (len(values) >= 6 and len(values) % 2 == 0))
    except ValueError:
        index = 0.0
        values = []
        well_formed = False
    if not well_formed:
        what = f"is {shown(line.strip())}, neither `class cx cy w h` nor `class x y x y x y ...`; left out"
        return Finding(severity="skipped", kind="malformed label", where=where, message=what)
    if not 0 <= index < classes:
        what = f"class {index:g}, but the data file names 0 to {classes - 1}; add a name there or mend the label"
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
