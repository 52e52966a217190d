"""WebDataset shards: tar files whose members belong together by name. They are indexed once, then read in any order.

The order of data, resuming and the number of ranks therefore work as with files: every image is used once per epoch, and a
resumed run continues with the next window. Known limits: shards must be on a disk (no URL, no pipe) and not compressed, and
they are indexed at every start, which reads their headers and texts.
"""

import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainfit.errors import TrainfitError
from trainfit.tasks.folder import OUTSIDE_REPAIR, DataFolder
from trainfit.tasks.images import IMAGE_SUFFIXES
from trainfit.tasks.pairs.grouped import Grouped

TEXT_BYTES = 1 << 20
JSON_KEYS = ("caption", "text")
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
MOST_SHARDS = 1_000_000


def expand(pattern: str) -> list[Path]:
    """The files of `shard-{0000..0012}.tar`; a single path if there are no braces.

    Raises:
        TrainfitError: more than `MOST_SHARDS` files.
    """
    match = BRACES.search(pattern)
    if match is None:
        return [Path(pattern)]
    first = int(match[1])
    last = int(match[2])
    if not 0 <= last - first < MOST_SHARDS:
        raise TrainfitError(f"{pattern} names {last - first + 1} shards: give from 1 to {MOST_SHARDS}")
    files: list[Path] = []
    for number in range(first, last + 1):
        files += expand(f"{pattern[: match.start()]}{number:0{len(match[1])}}{pattern[match.end() :]}")
    return files


def read_shard(path: Path, folder: DataFolder, grouped: Grouped) -> None:
    """Add the samples of one shard that have an image and a text (`.txt`, or `.json` with `caption` or `text`).

    Raises:
        TrainfitError: no such file, or not a tar file.
    """
    if not folder.holds(path):
        raise TrainfitError(f"{path} {OUTSIDE_REPAIR}")
    try:
        with tarfile.open(path, "r:") as shard:
            for key, members in _samples(shard):
                _add(path, shard, key, members, grouped)
    except FileNotFoundError as error:
        raise TrainfitError(f"{path}: no such file") from error
    except (tarfile.TarError, OSError, EOFError) as error:
        raise TrainfitError(f"{path}: not a complete tar file without compression ({error}); write it again") from error


def _samples(shard: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Group consecutive members whose file names are the same up to the first dot."""
    key = ""
    members: dict[str, tarfile.TarInfo] = {}
    for member in shard:
        if not member.isfile():
            continue
        folder, _, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        own = f"{folder}/{stem}"
        if own != key and members:
            yield key, members
            members = {}
        key = own
        members[f".{suffix.lower()}"] = member
    if members:
        yield key, members


def _add(path: Path, shard: tarfile.TarFile, key: str, members: dict[str, tarfile.TarInfo], grouped: Grouped) -> None:
    where = f"{path.name} {key.removeprefix('/')}"
    image = next((member for suffix, member in members.items() if suffix in IMAGE_SUFFIXES), None)
    if image is None:
        grouped.skip("no image", where, f"it has only {', '.join(members)}; left out")
        return
    text = _text(shard, members)
    if text is None:
        grouped.skip("no text", where, "no .txt, and no .json with a caption; left out")
        return
    grouped.add_in_shard(path, key.removeprefix("/"), (image.offset_data, image.size), [text])


def _text(shard: tarfile.TarFile, members: dict[str, tarfile.TarInfo]) -> str | None:
    for suffix in (".txt", ".json"):
        member = members.get(suffix)
        file = shard.extractfile(member) if member is not None and member.size <= TEXT_BYTES else None
        if file is None:
            continue
        content = file.read().decode("utf-8", "replace")
        if suffix == ".txt":
            return content
        try:
            record: Any = json.loads(content)
        except (ValueError, RecursionError):
            continue
        values = [record.get(key) for key in JSON_KEYS] if isinstance(record, dict) else []
        return next((value for value in values if isinstance(value, str)), None)
    return None
