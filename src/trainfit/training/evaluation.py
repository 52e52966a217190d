"""Evaluation of a detector on the validation images."""

from collections.abc import Callable, Iterator, Sequence

import torch

from trainfit.data.samples import ImageRecord, Sample
from trainfit.errors import OutOfMemory
from trainfit.models.workload import ImageDetections, Workload
from trainfit.step import ranks
from trainfit.step.names import Precision
from trainfit.step.precision import autocast
from trainfit.training.coco_ap import ApResult, Detections, Evaluator, IouKind, gather_detections
from trainfit.training.loader import evaluation_loader
from trainfit.training.oom import attempt, free_cached


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
) -> dict[str, ApResult]:
    """AP of boxes ("bbox"), and of masks ("segm") for a segmentation model, over all ranks.

    One micro-batch is on the device at a time. In one process masks are compared and dropped image by image; over several
    ranks they are kept, run-length encoded, until all ranks are done. The model comes back in the mode that it was in.
    Images that cannot be decoded count as images without detections.
    """
    loader = evaluation_loader(
        records,
        workload.decoder(),
        size=workload.resolution,
        micro_batch=micro_batch,
        workers=workers,
        rank=ranks.rank(),
        world_size=ranks.world_size(),
    )

    def found() -> Iterator[Detections]:
        done = 0
        for batch in loader:
            samples = [s for s in batch if isinstance(s, Sample)]
            if samples:
                yield from map(compact, _detect(model, workload, samples, precision=precision, device=device))
            done += len(batch)
            progress(min(len(records), done * ranks.world_size()), len(records))

    kinds: list[IouKind] = ["bbox", "segm"] if workload.masks else ["bbox"]
    evaluators = {kind: Evaluator(records, workload.classes, iou=kind) for kind in kinds}
    training = model.training
    model.eval()
    try:
        for one in found() if ranks.world_size() == 1 else gather_detections(found()):
            for evaluator in evaluators.values():
                evaluator.add(one)
    finally:
        model.train(training)
    return {kind: evaluator.result() for kind, evaluator in evaluators.items()}


def _detect(
    model: torch.nn.Module,
    workload: Workload,
    samples: Sequence[Sample],
    *,
    precision: Precision,
    device: torch.device,
) -> list[ImageDetections]:
    """Detections of a micro-batch, in halves where memory runs out.

    Raises:
        OutOfMemory: one image alone does not fit.
    """

    def detections() -> list[ImageDetections]:
        with autocast(precision, device.type):
            return workload.detect(model, samples)

    found, failure = attempt(detections)
    if found is not None:
        return found
    free_cached(device)
    if len(samples) == 1:
        raise OutOfMemory(f"evaluation of one image does not fit the memory ({failure}): lower --resolution")
    half = len(samples) // 2
    return [
        detection
        for part in (samples[:half], samples[half:])
        for detection in _detect(model, workload, part, precision=precision, device=device)
    ]


def compact(found: ImageDetections) -> Detections:
    """Detections as evaluation keeps them: arrays."""
    return Detections(
        image_id=found.image_id,
        boxes=found.boxes.numpy(),
        scores=found.scores.numpy(),
        classes=found.classes.numpy(),
        masks=found.masks,
    )
