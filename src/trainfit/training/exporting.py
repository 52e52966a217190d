"""A trained model as a file of another runtime, written by its upstream project's exporter and compared with PyTorch."""

import importlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from trainfit.errors import TrainfitError
from trainfit.files import read_json
from trainfit.tasks.task import inference_of, task_of
from trainfit.training.inference import LoadedModel
from trainfit.training.run_files import RECIPE

IMAGES = 4
"""Images that the file is compared on, unless they are named."""


class Exporter(Protocol):
    """The module `exporter` beside a family's workload, where its upstream project has an exporter."""

    FORMATS: Sequence[str]
    """What `write` writes."""
    UPSTREAMS: Sequence[str]
    """What upstream's own command writes besides."""

    def write(self, workload: Any, model: torch.nn.Module, path: Path, *, batch_size: int, dynamic_batch: bool) -> None:
        """Write the file."""
        ...

    def inputs_of(self, workload: Any, samples: Sequence[Any]) -> torch.Tensor:
        """What the file's graph takes for some samples."""
        ...

    def outputs_of(self, model: torch.nn.Module, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the model itself gives, by the names of the graph's outputs that are compared."""
        ...

    def command(self, weights: Path, form: str) -> str:
        """The shell command with which upstream writes one of `UPSTREAMS`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far the file's outputs are from the model's."""

    images: int
    """0: there was no image, and noise was taken."""
    differences: dict[str, float]
    """The largest absolute difference of each output."""
    sizes: dict[str, float]
    """The largest absolute value of each output."""


def exporter_of(loaded: LoadedModel) -> Exporter:
    """The exporter of the model's family.

    Raises:
        TrainfitError: its upstream project has none.
    """
    setting = loaded.workload.setting
    name = f"{setting.family.workload.rpartition('.')[0]}.exporter"
    if find_spec(name) is None:
        raise TrainfitError(
            f"{setting.model}: its upstream project has no exporter; {loaded.workload.export_name} of the run holds the "
            "weights as that project loads them, for torch.onnx.export on its own model"
        )
    return cast(Exporter, importlib.import_module(name))


def export(loaded: LoadedModel, exporter: Exporter, path: Path, *, batch_size: int, dynamic_batch: bool) -> None:
    """Write the file.

    Raises:
        TrainfitError: a package is missing.
    """
    if find_spec("onnx") is None:
        raise TrainfitError("--format onnx needs the package onnx: pip install 'trainfit[export]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing: the comparison shows whether they matter
        exporter.write(loaded.workload, loaded.model, path, batch_size=batch_size, dynamic_batch=dynamic_batch)


def samples_of(loaded: LoadedModel, run: Path, images: Sequence[Path], note: Callable[[str], None]) -> list[Any]:
    """Images to compare on: the named ones, else the first of the run's validation data where they are still there."""
    workload = loaded.workload
    name = str(workload.setting.family.task)
    if images:
        records = [inference_of(name).file_record(number, path) for number, path in enumerate(images)]
    else:
        try:
            recipe = read_json(run / RECIPE)
            records = task_of(name).read(recipe["data"], allow_outside=bool(recipe.get("allow_outside"))).splits["val"]
        except (OSError, ValueError, LookupError, TypeError, TrainfitError) as error:
            note(f"compared on noise: the run's data are not there ({error}); name images to compare on them")
            return []
    decode = workload.decoder()
    chosen = [record.without_truth() for record in records[: len(images) or IMAGES]]
    return [decode(each, size=workload.eval_size, augment=frozenset(), generator=torch.Generator()) for each in chosen]


def compare(
    loaded: LoadedModel, exporter: Exporter, path: Path, samples: Sequence[Any], *, batch_size: int
) -> Comparison:
    """Run the file with onnxruntime on the CPU beside the model.

    Raises:
        TrainfitError: onnxruntime is missing or cannot read the file.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise TrainfitError(f"{path} is written, but not compared: pip install 'trainfit[export]'") from error
    session: Any = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    side = loaded.workload.eval_size
    whole = exporter.inputs_of(loaded.workload, samples) if samples else torch.randn(IMAGES, 3, side, side)
    model = loaded.model.cpu()
    differences: dict[str, float] = {}
    sizes: dict[str, float] = {}
    for first in range(0, len(whole), batch_size):
        inputs = whole[first : first + batch_size]
        inputs = torch.cat([inputs, inputs[-1:].expand(batch_size - len(inputs), -1, -1, -1)])
        theirs = dict(zip(names, session.run(None, {session.get_inputs()[0].name: inputs.numpy()}), strict=True))
        for name, ours in exporter.outputs_of(model, inputs).items():
            difference = float((torch.from_numpy(theirs[name]) - ours).abs().max())
            differences[name] = max(differences.get(name, 0.0), difference)
            sizes[name] = max(sizes.get(name, 0.0), float(ours.abs().max()))
    return Comparison(images=len(samples), differences=differences, sizes=sizes)
