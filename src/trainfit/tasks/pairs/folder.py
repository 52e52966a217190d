"""Reads folders: images with text files beside them, and images in folders by class for zero-shot classification."""

import os
from collections.abc import Iterator
from pathlib import Path

from trainfit.errors import TrainfitError
from trainfit.tasks.folder import DataFolder, Malformed, named
from trainfit.tasks.images import IMAGE_SUFFIXES
from trainfit.tasks.pairs.grouped import Grouped
from trainfit.tasks.pairs.samples import PairRecord

CLASS_NAMES = "classnames.txt"
"""One class name per line, in the order of the folders' names. Without this file the folders' names are used."""
TEMPLATES = "templates.txt"
"""One template per line, with "{}" in the place of the class name."""
DEFAULT_TEMPLATES = ("a photo of a {}.",)
TEXT_BYTES = 1 << 20


def images_below(folder: Path) -> Iterator[Path]:
    """Image files in a folder and those below it, in a fixed order."""
    for path, folders, files in os.walk(folder):
        folders.sort()
        yield from (Path(path, name) for name in sorted(files) if Path(name).suffix.lower() in IMAGE_SUFFIXES)


def has_texts(folder: Path) -> bool:
    """Whether the first image has a text file beside it."""
    first = next(images_below(folder), None)
    return first is not None and first.with_suffix(".txt").exists()


def read_folder(root: Path, folder: DataFolder, grouped: Grouped) -> None:
    """Add every image with the lines of the text file beside it, which has the same name and the suffix .txt."""
    for image in images_below(root):
        text = image.with_suffix(".txt")
        where = str(image.relative_to(folder.root))
        try:
            lines = folder.read_text(text, TEXT_BYTES).splitlines()
        except FileNotFoundError:
            grouped.skip("no text", where, f"no file {text.name} beside it; left out")
            continue
        except Malformed as error:
            grouped.skip("unreadable text", where, f"{text.name} {error}; left out")
            continue
        grouped.add(image, lines, where)


def class_folders(root: Path) -> list[Path]:
    """The class folders of a data set for zero-shot classification: each contains images, and none contains texts."""
    folders = sorted(each for each in root.iterdir() if each.is_dir()) if root.is_dir() else []
    with_images = [each for each in folders if next(images_below(each), None) is not None]
    return [] if any(has_texts(each) for each in with_images) else with_images


def read_classes(root: Path, folder: DataFolder) -> tuple[tuple[str, ...], tuple[PairRecord, ...]]:
    """The class names; and the records of their images, and of the texts for each class.

    Raises:
        TrainfitError: the list of names does not fit the folders, or a template has no "{}".
    """
    folders = class_folders(root)
    names = _lines(folder, CLASS_NAMES)
    name_file = folder.root / CLASS_NAMES
    if names and len(names) != len(folders):
        raise TrainfitError(f"{name_file} has {len(names)} names for {len(folders)} folders: give one per folder")
    names = names or tuple(each.name for each in folders)
    templates = _lines(folder, TEMPLATES) or DEFAULT_TEMPLATES
    odd = next((each for each in templates if "{}" not in each), None)
    if odd is not None:
        raise TrainfitError(f'{folder.root / TEMPLATES}: {odd!r} has no "{{}}" in the place of the class name')
    records: list[PairRecord] = []
    for label, (class_folder, name) in enumerate(zip(folders, names, strict=True)):
        texts = tuple(template.replace("{}", name) for template in templates)
        source = str(name_file if name_file.exists() else class_folder)
        records.append(PairRecord(id=len(records), file=source, texts=texts, label=label, text_only=True))
        for image in images_below(class_folder):
            if folder.holds(image):
                records.append(PairRecord(id=len(records), file=str(image), texts=(), label=label))
    return names, tuple(records)


def _lines(folder: DataFolder, name: str) -> tuple[str, ...]:
    """The lines of a file in the data set's folder that are not blank; none if there is no such file."""
    path = folder.root / name
    try:
        text = folder.read_text(path, TEXT_BYTES)
    except FileNotFoundError:
        return ()
    except Malformed as error:
        raise named(path, error) from error
    return tuple(line.strip() for line in text.splitlines() if line.strip())
