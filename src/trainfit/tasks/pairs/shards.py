"""WebDataset shards: tar files whose members belong together by name. They are indexed once and then read at any place.

So the order of data, a resumed run and the number of ranks are the same as with files: every image is seen once an epoch, and
a run that goes on continues with the very next window. Known limits: shards lie on a disk (no URL, no pipe), are not
compressed, and are indexed at every start, which reads their headers and texts.
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
    """`shard-{0000..0012}.tar` as its files; one path where there are no braces.

    Raises:
        TrainfitError: more files than anyone has.
    """
    match = BRACES.search(pattern)
    if match is None:
        return [Path(pattern)]
    first, last = int(match[1]), int(match[2])
    if not 0 <= last - first < MOST_SHARDS:
        raise TrainfitError(f"{pattern} names {last - first + 1} shards: give from 1 to {MOST_SHARDS}")
    numbers = [f"{number:0{len(match[1])}}" for number in range(first, last + 1)]
    return [
        file for number in numbers for file in expand(f"{pattern[: match.start()]}{number}{pattern[match.end() :]}")
    ]


def read_shard(path: Path, folder: DataFolder, found: Grouped) -> None:
    """Add the samples of one shard that have an image and a text (`.txt`, or `.json` with `caption` or `text`).

    Raises:
        TrainfitError: no such file, or not a tar file.
    """
    if not folder.holds(path):
        raise TrainfitError(f"{path} {OUTSIDE_REPAIR}")
    try:
        with tarfile.open(path, "r:") as shard:
            for key, members in _samples(shard):
                _add(path, shard, key, members, found)
    except FileNotFoundError as error:
        raise TrainfitError(f"{path}: no such file") from error
    except (tarfile.TarError, OSError, EOFError) as error:
        raise TrainfitError(f"{path}: not a complete tar file without compression ({error}); write it again") from error


def _samples(shard: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Members that follow each other and have the same name up to the first dot of its last part."""
    key, members = "", dict[str, tarfile.TarInfo]()
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


def _add(path: Path, shard: tarfile.TarFile, key: str, members: dict[str, tarfile.TarInfo], found: Grouped) -> None:
    where = f"{path.name} {key.removeprefix('/')}"
    image = next((member for suffix, member in members.items() if suffix in IMAGE_SUFFIXES), None)
    if image is None:
        found.skip("no image", where, f"it has only {', '.join(members)}; left out")
        return
    text = _text(shard, members)
    if text is None:
        found.skip("no text", where, "no .txt, and no .json with a caption; left out")
        return
    found.add_in_shard(path, key.removeprefix("/"), (image.offset_data, image.size), [text])


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
