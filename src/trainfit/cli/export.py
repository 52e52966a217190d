"""trainfit export."""

import sys
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from trainfit.cli.files import require_writable
from trainfit.errors import TrainfitError
from trainfit.values import In, Range, require_valid

TOLERANCE = 1e-3
"""The largest difference, relative to the largest value of an output, that counts as equal: a thousand roundings of float32."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """The model to export, and its form."""

    run: Annotated[Path, In(positional=True)]
    """Run folder, or a weights file: of trainfit, or of the upstream project."""
    images: Annotated[tuple[Path, ...], In(positional=True)] = ()
    """Images to compare the file on; the run's validation images unless given."""
    format: str = "onnx"
    """onnx; of another format the command of the upstream project is printed."""
    model: str | None = None
    """Model that upstream's weights are of."""
    batch_size: Annotated[int, Range(1, 1024)] = 1
    """Images that the file takes at once."""
    dynamic_batch: bool = False
    """Any number of images at once."""
    out: Annotated[Path | None, In("output")] = None
    """The file; best.onnx in the run folder unless given."""
    force: Annotated[bool, In("output")] = False
    """Overwrite it."""


def export(arguments: Export, _given: AbstractSet[str]) -> int:
    """Export a model by its upstream project, and compare the file with PyTorch."""
    from trainfit.tasks.media import find_media
    from trainfit.training import exporting
    from trainfit.training.distributed import choose_device
    from trainfit.training.inference import load_model

    require_valid(arguments)
    media = find_media(arguments.images, _note) if arguments.images else []
    run = arguments.run
    out = arguments.out or (run / "best.onnx" if run.is_dir() else Path(run.name).with_suffix(".onnx"))
    loaded = load_model(run, choose_device("cpu", 0), model=arguments.model)
    exporter = exporting.exporter_of(loaded)
    if arguments.format in exporter.UPSTREAMS:
        weights = run / loaded.workload.export_name if run.is_dir() else run
        print(exporter.command(weights, arguments.format))
        return 0
    if arguments.format not in exporter.FORMATS:
        known = ", ".join([*exporter.FORMATS, *exporter.UPSTREAMS])
        raise TrainfitError(f"--format {arguments.format} is not known: one of {known}")
    require_writable((out,), force=arguments.force)
    batch = {"batch_size": arguments.batch_size}
    exporting.export(loaded, exporter, out, dynamic_batch=arguments.dynamic_batch, **batch)
    print(f"wrote {out}", file=sys.stderr)
    samples = exporting.samples_of(loaded, run, [medium.path for medium in media if not medium.is_video], _note)
    result = exporting.compare(loaded, exporter, out, samples, **batch)
    on = f"{result.images} images" if result.images else "noise"
    words = [f"{name} {value:.1e} of {result.sizes[name]:.3g}" for name, value in result.differences.items()]
    print(f"{out}: onnxruntime differs from PyTorch on {on} by at most {', '.join(words)}")
    equal = all(value <= TOLERANCE * result.sizes[name] for name, value in result.differences.items())
    if not equal:
        print(
            f"trainfit: error: these are more than {TOLERANCE:g} of the largest value: do not use {out}",
            file=sys.stderr,
        )
    return 0 if equal else 1


def _note(line: str) -> None:
    print(line, file=sys.stderr)
