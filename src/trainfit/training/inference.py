"""Loads a trained run, or a checkpoint of the upstream project, as a model for inference."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainfit.errors import TrainfitError
from trainfit.models.build import open_checkpoint, workload_from_metadata
from trainfit.models.family import family_of
from trainfit.models.workload import TrainableWorkload
from trainfit.step.names import Precision
from trainfit.step.precision import autocast
from trainfit.tasks.task import inference_of
from trainfit.training.run_folder import BEST, LAST, load_weights
from trainfit.weights import require_fit


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model in eval mode with the weights of a run."""

    workload: TrainableWorkload
    """The model's workload."""
    model: torch.nn.Module
    """The model, in eval mode on the device."""
    device: torch.device
    """Device that it runs on."""
    precision: Precision
    """Precision that it runs in."""
    remarks: tuple[str, ...] = ()
    """Remarks for the user on how the weights were loaded."""


def load_model(
    run: Path, device: torch.device, precision: Precision = "fp32", *, model: str | None = None
) -> LoadedModel:
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
            f"{run} is not a run folder with weights, nor a weights file: give the folder that `train` named"
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
    return LoadedModel(workload=workload, model=network.to(device).eval(), device=device, precision=precision)


def _load_upstream(weights: Path, device: torch.device, precision: Precision, model: str | None) -> LoadedModel:
    if model is None:
        raise TrainfitError(f"{weights} does not say which model it is of: give --model NAME")
    workload, network, remarks = open_checkpoint(model, str(weights))
    network = network.to(device).eval()
    return LoadedModel(workload=workload, model=network, device=device, precision=precision, remarks=tuple(remarks))


def infer(loaded: LoadedModel, files: Sequence[Path], *, micro_batch: int = 4) -> Iterator[Any]:
    """What the model gives for each file, in order, as its task has outputs.

    Raises:
        TrainfitError: a file that cannot be read, or a task without inference on files.
    """
    task = inference_of(str(loaded.workload.setting.family.task))
    decode = loaded.workload.decoder()
    size = loaded.workload.eval_size
    for first in range(0, len(files), micro_batch):
        records = [task.file_record(first + i, path) for i, path in enumerate(files[first : first + micro_batch])]
        batch = [decode(record, size=size, augment=frozenset(), generator=torch.Generator()) for record in records]
        with autocast(loaded.precision, loaded.device.type):
            yield from loaded.workload.outputs(loaded.model, batch)
