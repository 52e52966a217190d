"""A training loop of your own, and the functions that hand it to `trainfit check-exactness own_loop:check`.

Segmentation with pixels that do not count. `train` divides each micro-batch by the valid pixels of its whole window;
`train_naive` is the mean of means that most loops take, and `trainfit check-exactness own_loop:check_naive` says so.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import trainfit

IGNORED = 255


def make_model():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 1))


def make_items(count):
    """Images with a class for each pixel; some images are labelled in part only."""
    generator = torch.Generator().manual_seed(0)
    items = []
    for number in range(count):
        labels = torch.randint(4, (16, 16), generator=generator)
        labels[: 3 * (number % 5)] = IGNORED
        items.append((torch.randn(3, 16, 16, generator=generator), labels))
    return items


def train(model, batches, accumulation):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for start in range(0, len(batches), accumulation):
        window = batches[start : start + accumulation]
        valid_pixels = sum(int((labels != IGNORED).sum()) for _, labels in window)
        for images, labels in window:
            loss = cross_entropy(model(images), labels, ignore_index=IGNORED, reduction="sum") / valid_pixels
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def train_naive(model, batches, accumulation):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for number, (images, labels) in enumerate(batches, 1):
        loss = cross_entropy(model(images), labels, ignore_index=IGNORED) / accumulation
        loss.backward()
        if number % accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()


def check():
    return trainfit.OwnLoop(model=make_model, items=make_items(20), train=train)


def check_naive():
    return trainfit.OwnLoop(model=make_model, items=make_items(20), train=train_naive)


if __name__ == "__main__":
    for function in (check, check_naive):
        result = trainfit.check_exactness(function)
        print(f"{function.__name__}: {'exact' if result.exact else result.causes}")
        for finding in result.findings:
            print(f"  {finding.cause}: {finding.explanation}")
