"""A trained run, or a checkpoint of a model's upstream project, as a detector."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from trainfit.errors import TrainfitError
from trainfit.models.build import open_checkpoint, workload_from_metadata
from trainfit.models.family import family_of
from trainfit.models.workload import TrainableWorkload
from trainfit.step.names import Precision
from trainfit.step.precision import autocast
from trainfit.tasks.detection.samples import ImageDetections, ImageRecord
from trainfit.tasks.images import ImageDefect, read_header
from trainfit.training.run_folder import BEST, LAST, load_weights
from trainfit.weights import require_fit


@dataclass(frozen=True, kw_only=True)
class Detector:
    """A model in eval mode with the weights of a run."""

    workload: TrainableWorkload
    model: torch.nn.Module
    device: torch.device
    precision: Precision
    remarks: tuple[str, ...] = ()
    """What the user should know of how the weights were loaded."""


def load_detector(
    run: Path, device: torch.device, precision: Precision = "fp32", *, model: str | None = None
) -> Detector:
    """The best weights of a run folder (the last ones where there was no evaluation yet), or one weights file.

    Args:
        run: Run folder or weights file; with `model` also a checkpoint of upstream's, or `pretrained`.
        device: Where the model goes.
        precision: What it computes in.
        model: The model's name: needed for a checkpoint of upstream's.

    Raises:
        TrainfitError: neither a run folder with weights nor a weights file, or the weights of another model.
    """
    if str(run) == "pretrained" or (run.is_file() and run.suffix != ".safetensors"):
        return _load_upstream(run, device, precision, model)
    candidates = [run] if run.is_file() else [run / BEST, run / LAST]
    path = next((p for p in candidates if p.is_file()), None)
    if path is None:
        raise TrainfitError(
            f"{run} is no run folder with weights, and no weights file: give the folder that `train` named"
        )
    weights, metadata = load_weights(path)
    try:
        workload = workload_from_metadata(metadata)
    except TrainfitError as error:
        raise TrainfitError(f"{path}: {error}") from error
    if model is not None and family_of(model)[1] != workload.setting.model:
        raise TrainfitError(f"{path} holds weights of {workload.setting.model}, not {model}: leave --model out")
    network = workload.build()
    require_fit(network, weights, path)
    network.load_state_dict(weights)
    return Detector(workload=workload, model=network.to(device).eval(), device=device, precision=precision)


def _load_upstream(weights: Path, device: torch.device, precision: Precision, model: str | None) -> Detector:
    if model is None:
        raise TrainfitError(f"{weights} does not say which model it is of: give --model, for instance rfdetr-nano")
    workload, network, remarks = open_checkpoint(model, str(weights))
    network = network.to(device).eval()
    return Detector(workload=workload, model=network, device=device, precision=precision, remarks=tuple(remarks))


def detect(detector: Detector, images: Sequence[Path], *, micro_batch: int = 4) -> Iterator[ImageDetections]:
    """Detections of image files, in order; `image_id` is the position in `images`.

    Raises:
        TrainfitError: an image that cannot be read.
    """
    decode = detector.workload.decoder()
    size = detector.workload.eval_size
    for first in range(0, len(images), micro_batch):
        batch = [
            decode(_record(first + i, path), size=size, augment=False, generator=torch.Generator())
            for i, path in enumerate(images[first : first + micro_batch])
        ]
        with autocast(detector.precision, detector.device.type):
            yield from detector.workload.outputs(detector.model, batch)


def _record(number: int, path: Path) -> ImageRecord:
    """An image file without objects."""
    header = read_header(path)
    if isinstance(header, ImageDefect):
        raise TrainfitError(f"{path}: {header.kind}: {header.message}")
    width, height = header.upright
    nothing = np.zeros(0)
    return ImageRecord(
        id=number,
        path=path,
        width=width,
        height=height,
        boxes=np.zeros((0, 4)),
        classes=nothing.astype(np.int64),
        crowd=nothing.astype(np.bool_),
        areas=nothing,
        segmentations=(),
        object_ids=nothing.astype(np.int64),
    )
