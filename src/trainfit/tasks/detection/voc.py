"""Pascal VOC XML: `Annotations/`, `JPEGImages/` and `ImageSets/Main/`, or XML beside the images in split folders."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from trainfit.errors import TrainfitError
from trainfit.tasks.detection.admit import Box, RawImage, RawObject, admit, relative
from trainfit.tasks.detection.coco import SPLIT_WORDS
from trainfit.tasks.detection.samples import Dataset, Finding, ImageRecord
from trainfit.tasks.images import IMAGE_SUFFIXES, read_headers

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True, kw_only=True)
class _Parsed:
    """One XML file, its values not yet checked."""

    where: str
    image: Path
    size: tuple[int, int]
    objects: tuple[tuple[str, Box, bool], ...]
    """Class, box, difficult."""


def find_voc(path: Path) -> dict[str, list[Path]]:
    """The XML files of each split, {} where `path` is no VOC data set.

    `trainval` counts as train where there is no train list; without lists every file of `Annotations/` is train.
    """
    folder, lists = path / "Annotations", path / "ImageSets" / "Main"
    if not folder.is_dir():
        beside: dict[str, list[Path]] = {}
        for word, split in SPLIT_WORDS.items():
            if split not in beside and (xmls := sorted((path / word).glob("*.xml"))):
                beside[split] = xmls
        return beside
    splits = {name: _stems(lists / f"{name}.txt") for name in ("train", "trainval", "val", "test")}
    whole, held = splits.pop("trainval"), set(splits["val"])
    splits["train"] = splits["train"] or [stem for stem in whole if stem not in held]
    if not any(splits.values()):
        return {"train": sorted(folder.glob("*.xml"))}
    return {split: [folder / f"{stem}.xml" for stem in stems] for split, stems in splits.items() if stems}


def read_voc(path: Path) -> Dataset:
    """Reads a Pascal VOC data set; images and objects have running ids.

    Coordinates are kept as written. The original standard counts pixels from 1 and includes the last one, but most
    tools write edges from 0, and a file does not say which: the difference is at most one pixel.
    Objects marked `difficult` are ordinary objects here. Classes are sorted by name, unless a `labels.txt` or
    `classes.txt` lists them, one a line.

    Raises:
        TrainfitError: no XML files.
    """
    files = find_voc(path)
    if not files:
        raise TrainfitError(f"{path}: not Pascal VOC; looked for Annotations/*.xml and train/*.xml")
    findings: list[Finding] = []
    parsed = {split: list(_parse_all(xmls, path, findings)) for split, xmls in files.items()}
    listed = next((path / name for name in ("labels.txt", "classes.txt") if (path / name).is_file()), None)
    used = {name for split in parsed.values() for file in split for name, _, _ in file.objects}
    classes = tuple(listed.read_text("utf-8").split("\n")) if listed else tuple(sorted(used))
    classes = tuple(name.strip() for name in classes if name.strip())
    splits: dict[str, tuple[ImageRecord, ...]] = {}
    for split, xmls in parsed.items():
        splits[split], found = admit(list(_raw_images(xmls, classes, findings)), path, split)
        findings += found
    difficult = sum(hard for split in parsed.values() for file in split for _, _, hard in file.objects)
    if difficult:
        what = f"{difficult} objects are marked difficult: trained on and evaluated like all others"
        findings.append(Finding(severity="note", kind="difficult objects", where="Annotations", message=what))
    return Dataset(
        root=path,
        format="voc",
        classes=classes,
        category_ids=tuple(range(len(classes))),
        splits=splits,
        findings=tuple(findings),
    )


def _stems(file: Path) -> list[str]:
    """First word of each line (a second says whether a class is in the image); none where there is no file."""
    if not file.is_file():
        return []
    return [line.split()[0] for line in file.read_text("utf-8").splitlines() if line.strip()]


def _parse_all(files: list[Path], root: Path, findings: list[Finding]) -> Iterator[_Parsed]:
    for file in files:
        where = relative(file, root)
        try:
            tree = fromstring(file.read_bytes())
        except FileNotFoundError:
            what = "is listed in ImageSets/Main, but not there: its image is left out"
            findings.append(Finding(severity="skipped", kind="missing annotation", where=where, message=what))
        except (ParseError, DefusedXmlException) as error:
            what = f"broken XML: {error}: its image is left out"
            findings.append(Finding(severity="skipped", kind="broken annotation", where=where, message=what))
        else:
            yield _Parsed(
                where=where,
                image=_image_file(file, tree.findtext("filename") or ""),
                size=(_integer(tree.findtext("size/width")), _integer(tree.findtext("size/height"))),
                objects=tuple(_object(element) for element in tree.findall("object")),
            )


def _image_file(xml: Path, filename: str) -> Path:
    """The image of the same stem; copied XML files often carry the `filename` of another."""
    folder = xml.parent if xml.parent.name != "Annotations" else xml.parent.parent / "JPEGImages"
    suffixes = dict.fromkeys((Path(filename).suffix, ".jpg", *IMAGE_SUFFIXES))
    tries = [*(folder / f"{xml.stem}{suffix}" for suffix in suffixes), folder / filename]
    return next((path for path in tries if path.is_file()), folder / (filename or f"{xml.stem}.jpg"))


def _integer(text: str | None) -> int:
    return int(text) if text and text.strip().isdigit() else 0


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


def _raw_images(files: list[_Parsed], classes: tuple[str, ...], findings: list[Finding]) -> Iterator[RawImage]:
    object_id = 0
    for number, (file, header) in enumerate(zip(files, read_headers([file.image for file in files]), strict=True)):
        objects: list[RawObject] = []
        for position, (name, box, _) in enumerate(file.objects, 1):
            object_id += 1
            where = f"{file.where} object {position}"
            if name in classes:
                index = classes.index(name)
                objects.append(RawObject(where=where, id=object_id, class_index=index, box=box))
            else:
                what = f"class {name!r} is none of the classes; add it to the label file or remove the object"
                findings.append(Finding(severity="error", kind="unknown class", where=where, message=what))
        yield RawImage(
            where=file.where, id=number, path=file.image, header=header, size=file.size, objects=tuple(objects)
        )
