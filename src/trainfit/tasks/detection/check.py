"""What `trainfit check-data` says of a data set for detection: counts and sizes, and every defect."""

from collections.abc import Sequence
from dataclasses import asdict, replace

from trainfit.tasks.decoding import decoded, threads_for
from trainfit.tasks.detection.admit import relative
from trainfit.tasks.detection.masks import mask_area
from trainfit.tasks.detection.read import read_dataset
from trainfit.tasks.detection.samples import DetectionDataset, ImageRecord
from trainfit.tasks.detection.statistics import sections_of, statistics
from trainfit.tasks.findings import Finding
from trainfit.tasks.images import read_image
from trainfit.tasks.task import DataCheck, Progress

_REFUSED = "models with masks refuse the data set"


def check(
    data: str,
    *,
    file_format: str | None = None,
    decode: bool = True,
    allow_outside: bool = False,
    progress: Progress | None = None,
) -> DataCheck:
    """Read a data set, decode every image unless that is switched off, and list all defects; see `tasks.task.Task.check`."""
    dataset = read_dataset(data, format=file_format, allow_outside=allow_outside)
    return check_of(check_dataset(dataset, progress=progress) if decode else dataset)


def check_of(dataset: DetectionDataset) -> DataCheck:
    """A data set, its statistics and its findings, for a report."""
    by_split = {split: statistics(records) for split, records in dataset.splits.items()}
    everything = statistics([record for records in dataset.splits.values() for record in records])
    ids = zip(dataset.category_ids, dataset.classes, strict=True)
    return DataCheck(
        dataset=dataset,
        title=f"{dataset.root}: {dataset.format}, {len(dataset.classes)} classes",
        sections=sections_of(by_split, everything, dataset.classes),
        record={
            "root": str(dataset.root),
            "format": dataset.format,
            "classes": [{"id": category, "name": name} for category, name in ids],
            "splits": {split: asdict(counted) for split, counted in by_split.items()},
        },
        findings=dataset.findings,
    )


def check_dataset(dataset: DetectionDataset, *, progress: Progress | None = None) -> DetectionDataset:
    """Decodes every image and leaves out those that fail, each with a `skipped` finding; draws every mask.

    Everything else was checked by `read_dataset` already. A JPEG damaged in the middle may still decode, in grey:
    that is not seen. `progress` is called with the images done and their number. Host memory: `tasks.decoding.DECODE_BYTES`.
    """
    records = [record for split in dataset.splits.values() for record in split]
    damaged: set[int] = set()
    findings: list[Finding] = []
    for record, fault in decoded(records, read_image, threads=threads_for(records), progress=progress):
        where = relative(record.path, dataset.root)
        if fault is None:
            findings += _mask_findings(record, where)
            continue
        damaged.add(id(record))
        message = fault.removeprefix(f"{record.path}: ")
        what = f"{message}; its {len(record.classes)} objects are left out"
        findings.append(Finding(severity="skipped", kind="undecodable image", where=where, message=what))
    splits = {split: tuple(r for r in read if id(r) not in damaged) for split, read in dataset.splits.items()}
    if not splits["train"]:
        what = "no image of train can be decoded; give a data set with images"
        findings.append(Finding(severity="error", kind="no images", where="train", message=what))
    for split, kept in splits.items():
        findings += _without_mask(kept, split, dataset)
    return replace(dataset, splits=splits, findings=(*dataset.findings, *findings))


def _mask_findings(record: ImageRecord, where: str) -> list[Finding]:
    findings: list[Finding] = []
    for number, segmentation in zip(record.object_ids.tolist(), record.segmentations, strict=True):
        if segmentation is not None and mask_area(segmentation, record.height, record.width) == 0:
            what = f"the mask of annotation {number} has no pixel in the image; training takes it as it is"
            findings.append(Finding(severity="note", kind="empty mask", where=where, message=what))
    return findings


def _without_mask(records: Sequence[ImageRecord], split: str, dataset: DetectionDataset) -> list[Finding]:
    """A note where some objects have masks and others have none: models with masks refuse such a set."""
    shapes = [(r, s) for r in records for s, crowd in zip(r.segmentations, r.crowd, strict=True) if not crowd]
    bare = [record for record, segmentation in shapes if segmentation is None]
    if len(bare) in (0, len(shapes)):
        return []
    what = f"{len(bare)} of {len(shapes)} objects have none, the first in {relative(bare[0].path, dataset.root)}"
    return [Finding(severity="note", kind="objects without a mask", where=split, message=f"{what}: {_REFUSED}")]
