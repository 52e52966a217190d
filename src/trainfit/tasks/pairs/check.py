"""The check that costs time: every image decoded, every text tokenized."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from trainfit.tasks.decoding import decoded
from trainfit.tasks.findings import Finding, Findings
from trainfit.tasks.folder import shown
from trainfit.tasks.pairs.read import read_pixels
from trainfit.tasks.pairs.samples import PairDataset, PairRecord
from trainfit.tasks.pairs.statistics import lengths_of, record_of, table_of
from trainfit.tasks.task import DataCheck, Progress

CONTEXT = 77
"""Tokens that CLIP's text towers take; two of them mark the beginning and the end."""


def check_dataset(dataset: PairDataset, *, progress: Progress | None = None) -> PairDataset:
    """Decode every image and leave out those that fail, each with a `skipped` finding; tokenize every text.

    Texts of more than `CONTEXT` tokens of CLIP's own tokenizer are noted: training cuts them.
    """
    findings = Findings("all splits")
    too_long = _token_counter(findings)
    records = [record for split in dataset.splits.values() for record in split]
    damaged: set[int] = set()
    for record, fault in decoded(records, _decode, progress=progress):
        where = _place(record)
        if fault is None:
            findings.extend(_too_long(record, where, too_long))
            continue
        damaged.add(id(record))
        what = f"{fault.removeprefix(f'{record.file}: ')}; left out with its {len(record.texts)} texts"
        findings.append(Finding(severity="skipped", kind="undecodable image", where=where, message=what))
    splits = {split: tuple(r for r in read if id(r) not in damaged) for split, read in dataset.splits.items()}
    if dataset.format != "classes" and not splits["train"]:
        what = "no image of train can be decoded; give a data set with images"
        findings.append(Finding(severity="error", kind="no images", where="train", message=what))
    return replace(dataset, splits=splits, findings=(*dataset.findings, *findings.all()))


def data_check(dataset: PairDataset) -> DataCheck:
    """What `trainfit check-data` shows of a data set."""
    texts = sum(len(record.texts) for records in dataset.splits.values() for record in records)
    return DataCheck(
        dataset=dataset,
        title=f"{dataset.root}: pairs ({dataset.format}), {texts} texts",
        sections=(table_of(dataset.splits), lengths_of(dataset.splits)),
        record={"root": str(dataset.root), "format": dataset.format, "splits": record_of(dataset.splits)},
        findings=dataset.findings,
    )


def _place(record: PairRecord) -> str:
    return record.file if record.offset < 0 else f"{record.file} at byte {record.offset}"


def _decode(record: PairRecord) -> None:
    if not record.text_only:
        read_pixels(record)


def _token_counter(findings: Findings) -> Callable[[Sequence[str]], Sequence[int]] | None:
    """A function that gives the number of tokens of texts, or None without open_clip."""
    try:
        from open_clip.tokenizer import SimpleTokenizer
    except ImportError:
        what = "the length of texts in tokens is not checked without open_clip: pip install 'trainfit[clip]'"
        findings.append(Finding(severity="note", kind="no tokenizer", where="all splits", message=what))
        return None
    tokenizer: Any = SimpleTokenizer()
    return lambda texts: [len(tokenizer.encode(text)) + 2 for text in texts]


def _too_long(record: PairRecord, where: str, count: Callable[[Sequence[str]], Sequence[int]] | None) -> list[Finding]:
    if count is None:
        return []
    findings: list[Finding] = []
    for text, tokens in zip(record.texts, count(record.texts), strict=True):
        if tokens > CONTEXT:
            what = f"{shown(text)} has {tokens} tokens of CLIP's tokenizer: training cuts it to {CONTEXT}"
            findings.append(Finding(severity="note", kind="over-long text", where=where, message=what))
    return findings
