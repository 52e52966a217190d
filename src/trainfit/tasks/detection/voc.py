"""Pascal VOC XML: `Annotations/`, `JPEGImages/` and `ImageSets/Main/`, or XML beside the images in split folders."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element

from trainfit.errors import TrainfitError
from trainfit.tasks.detection.admit import Box, RawImage, RawObject, admit, relative
from trainfit.tasks.detection.coco import SPLIT_WORDS
from trainfit.tasks.detection.samples import DetectionDataset, ImageRecord
from trainfit.tasks.findings import Finding, Findings
from trainfit.tasks.folder import (
    OUTSIDE,
    XML_BYTES,
    DataFolder,
    Malformed,
    Outside,
    is_file,
    is_file_name,
    parse_xml,
    pixels,
    shown,
)
from trainfit.tasks.images import IMAGE_SUFFIXES

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True, kw_only=True)
class _Parsed:
    """One XML file, its values not yet checked."""

    where: str
    """The file, for messages."""
    image: Path
    """The image file."""
    size: tuple[int, int]
    """(width, height) as annotated."""
    objects: tuple[tuple[str, Box, bool], ...]
    """Class, box, difficult."""


def find_voc(path: Path, data: DataFolder | None = None) -> dict[str, list[Path]]:
    """The XML files of each split, {} where `path` is not a VOC data set.

    `trainval` counts as train where there is no train list; without lists every file of `Annotations/` is train.

    Raises:
        TrainfitError: a list cannot be read, or lies outside of `data` (by default `path`).
    """
    data = data or DataFolder(path)
    folder = path / "Annotations"
    lists = path / "ImageSets" / "Main"
    if not folder.is_dir():
        beside: dict[str, list[Path]] = {}
        for word, split in SPLIT_WORDS.items():
            if split not in beside and (xmls := sorted((path / word).glob("*.xml"))):
                beside[split] = xmls
        return beside
    splits = {name: _stems(lists / f"{name}.txt", data) for name in ("train", "trainval", "val", "test")}
    whole = splits.pop("trainval")
    val_stems = set(splits["val"])
    splits["train"] = splits["train"] or [stem for stem in whole if stem not in val_stems]
    if not any(splits.values()):
        return {"train": sorted(folder.glob("*.xml"))}
    return {split: [folder / f"{stem}.xml" for stem in stems] for split, stems in splits.items() if stems}


def read_voc(path: Path, *, allow_outside: bool = False) -> DetectionDataset:
    """Reads a Pascal VOC data set; images and objects have running ids.

    Coordinates are kept as written. The original standard counts pixels from 1 and includes the last one, but most
    tools write edges from 0, and a file does not say which: the difference is at most one pixel.
    Objects marked `difficult` are ordinary objects here. Classes are sorted by name, unless a `labels.txt` or
    `classes.txt` lists them, one a line.

    Raises:
        TrainfitError: no XML files.
    """
    folder = DataFolder(path, allow_outside=allow_outside)
    files = find_voc(path, folder)
    if not files:
        raise TrainfitError(f"{path}: not Pascal VOC; looked for Annotations/*.xml and train/*.xml")
    findings = Findings("Annotations")
    parsed = {split: list(_parse_all(xmls, folder, findings)) for split, xmls in files.items()}
    classes = _classes(folder, [file for split in parsed.values() for file in split])
    splits: dict[str, tuple[ImageRecord, ...]] = {}
    for split, xmls in parsed.items():
        splits[split], own = admit(list(_raw_images(xmls, folder, classes, findings)), path, split)
        findings.extend(own)
    difficult = sum(hard for split in parsed.values() for file in split for _, _, hard in file.objects)
    if difficult:
        what = f"{difficult} objects are marked difficult: trained on and evaluated like all others"
        findings.append(Finding(severity="note", kind="difficult objects", where="Annotations", message=what))
    return DetectionDataset(
        root=path,
        format="voc",
        classes=classes,
        category_ids=tuple(range(len(classes))),
        splits=splits,
        findings=tuple(findings.all()),
    )


def _classes(folder: DataFolder, files: list[_Parsed]) -> tuple[str, ...]:
    """The classes of the label file, each once, else the ones in use by name."""
    for listed in (folder.root / "labels.txt", folder.root / "classes.txt"):
        if is_file(listed):
            return tuple(dict.fromkeys(name for _, name in folder.read_lines(listed)))
    return tuple(sorted({name for file in files for name, _, _ in file.objects if name}))


def _stems(file: Path, folder: DataFolder) -> list[str]:
    """First word of each line (a second says whether a class is in the image); none where there is no file."""
    return [line.split()[0] for _, line in folder.read_lines(file)] if is_file(file) else []


def _parse_all(files: list[Path], folder: DataFolder, findings: Findings) -> Iterator[_Parsed]:
    for file in files:
        where = relative(file, folder.root)
        try:
            tree = parse_xml(folder.read_bytes(file, XML_BYTES))
        except FileNotFoundError:
            what = "is listed in ImageSets/Main, but not there: its image is left out"
            findings.append(Finding(severity="skipped", kind="missing annotation", where=where, message=what))
        except Outside as error:
            findings.append(Finding(severity="error", kind=OUTSIDE, where=where, message=str(error)))
        except Malformed as error:
            what = f"{error}: its image is left out"
            findings.append(Finding(severity="skipped", kind="broken annotation", where=where, message=what))
        else:
            yield _Parsed(
                where=where,
                image=_image_file(file, tree.findtext("filename") or ""),
                size=(pixels(tree.findtext("size/width")), pixels(tree.findtext("size/height"))),
                objects=tuple(_object(element) for element in tree.findall("object")),
            )


def _image_file(xml: Path, filename: str) -> Path:
    """The image of the same stem; copied XML files often carry the `filename` of another."""
    folder = xml.parent if xml.parent.name != "Annotations" else xml.parent.parent / "JPEGImages"
    if not is_file_name(filename):
        filename = ""
    suffixes = dict.fromkeys((Path(filename).suffix, ".jpg", *IMAGE_SUFFIXES))
    tries = [*(folder / f"{xml.stem}{suffix}" for suffix in suffixes), folder / filename]
    return next((path for path in tries if is_file(path)), folder / (filename or f"{xml.stem}.jpg"))


def _object(element: Element) -> tuple[str, Box, bool]:
    x0, y0, x1, y1 = (_number(element.findtext(f"bndbox/{corner}")) for corner in _CORNERS)
    name = (element.findtext("name") or "").strip()
    return name, (x0, y0, x1, y1), (element.findtext("difficult") or "").strip() == "1"


def _number(text: str | None) -> float:
    """A coordinate; NaN, which `admit` reports, for what is not a number."""
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")


def _raw_images(
    files: list[_Parsed], folder: DataFolder, classes: tuple[str, ...], findings: Findings
) -> Iterator[RawImage]:
    indices = {name: index for index, name in enumerate(classes)}
    object_id = 0
    for number, (file, header) in enumerate(zip(files, folder.headers([file.image for file in files]), strict=True)):
        objects: list[RawObject] = []
        for position, (name, box, _) in enumerate(file.objects, 1):
            object_id += 1
            where = f"{file.where} object {position}"
            if name in indices:
                objects.append(RawObject(where=where, id=object_id, class_index=indices[name], box=box))
            else:
                what = f"class {shown(name)} is none of the classes; add it to the label file or remove the object"
                findings.append(Finding(severity="error", kind="unknown class", where=where, message=what))
        yield RawImage(
            where=file.where, id=number, path=file.image, header=header, size=file.size, objects=tuple(objects)
        )
