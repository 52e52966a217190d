"""Reading folders by class: SPLIT/CLASS/*.jpg, or CLASS/*.jpg without splits."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from trainfit.errors import TrainfitError
from trainfit.tasks.classes.samples import ClassRecord, ImageFolder
from trainfit.tasks.findings import Finding, Findings
from trainfit.tasks.images import IMAGE_SUFFIXES, ImageDefect, read_headers

FORMAT = "image-folder"
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
"""Split -> names of its folder."""


def recognises(data: str) -> bool:
    """Whether there are folders of classes that hold images."""
    root = Path(data)
    try:
        splits = _split_folders(root)
        folders = _folders(splits["train"]) if "train" in splits else _folders(root)
        return sum(any(True for _ in _images(folder)) for folder in folders) >= 2
    except OSError:
        return False


def read(
    data: str,
    *,
    file_format: str | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    allow_outside: bool = False,
) -> ImageFolder:
    """The folders by class below `data`; images that cannot be used are left out with a finding.

    Classes are the folders of the training split. Without a validation split, a share of each class is held out, at least
    one image of every class that has two, chosen by file name and `seed`.

    Raises:
        TrainfitError: no such folder, no folders of classes, fewer than two classes, no usable image, or another format.
    """
    if file_format not in (None, FORMAT):
        raise TrainfitError(f"--format {file_format}: data of classes are only read as {FORMAT}")
    root = Path(data)
    if not os.path.isdir(root):  # noqa: PTH112 - Path.is_dir raises for names that no file can have
        raise TrainfitError(f"{data}: no such folder; give the folder that holds train/CLASS/*.jpg, or CLASS/*.jpg")
    folders = _split_folders(root) or {"train": root}
    if "train" not in folders:
        raise TrainfitError(f"{data}: no train folder, only {', '.join(folders)}; name one train")
    classes = tuple(folder.name for folder in _folders(folders["train"]))
    if len(classes) < 2:
        raise TrainfitError(
            f"{folders['train']}: {len(classes)} folders of classes; a classifier needs two, each with its images (CLASS/*.jpg)"
        )
    findings = Findings(str(root))
    splits: dict[str, tuple[ClassRecord, ...]] = {}
    number = 0
    for split, folder in folders.items():
        splits[split] = tuple(_records(folder, classes, findings, root=root, first=number, outside=allow_outside))
        number += len(splits[split])
    if not splits["train"]:
        raise TrainfitError(
            f"{folders['train']}: no usable image; looked for {', '.join(IMAGE_SUFFIXES)}{_first(findings)}"
        )
    for row, name in enumerate(classes):
        if all(record.label != row for record in splits["train"]):
            findings.append(
                _finding("note", "class without images", f"train/{name}", "it has no usable training image")
            )
    if not splits.get("val"):
        splits = _held_out(splits, val_fraction, seed, root, findings)
    return ImageFolder(root=root, splits=splits, classes=classes, findings=tuple(findings.all()))


def _split_folders(root: Path) -> dict[str, Path]:
    names = {folder.name.lower(): folder for folder in _folders(root)}
    folders = {split: next((names[n] for n in known if n in names), None) for split, known in SPLITS.items()}
    return {split: folder for split, folder in folders.items() if folder is not None}


def _folders(root: Path) -> list[Path]:
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _images(folder: Path) -> Iterator[Path]:
    """Images below a folder, at any depth, in the order of their names."""
    for entry in sorted(folder.rglob("*")):
        if entry.suffix.lower() in IMAGE_SUFFIXES and not entry.name.startswith("."):
            yield entry


def _records(
    folder: Path, classes: Sequence[str], findings: Findings, *, root: Path, first: int, outside: bool
) -> Iterator[ClassRecord]:
    inside = root.resolve()
    files: list[tuple[Path, int]] = []
    for place in _folders(folder):
        if place.name not in classes:
            message = "train has no such class; its images are left out"
            findings.append(_finding("skipped", "unknown class", str(place.relative_to(root)), message))
            continue
        for file in _images(place):
            if not outside and not file.resolve().is_relative_to(inside):
                message = "a link out of the data set; read it with --allow-outside"
                findings.append(_finding("skipped", "file outside", str(file.relative_to(root)), message))
                continue
            files.append((file, classes.index(place.name)))
    number = first
    for (file, label), header in zip(files, read_headers([file for file, _ in files]), strict=True):
        if isinstance(header, ImageDefect):
            where = str(file.relative_to(root))
            findings.append(_finding("skipped", header.kind, where, f"{header.message}; left out"))
            continue
        width, height = header.upright
        yield ClassRecord(id=number, path=file, width=width, height=height, label=label)
        number += 1


def _held_out(
    splits: dict[str, tuple[ClassRecord, ...]], fraction: float, seed: int, root: Path, findings: Findings
) -> dict[str, tuple[ClassRecord, ...]]:
    train = splits["train"]
    val_ids: set[int] = set()
    for label in sorted({record.label for record in train}):
        own = [record for record in train if record.label == label]
        ranked = sorted(
            own, key=lambda r: hashlib.sha256(f"{seed} {r.path.relative_to(root)}".encode(errors="replace")).digest()
        )
        wanted = max(1, round(fraction * len(own))) if len(own) > 1 else 0
        val_ids |= {record.id for record in ranked[: min(wanted, len(own) - 1)]}
    if not 0 < fraction < 1 or not val_ids:
        raise TrainfitError(
            f"{root}: no val folder, and {fraction:g} of {len(train)} images cannot be held out by class; give a val "
            "folder, or at least two images of a class and a fraction between 0 and 1"
        )
    what = f"no val folder: {len(val_ids)} of the {len(train)} train images are held out for it, by class (seed {seed})"
    findings.append(_finding("note", "val held out", "train", what))
    return splits | {
        "train": tuple(record for record in train if record.id not in val_ids),
        "val": tuple(record for record in train if record.id in val_ids),
    }


def _first(findings: Findings) -> str:
    listed = findings.all()
    return f"; the first: {listed[0].where}: {listed[0].message}" if listed else ""


def _finding(severity: str, kind: str, where: str, message: str) -> Finding:
    return Finding(severity="note" if severity == "note" else "skipped", kind=kind, where=where, message=message)
