"""COCO captions: a JSON file with images, and annotations that each have a caption."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from trainfit.errors import TrainfitError
from trainfit.tasks.folder import JSON_BYTES, DataFolder, Malformed, is_file, named, parse_json, shown
from trainfit.tasks.pairs.grouped import Grouped

PREFIX = "captions_"
HEAD_BYTES = 1 << 20


def caption_files(root: Path) -> dict[str, Path]:
    """captions_train2017.json and the like by split, in a folder or its `annotations`."""
    for place in (root / "annotations", root):
        found = {split: sorted(place.glob(f"{PREFIX}{split}*.json")) for split in ("train", "val", "test")}
        if any(found.values()):
            return {split: files[0] for split, files in found.items() if files}
    return {}


def read_captions(path: Path, folder: DataFolder, found: Grouped) -> None:
    """Add every captioned image.

    Raises:
        TrainfitError: the file cannot be read or is no COCO captions file.
    """
    try:
        record = parse_json(folder.read_text(path, JSON_BYTES))
    except (FileNotFoundError, Malformed) as error:
        raise named(path, error) from error
    images, captions = _lists(path, record)
    files = {image.get("id"): image.get("file_name") for image in images}
    texts: dict[Any, list[str]] = {}
    for caption in captions:
        text = caption.get("caption")
        if isinstance(text, str) and caption.get("image_id") in files:
            texts.setdefault(caption["image_id"], []).append(text)
        else:
            found.skip("caption without image", f"{path.name} {shown(caption.get('id'))}", "left out")
    names = [name for name in files.values() if isinstance(name, str)]
    place = _image_folder(path, names[0]) if names else path.parent
    for image_id, name in files.items():
        where = f"{path.name} image {shown(image_id)}"
        if isinstance(name, str):
            found.add(place / name, texts.get(image_id, []), where)
        else:
            found.skip("no image", where, "it has no file name; left out")


def _lists(path: Path, record: Any) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    parts: list[list[Mapping[str, Any]]] = []
    for key in ("images", "annotations"):
        value: Any = cast("dict[str, Any]", record).get(key) if isinstance(record, dict) else None
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in cast("list[Any]", value)):
            raise TrainfitError(f"{path}: no COCO captions: it has no list {key!r} of objects")
        parts.append(cast("list[Mapping[str, Any]]", value))
    if parts[1] and "caption" not in parts[1][0]:
        raise TrainfitError(f"{path}: its annotations have no caption; give captions_*.json")
    return parts[0], parts[1]


def _image_folder(path: Path, name: str) -> Path:
    """Where the images of an annotation file are: COCO's folder (train2017), `images`, or beside the file."""
    root = path.parent.parent if path.parent.name == "annotations" else path.parent
    own = path.stem.removeprefix(PREFIX)
    split = own.rstrip("0123456789")
    places = [root / own, root / "images" / own, root / split, root / "images", root / split / "images", root]
    return next((place for place in places if is_file(place / name)), places[0])
