"""Reads image-text pairs of any supported format into a `PairDataset`."""

import io
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from PIL import Image

from trainfit.errors import TrainfitError
from trainfit.tasks.findings import Finding
from trainfit.tasks.folder import DataFolder
from trainfit.tasks.held_out import hold_out
from trainfit.tasks.images import read_rgb
from trainfit.tasks.pairs.captions import caption_files, read_captions
from trainfit.tasks.pairs.folder import class_folders, has_texts, read_classes, read_folder
from trainfit.tasks.pairs.grouped import Grouped
from trainfit.tasks.pairs.samples import PairDataset, PairRecord
from trainfit.tasks.pairs.shards import expand, read_shard
from trainfit.tasks.pairs.tables import ANY, SUFFIXES, TableColumns, parse_columns, read_table

READERS = {"folder": read_folder, "coco": read_captions, "webdataset": read_shard}
TABLE = "table"
FORMATS = (TABLE, *READERS, "classes")
"""`table:IMAGE,TEXT,SEPARATOR` names a table's columns too."""
TOGETHER = "::"
"""Between sources that are read as one, as open_clip joins them."""
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
"""Split -> names of its files and folders."""


def read_dataset(
    path: str,
    *,
    file_format: str | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    allow_outside: bool = False,
) -> PairDataset:
    """Read pairs; the format is detected unless it is given.

    Without a val split, max(1, round(val_fraction * n)) images of train are held out, chosen by their names and `seed`.

    Raises:
        TrainfitError: nothing there, nothing recognised, a broken file, no usable image in train.
    """
    file_format, columns = _with_columns(file_format)
    name, parts = find(path, file_format)
    root = _root(path, parts)
    folder = DataFolder(root, allow_outside=allow_outside)
    if name == "classes":
        classes, records = read_classes(parts["val"][0], folder)
        return PairDataset(root=root, format=name, splits={"train": (), "val": records}, findings=(), classes=classes)
    splits: dict[str, tuple[PairRecord, ...]] = {}
    findings: list[Finding] = []
    read = partial(read_table, chosen=columns) if name == TABLE else READERS[name]
    for split, files in parts.items():
        grouped = Grouped(split, folder)
        for file in files:
            read(file, folder, grouped)
        splits[split] = grouped.records()
        findings += grouped.all_findings()
    dataset = PairDataset(root=root, format=name, splits=splits, findings=tuple(findings))
    if not splits.get("train"):
        raise TrainfitError(_why_empty(dataset, path))
    dataset = dataset if splits.get("val") else _held_out(dataset, val_fraction, seed)
    return replace(dataset, findings=dataset.findings + _between_splits(dataset.splits))


def _with_columns(file_format: str | None) -> tuple[str | None, TableColumns]:
    """`table:IMAGE,TEXT` as the format and its columns."""
    if file_format is None or not file_format.startswith(f"{TABLE}:"):
        return file_format, ANY
    return TABLE, parse_columns(file_format.removeprefix(f"{TABLE}:"))


def find(path: str, file_format: str | None = None) -> tuple[str, Mapping[str, list[Path]]]:
    """The format of a data set, and its files or folders by split.

    Raises:
        TrainfitError: nothing there, nothing recognised, or no such format.
    """
    if file_format is not None and file_format not in FORMATS:
        raise TrainfitError(f"--format {file_format}: unknown; of pairs it is one of {', '.join(FORMATS)}")
    detected = look(path, file_format)
    if detected is None:
        _refuse_sources(path)
        if not os.path.exists(path):  # noqa: PTH110 - Path.exists raises for long names
            raise TrainfitError(f"{path}: no such file or folder; give a table, a folder, or shards of pairs")
        raise TrainfitError(
            f"{path}: no pairs recognised; looked for tables (*.csv, *.tsv, *.jsonl; train.csv and val.csv in a folder), "
            "COCO captions (annotations/captions_*.json), shards (*.tar), and images with a .txt beside them"
        )
    return detected


def _refuse_sources(path: str) -> None:
    """Say what is wrong with a URL, a pipe, or one of several sources; nothing where the path is none of these."""
    for source in path.split(TOGETHER):
        if "://" in source or source.startswith("pipe:"):
            raise TrainfitError(
                f"{source}: pairs are read from files on a disk, in any order, not from a URL or a pipe: download the shards, "
                "and give their files or their folder"
            )
        missing = next((file for file in expand(source) if not file.is_file()), None)
        if TOGETHER in path and Path(source).suffix not in (".tar", *SUFFIXES):
            raise TrainfitError(
                f"{source}: sources joined by {TOGETHER} are shards (*.tar) or tables (*.csv, *.tsv, *.jsonl)"
            )
        if missing is not None and missing != Path(path):
            raise TrainfitError(f"{missing}: no such file; {path} names it")
    if TOGETHER in path:
        raise TrainfitError(f"{path}: sources joined by {TOGETHER} are all shards or all tables")


def look(path: str, file_format: str | None = None) -> tuple[str, Mapping[str, list[Path]]] | None:
    """The result of `find`, or None if no format is recognised."""
    finders = {"table": _tables, "coco": _captions, "webdataset": _shards, "folder": _folders, "classes": _classes}
    for name, finder in finders.items():
        if file_format in (None, name):
            try:
                by_split = finder(path)
            except (OSError, ValueError):  # no such folder, or a name that no file can have
                continue
            if by_split:
                return name, by_split
    return None


def _tables(path: str) -> dict[str, list[Path]]:
    root = Path(path)
    if root.suffix in SUFFIXES:
        tables = [Path(source) for source in path.split(TOGETHER)]
        return {"train": tables} if all(each.suffix in SUFFIXES and each.is_file() for each in tables) else {}
    return _by_split([each for each in sorted(root.iterdir()) if each.suffix in SUFFIXES])


def _captions(path: str) -> dict[str, list[Path]]:
    root = Path(path)
    if root.suffix == ".json":
        return {"train": [root]} if root.is_file() and root.name.startswith("captions") else {}
    return {split: [file] for split, file in caption_files(root).items()}


def _shards(path: str) -> dict[str, list[Path]]:
    if path.endswith(".tar"):
        sources = path.split(TOGETHER)
        files = [file for source in sources for file in expand(source)]
        are_shards = all(source.endswith(".tar") for source in sources) and all(file.is_file() for file in files)
        return {"train": files} if are_shards else {}
    root = Path(path)
    by_split: dict[str, list[Path]] = {}
    for split, names in SPLITS.items():
        for name in names:
            shards = sorted((root / name).glob("*.tar"))
            if shards:
                by_split.setdefault(split, []).extend(shards)
    return by_split or _by_split(sorted(root.glob("*.tar")))


def _folders(path: str) -> dict[str, list[Path]]:
    root = Path(path)
    by_split = {split: [root / name for name in names if has_texts(root / name)] for split, names in SPLITS.items()}
    by_split = {split: folders for split, folders in by_split.items() if folders}
    if by_split:
        return by_split
    return {"train": [root]} if root.is_dir() and has_texts(root) else {}


def _classes(path: str) -> dict[str, list[Path]]:
    for root in (Path(path) / "val", Path(path)):
        if root.is_dir() and class_folders(root):
            return {"val": [root]}
    return {}


def _by_split(files: list[Path]) -> dict[str, list[Path]]:
    """Files by the split that their names begin with; if none names a split, all are train."""
    by_split: dict[str, list[Path]] = {}
    for split, names in SPLITS.items():
        own = [file for file in files if file.stem.lower().startswith(names)]
        if own:
            by_split[split] = own
    if by_split:
        return by_split
    return {"train": files} if files else {}


def _root(path: str, parts: Mapping[str, list[Path]]) -> Path:
    root = Path(path)
    if root.is_dir():
        return root
    if TOGETHER in path:
        files = [file for own in parts.values() for file in own]
        return Path(os.path.commonpath([file.absolute().parent for file in files]))
    first = next(iter(parts.values()))[0]
    return first.parent.parent if first.parent.name == "annotations" else first.parent


def _why_empty(dataset: PairDataset, path: str) -> str:
    skipped = [finding for finding in dataset.findings if finding.severity in ("skipped", "error")]
    if "train" not in dataset.splits:
        return f"{path}: no train split, only {', '.join(dataset.splits)}; name one train, or give its file"
    if not skipped:
        return f"{path}: it lists no pair; give a data set with images and texts"
    first = skipped[0]
    return f"{path}: no usable pair: {len(skipped)} left out, the first: {first.where}: {first.kind}: {first.message}"


def _held_out(dataset: PairDataset, fraction: float, seed: int) -> PairDataset:
    def key(record: PairRecord) -> bytes:
        return f"{Path(record.file).name} {record.offset} {record.texts[0]}".encode(errors="surrogatepass")

    train, val, finding = hold_out(dataset.splits["train"], fraction, seed, root=dataset.root, key=key)
    splits = {**dataset.splits, "train": train, "val": val}
    return replace(dataset, splits=splits, findings=(*dataset.findings, finding))


def _between_splits(splits: Mapping[str, tuple[PairRecord, ...]]) -> tuple[Finding, ...]:
    """Find images that are in two splits: evaluation would use images of the training."""
    split_of: dict[tuple[str, int], str] = {}
    findings: list[Finding] = []
    for split, records in splits.items():
        for record in records:
            first = split_of.setdefault((record.file, record.offset), split)
            if first != split:
                message = f"is in {first} and in {split}"
                finding = Finding(severity="note", kind="image in two splits", where=record.file, message=message)
                findings.append(finding)
    return tuple(findings)


def read_pixels(record: PairRecord) -> Image.Image:
    """The record's image in RGB, with its EXIF orientation applied.

    Raises:
        TrainfitError: the file is missing or damaged; it names the file.
    """
    if record.offset < 0:
        return read_rgb(record.path)
    try:
        with record.path.open("rb") as shard:
            shard.seek(record.offset)
            content = shard.read(record.length)
    except OSError as error:
        raise TrainfitError(f"{record.file}: {error.strerror or error}") from error
    return read_rgb(record.path, io.BytesIO(content))
