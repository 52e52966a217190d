"""Lightning with exact windows: one callback beside `accumulate_grad_batches`; needs trainfit[lightning].

trainfit check-exactness lightning_windows:plain     # what Lightning does by itself
trainfit check-exactness lightning_windows:exact     # with the callback
"""

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.functional import cross_entropy

import trainfit
from trainfit.integrations.lightning import ExactAccumulation, lightning_loop

IGNORED = 255


class Segmenter(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 1))

    def training_step(self, batch, _index):
        images, labels = batch
        return cross_entropy(self.net(images), labels, ignore_index=IGNORED)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


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


def plain():
    return lightning_loop(Segmenter, items(), gradient_clip_val=1.0)


def exact():
    return lightning_loop(
        Segmenter, items(), gradient_clip_val=1.0, callbacks=lambda: [ExactAccumulation(counts=valid_pixels)]
    )


if __name__ == "__main__":
    for make in (plain, exact):
        result = trainfit.check_exactness(make, micro_batch=2, accumulation=4)
        error = max(group.relative_error for group in result.groups)
        print(
            f"{make.__name__}: exact {result.exact}, error {error:.1e}, {', '.join(result.causes) or 'nothing found'}"
        )
