"""A plain loop with gradient accumulation, and the same with exact windows: `diff` of the two functions is in the docs.

Segmentation with pixels that do not count, a learning rate schedule and clipping; the last window of an epoch is short.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

import trainfit

IGNORED = 255


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 1))


def make_loader(count=22, micro_batch=2):
    """Batches of images with a class for each pixel; some images are labelled in part only."""
    generator = torch.Generator().manual_seed(0)
    items = []
    for number in range(count):
        labels = torch.randint(4, (16, 16), generator=generator)
        labels[: 3 * (number % 5)] = IGNORED
        items.append((torch.randn(3, 16, 16, generator=generator), labels))
    return torch.utils.data.DataLoader(items, batch_size=micro_batch)


def valid_pixels(batch):
    return (batch[1] != IGNORED).sum()


def train_naive(model, loader, accumulation):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for number, (images, labels) in enumerate(loader, 1):
        loss = cross_entropy(model(images), labels, ignore_index=IGNORED) / accumulation
        loss.backward()
        if number % accumulation == 0:
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def train(model, loader, accumulation):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    windows = trainfit.accumulate(loader, accumulation, model=model, counts=valid_pixels)
    for images, labels in windows:
        loss = cross_entropy(model(images), labels, ignore_index=IGNORED)
        windows.backward(loss)
        if windows.complete:
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def check():
    return trainfit.OwnLoop(model=make_model, items=list(make_loader().dataset), train=train)


def check_naive():
    return trainfit.OwnLoop(model=make_model, items=list(make_loader().dataset), train=train_naive)


if __name__ == "__main__":
    big, small = make_model(), make_model()
    train(big, make_loader(micro_batch=8), 1)
    train(small, make_loader(micro_batch=2), 4)
    pairs = zip(big.parameters(), small.parameters(), strict=True)
    print(f"micro-batch 8 x 1 and 2 x 4 differ by {max(float((a - b).detach().abs().max()) for a, b in pairs):.1e}")
    print(
        f"naive: {trainfit.check_exactness(check_naive).causes}, with trainfit: {trainfit.check_exactness(check).causes}"
    )
