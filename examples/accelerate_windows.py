"""accelerate with exact windows: `trainfit.accumulate` in the place of `accelerator.accumulate`; needs trainfit[transformers].

trainfit check-exactness accelerate_windows:plain
trainfit check-exactness accelerate_windows:exact
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy

import trainfit

IGNORED = 255


def make_model():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 1))


def items(count=22):
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(count):
        labels = torch.randint(4, (16, 16), generator=generator)
        labels[: 3 * (number % 5)] = IGNORED
        found.append((torch.randn(3, 16, 16, generator=generator), labels))
    return found


def valid_pixels(batch):
    return (batch[1] != IGNORED).sum()


def train_plain(model, batches, accumulation):
    accelerator = Accelerator(gradient_accumulation_steps=accumulation, cpu=True)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    for images, labels in batches:
        with accelerator.accumulate(model):
            accelerator.backward(cross_entropy(model(images), labels, ignore_index=IGNORED))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


def train_exact(model, batches, accumulation):
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    windows = trainfit.accumulate(batches, accumulation, model=model, counts=valid_pixels, scaler=accelerator.scaler)
    for images, labels in windows:
        windows.backward(cross_entropy(model(images), labels, ignore_index=IGNORED))
        if windows.complete:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


def plain():
    return trainfit.OwnLoop(model=make_model, items=items(), train=train_plain)


def exact():
    return trainfit.OwnLoop(model=make_model, items=items(), train=train_exact)


if __name__ == "__main__":
    for make in (plain, exact):
        result = trainfit.check_exactness(make, micro_batch=2, accumulation=4)
        error = max(group.relative_error for group in result.groups)
        print(
            f"{make.__name__}: exact {result.exact}, error {error:.1e}, {', '.join(result.causes) or 'nothing found'}"
        )
