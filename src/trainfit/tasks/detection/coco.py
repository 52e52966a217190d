"""COCO JSON: Roboflow export folders, the plain COCO layout, or a single JSON with its images."""

import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainfit.errors import TrainfitError
from trainfit.tasks.detection.admit import LONGEST_PATH, RawImage, RawObject, admit, relative
from trainfit.tasks.detection.samples import DetectionDataset, ImageRecord
from trainfit.tasks.findings import MOST_LISTED, Finding, Findings
from trainfit.tasks.folder import (
    JSON_BYTES,
    DataFolder,
    Malformed,
    integer,
    is_file,
    is_file_name,
    is_text,
    named,
    number,
    parse_json,
    read_regular,
    shown,
)

SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "trainval": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_LONGEST_SIDE = 2**31
_OTHER_TASKS = ("captions_", "person_keypoints_", "panoptic_", "stuff_", "image_info_")


@dataclass(frozen=True, kw_only=True)
class _CocoFile:
    """One parsed annotation file."""

    path: Path
    images: Sequence[Mapping[str, Any]]
    annotations: Sequence[Any]
    categories: Mapping[int, Mapping[str, Any]]
    """Category id -> the category."""


def find_coco(path: Path) -> dict[str, Path]:
    """The annotation file of each split; empty where `path` is not a COCO data set.

    Looked for in this order: `path` itself (a .json), `{train,valid,test}/*.json` (Roboflow), `annotations/*.json`,
    `*.json`. In the last two the split is a word of the file name ("instances_train2017.json"), and a single file
    without such a word is all there is; files of COCO's other tasks (captions, keypoints, ...) are passed over.

    Raises:
        TrainfitError: several files could be the one of a split.
    """
    if path.is_file():
        return {"train": path} if path.suffix == ".json" else {}
    folders = ((split, _jsons(path / word)) for word, split in SPLIT_WORDS.items())
    # Several files without the export's own name are something else: one file an image, as labelme writes.
    beside = [(split, file) for split, files in folders for file in files if _is_export(file) or len(files) == 1]
    return _one_per_split(beside) or _by_name(path / "annotations") or _by_name(path)


def read_coco(path: Path, *, allow_outside: bool = False) -> DetectionDataset:
    """Reads a COCO data set; classes are in the order of their category ids, RLEs and polygons stay as written.

    The data set of a single JSON file is the folder of the file, or the one around it where that is `annotations`.

    Raises:
        TrainfitError: no annotation file, or one that is empty, broken or not COCO.
    """
    root = path if path.is_dir() else path.parent
    folder = DataFolder(
        root.parent if root != path and root.name == "annotations" else root, allow_outside=allow_outside
    )
    files = {split: _parse(file, folder) for split, file in find_coco(path).items()}
    if not files:
        raise TrainfitError(f"{path}: no COCO annotation file; looked for train/*.json, annotations/*.json, *.json")
    names, findings = _classes(files, root)
    index = {category: position for position, category in enumerate(names)}
    splits: dict[str, tuple[ImageRecord, ...]] = {}
    for split, file in files.items():
        raws, own = _raw_images(file, folder, root, split, index)
        splits[split], checked = admit(raws, root, split)
        findings += own + checked
    return DetectionDataset(
        root=root,
        format="coco",
        classes=tuple(names.values()),
        category_ids=tuple(names),
        splits=splits,
        findings=tuple(findings),
    )


def _is_export(file: Path) -> bool:
    return file.name.endswith(".coco.json")


def _jsons(folder: Path) -> list[Path]:
    """Annotation files of a folder; only those of COCO's detection task if the folder has others besides."""
    files = [file for file in sorted(folder.glob("*.json")) if not file.name.startswith(_OTHER_TASKS)]
    return [file for file in files if file.name.startswith("instances_")] or files


def _by_name(folder: Path) -> dict[str, Path]:
    files = _jsons(folder)
    words = [(re.findall("[a-z]+", file.stem.lower()), file) for file in files]
    named = [(SPLIT_WORDS[word], file) for splits_named, file in words for word in splits_named if word in SPLIT_WORDS]
    if any("train" in splits_named for splits_named, _ in words):  # trainval is train and val together: not with train
        named = [(split, file) for split, file in named if "trainval" not in file.stem.lower()]
    if not named and len(files) == 1 and _looks_like_coco(files[0]):
        return {"train": files[0]}
    return _one_per_split(named)


def _one_per_split(named: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for split, file in named:
        if files.setdefault(split, file) != file:
            raise TrainfitError(f"two annotation files for {split}: {files[split]} and {file}; remove or move one")
    return {split: files[split] for split in ("train", "val", "test") if split in files}


def _looks_like_coco(file: Path) -> bool:
    """Also for what cannot be read: reading it says why."""
    try:
        head = read_regular(file, JSON_BYTES, first=1 << 16)
    except (OSError, Malformed):
        return True
    return not head.strip() or any(key in head for key in (b'"images"', b'"annotations"', b'"categories"'))


def _parse(file: Path, folder: DataFolder) -> _CocoFile:
    try:
        document = parse_json(folder.read_text(file, JSON_BYTES))
    except (FileNotFoundError, Malformed) as error:
        raise named(file, error) from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(document, dict) or not isinstance(document.get(key), list):
            raise TrainfitError(f'{file}: not COCO: it has no list "{key}"; give another file, or say --format')
    strange = sum(not isinstance(entry, dict) for entry in document["annotations"])
    if strange > MOST_LISTED:
        what = f"{strange} of {len(document['annotations'])} annotations are not objects; export the annotations again"
        raise TrainfitError(f"{file}: not COCO: {what}")
    images = [_entry(file, "images", n, entry, "file_name") for n, entry in enumerate(document["images"])]
    categories = [_entry(file, "categories", n, entry, "name") for n, entry in enumerate(document["categories"])]
    by_id = {int(category["id"]): category for category in categories}
    if len(by_id) < len(categories):
        raise TrainfitError(f"{file}: two categories have one id; give each its own")
    return _CocoFile(path=file, images=images, annotations=document["annotations"], categories=by_id)


def _entry(file: Path, key: str, position: int, entry: Any, text: str) -> Mapping[str, Any]:
    """An image or category, which needs an integer `id` and a text; without them nothing after it can be read."""
    if not isinstance(entry, dict) or integer(entry.get("id")) is None or not is_text(entry.get(text)):
        what = f'{key}[{position}] needs an integer "id" and a text "{text}"'
        raise TrainfitError(f"{file}: {what}; it is {shown(entry)}")
    return entry


def _classes(files: Mapping[str, _CocoFile], root: Path) -> tuple[dict[int, str], list[Finding]]:
    """Name by category id over all splits, in the order of the ids, and what does not agree."""
    names: dict[int, str] = {}
    findings: list[Finding] = []
    for file in files.values():
        ids = {name: category for category, name in names.items()}
        for category, entry in file.categories.items():
            name = entry["name"]
            where = f"{relative(file.path, root)} category {category}"
            if names.setdefault(category, name) != name:
                what = f"is {name!r} here, but {names[category]!r} in another split; export all splits together"
            elif ids.get(name, category) != category:
                what = f"{name!r} has id {ids[name]} in another split; export all splits together"
            else:
                continue
            findings.append(Finding(severity="error", kind="classes differ by split", where=where, message=what))
        if added := [e["name"] for i, e in file.categories.items() if i not in files.get("train", file).categories]:
            what = f"classes that train does not list: {', '.join(added)}"
            where = relative(file.path, root)
            findings.append(Finding(severity="note", kind="class not in train", where=where, message=what))
    parent = _roboflow_parent(files.values())
    if parent is not None:
        what = f"{names.pop(parent)!r} (id {parent}) is the unused parent of all other classes: dropped"
        where = relative(next(iter(files.values())).path, root)
        findings.append(Finding(severity="note", kind="parent category", where=where, message=what))
    return dict(sorted(names.items())), findings


def _roboflow_parent(files: Iterable[_CocoFile]) -> int | None:
    """The id of the category that Roboflow adds as the parent of all others; no object is of it."""
    categories: dict[int, Mapping[str, Any]] = {}
    used: set[Any] = set()
    for file in files:
        categories |= file.categories
        used |= {integer(entry.get("category_id")) for entry in file.annotations if isinstance(entry, dict)}
    for category, entry in categories.items():
        others = [other for key, other in categories.items() if key != category]
        children = bool(others) and all(other.get("supercategory") == entry["name"] for other in others)
        if children and entry.get("supercategory") != entry["name"] and category not in used:
            return category
    return None


def _raw_images(
    file: _CocoFile, folder: DataFolder, root: Path, split: str, index: Mapping[int, int]
) -> tuple[list[RawImage], list[Finding]]:
    label = relative(file.path, root)
    findings = Findings(label)
    names: dict[int, str] = {}
    entries: list[Mapping[str, Any]] = []
    for entry in file.images:
        where = f"{label} image {entry['id']}"
        if names.setdefault(entry["id"], entry["file_name"]) != entry["file_name"]:
            both = f"{shown(names[entry['id']])} and {shown(entry['file_name'])}"
            what = f"is {both}: whose objects are whose? Give each its own id"
            findings.append(Finding(severity="error", kind="duplicate image id", where=where, message=what))
        elif len(names) == len(entries):
            what = f"{shown(entry['file_name'])} is listed twice; the second entry is left out"
            findings.append(Finding(severity="skipped", kind="duplicate image id", where=where, message=what))
        else:
            entries.append(entry)
    objects = _objects(file, label, names, index, findings)
    paths = _locate([entry["file_name"] for entry in entries], _image_folders(file.path, root, split), folder)
    raws = [
        RawImage(
            where=f"{label} image {entry['id']}",
            id=int(entry["id"]),
            path=path,
            header=header,
            size=(_pixels(entry.get("width")), _pixels(entry.get("height"))),
            objects=objects.get(entry["id"], ()),
        )
        for entry, path, header in zip(entries, paths, folder.headers(paths), strict=True)
    ]
    return raws, findings.all()


def _pixels(value: object) -> int:
    """An annotated width or height; 0, which fits no image, for what is none."""
    pixels = number(value)
    return int(pixels) if pixels is not None and 0 < pixels < _LONGEST_SIDE else 0


def _objects(
    file: _CocoFile, label: str, names: Mapping[int, str], index: Mapping[int, int], findings: Findings
) -> dict[int, list[RawObject]]:
    """The objects of each image id."""
    objects: dict[int, list[RawObject]] = {}
    seen: dict[int, Mapping[str, Any]] = {}
    free_ids = itertools.count(1 + max((_id(entry) or 0 for entry in file.annotations), default=0))
    for position, entry in enumerate(file.annotations):
        own = _id(entry)
        where = f"{label} annotation {own if own is not None else f'at position {position}'}"
        fault = _annotation_fault(entry, names, index)
        if fault is not None:
            findings.append(Finding(severity=fault[0], kind=fault[1], where=where, message=fault[2]))
            continue
        where = f"{where}, image {_cut(names[entry['image_id']])}"
        before = seen.get(own) if own is not None else None
        if before is not None and _same(entry, before):
            what = "the same object again: left out"
            findings.append(Finding(severity="skipped", kind="duplicate annotation id", where=where, message=what))
            continue
        if before is not None or own is None:
            unique = next(free_ids)
            findings.extend(_new_id(entry, unique, where))
        else:
            unique = own
            seen[own] = entry
        findings.extend(_area_finding(entry, where))
        objects.setdefault(entry["image_id"], []).append(_object(entry, unique, where, index))
    return objects


def _id(entry: Any) -> int | None:
    return integer(entry.get("id")) if isinstance(entry, dict) else None


def _cut(name: str) -> str:
    return name if len(name) <= LONGEST_PATH else f"{name[:LONGEST_PATH]}..."


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two annotations describe one object; only keys that were checked are compared."""
    keys = ("image_id", "category_id", "bbox", "segmentation", "iscrowd")
    return all(one.get(key) == other.get(key) for key in keys)


def _new_id(entry: Mapping[str, Any], unique: int, where: str) -> Iterator[Finding]:
    """What is said of an annotation whose id is taken or no integer; a missing one is not worth a word."""
    if entry.get("id") is None:
        return
    kind = "duplicate annotation id"
    what = "another object"
    if _id(entry) is None:
        kind = "broken annotation id"
        what = f"the id is {shown(entry['id'])}, no integer up to 2**53"
    yield Finding(severity="mended", kind=kind, where=where, message=f"{what}: gets the id {unique}")


def _annotation_fault(entry: Any, names: Mapping[int, str], index: Mapping[int, int]) -> tuple[Any, str, str] | None:
    """Severity, kind and message, if no object can be made of an annotation."""
    malformed = _malformed(entry)
    if malformed is not None:
        return "skipped", "malformed annotation", f"{malformed}; left out"
    if integer(entry.get("image_id")) not in names:
        return "skipped", "annotation without image", f"no image has the id {shown(entry.get('image_id'))}; left out"
    if integer(entry.get("category_id")) not in index:
        what = f"category_id {shown(entry.get('category_id'))} is not in categories; add it there or remove the object"
        return "error", "unknown class", f"image {_cut(names[entry['image_id']])}: {what}"
    return None


def _malformed(entry: Any) -> str | None:
    """Which part of an annotation is not what the format wants, if one is."""
    if not isinstance(entry, dict):
        return f"is {shown(entry)}"
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or any(number(value) is None for value in box):
        return f"bbox is {shown(box)}, not four numbers"
    if not _is_mask(entry.get("segmentation")):
        return "segmentation is neither polygons nor an RLE"
    if entry.get("iscrowd") not in (None, 0, 1):
        return f"iscrowd is {shown(entry['iscrowd'])}, neither 0 nor 1"
    return None


def _is_mask(mask: Any) -> bool:
    if isinstance(mask, dict):
        return isinstance(mask.get("size"), list) and "counts" in mask
    return not mask or (
        isinstance(mask, list) and all(isinstance(p, list) and {int, float}.issuperset(map(type, p)) for p in mask)
    )


def _area(entry: Mapping[str, Any]) -> float | None:
    area = number(entry.get("area"))
    return area if area is not None and 0 < area < math.inf else None


def _area_finding(entry: Mapping[str, Any], where: str) -> Iterator[Finding]:
    if entry.get("area") is not None and _area(entry) is None:
        what = f"is {shown(entry['area'])}, no positive number: the box's area is used"
        yield Finding(severity="mended", kind="broken area", where=where, message=what)


def _object(entry: Mapping[str, Any], number: int, where: str, index: Mapping[int, int]) -> RawObject:
    x, y, width, height = (float(value) for value in entry["bbox"])
    return RawObject(
        where=where,
        id=number,
        class_index=index[entry["category_id"]],
        box=(x, y, x + width, y + height),
        crowd=bool(entry.get("iscrowd")),
        area=_area(entry),
        segmentation=entry.get("segmentation") or None,
    )


def _image_folders(file: Path, root: Path, split: str) -> list[Path]:
    """Folders that images may be relative to: beside the file, the root, `images/`, and in each the split's own."""
    subset = file.stem.rsplit("_", maxsplit=1)[-1]
    bases = [file.parent, root, root / "images", file.parent / "images", file.parent.parent]
    bases += [file.parent.parent / "images"]
    words = [word for word, meant in SPLIT_WORDS.items() if meant == split]
    subsets = ["", subset, *words]
    folders = [base / sub for sub in subsets for base in bases]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def _locate(names: Sequence[str], folders: Sequence[Path], data: DataFolder) -> list[Path]:
    """The path of each image: as named in one of the folders, else its last part in one; as named if nowhere.

    What lies outside of the data set is taken only where nothing inside has the name.
    """
    order = list(folders)
    paths: list[Path] = []
    for name in names:
        portable = Path(name.replace("\\", "/"))
        tries = [(folder, folder / part) for part in (portable, portable.name) for folder in order]
        there = ((folder, path) for folder, path in tries if is_file_name(name) and is_file(path))
        inside = next(((folder, path) for folder, path in there if data.holds(path)), None)
        outside = next(((folder, path) for folder, path in tries if inside is None and is_file(path)), None)
        folder, path = inside or outside or (order[0], order[0] / name)
        order.remove(folder)  # where one was found, the next is found at the first try
        order.insert(0, folder)
        paths.append(Path(os.path.normpath(path)))  # one file, one path: the checks compare them
    return paths
