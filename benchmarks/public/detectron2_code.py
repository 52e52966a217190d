"""Memory of Detectron2's own code, traced, beside what its zoo measured: totals and differences between configurations.

    python -m benchmarks.public.detectron2_code CHECKOUT [--packages SITE_PACKAGES] [--configs CONFIG ...]

CHECKOUT is Detectron2 as of 989f52d6 (October 2019), whose code trained most rows; SITE_PACKAGES has fvcore, iopath, yacs
and their needs, of an environment of their own. Nothing of it is compiled: its RoIAlign is torchvision's here, which keeps
the same tensors. Two images of 800 x 1333, 8 ranks' buckets, gradients zeroed and not freed, 128 positive regions of 512 an
image, 90 objects an image (`detectron2_zoo.OBJECTS`), polygons on the CPU; the index by classes keeps the logits for its
backward, as PyTorch had it then (`index_backward(zeros_like(self), ...)`). The code runs on today's PyTorch.

Workspaces of cuDNN are left out: PyTorch took them from its own allocator, so the zoo's figures hold them, and cuDNN 7
chose the algorithms of a V100 by tables that nobody has published. Rows of normalised heads were measured again in June
2020 with another PyTorch (Detectron2's commit 01dab47e: GN 7.3 -> 5.6 GB). About 10 s of CPU a configuration.
"""

import argparse
import importlib
import json
import sys
from functools import partial
from multiprocessing import get_context
from types import ModuleType
from typing import Any

import PIL.Image
import torch
from benchmarks.public.detectron2_zoo import CAPABILITY, HEIGHT, OBJECTS, WIDTH
from benchmarks.public.rows import DATA
from torchvision.ops import roi_align

from trainfit.gpus.catalogue import MIB
from trainfit.tracing.fake_cuda import Target
from trainfit.tracing.trace import trace_step

COCO, BOXES, MISC = "COCO-InstanceSegmentation/", "COCO-Detection/", "Misc/"
LVIS = "LVIS-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
CONFIGS = (
    BOXES + "rpn_R_50_FPN_1x.yaml",
    BOXES + "faster_rcnn_R_50_FPN_3x.yaml",
    BOXES + "faster_rcnn_R_101_FPN_3x.yaml",
    BOXES + "faster_rcnn_R_50_DC5_3x.yaml",
    COCO + "mask_rcnn_R_50_FPN_3x.yaml",
    COCO + "mask_rcnn_R_101_FPN_3x.yaml",
    COCO + "mask_rcnn_R_50_DC5_3x.yaml",
    MISC + "mask_rcnn_R_50_FPN_3x_gn.yaml",
    MISC + "scratch_mask_rcnn_R_50_FPN_3x_gn.yaml",
    MISC + "cascade_mask_rcnn_R_50_FPN_1x.yaml",
    LVIS,
)
DIFFERENCES = ((1, 0), (2, 1), (5, 4), (4, 1), (6, 3), (7, 4), (8, 7), (9, 4), (10, 4))
"""Of CONFIGS: which minus which."""
IMAGES, POSITIVES = 2, 128


class Compiled(ModuleType):
    """What Detectron2 compiles: imported, and never called here."""

    def __getattr__(self, name: str) -> str:
        return name


class Polygons:
    """Stands for `PolygonMasks`, which stay on the CPU: only the cropped targets reach the device."""

    device = torch.device("cpu")

    def __init__(self, count: int) -> None:
        """So many objects."""
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, chosen: Any) -> "Polygons":
        return Polygons(len(chosen))

    def to(self, *_device: Any, **_options: Any) -> "Polygons":
        """They do not move."""
        return self

    def crop_and_resize(self, boxes: torch.Tensor, side: int) -> torch.Tensor:
        """One target a box."""
        return torch.zeros(len(boxes), side, side, dtype=torch.bool)


class KeptForIndex(torch.autograd.Function):
    """The identity, which keeps its output as `index` kept its input."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor) -> torch.Tensor:
        """Save a view."""
        view = logits.view_as(logits)
        ctx.save_for_backward(view)
        return view

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Read what was saved until now."""
        _ = ctx.saved_tensors
        return gradients[0]


def prepare(checkout: str, packages: str) -> None:
    """Make Detectron2 importable, and let it run on fake tensors and today's packages."""
    sys.path.insert(0, checkout)
    sys.path.append(packages)
    part = _module
    for name, value in (("bool", bool), ("float", float), ("int", int)):
        setattr(part("numpy"), name, value)
    part("PIL.Image").LINEAR = PIL.Image.Resampling.BILINEAR
    part("PIL.Image").CUBIC = PIL.Image.Resampling.BICUBIC
    compiled = Compiled("detectron2._C")
    sys.modules[compiled.__name__] = compiled
    part("detectron2")._C = compiled

    def aligned(self: Any, features: torch.Tensor, regions: torch.Tensor) -> torch.Tensor:
        return roi_align(
            features, regions, self.output_size, self.spatial_scale, self.sampling_ratio, aligned=self.aligned
        )

    def foreground(proposals: Any, _background: int) -> Any:
        return [found[torch.arange(POSITIVES, device=found.gt_classes.device)] for found in proposals], []

    def of_low_quality(_self: Any, labels: torch.Tensor, quality: torch.Tensor) -> None:
        """Its own, but that as few pairs are found as there are objects: a trace would assume all."""
        best = quality.max(dim=1)[0]
        _ = quality == best[:, None]
        labels[torch.arange(len(quality), device=quality.device)] = 1

    part("detectron2.layers").ROIAlign.forward = aligned
    part("detectron2.modeling.roi_heads.roi_heads").select_foreground_proposals = foreground
    part("detectron2.modeling.matcher").Matcher.set_low_quality_matches_ = of_low_quality


class Step:
    """`SimpleTrainer.run_step` of Detectron2."""

    ema, blocks = None, 0

    def __init__(self, device: torch.device, *, config: str, checkout: str, packages: str) -> None:
        """Build the model of a configuration, its optimizer and two images."""
        prepare(checkout, packages)
        cfg: Any = _module("detectron2.config").get_cfg()
        cfg.merge_from_file(f"{checkout}/configs/{config}")
        cfg.MODEL.DEVICE = "cpu"
        self.model: Any = _module("detectron2.modeling").build_model(cfg).to(device).train()
        self.model.device = device
        mean, deviation = (
            torch.tensor(v).view(3, 1, 1).to(device) for v in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
        )

        def normalized(image: torch.Tensor) -> torch.Tensor:
            return (image - mean) / deviation

        self.model.normalizer = normalized  # its own holds tensors of the CPU
        if cfg.MODEL.MASK_ON:
            self.model.roi_heads.mask_head.predictor.register_forward_hook(_kept)
        self.optimizer: Any = _module("detectron2.solver").build_optimizer(cfg, self.model)
        for group in self.optimizer.param_groups:
            group["foreach"] = False
        self.buckets = [torch.empty_like(p) for p in self.model.parameters() if p.requires_grad]
        self.storage: Any = _module("detectron2.utils.events").EventStorage
        self.inputs = [_image(masks=cfg.MODEL.MASK_ON) for _ in range(IMAGES)]

    def run(self) -> None:
        """One iteration."""
        with self.storage(0):
            losses: Any = sum(self.model(self.inputs).values())
        self.optimizer.zero_grad(set_to_none=False)
        losses.backward()
        self.optimizer.step()


def _module(name: str) -> Any:
    return importlib.import_module(name)


def _kept(_module: torch.nn.Module, _inputs: Any, logits: torch.Tensor) -> Any:
    return KeptForIndex.apply(logits)


def _image(*, masks: bool) -> dict[str, Any]:
    structures = _module("detectron2.structures")
    corner = torch.arange(OBJECTS, dtype=torch.float32)[:, None] + torch.tensor([[10.0, 10.0]])
    objects = structures.Instances((HEIGHT, WIDTH))
    objects.gt_boxes = structures.Boxes(torch.cat([corner, corner + 200], 1))
    objects.gt_classes = torch.zeros(OBJECTS, dtype=torch.int64)
    if masks:
        objects.gt_masks = Polygons(OBJECTS)
    return {"image": torch.zeros(3, HEIGHT, WIDTH), "instances": objects}


def peak(config: str, checkout: str, packages: str) -> tuple[float, str]:
    """(MiB allocated at most in two steps, where)."""
    build = partial(Step, config=config, checkout=checkout, packages=packages)
    allocated, most, where = 0, 0, ""
    for is_new, tensor in trace_step(build, target=Target(capability=CAPABILITY), steps=2).trace:
        allocated += tensor.nbytes if is_new else -tensor.nbytes
        if allocated > most:
            most, where = allocated, f"{tensor.phase}, {tensor.module.removeprefix('model.')}"
    return most / MIB, where


def main() -> None:
    """Trace each in a process of its own and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout")
    parser.add_argument("--packages", default="")
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = (DATA / "public_memory/detectron2_zoo.jsonl").read_text().splitlines()
    rows = map(json.loads, lines)
    measured = {row["config"].removeprefix("configs/").replace("LVISv0.5", "LVIS"): row["value_mib"] for row in rows}
    traced: dict[str, float] = {}
    print("configuration                                            measured MiB  traced MiB  difference  peak")
    for config in arguments.configs:
        with get_context("fork").Pool(1) as pool:  # a trace changes its process
            traced[config], where = pool.apply(peak, (config, arguments.checkout, arguments.packages))
        lacking = traced[config] - measured[config]
        print(f"{config:56}{measured[config]:13.0f}{traced[config]:12.0f}{lacking:+12.0f}  {where}", flush=True)
    print("\ndifference, measured MiB, traced MiB, error")
    for one, other in ((CONFIGS[i], CONFIGS[j]) for i, j in DIFFERENCES):
        if one in traced and other in traced:
            known, found = measured[one] - measured[other], traced[one] - traced[other]
            print(f"{one} - {other}: {known:.0f} {found:.0f} {100 * (found / known - 1):+.1f} %")


if __name__ == "__main__":
    main()
