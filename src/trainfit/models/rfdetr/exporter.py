"""RF-DETR in other formats, by upstream's own exporter (rfdetr 1.11, `rfdetr.export`)."""

import logging
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from rfdetr.export.base import ExportGraph
from rfdetr.export.prepare import prepare_export_graph
from rfdetr.export.registry import resolve_exporter

from trainfit.models.rfdetr.data import to_batch
from trainfit.models.rfdetr.workload import RfDetr

FORMATS = ("onnx",)
"""What is written and compared here."""
UPSTREAMS = {
    "tensorrt": "tensorrt",
    "openvino": "openvino",
    "coreml": "coreml",
    "tflite": "tflite",
    "litert": "litert",
    "executorch": "executorch",
}
"""What upstream's exporter writes besides -> its extra of rfdetr."""


def write(workload: RfDetr, model: torch.nn.Module, path: Path, *, batch_size: int, dynamic_batch: bool) -> None:
    """Write an ONNX graph: `input` (n, 3, side, side), normalised RGB, to `dets` (centre, size; 0 to 1), `labels` and `masks`."""
    logging.getLogger("rf-detr").setLevel(logging.WARNING)  # it reports each step
    shape = (workload.resolution, workload.resolution)
    graph: ExportGraph = prepare_export_graph(
        _exportable(model),
        cast(Any, workload.config),
        shape=shape,
        device="cpu",
        batch_size=batch_size,
        dynamic_batch=dynamic_batch,
    )
    exporter: Any = resolve_exporter("onnx")
    settings = {"opset_version": 17, "verbose": False, "dynamic_batch": dynamic_batch, "batch_size": batch_size}
    config = exporter.build_config(output_dir=path.parent, output_name=path.stem, **_UNUSED, **settings)
    written = Path(exporter(config)(graph))
    if written != path:
        written.replace(path)


_UNUSED: dict[str, Any] = {"variant_name": None, "backbone_only": False, "notes": None}


def _exportable(model: torch.nn.Module) -> Any:
    """A copy on the CPU in upstream's form for export."""
    copy: Any = deepcopy(model).cpu().eval()
    copy.export()
    return copy


def inputs_of(workload: RfDetr, samples: Sequence[Any]) -> torch.Tensor:
    """What the graph takes for some samples."""
    return to_batch(samples, (workload.resolution, workload.resolution), torch.zeros(1)).tensors


def outputs_of(model: torch.nn.Module, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the model gives, by the names of the graph's outputs; without masks, which upstream's graph makes of all queries."""
    with torch.no_grad():
        outputs: dict[str, Any] = model(inputs)
    return {"dets": outputs["pred_boxes"], "labels": outputs["pred_logits"]}


def command(weights: Path, form: str) -> str:
    """How upstream writes one of `UPSTREAMS` from the weights that a run ends with."""
    load = f"RFDETR.from_checkpoint('{weights}', trust_checkpoint=True)"
    return f"pip install 'rfdetr[{UPSTREAMS[form]}]' && python -c \"from rfdetr import RFDETR; {load}.export(format='{form}')\""
