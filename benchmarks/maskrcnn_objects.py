"""Peak of a Mask R-CNN step as the objects of an image go from 1 to 300: trainfit's step against plain torchvision's.

    python benchmarks/maskrcnn_objects.py [--objects 1 10 30 100 300] [--side 800]

Both are R50-FPN v1 in float32 on one landscape image of the published size, AdamW, no EMA weights, the region
samplers full, traced on fake CUDA tensors of capability 8.6 and replayed; MiB that torch allocates at most. torchvision's
step is its own forward as references/detection runs it: masks of the image's size are moved to the device, a byte a pixel,
and are resized there; boxes and anchors are compared all at once. A trace takes half a minute.
"""

import argparse
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from trainfit.gpus.catalogue import MIB, find_gpu
from trainfit.memory.alloc_conf import AllocatorConfig
from trainfit.memory.predict import assess, needed
from trainfit.models.build import build_step
from trainfit.models.maskrcnn.caps import cap_training_samples
from trainfit.models.setting import make_setting
from trainfit.tracing.fake_cuda import Target
from trainfit.tracing.trace import trace_step

CAPABILITY, CARD = (8, 6), "RTX 3090"
CLASSES = 80


class Torchvision:
    """A step as torchvision's references run it."""

    ema, blocks = None, 0

    def __init__(self, device: torch.device, *, objects: int, side: int) -> None:
        """Build model, optimizer and one image on the CPU."""
        body = resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=3)
        model: Any = MaskRCNN(body, num_classes=CLASSES + 1, min_size=side, max_size=side * 5 // 3)
        self.model = model.to(device).train()
        cap_training_samples(self.model.roi_heads)
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        self.device = device
        height, width = side, side * 5 // 3
        corner = torch.arange(objects, dtype=torch.float32)[:, None] + torch.tensor([[10.0, 10.0]])
        self.image = torch.zeros(3, height, width)
        self.target = {
            "boxes": torch.cat([corner, corner + 200], 1),
            "labels": torch.ones(objects, dtype=torch.int64),
            "masks": torch.ones(objects, height, width, dtype=torch.uint8),
        }

    def run(self) -> None:
        """One step."""
        target = {name: value.to(self.device) for name, value in self.target.items()}
        losses = self.model([self.image.to(self.device)], [target])
        self.optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        self.optimizer.step()


def ours(device: torch.device, *, objects: int, side: int) -> Any:
    """Trainfit's step, as a prediction traces it."""
    setting = make_setting(
        "maskrcnn-r50-v1",
        resolution=side,
        max_size=side * 5 // 3,
        objects_per_image=objects,
        precision="fp32",
        ema=False,
        classes=CLASSES,
    )
    return build_step(setting=setting.to_json(), device=device)


def peak_mib(build: Any) -> float:
    """The most that torch has allocated within two steps."""
    stored = trace_step(build, target=Target(capability=CAPABILITY), steps=2)
    gpu, config = find_gpu(CARD), AllocatorConfig()
    return assess(stored, gpu, config, reserved=needed(stored, gpu, config)).profile.peak_allocated_bytes / MIB


def main() -> None:
    """Trace and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, nargs="+", default=[1, 10, 30, 100, 300])
    parser.add_argument("--side", type=int, default=800)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("objects  torchvision MiB  trainfit MiB")
    for objects in arguments.objects:
        cases = [partial(build, objects=objects, side=arguments.side) for build in (Torchvision, ours)]
        with get_context("fork").Pool(1, maxtasksperchild=1) as pool:  # a trace changes its process
            known, found = pool.map(peak_mib, cases, chunksize=1)
        print(f"{objects:7}{known:17.0f}{found:14.0f}", flush=True)


if __name__ == "__main__":
    main()
