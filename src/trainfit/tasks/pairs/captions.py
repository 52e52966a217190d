"""COCO captions: a JSON file with images, and annotations that each have a caption."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from trainfit.errors import TrainfitError
from trainfit.tasks.folder import JSON_BYTES, DataFolder, Malformed, is_file, named, parse_json, shown
from trainfit.tasks.pairs.grouped import Grouped

PREFIX = "captions_"


def caption_files(root: Path) -> dict[str, Path]:
    """Files like captions_train2017.json by split, in a folder or its `annotations`."""
    for folder in (root / "annotations", root):
        by_split = {split: sorted(folder.glob(f"{PREFIX}{split}*.json")) for split in ("train", "val", "test")}
        if any(by_split.values()):
            return {split: files[0] for split, files in by_split.items() if files}
    return {}


def read_captions(path: Path, folder: DataFolder, grouped: Grouped) -> None:
    """Add every captioned image.

    Raises:
        TrainfitError: the file cannot be read or is not a COCO captions file.
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
            grouped.skip("caption without image", f"{path.name} {shown(caption.get('id'))}", "left out")
    names = [name for name in files.values() if isinstance(name, str)]
    images_folder = _image_folder(path, names[0]) if names else path.parent
    for image_id, name in files.items():
        where = f"{path.name} image {shown(image_id)}"
        if isinstance(name, str):
            grouped.add(images_folder / name, texts.get(image_id, []), where)
        else:
            grouped.skip("no image", where, "it has no file name; left out")


def _lists(path: Path, record: Any) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    parts: list[list[Mapping[str, Any]]] = []
    for key in ("images", "annotations"):
        value: Any = cast("dict[str, Any]", record).get(key) if isinstance(record, dict) else None
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in cast("list[Any]", value)):
            raise TrainfitError(f"{path}: not a COCO captions file: it has no list {key!r} of objects")
        parts.append(cast("list[Mapping[str, Any]]", value))
    if parts[1] and "caption" not in parts[1][0]:
        raise TrainfitError(f"{path}: its annotations have no caption; give captions_*.json")
    return parts[0], parts[1]


def _image_folder(path: Path, name: str) -> Path:
    """The folder with the images of an annotation file: COCO's (train2017), `images`, or the file's own."""
    root = path.parent.parent if path.parent.name == "annotations" else path.parent
    own = path.stem.removeprefix(PREFIX)
    split = own.rstrip("0123456789")
    places = [root / own, root / "images" / own, root / split, root / "images", root / split / "images", root]
    return next((place for place in places if is_file(place / name)), places[0])
