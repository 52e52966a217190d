"""The check that costs time: every image decoded, every text tokenized."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from trainfit.errors import TrainfitError
from trainfit.tasks.findings import Finding, Findings
from trainfit.tasks.folder import shown
from trainfit.tasks.pairs.read import read_pixels
from trainfit.tasks.pairs.samples import PairDataset, PairRecord
from trainfit.tasks.pairs.statistics import lengths_of, record_of, table_of
from trainfit.tasks.task import DataCheck, Progress

CONTEXT = 77
"""Tokens that CLIP's text towers take; two of them mark the beginning and the end."""
THREADS = 8
"""Each holds one decoded image, of at most 0.7 GiB."""


def check_dataset(dataset: PairDataset, *, progress: Progress | None = None) -> PairDataset:
    """Decode every image and leave out those that fail, each with a `skipped` finding; tokenize every text.

    Texts of more than `CONTEXT` tokens of CLIP's own tokenizer are noted: training cuts them.
    """
    findings = Findings("all splits")
    too_long = _token_counter(findings)
    splits: dict[str, tuple[PairRecord, ...]] = {}
    total = sum(map(len, dataset.splits.values()))
    done = 0
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        for split, records in dataset.splits.items():
            kept: list[PairRecord] = []
            for record, fault in zip(records, pool.map(_fault, records), strict=True):
                done += 1
                if progress is not None:
                    progress(done, total)
                where = _place(record)
                if fault is None:
                    kept.append(record)
                    findings.extend(_too_long(record, where, too_long))
                else:
                    what = f"{fault}; left out with its {len(record.texts)} texts"
                    findings.append(Finding(severity="skipped", kind="undecodable image", where=where, message=what))
            splits[split] = tuple(kept)
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


def _fault(record: PairRecord) -> str | None:
    if record.text_only:
        return None
    try:
        read_pixels(record)
    except TrainfitError as error:
        return str(error).removeprefix(f"{record.file}: ")
    return None


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
