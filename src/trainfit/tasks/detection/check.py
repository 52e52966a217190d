"""The check that costs time: every image decoded."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from trainfit.errors import TrainfitError
from trainfit.tasks.detection.admit import relative
from trainfit.tasks.detection.samples import Dataset, Finding, ImageRecord
from trainfit.tasks.images import read_image


def check_dataset(dataset: Dataset, *, progress: Callable[[int, int], None] | None = None) -> Dataset:
    """Decodes every image and leaves out those that fail, each with a `skipped` finding.

    Everything else was checked by `read_dataset` already. A JPEG damaged in the middle may still decode, in grey:
    that is not seen. `progress` is called with the images done and their number.
    """
    total = sum(map(len, dataset.splits.values()))
    done = 0
    findings: list[Finding] = []
    splits: dict[str, tuple[ImageRecord, ...]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for split, records in dataset.splits.items():
            kept: list[ImageRecord] = []
            for record, fault in zip(records, pool.map(_fault, records), strict=True):
                done += 1
                if progress is not None:
                    progress(done, total)
                if fault is None:
                    kept.append(record)
                    continue
                where = relative(record.path, dataset.root)
                what = f"{fault}; its {len(record.classes)} objects are left out"
                findings.append(Finding(severity="skipped", kind="undecodable image", where=where, message=what))
            splits[split] = tuple(kept)
    if not splits["train"]:
        what = "no image of train can be decoded; give a data set with images"
        findings.append(Finding(severity="error", kind="no images", where="train", message=what))
    return replace(dataset, splits=splits, findings=(*dataset.findings, *findings))


def _fault(record: ImageRecord) -> str | None:
    try:
        read_image(record)
    except TrainfitError as error:
        return str(error).removeprefix(f"{record.path}: ")
    return None
