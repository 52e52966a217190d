"""A Mask R-CNN of torchvision's classes with a trunk of five convolutions, so that a step takes milliseconds."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from trainfit.models.images import crowded_sample
from trainfit.models.maskrcnn.losses import make_objective
from trainfit.models.maskrcnn.model import set_scales
from trainfit.step.exchange import sum_gradients
from trainfit.step.window import accumulate, cut
from trainfit.tasks.detection.samples import Sample

CHANNELS = 8


class Trunk(torch.nn.Module):
    """Five levels of features with strides of 4 to 64, named as the FPN's."""

    out_channels = CHANNELS

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, CHANNELS, 7, stride=4, padding=3)
        self.down = torch.nn.ModuleList(torch.nn.Conv2d(CHANNELS, CHANNELS, 3, 2, padding=1) for _ in range(4))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        levels = [torch.tanh(self.stem(images))]
        for convolution in self.down:
            levels.append(torch.tanh(convolution(levels[-1])))
        return OrderedDict(zip(("0", "1", "2", "3", "pool"), levels, strict=True))


def small_rcnn(classes: int = 3) -> Any:
    """The model in train mode, float64; its samplers pick at random, few enough that they choose."""
    torch.manual_seed(0)
    model: Any = MaskRCNN(
        Trunk(),
        min_size=64,
        max_size=96,
        box_head=TwoMLPHead(CHANNELS * 7**2, 16),
        box_predictor=FastRCNNPredictor(16, classes + 1),
        mask_head=MaskRCNNHeads(CHANNELS, (CHANNELS,), 1),
        mask_predictor=MaskRCNNPredictor(CHANNELS, CHANNELS, classes + 1),
        rpn_batch_size_per_image=32,
        rpn_pre_nms_top_n_train=5000,  # all: scores of anchors in the padding tie, and rounding would choose
        rpn_post_nms_top_n_train=60,
        box_batch_size_per_image=16,
        box_detections_per_img=4,
    )
    set_scales(model.roi_heads)
    return model.double().train()


def window() -> list[Sample]:
    """Images of four shapes with ids of their own, unequal numbers of objects, one without any."""
    shapes = [(64, 96, 5), (96, 64, 1), (64, 80, 2), (64, 72, 0)]
    images = [crowded_sample(h, w, objects=n, classes=3, masks=True) for h, w, n in shapes]
    return [replace(sample, image_id=number) for number, sample in enumerate(images)]


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of each gradient there is."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def gradient(model: Any, parts: Sequence[Sequence[Sample]], **options: Any) -> dict[str, torch.Tensor]:
    """The gradient of a window that is cut into these micro-batches."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    accumulate(model, make_objective(**options), parts, device=torch.device("cpu"))
    return gradients(model)


SHARES = ([0, 1], [2, 3])
"""Images of each rank: the windows of the two have other canvases."""


def rank_gradient(rank: int, folder: str) -> None:
    """A rank's process: the gradient of its share, summed over the two ranks, goes into a file."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model, samples = small_rcnn(), window()
    gradient(model, cut([samples[i] for i in SHARES[rank]], 1))
    sum_gradients(model.parameters())
    torch.save(gradients(model), f"{folder}/gradient-{rank}")
    dist.destroy_process_group()
