"""What `trainfit check-data` says of images in folders by class: counts, and every defect."""

from dataclasses import replace

from trainfit.tasks.classes.read import read
from trainfit.tasks.classes.samples import ImageFolder
from trainfit.tasks.decoding import decoded, threads_for
from trainfit.tasks.findings import Finding
from trainfit.tasks.images import read_image
from trainfit.tasks.task import DataCheck, Progress, Table


def check(
    data: str,
    *,
    file_format: str | None = None,
    decode: bool = True,
    allow_outside: bool = False,
    progress: Progress | None = None,
) -> DataCheck:
    """Images by split and class, and every image that cannot be used."""
    kept = read(data, file_format=file_format, allow_outside=allow_outside)
    if decode:
        kept = check_dataset(kept, progress=progress)
    counts = {
        split: [sum(record.label == row for record in records) for row in range(len(kept.classes))]
        for split, records in kept.splits.items()
    }
    by_class = tuple((name, *(counts[split][row] for split in counts)) for row, name in enumerate(kept.classes))
    images = ("images", *map(sum, counts.values()))
    return DataCheck(
        dataset=kept,
        title=f"{kept.root}: {kept.format}, {len(kept.classes)} classes",
        sections=(Table(title="", columns=("", *counts), rows=(images, *by_class)),),
        record={
            "root": str(kept.root),
            "format": kept.format,
            "classes": list(kept.classes),
            "splits": {split: {"images": sum(each), "by_class": each} for split, each in counts.items()},
        },
        findings=kept.findings,
    )


def check_dataset(dataset: ImageFolder, *, progress: Progress | None = None) -> ImageFolder:
    """Decode every image and leave out those that fail, each with a `skipped` finding."""
    records = [record for split in dataset.splits.values() for record in split]
    damaged: set[int] = set()
    findings: list[Finding] = []
    for record, fault in decoded(records, read_image, threads=threads_for(records), progress=progress):
        if fault is not None:
            damaged.add(id(record))
            where = str(record.path.relative_to(dataset.root))
            message = fault.removeprefix(f"{record.path}: ")
            findings.append(Finding(severity="skipped", kind="undecodable image", where=where, message=message))
    splits = {split: tuple(r for r in read if id(r) not in damaged) for split, read in dataset.splits.items()}
    if not splits["train"]:
        what = "no image of train can be decoded; give a data set with images"
        findings.append(Finding(severity="error", kind="no images", where="train", message=what))
    return replace(dataset, splits=splits, findings=(*dataset.findings, *findings))
