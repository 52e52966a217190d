"""Groups rows of images and texts by image: an image is one record, however many texts it has."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from trainfit.tasks.findings import Finding, Findings
from trainfit.tasks.folder import OUTSIDE, OUTSIDE_REPAIR, DataFolder, is_file, is_file_name, shown
from trainfit.tasks.pairs.samples import PairRecord


class Grouped:
    """Collects the pairs of one split."""

    def __init__(self, split: str, folder: DataFolder) -> None:
        """Start without records; `folder` decides which files may be read."""
        self.split = split
        self.folder = folder
        self.findings = Findings(split)
        self._texts: dict[str, list[str]] = {}
        self._locations: dict[str, tuple[str, int, int]] = {}
        self._refused: set[str] = set()

    def skip(self, kind: str, where: str, message: str) -> None:
        """Add a finding about a row that is left out."""
        self.findings.append(Finding(severity="skipped", kind=kind, where=where, message=message))

    def add(self, path: Path, texts: Sequence[str], where: str) -> None:
        """Add an image file with texts; if the file or every text is missing, it is left out with a finding."""
        key = os.path.normpath(path)
        if key in self._refused:
            return
        if key not in self._locations:
            if not is_file_name(key) or not is_file(Path(key)):
                self._refused.add(key)
                self.skip("missing image", where, f"{shown(str(path))}: no such file; left out")
                return
            if not self.folder.holds(Path(key)):
                self._refused.add(key)
                error = Finding(severity="error", kind=OUTSIDE, where=where, message=f"{shown(key)} {OUTSIDE_REPAIR}")
                self.findings.append(error)
                return
        self._add(key, (key, -1, 0), texts, where)

    def add_in_shard(self, shard: Path, name: str, extent: tuple[int, int], texts: Sequence[str]) -> None:
        """Add an image in a shard; `extent` is its offset and length in bytes."""
        self._add(f"{shard}/{name}", (str(shard), *extent), texts, f"{shard.name} {name}")

    def _add(self, key: str, location: tuple[str, int, int], texts: Sequence[str], where: str) -> None:
        full = [text for text in (each.strip() for each in texts) if text]
        if not full:
            self.skip("empty text", where, "the image has no text; left out")
            return
        self._locations.setdefault(key, location)
        own = self._texts.setdefault(key, [])
        for text in full:
            if text in own:
                message = f"this image has {shown(text)} already; counted once"
                self.findings.append(Finding(severity="mended", kind="pair twice", where=where, message=message))
            else:
                own.append(text)

    def records(self) -> tuple[PairRecord, ...]:
        """The images in the order in which they were added."""
        return tuple(
            PairRecord(id=number, file=file, texts=tuple(self._texts[key]), offset=offset, length=length)
            for number, (key, (file, offset, length)) in enumerate(self._locations.items())
        )

    def all_findings(self) -> list[Finding]:
        """All findings, including those of texts that several images share."""
        images: Counter[str] = Counter()
        for texts in self._texts.values():
            images.update(texts)
        shared = [(text, count) for text, count in images.items() if count > 1]
        for text, count in shared:
            message = (
                f"{shown(text)} belongs to {count} images, which are negatives of each other without --positives texts"
            )
            self.findings.append(Finding(severity="note", kind="duplicate text", where=self.split, message=message))
        return self.findings.all()
