"""trainfit explain."""

import json
import sys
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from trainfit.errors import TrainfitError
from trainfit.explaining.explain import explain_bytes
from trainfit.explaining.snapshot import MOST_BYTES
from trainfit.files import read_bytes
from trainfit.gpus.catalogue import chosen_gpu
from trainfit.models.setting import make_setting
from trainfit.reports.explain import explain_json, explain_text
from trainfit.values import In

STDIN = "-"


@dataclass(frozen=True, kw_only=True)
class Explain:
    """Why memory ran out: from an error message, a log, or a memory snapshot of PyTorch."""

    file: Annotated[str, In(positional=True)]
    """The file, or - for what is piped in."""
    model: str | None = None
    """The model that ran, for what each of its knobs would free."""
    micro_batch: int = 1
    """Micro-batch of that model when memory ran out."""
    gpu: str | None = None
    """The card, where the message does not say how much memory it has."""
    memory: str | None = None
    """Memory of the card, for instance 8GiB."""
    trace: bool = False
    """Price knobs that no stored trace covers too: some 10 s each."""
    as_json: bool = False
    """Print JSON (schema 1) instead of text."""


def explain(arguments: Explain, _given: AbstractSet[str]) -> int:
    """Explain an out-of-memory error; nothing of the file is run."""
    if arguments.file == STDIN:
        data = sys.stdin.buffer.read(MOST_BYTES + 1)
        source = "what was piped in"
    else:
        data = _content(Path(arguments.file))
        source = arguments.file
    setting = make_setting(arguments.model, micro_batch=arguments.micro_batch) if arguments.model is not None else None
    known = arguments.gpu is not None or arguments.memory is not None
    result = explain_bytes(
        data,
        source,
        setting=setting,
        gpu=chosen_gpu(arguments.gpu, arguments.memory) if known else None,
        trace=arguments.trace,
        note=_note,
    )
    print(json.dumps(explain_json(result)) if arguments.as_json else explain_text(result))
    return 0


def _content(path: Path) -> bytes:
    """The file's bytes.

    Raises:
        TrainfitError: a folder, a pipe, no file, or one that is too large to be a log or a snapshot.
    """
    if path.is_dir():
        raise TrainfitError(f"{path} is a folder: give a log, a message or a snapshot file")
    try:
        return read_bytes(path, limit=MOST_BYTES)
    except OSError as error:
        raise TrainfitError(
            f"{path} cannot be read ({error.strerror}): give a log, a message or a snapshot file"
        ) from error


def _note(line: str) -> None:
    if sys.stderr.isatty():
        print(line, file=sys.stderr)
