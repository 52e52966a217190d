"""trainfit plan."""

import json
import os
import sys
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Generic, Literal

import tyro

from trainfit.cli.arguments import AnySetting
from trainfit.cli.files import require_writable, write
from trainfit.cli.predict import chosen_gpu
from trainfit.errors import TrainfitError
from trainfit.gpus.catalogue import Gpu
from trainfit.gpus.detect import detect_gpus
from trainfit.memory.alloc_conf import AllocatorConfig
from trainfit.models.setting import Setting, named
from trainfit.planning.dataset import decode_seconds, for_data
from trainfit.planning.make import DEFAULT_EFFECTIVE_BATCH, make_plan
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
    gpu = _gpu(arguments)
    setting, decode_s = named(arguments.setting), None
    if arguments.data is not None:
        from trainfit.tasks.detection.read import read_dataset

        dataset = read_dataset(arguments.data, allow_outside=arguments.allow_outside)
        setting, decode_s = for_data(setting, dataset), decode_seconds(setting, dataset)
    found = make_plan(
        setting,
        gpu,
        effective_batch=arguments.effective_batch,
        gpus=arguments.gpus,
        micro_batch=setting.micro_batch if "micro_batch" in given else None,
        checkpointing=setting.checkpointing if "checkpointing" in given else None,
        allow=arguments.allow,
        config=AllocatorConfig.from_env_string(arguments.alloc_conf),
        cache=arguments.cache,
        decode_s=decode_s,
        cores=os.cpu_count() if decode_s is not None else None,
        note=lambda line: print(line, file=sys.stderr) if sys.stderr.isatty() else None,
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
    here = detect_gpus()
    if not here:
        raise TrainfitError("no GPU is here: name one with --gpu NAME, or give --memory 8GiB")
    taken = sum(process.used_bytes or 0 for process in here[0].processes)
    if taken:
        names = ", ".join(f"{process.name or process.pid}" for process in here[0].processes)
        print(f"{taken / 2**30:.1f} GiB of {here[0].gpu.name} are taken by {names}", file=sys.stderr)
    return replace(here[0].gpu, memory_bytes=here[0].free_bytes, memory_is_nominal=False)
