"""trainfit plan."""

import json
import sys
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Generic, Literal

from trainfit import api
from trainfit.cli.arguments import AnySetting
from trainfit.cli.files import require_writable, write
from trainfit.cli.progress import StatusLine
from trainfit.models.setting import Setting
from trainfit.reports.plan import plan_json, plan_text
from trainfit.values import In


@dataclass(frozen=True, kw_only=True)
class PlanFlags(Generic[AnySetting]):
    """The fastest setting that fits a GPU, which need not be in this machine."""

    setting: AnySetting
    """The model, and its knobs as wanted. --micro-batch and --checkpointing, where given, are planned with alone."""
    gpu: Annotated[str | None, In("card")] = None
    """Name of the card, for instance "RTX 3060"; without it and --memory, the card of this machine, and with
    --gpus N the one with the least free memory of the first N."""
    memory: Annotated[str | None, In("card")] = None
    """Memory of the card, for instance 8GiB: instead of --gpu, or of what that card has."""
    gpus: Annotated[int, In("card")] = 1
    """Cards, each with an equal share of the effective batch."""
    data: Annotated[str | None, In("data")] = None
    """Data set: its classes, fullest image, canvas and decoding time are used."""
    allow_outside: Annotated[bool, In("data")] = False
    """Read files that the data set names but does not hold."""
    only_classes: Annotated[str, In("data")] = ""
    """Names of classes of the data set, with commas between; all unless given."""
    effective_batch: Annotated[int | None, In("batch")] = None
    """Images (or pairs) per optimizer step over all GPUs; held exactly (default 16; CLIP has none)."""
    allow: Annotated[tuple[str, ...], In("model")] = ()
    """Knobs that change what is learned and may be turned where nothing fits otherwise."""
    alloc_conf: Annotated[str, In("card")] = ""
    """Value of PYTORCH_ALLOC_CONF, for instance expandable_segments:True."""
    emit: Annotated[
        Literal["rfdetr", "detectron2", "open_clip", "lightning", "transformers", "accelerate"] | None, In("output")
    ] = None
    """Print the setting as another tool writes it, instead of the report."""
    as_json: Annotated[bool, In("output")] = False
    """Print JSON (schema 1) instead of text."""
    html: Annotated[Path | None, In("output")] = None
    """Write the report as one HTML page."""
    svg: Annotated[Path | None, In("output")] = None
    """Write a picture of the plan, for light and dark pages."""
    out: Annotated[Path | None, In("output")] = None
    """Write the plan file that train, measure and report take."""
    force: Annotated[bool, In("output")] = False
    """Overwrite files."""
    cache: Annotated[bool, In("output")] = True
    """Store the traces, and use stored ones."""


def plan(arguments: PlanFlags[Setting], given: AbstractSet[str]) -> int:
    """Plan the fastest training that fits a GPU; the exit code is 1 if nothing fits."""
    require_writable((arguments.html, arguments.svg, arguments.out), force=arguments.force)
    setting = arguments.setting
    with StatusLine(f"planning {setting.model}...") as progress:
        result = api.plan(
            setting,
            gpu=arguments.gpu,
            memory=arguments.memory,
            gpus=arguments.gpus,
            data=arguments.data,
            allow_outside=arguments.allow_outside,
            only_classes=arguments.only_classes,
            effective_batch=arguments.effective_batch,
            micro_batch=setting.micro_batch if "micro_batch" in given else None,
            checkpointing=setting.checkpointing if "checkpointing" in given else None,
            allow=arguments.allow,
            alloc_conf=arguments.alloc_conf,
            cache=arguments.cache,
            note=progress.note,
        )
    if arguments.html is not None:
        from trainfit.reports.plan_html import plan_html

        write(arguments.html, plan_html(result))
    if arguments.svg is not None:
        from trainfit.reports.plan_svg import plan_svg

        write(arguments.svg, plan_svg(result))
    if arguments.out is not None and result.chosen is not None:
        print(f"wrote {api.save_plan(result, arguments.out)}", file=sys.stderr)
    if arguments.emit is not None:
        emitted = api.emit(result, arguments.emit)
        print(emitted.text)
        print("\n".join(f"note: {note}" for note in emitted.notes), file=sys.stderr)
    else:
        print(json.dumps(plan_json(result)) if arguments.as_json else plan_text(result))
    return 0 if result.chosen is not None else 1
