"""Image tensors, shared by the families: copying to the device, normalisation, synthetic samples."""

from collections.abc import Sequence

import torch

from trainfit.tasks.detection.samples import Sample

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def to_device(tensors: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """Concatenate CPU tensors along their first dimension on the device of `like`, by one copy that the host does not wait for.

    On a GPU the copy leaves from page-locked memory: one from pageable memory would stop the host until it is done.
    """
    first = tensors[0]
    shape = (sum(len(tensor) for tensor in tensors), *first.shape[1:])
    packed = torch.empty(shape, dtype=first.dtype, pin_memory=like.is_cuda)
    torch.cat(list(tensors), out=packed)
    return packed.to(like.device, non_blocking=True)


def normalise_(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Scale (n, 3, height, width) from 0..255 to 0..1, subtract `mean` and divide by `std` of each channel; in place.

    The constants reach the kernels as numbers: as tensors they would be copied to the device for every micro-batch.
    """
    images.div_(255)
    for channel in range(3):
        images[:, channel].sub_(mean[channel]).div_(std[channel])
    return images


def stack_images(
    images: Sequence[torch.Tensor], like: torch.Tensor, *, mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """Uint8 images (3, height, width) of one size on the CPU -> (n, 3, height, width) like `like`, normalised."""
    pixels = to_device([image[None] for image in images], like).to(like.dtype)
    return normalise_(pixels, mean, std)


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
