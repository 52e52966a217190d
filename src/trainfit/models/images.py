"""Images as every family draws, stacks and normalises them."""

from collections.abc import Sequence

import torch

from trainfit.tasks.detection.samples import Sample

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def stack_images(
    images: Sequence[torch.Tensor], like: torch.Tensor, *, mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """Uint8 images (3, height, width) of one size on the CPU -> (n, 3, height, width) like `like`, normalised."""
    pixels = torch.stack(list(images)).to(like.device, non_blocking=True).to(like.dtype).div_(255)
    means, stds = (torch.tensor(v, device=like.device, dtype=like.dtype)[:, None, None] for v in (mean, std))
    return pixels.sub_(means).div_(stds)


def crowded_sample(height: int, width: int, *, objects: int, classes: int, masks: bool) -> Sample:
    """An image of noise with `objects` boxes of a tenth to a half of its sides: the worst that a step may meet."""
    g = torch.Generator().manual_seed(0)
    size = 0.1 + 0.4 * torch.rand((objects, 2), generator=g)
    corner = torch.rand((objects, 2), generator=g) * (1 - size)
    boxes = torch.cat((corner, corner + size), 1) * torch.tensor([width, height, width, height])
    drawn = torch.zeros((objects, height, width), dtype=torch.bool) if masks else None
    if drawn is not None:
        for mask, (x0, y0, x1, y1) in zip(drawn, boxes.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = True
    return Sample(
        image=torch.randint(0, 256, (3, height, width), generator=g, dtype=torch.uint8),
        boxes=boxes,
        classes=torch.randint(0, classes, (objects,), generator=g),
        masks=drawn,
        image_id=0,
        original_size=(height, width),
    )
