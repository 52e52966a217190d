"""Evaluation of a detector on the validation images."""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from trainfit.errors import OutOfMemory
from trainfit.models.class_names import positions
from trainfit.models.workload import ImageDetections, Workload
from trainfit.step import ranks
from trainfit.step.attempt import attempt
from trainfit.step.names import Precision
from trainfit.step.precision import autocast
from trainfit.tasks.detection.coco_ap import ApResult, Detections, Evaluator, IouKind, gather_detections
from trainfit.tasks.detection.samples import ImageRecord, Sample
from trainfit.training.loader import evaluation_loader
from trainfit.training.oom import Halving

WHERE = "evaluation"


def evaluate_model(
    model: torch.nn.Module,
    workload: Workload,
    records: Sequence[ImageRecord],
    *,
    micro_batch: int,
    precision: Precision,
    device: torch.device,
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    step: int = 0,
    in_parts: Halving | None = None,
    classes: Sequence[str] | None = None,
    max_detections: int | None = None,
) -> dict[str, ApResult]:
    """AP of boxes ("bbox"), and of masks ("segm") for a segmentation model, over all ranks.

    One micro-batch is on the device at a time. In one process masks are compared and dropped image by image; over several
    ranks they are kept, run-length encoded, until all ranks are done. The model comes back in the mode that it was in.
    Images that cannot be decoded count as images without detections. Where memory runs out `in_parts` halves the
    micro-batch and keeps the event, of optimizer step `step`. `classes` are the data set's where they are not the model's:
    the model's are found among them by name, and detections of others are left out. `max_detections` for each image
    and class count, by default as many as the family's own evaluation counts.

    Raises:
        OutOfMemory: one image alone does not fit, here or on another rank; all ranks raise.
    """
    loader = evaluation_loader(records, workload, micro_batch=micro_batch, workers=workers)
    in_parts = in_parts or Halving(micro_batch, device)
    action = partial(detect, model, workload, precision=precision, device=device, classes=classes)

    def own_share() -> Generator[Detections]:
        done = 0
        with evaluating(model, device):
            for batch in loader:
                samples = [s for s in batch if isinstance(s, Sample)]
                yield from in_parts(action, samples, step=step, where=WHERE)
                done += len(batch)
                progress(min(len(records), done * ranks.world_size()), len(records))

    def all_shares(own: Iterable[Detections]) -> Iterable[Detections]:
        if ranks.world_size() == 1:
            return own
        return gather_detections(in_parts.on_all_ranks(lambda: list(own), step=step, where=WHERE))

    kinds: list[IouKind] = ["bbox", "segm"] if workload.masks else ["bbox"]
    names, limit = classes or workload.classes, max_detections or workload.max_detections
    evaluators = {kind: Evaluator(records, names, iou=kind, max_detections=limit) for kind in kinds}
    with closing(own_share()) as own:
        for one in all_shares(own):
            for evaluator in evaluators.values():
                evaluator.add(one)
    return {kind: evaluator.result() for kind, evaluator in evaluators.items()}


@contextmanager
def evaluating(model: torch.nn.Module, device: torch.device) -> Generator[None]:
    """The model in eval mode and on the device; it comes back in the mode and to the place that it was in.

    Raises:
        OutOfMemory: the weights, where they are kept on the host, do not fit.
    """
    training, home = model.training, next(model.parameters()).device
    try:
        _, failure = attempt(lambda: model.eval().to(device))
        if failure is not None:
            raise OutOfMemory(
                f"evaluation: the averaged weights do not fit the memory ({failure}): train with --no-ema"
            )
        yield
    finally:
        model.train(training).to(home)


def detect(
    model: torch.nn.Module,
    workload: Workload,
    samples: Sequence[Sample],
    *,
    precision: Precision,
    device: torch.device,
    classes: Sequence[str] | None = None,
) -> list[Detections]:
    """Detections of a micro-batch, one an image; the model is in eval mode.

    Classes are indices into `classes`, -1 for what is not among them; without `classes` into the model's.
    """
    with autocast(precision, device.type):
        detections = [compact(found) for found in workload.detect(model, samples)]
    if classes is None:
        return detections
    index = [-1 if each is None else each for each in positions(workload.classes, classes)]
    return [replace(one, classes=np.asarray(index, np.int64)[one.classes]) for one in detections]


def compact(found: ImageDetections) -> Detections:
    """Detections as evaluation keeps them: arrays."""
    arrays = {name: getattr(found, name).numpy() for name in ("boxes", "scores", "classes")}
    return Detections(image_id=found.image_id, masks=found.masks, **arrays)
