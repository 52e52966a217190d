"""Evaluation on the validation data."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from trainfit.errors import OutOfMemory
from trainfit.models.workload import TrainableWorkload
from trainfit.step import ranks
from trainfit.step.attempt import attempt
from trainfit.step.names import Precision
from trainfit.step.precision import autocast
from trainfit.tasks.task import Evaluation, Metric
from trainfit.training.loader import Unreadable, evaluation_loader
from trainfit.training.oom import Halving

WHERE = "evaluation"


def evaluate_model(
    model: torch.nn.Module,
    workload: TrainableWorkload,
    records: Sequence[Any],
    metric: Metric,
    *,
    micro_batch: int,
    precision: Precision,
    device: torch.device,
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    note: Callable[[str], None] = lambda _: None,
    step: int = 0,
    in_parts: Halving | None = None,
) -> Evaluation:
    """What the metric says of the model's outputs for all records, over all ranks.

    One micro-batch is on the device at a time. The model comes back in the mode that it was in. Records that cannot be
    decoded are left out. `note` receives a line where data is waited for long. Where memory runs out `in_parts` halves
    the micro-batch and keeps the event, of optimizer step `step`.

    Raises:
        OutOfMemory: one sample alone does not fit, here or on another rank; all ranks raise.
    """
    loader = evaluation_loader(records, workload, micro_batch=micro_batch, workers=workers, note=note)
    parts = in_parts or Halving(micro_batch, device)
    action = partial(outputs_of, model, workload, precision=precision, device=device)

    def own_share() -> None:
        done = 0
        with evaluating(model, device):
            for batch in loader:
                samples = [sample for sample in batch if not isinstance(sample, Unreadable)]
                metric.add(parts(action, samples, step=step, where=WHERE))
                done += len(batch)
                progress(min(len(records), done * ranks.world_size()), len(records))

    parts.on_all_ranks(own_share, step=step, where=WHERE)
    return metric.result()


@contextmanager
def evaluating(model: torch.nn.Module, device: torch.device) -> Generator[None]:
    """The model in eval mode and on the device; it comes back in the mode and to the place that it was in.

    Raises:
        OutOfMemory: the weights, where they are kept on the host, do not fit.
    """
    training = model.training
    home = next(model.parameters()).device
    try:
        _, failure = attempt(lambda: model.eval().to(device))
        if failure is not None:
            raise OutOfMemory(f"evaluation: the EMA weights do not fit the memory ({failure}): train with --no-ema")
        yield
    finally:
        model.train(training).to(home)


def outputs_of(
    model: torch.nn.Module,
    workload: TrainableWorkload,
    samples: Sequence[Any],
    *,
    precision: Precision,
    device: torch.device,
) -> list[Any]:
    """Outputs of a micro-batch, one per sample; the model is in eval mode."""
    with autocast(precision, device.type):
        return list(workload.outputs(model, samples))
