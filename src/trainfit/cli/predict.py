"""trainfit predict."""

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
from trainfit.gpus.catalogue import GIB, gpu_with_memory
from trainfit.models.setting import Setting
from trainfit.reports.profile import profile_json, profile_text
from trainfit.values import In


@dataclass(frozen=True, kw_only=True)
class PredictFlags(Generic[AnySetting]):
    """Whether a setting fits a GPU that need not be there: memory of a training step and of evaluation."""

    setting: AnySetting
    """The model, and every knob of its step."""
    gpu: Annotated[str | None, In("card")] = None
    """Name of the card, for instance "RTX 3060"."""
    memory: Annotated[str | None, In("card")] = None
    """Memory of the card, for instance 8GiB: instead of --gpu, or of what that card has."""
    budget: Annotated[str | None, In("card")] = None
    """What it may need at most, for instance 8GiB: exit code 1 where it may need more. Without --gpu and --memory, the card's
    memory too."""
    gpus: Annotated[int, In("card")] = 1
    """Cards of this kind that train together: each also holds NCCL's buffers and that of the gradient exchange."""
    data: Annotated[str | None, In("data")] = None
    """Data set that tells --classes, --objects-per-image and --canvas; it overrides them."""
    allow_outside: Annotated[bool, In("data")] = False
    """Read files that the data set names but does not hold."""
    only_classes: Annotated[str, In("data")] = ""
    """Names of classes of the data set, with commas between; all unless given."""
    alloc_conf: Annotated[str, In("card")] = ""
    """Value of PYTORCH_ALLOC_CONF, for instance expandable_segments:True."""
    cudnn_benchmark: Annotated[bool, In("card")] = False
    """torch.backends.cudnn.benchmark is on: each convolution's first run empties the allocator's cache. trainfit leaves it off."""
    as_json: Annotated[bool, In("output")] = False
    """Print JSON (schema 1) instead of text."""
    html: Annotated[Path | None, In("output")] = None
    """Write the report as one HTML page."""
    snapshot: Annotated[Path | None, In("output")] = None
    """Write the step for PyTorch's memory viewer."""
    force: Annotated[bool, In("output")] = False
    """Overwrite files."""
    cache: Annotated[bool, In("output")] = True
    """Store the traces, and use stored ones."""
    trace_on: Annotated[Literal["cuda", "cpu"], In("output")] = "cuda"
    """cuda: fake tensors of the card. cpu: really run the step here, where a new torch cannot be traced otherwise: slow,
    needs the memory, in float32 and with the CPU's kernels."""


def predict(arguments: PredictFlags[Setting], _given: AbstractSet[str]) -> int:
    """Predict whether a setting fits a GPU; exit code 1 if it exceeds --budget."""
    require_writable((arguments.html, arguments.snapshot), force=arguments.force)
    budget = None if arguments.budget is None else gpu_with_memory(arguments.budget, flag="--budget")
    with StatusLine(f"predicting {arguments.setting.model}...") as progress:
        prediction = api.predict(
            arguments.setting,
            gpu=arguments.gpu,
            memory=arguments.memory if arguments.memory or arguments.gpu else arguments.budget,
            gpus=arguments.gpus,
            data=arguments.data,
            allow_outside=arguments.allow_outside,
            only_classes=arguments.only_classes,
            alloc_conf=arguments.alloc_conf,
            cudnn_benchmark=arguments.cudnn_benchmark,
            cache=arguments.cache,
            trace_on=arguments.trace_on,
            snapshot=arguments.snapshot,
            note=progress.note,
        )
    print(json.dumps(profile_json(prediction)) if arguments.as_json else profile_text(prediction))
    if arguments.html is not None:
        from trainfit.reports.profile_html import profile_html

        write(arguments.html, profile_html(prediction))
    if arguments.snapshot is not None:
        print(f"wrote {arguments.snapshot}", file=sys.stderr)
    if budget is None or prediction.needs.high_bytes <= budget.nominal_memory_bytes:
        return 0
    needs, most = (value / GIB for value in (prediction.needs.high_bytes, budget.nominal_memory_bytes))
    print(f"trainfit: over budget: it may need {needs:.2f} GiB, --budget is {most:.2f} GiB", file=sys.stderr)
    return 1
