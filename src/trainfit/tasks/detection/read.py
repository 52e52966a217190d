"""Reads a data set of any format as a `DetectionDataset` that training can use."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from trainfit.errors import TrainfitError
from trainfit.files import cache_folder
from trainfit.tasks.detection.coco import find_coco, read_coco
from trainfit.tasks.detection.sample_set import SAMPLE_SET_VERSION, write_sample_set
from trainfit.tasks.detection.samples import DetectionDataset, ImageRecord
from trainfit.tasks.detection.voc import find_voc, read_voc
from trainfit.tasks.detection.yolo import find_yolo, read_yolo
from trainfit.tasks.findings import Finding, require_none
from trainfit.tasks.held_out import hold_out

_READERS = {"coco": read_coco, "yolo": read_yolo, "voc": read_voc}
_FINDERS = {"coco": find_coco, "yolo": find_yolo, "voc": find_voc}
FORMATS = tuple(_READERS)


def read_dataset(
    path: Path | str,
    *,
    format: str | None = None,  # noqa: A002 - the flag's name
    val_fraction: float = 0.1,
    seed: int = 0,
    allow_outside: bool = False,
) -> DetectionDataset:
    """Reads a data set; `"sample"` is the built-in one (a folder of that name is `./sample`).

    The format is recognised by looking, unless it is given (`coco`, `yolo`, `voc`). Records are what training may
    use, as far as it can be told without decoding (`check_dataset` decodes); findings list the rest. Without a val
    split, max(1, round(val_fraction * n)) images of train are held out, chosen by their names and `seed`. Files that the
    data set names but does not hold are only read with `allow_outside`; else each is an `error` finding, or one here.

    Raises:
        TrainfitError: nothing there, nothing recognised, a broken file, no usable image in train.
    """
    if format not in (None, "sample", *FORMATS):
        raise TrainfitError(f"--format {format}: unknown; it is one of {', '.join(FORMATS)}")
    if str(path) == "sample" and format in (None, "sample", "coco"):
        sample = read_coco(_sample_folder())
        return replace(sample, format="sample")
    if not os.path.exists(path):  # noqa: PTH110 - Path.exists raises for long names
        raise TrainfitError(f"{path}: no such file or folder; give the folder of a data set, or `sample`")
    dataset = _READERS[_format(Path(path), format)](Path(path), allow_outside=allow_outside)
    if not dataset.splits.get("train"):
        raise TrainfitError(_why_empty(dataset, Path(path)))
    if not dataset.splits.get("val"):
        dataset = _held_out(dataset, val_fraction, seed)
    findings = dataset.findings + _between_splits(dataset.splits, dataset.root) + _without_truth(dataset)
    return replace(dataset, findings=findings)


def recognises(data: str) -> bool:
    """Whether a path looks like a data set of a format that detection reads; `sample` is one."""
    if data == "sample":
        return True
    if not os.path.exists(data):  # noqa: PTH110 - Path.exists raises for long names
        return False
    try:
        return any(find(Path(data)) for find in _FINDERS.values())
    except TrainfitError:  # it looks like one, and has a fault that `read_dataset` reports
        return True


def require_no_errors(dataset: DetectionDataset) -> None:
    """Raise TrainfitError with the first `error` finding and the number of further ones; training calls it first."""
    require_none(dataset.findings, f"trainfit check-data {dataset.root}")


def _format(path: Path, given: str | None) -> str:
    if given is not None:
        return given
    formats = [name for name, find in _FINDERS.items() if find(path)]
    if len(formats) > 1:
        raise TrainfitError(f"{path}: looks like {' and '.join(formats)}; choose with --format")
    if not formats:
        raise TrainfitError(
            f"{path}: no data set recognised; looked for COCO (train/_annotations.coco.json, annotations/*.json, "
            "*.json), YOLO (data.yaml), Pascal VOC (Annotations/*.xml, train/*.xml); give the data set's own folder, "
            "or say --format"
        )
    return formats[0]


def _sample_folder() -> Path:
    """The built-in set in the user's cache; written at the first use."""
    folder = cache_folder() / f"sample-v{SAMPLE_SET_VERSION}"
    try:
        return folder if folder.is_dir() else write_sample_set(folder)
    except OSError as error:
        raise TrainfitError(f"{folder}: cannot be written ({error.strerror}); set XDG_CACHE_HOME") from error


def _why_empty(dataset: DetectionDataset, path: Path) -> str:
    if "train" not in dataset.splits:
        return f"{path}: no train split, only {', '.join(dataset.splits)}; name one train, or give its file"
    skipped = [finding for finding in dataset.findings if finding.severity in ("skipped", "error")]
    if not skipped:
        return f"{path}: the train split lists no image; give a data set with images"
    kinds = ", ".join(f"{count} x {kind}" for kind, count in Counter(finding.kind for finding in skipped).items())
    return f"{path}: the train split has no usable image: {kinds}; the first: {skipped[0].where}: {skipped[0].message}"


def _held_out(dataset: DetectionDataset, fraction: float, seed: int) -> DetectionDataset:
    def key(record: ImageRecord) -> bytes:
        return f"{record.path.name} {record.id}".encode(errors="surrogateescape")

    remark = "; test stays untouched" if "test" in dataset.splits else ""
    train, val, finding = hold_out(dataset.splits["train"], fraction, seed, root=dataset.root, key=key, remark=remark)
    splits = {**dataset.splits, "train": train, "val": val}
    return replace(dataset, splits=splits, findings=(*dataset.findings, finding))


def _between_splits(splits: Mapping[str, Sequence[ImageRecord]], root: Path) -> tuple[Finding, ...]:
    """One file in two splits: evaluation would see what was trained on."""
    home: dict[Path, str] = {}
    findings: list[Finding] = []
    for split, records in splits.items():
        for record in records:
            first = home.setdefault(record.path, split)
            if first != split:
                where = os.path.relpath(record.path, root)
                what = f"is in {first} and in {split}"
                findings.append(Finding(severity="note", kind="image in two splits", where=where, message=what))
    return tuple(findings)


def _without_truth(dataset: DetectionDataset) -> tuple[Finding, ...]:
    if any(len(record.classes) for record in dataset.splits["train"]):
        return ()
    what = "no image of train has an object; are the labels where the format wants them?"
    return (Finding(severity="error", kind="no objects", where="train", message=what),)
