"""COCO JSON: Roboflow export folders, the plain COCO layout, or a single JSON with its images."""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainfit.errors import TrainfitError
from trainfit.tasks.detection.admit import RawImage, RawObject, admit, relative
from trainfit.tasks.detection.samples import Dataset, Finding, ImageRecord
from trainfit.tasks.images import read_headers

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
_OTHER_TASKS = ("captions_", "person_keypoints_", "panoptic_", "stuff_", "image_info_")


@dataclass(frozen=True, kw_only=True)
class _CocoFile:
    """One parsed annotation file."""

    path: Path
    images: Sequence[Mapping[str, Any]]
    annotations: Sequence[Any]
    categories: Mapping[int, Mapping[str, Any]]
    """By id."""


def find_coco(path: Path) -> dict[str, Path]:
    """The annotation file of each split; empty where `path` is no COCO data set.

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


def read_coco(path: Path) -> Dataset:
    """Reads a COCO data set; classes are in the order of their category ids, RLEs and polygons stay as written.

    Raises:
        TrainfitError: no annotation file, or one that is empty, broken or not COCO.
    """
    files = {split: _parse(file) for split, file in find_coco(path).items()}
    if not files:
        raise TrainfitError(f"{path}: no COCO annotation file; looked for train/*.json, annotations/*.json, *.json")
    root = path if path.is_dir() else path.parent
    names, findings = _classes(files, root)
    index = {category: position for position, category in enumerate(names)}
    splits: dict[str, tuple[ImageRecord, ...]] = {}
    for split, file in files.items():
        raws, found = _raw_images(file, root, split, index)
        splits[split], checked = admit(raws, root, split)
        findings += found + checked
    return Dataset(
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
    """Annotation files of a folder; COCO's detection task alone where a folder has it and others."""
    files = [file for file in sorted(folder.glob("*.json")) if not file.name.startswith(_OTHER_TASKS)]
    return [file for file in files if file.name.startswith("instances_")] or files


def _by_name(folder: Path) -> dict[str, Path]:
    files = _jsons(folder)
    words = [(re.findall("[a-z]+", file.stem.lower()), file) for file in files]
    named = [(SPLIT_WORDS[word], file) for found, file in words for word in found if word in SPLIT_WORDS]
    if any("train" in found for found, _ in words):  # trainval is train and val together: not with train
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
    with file.open("rb") as stream:
        head = stream.read(1 << 16)
    return not head.strip() or any(key in head for key in (b'"images"', b'"annotations"', b'"categories"'))


def _parse(file: Path) -> _CocoFile:
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TrainfitError(f"{file}: not UTF-8 at byte {error.start}; export the annotations again") from error
    if not text.strip():
        raise TrainfitError(f"{file}: the annotation file is empty; export the annotations again")
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise TrainfitError(f"{file}: broken JSON at {where}: {error.msg}; export the annotations again") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(document, dict) or not isinstance(document.get(key), list):
            raise TrainfitError(f'{file}: not COCO: it has no list "{key}"; give another file, or say --format')
    images = [_entry(file, "images", n, entry, "file_name") for n, entry in enumerate(document["images"])]
    categories = [_entry(file, "categories", n, entry, "name") for n, entry in enumerate(document["categories"])]
    by_id = {category["id"]: category for category in categories}
    if len(by_id) < len(categories):
        raise TrainfitError(f"{file}: two categories have one id; give each its own")
    return _CocoFile(path=file, images=images, annotations=document["annotations"], categories=by_id)


def _entry(file: Path, key: str, position: int, entry: Any, text: str) -> Mapping[str, Any]:
    """An image or category, which needs an integer `id` and a text; without them nothing after it can be read."""
    if not isinstance(entry, dict) or not isinstance(entry.get("id"), int) or not isinstance(entry.get(text), str):
        raise TrainfitError(f'{file}: {key}[{position}] needs an integer "id" and a text "{text}"; it is {entry!r:.80}')
    return entry


def _classes(files: Mapping[str, _CocoFile], root: Path) -> tuple[dict[int, str], list[Finding]]:
    """Name by category id over all splits, in the order of the ids, and what does not agree."""
    names: dict[int, str] = {}
    findings: list[Finding] = []
    for file in files.values():
        ids = {name: category for category, name in names.items()}
        for category, entry in file.categories.items():
            name, where = entry["name"], f"{relative(file.path, root)} category {category}"
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
        used |= {entry.get("category_id") for entry in file.annotations if isinstance(entry, dict)}
    for category, entry in categories.items():
        others = [other for key, other in categories.items() if key != category]
        children = bool(others) and all(other.get("supercategory") == entry["name"] for other in others)
        if children and entry.get("supercategory") != entry["name"] and category not in used:
            return category
    return None


def _raw_images(
    file: _CocoFile, root: Path, split: str, index: Mapping[int, int]
) -> tuple[list[RawImage], list[Finding]]:
    label = relative(file.path, root)
    findings: list[Finding] = []
    names: dict[int, str] = {}
    entries: list[Mapping[str, Any]] = []
    for entry in file.images:
        where = f"{label} image {entry['id']}"
        if names.setdefault(entry["id"], entry["file_name"]) != entry["file_name"]:
            what = f"is {names[entry['id']]} and {entry['file_name']}: whose objects are whose? Give each its own id"
            findings.append(Finding(severity="error", kind="duplicate image id", where=where, message=what))
        elif len(names) == len(entries):
            what = f"{entry['file_name']} is listed twice; the second entry is left out"
            findings.append(Finding(severity="skipped", kind="duplicate image id", where=where, message=what))
        else:
            entries.append(entry)
    objects = _objects(file, label, names, index, findings)
    paths = _locate([entry["file_name"] for entry in entries], _image_folders(file.path, root, split))
    raws = [
        RawImage(
            where=f"{label} image {entry['id']}",
            id=entry["id"],
            path=path,
            header=header,
            size=(_pixels(entry.get("width")), _pixels(entry.get("height"))),
            objects=objects.get(entry["id"], ()),
        )
        for entry, path, header in zip(entries, paths, read_headers(paths), strict=True)
    ]
    return raws, findings


def _pixels(value: object) -> int:
    return int(value) if isinstance(value, int | float) and math.isfinite(value) else 0


def _objects(
    file: _CocoFile, label: str, names: Mapping[int, str], index: Mapping[int, int], findings: list[Finding]
) -> dict[int, list[RawObject]]:
    """The objects of each image id."""
    objects: dict[int, list[RawObject]] = {}
    seen: dict[int, Any] = {}
    free_id = 1 + max((_id(entry) or 0 for entry in file.annotations), default=0)
    for position, entry in enumerate(file.annotations):
        number = _id(entry)
        where = f"{label} annotation {number if number is not None else f'at position {position}'}"
        fault = _annotation_fault(entry, names, index)
        if fault is not None:
            findings.append(Finding(severity=fault[0], kind=fault[1], where=where, message=fault[2]))
            continue
        where = f"{where}, image {names[entry['image_id']]}"
        if number is None or number in seen:
            if number is not None:
                same = entry == seen[number]
                what = "the same object again: left out" if same else f"another object: gets the id {free_id}"
                severity = "skipped" if same else "mended"
                found = Finding(severity=severity, kind="duplicate annotation id", where=where, message=what)
                findings.append(found)
                if same:
                    continue
            number, free_id = free_id, free_id + 1
        else:
            seen[number] = entry
        objects.setdefault(entry["image_id"], []).append(_object(entry, number, where, index))
    return objects


def _id(entry: Any) -> int | None:
    number = entry.get("id") if isinstance(entry, dict) else None
    return number if isinstance(number, int) else None


def _annotation_fault(entry: Any, names: Mapping[int, str], index: Mapping[int, int]) -> tuple[Any, str, str] | None:
    """Severity, kind and message, if no object can be made of an annotation."""
    if not isinstance(entry, dict):
        return "skipped", "malformed annotation", f"is {entry!r:.60s}; left out"
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(value, int | float) for value in box):
        return "skipped", "malformed annotation", f"bbox is {box!r:.60s}, not four numbers; left out"
    if not _is_mask(entry.get("segmentation")):
        return "skipped", "malformed annotation", "segmentation is neither polygons nor an RLE; left out"
    if entry.get("image_id") not in names:
        return "skipped", "annotation without image", f"no image has the id {entry.get('image_id')!r}; left out"
    if entry.get("category_id") not in index:
        what = f"category_id {entry.get('category_id')!r} is not in categories; add it there or remove the object"
        return "error", "unknown class", f"image {names[entry['image_id']]}: {what}"
    return None


def _is_mask(mask: Any) -> bool:
    if isinstance(mask, dict):
        return isinstance(mask.get("size"), list) and "counts" in mask
    return not mask or (
        isinstance(mask, list) and all(isinstance(p, list) and {int, float}.issuperset(map(type, p)) for p in mask)
    )


def _object(entry: Mapping[str, Any], number: int, where: str, index: Mapping[int, int]) -> RawObject:
    x, y, width, height = (float(value) for value in entry["bbox"])
    area = entry.get("area")
    return RawObject(
        where=where,
        id=number,
        class_index=index[entry["category_id"]],
        box=(x, y, x + width, y + height),
        crowd=bool(entry.get("iscrowd")),
        area=float(area) if isinstance(area, int | float) and math.isfinite(area) and area > 0 else None,
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


def _locate(names: Sequence[str], folders: Sequence[Path]) -> list[Path]:
    """The path of each image: as named in one of the folders, else its last part in one; as named if nowhere."""
    order = list(folders)
    paths: list[Path] = []
    for name in names:
        portable = Path(name.replace("\\", "/"))
        tries = ((folder, folder / part) for part in (portable, portable.name) for folder in order)
        folder, path = next(((folder, path) for folder, path in tries if path.is_file()), (order[0], order[0] / name))
        order.remove(folder)  # where one was found, the next is found at the first try
        order.insert(0, folder)
        paths.append(Path(os.path.normpath(path)))  # one file, one path: the checks compare them
    return paths
