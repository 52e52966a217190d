"""trainfit plan."""

import json
import sys
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Generic, Literal

import tyro

from trainfit import api
from trainfit.cli.arguments import AnySetting
from trainfit.cli.files import require_writable, write
from trainfit.gpus.catalogue import Gpu
from trainfit.gpus.choice import chosen_gpu, gpu_here
from trainfit.models.setting import Setting
from trainfit.planning.make import DEFAULT_EFFECTIVE_BATCH
from trainfit.planning.plan import to_json
from trainfit.reports.emit import emit
from trainfit.reports.plan import plan_json, plan_text
from trainfit.reports.plan_html import plan_html


@dataclass(frozen=True, kw_only=True)
class Plan(Generic[AnySetting]):
    """Of all settings that fit a GPU, the fastest; the GPU need not be there."""

    setting: tyro.conf.OmitArgPrefixes[tyro.conf.PositionalRequiredArgs[AnySetting]]
    """The model, and its knobs as wanted. --micro-batch and --checkpointing, where given, are planned with alone."""
    gpu: str | None = None
    """Name of the card, for instance "RTX 3060"; without it and --memory, the first card of this machine."""
    memory: str | None = None
    """Memory of the card, for instance 8GiB: instead of --gpu, or of what that card has."""
    gpus: int = 1
    """Cards of this kind."""
    data: str | None = None
    """Data set: its classes, fullest image, canvas and decoding time are used."""
    allow_outside: bool = False
    """Read files that the data set names but does not hold."""
    effective_batch: int = DEFAULT_EFFECTIVE_BATCH
    """Images per optimizer step over all GPUs; held exactly."""
    allow: tuple[str, ...] = ()
    """Knobs that change what is learned and may be turned where nothing fits otherwise."""
    alloc_conf: str = ""
    """As PYTORCH_ALLOC_CONF, for instance expandable_segments:True."""
    emit: Literal["rfdetr", "detectron2", "open_clip", "lightning", "transformers", "accelerate"] | None = None
    """Print the setting as another tool writes it, instead of the report."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print JSON (schema 1) instead of text."""
    html: Path | None = None
    """Write the report as one HTML page."""
    out: Path | None = None
    """Write the plan file that train, measure and report take."""
    force: bool = False
    """Overwrite files."""
    cache: bool = True
    """Store the traces, and use stored ones."""


def plan(arguments: Plan[Setting], given: AbstractSet[str]) -> int:
    """Plan the fastest training that fits a GPU, without the GPU; the exit code is 1 where nothing fits."""
    require_writable((arguments.html, arguments.out), force=arguments.force)
    setting, note = arguments.setting, _note if sys.stderr.isatty() else _ignore
    found = api.plan(
        setting,
        gpu=_gpu(arguments),
        gpus=arguments.gpus,
        data=arguments.data,
        allow_outside=arguments.allow_outside,
        effective_batch=arguments.effective_batch,
        micro_batch=setting.micro_batch if "micro_batch" in given else None,
        checkpointing=setting.checkpointing if "checkpointing" in given else None,
        allow=arguments.allow,
        alloc_conf=arguments.alloc_conf,
        cache=arguments.cache,
        note=note,
    )
    if arguments.html is not None:
        write(arguments.html, plan_html(found))
    if arguments.out is not None and found.chosen is not None:
        write(arguments.out, json.dumps(to_json(found), indent=2) + "\n")
    if arguments.emit is not None:
        emitted = emit(found, arguments.emit)
        print(emitted.text)
        print("\n".join(f"note: {note}" for note in emitted.notes), file=sys.stderr)
    else:
        print(json.dumps(plan_json(found)) if arguments.as_json else plan_text(found))
    return 0 if found.chosen is not None else 1


def _gpu(arguments: Plan[Setting]) -> Gpu:
    """The card that was named, or the first of this machine with what is free of it."""
    if arguments.gpu is not None or arguments.memory is not None:
        return chosen_gpu(arguments.gpu, arguments.memory)
    return gpu_here(_note)


def _note(line: str) -> None:
    print(line, file=sys.stderr)


def _ignore(_line: str) -> None:
    pass
