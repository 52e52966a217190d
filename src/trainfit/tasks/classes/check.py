"""What `trainfit check-data` says of images in folders by class: counts, and every defect."""

from trainfit.errors import TrainfitError
from trainfit.tasks.classes.read import read
from trainfit.tasks.classes.samples import ImageFolder
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
    dataset = read(data, file_format=file_format, allow_outside=allow_outside)
    findings = [*dataset.findings]
    splits = dict(dataset.splits)
    if decode:
        done = 0
        total = sum(map(len, splits.values()))
        for split, records in dataset.splits.items():
            bad: set[int] = set()
            for record in records:
                try:
                    read_image(record)
                except TrainfitError as error:
                    bad.add(record.id)
                    where = str(record.path.relative_to(dataset.root))
                    findings.append(Finding(severity="skipped", kind="damaged image", where=where, message=str(error)))
                done += 1
                if progress is not None:
                    progress(done, total)
            splits[split] = tuple(record for record in records if record.id not in bad)
    kept = ImageFolder(root=dataset.root, splits=splits, classes=dataset.classes, findings=tuple(findings))
    counts = {
        split: [sum(record.label == row for record in records) for row in range(len(kept.classes))]
        for split, records in splits.items()
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
