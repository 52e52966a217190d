"""Peak memory of a fake-CUDA trace against a real CPU run of the same step, both seen by the same recorder.

    python benchmarks/trace_vs_cpu.py [name ...]

float32, foreach AdamW, peak of the second step. The CPU runs take minutes and up to 8 GB.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainfit.memory.profile import last_window
from trainfit.tracing import client
from trainfit.tracing.events import Trace
from trainfit.tracing.stored_trace import StoredTrace

MIB = 2**20


@dataclass
class PlainStep:
    """One micro-batch, backward, AdamW."""

    model: nn.Module
    device: torch.device
    loss: Callable[[torch.device], Tensor]
    ema: nn.Module | None = None

    def __post_init__(self) -> None:
        """Make the optimizer on the model's parameters."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, foreach=True)

    def run(self) -> None:
        """Train on one micro-batch."""
        self.loss(self.device).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def _classifier(model: nn.Module, device: torch.device, batch: int) -> PlainStep:
    model = model.to(device).train()

    def loss(device: torch.device) -> Tensor:
        images = torch.zeros(batch, 3, 224, 224, device=device)
        return nn.functional.cross_entropy(model(images), torch.zeros(batch, dtype=torch.int64, device=device))

    return PlainStep(model, device, loss)


def torchvision_model(device: torch.device, name: str, batch: int) -> PlainStep:
    """A torchvision classifier."""
    import torchvision

    return _classifier(torchvision.models.get_model(name), device, batch)


def timm_model(device: torch.device, name: str, batch: int) -> PlainStep:
    """A timm classifier."""
    import timm

    return _classifier(timm.create_model(name), device, batch)


def clip_model(device: torch.device, name: str, batch: int) -> PlainStep:
    """An open_clip model with the contrastive loss of one batch."""
    import open_clip

    model = open_clip.create_model(name, pretrained=None).to(device).train()

    def loss(device: torch.device) -> Tensor:
        images = torch.zeros(batch, 3, 224, 224, device=device)
        image, text, scale = model(images, torch.zeros(batch, 77, dtype=torch.int64, device=device))[:3]
        logits, labels = scale * image @ text.T, torch.arange(batch, device=device)
        entropy = nn.functional.cross_entropy
        return (entropy(logits, labels) + entropy(logits.T, labels)) / 2

    return PlainStep(model, device, loss)


def _targets(device: torch.device, batch: int, size: int, boxes: int, absolute: bool) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    targets: list[dict[str, Tensor]] = []
    for _ in range(batch):
        corner = 0.6 * torch.rand(boxes, 2, generator=generator)
        extent = 0.1 + 0.2 * torch.rand(boxes, 2, generator=generator)
        box = torch.cat([corner, corner + extent], 1) * size if absolute else torch.cat([corner + extent, extent], 1)
        masks = torch.zeros(boxes, size, size, dtype=torch.uint8 if absolute else torch.bool, device=device)
        labels = torch.ones(boxes, dtype=torch.int64)
        targets.append({"boxes": box.to(device), "labels": labels.to(device), "masks": masks})
    return targets


def maskrcnn(device: torch.device, size: int, batch: int) -> PlainStep:
    """Torchvision's Mask R-CNN v2 at its configured region counts."""
    import torchvision

    from trainfit.models.maskrcnn.caps import cap_training_samples

    model = torchvision.models.detection.maskrcnn_resnet50_fpn_v2(
        weights=None, weights_backbone=None, min_size=size, max_size=size
    )
    heads: Any = model.roi_heads
    cap_training_samples(heads)
    model = model.to(device).train()

    def loss(device: torch.device) -> Tensor:
        images = [torch.rand(3, size, size).to(device) for _ in range(batch)]
        return torch.stack(list(model(images, _targets(device, batch, size, 5, absolute=True)).values())).sum()

    return PlainStep(model, device, loss)


def rfdetr(device: torch.device, kind: str, batch: int) -> PlainStep:
    """RF-DETR with its own criterion and 10 boxes an image."""
    from rfdetr import config
    from rfdetr.models import (
        _assignment,  # pyright: ignore[reportPrivateUsage]
        build_criterion_from_config,
        build_model_from_config,
    )
    from rfdetr.utilities.tensors import NestedTensor

    from trainfit.models.rfdetr import tracing

    # On CUDA upstream solves the matching with a Triton kernel, which a trace cannot run.
    _assignment._solve_to_indices = tracing.solve_on_host  # pyright: ignore[reportPrivateUsage]
    settings = getattr(config, kind)(pretrain_weights=None, device="cpu")
    training = config.SegmentationTrainConfig if "Seg" in kind else config.TrainConfig
    model = build_model_from_config(settings).to(device).train()
    criterion, _ = build_criterion_from_config(settings, training(dataset_dir=".", output_dir="."))
    criterion = criterion.to(device).train()
    size = settings.resolution

    def loss(device: torch.device) -> Tensor:
        images = torch.rand(batch, 3, size, size).to(device)
        targets: list[Any] = _targets(device, batch, size, 10, absolute=False)
        if "Seg" not in kind:
            for target in targets:
                del target["masks"]
        samples = NestedTensor(images, torch.zeros(batch, size, size, dtype=torch.bool, device=device))
        terms = criterion(model(samples, targets), targets)
        weights = criterion.weight_dict
        return torch.stack([terms[name] * weights[name] for name in terms if name in weights]).sum()

    return PlainStep(model, device, loss)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ResNet-50 b8": ("torchvision_model", {"name": "resnet50", "batch": 8}),
    "ConvNeXt-T b8": ("torchvision_model", {"name": "convnext_tiny", "batch": 8}),
    "Swin-T b4": ("torchvision_model", {"name": "swin_t", "batch": 4}),
    "ViT-S/16 b8": ("timm_model", {"name": "vit_small_patch16_224", "batch": 8}),
    "CLIP ViT-B/16 b4": ("clip_model", {"name": "ViT-B-16", "batch": 4}),
    "Mask R-CNN v2 240 px b1": ("maskrcnn", {"size": 240, "batch": 1}),
    "Mask R-CNN v2 320 px b2": ("maskrcnn", {"size": 320, "batch": 2}),
    "RF-DETR Nano b2": ("rfdetr", {"kind": "RFDETRNanoConfig", "batch": 2}),
    "RF-DETR-Seg Nano b2": ("rfdetr", {"kind": "RFDETRSegNanoConfig", "batch": 2}),
}


def peak_bytes(trace: Trace) -> int:
    """The most bytes that tensors held at once in the last window (before any allocator rounding)."""
    start, held, peak = last_window(trace), 0, 0
    for index, (allocated, tensor) in enumerate(trace):
        held += tensor.nbytes if allocated else -tensor.nbytes
        peak = max(peak, held) if index >= start else held
    return peak


def main(wanted: list[str]) -> None:
    """Print the table."""
    print(f"{'model':26}{'fake MiB':>10}{'CPU MiB':>10}{'differs':>9}{'MiB':>7}{'fake s':>8}{'CPU s':>8}  made up")
    for name in wanted or CASES:
        factory, kwargs = CASES[name]
        peaks, times, made_up = list[float](), list[float](), ""
        for device in ("cuda", "cpu"):
            request = {"factory": f"trace_vs_cpu:{factory}", "kwargs": kwargs, "device": device, "steps": 2}
            start = time.perf_counter()
            result = StoredTrace.from_json(client.run(request | {"target": {"capability": (8, 6)}}, name))
            times.append(time.perf_counter() - start)
            peaks.append(peak_bytes(result.trace) / MIB)
            made_up = made_up or ", ".join(
                [f"SHAPES {result.upper_bounds}", *result.made_up] if result.upper_bounds else []
            )
        fake, cpu = peaks
        print(f"{name:26}{fake:10.1f}{cpu:10.1f}{fake / cpu - 1:9.2%}{fake - cpu:7.2f}", end="")
        print(f"{times[0]:8.1f}{times[1]:8.1f}  {made_up}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
