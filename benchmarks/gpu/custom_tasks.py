"""Two models of a user's own, in plain PyTorch: `custom_tasks:unet` and `custom_tasks:encoder`."""

import torch
from torch import Tensor, nn

from trainfit.models.custom.step import CustomTask
from trainfit.models.setting import Setting


class UNet(nn.Module):
    """Four scales with skip connections; images (n, 3, h, w) -> logits (n, classes, h, w)."""

    def __init__(self, classes: int, width: int = 32) -> None:
        """Make the layers."""
        super().__init__()
        widths = [width * 2**i for i in range(4)]
        self.down = nn.ModuleList(_block(a, b) for a, b in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(_block(a + b, b) for a, b in zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        skips = list[Tensor]()
        for i, block in enumerate(self.down):
            x = block(nn.functional.max_pool2d(x, 2) if i else x)
            skips.append(x)
        for block, skip in zip(self.up, skips[-2::-1], strict=True):
            x = block(torch.cat((nn.functional.interpolate(x, scale_factor=2.0), skip), 1))
        return self.head(x)


def _block(a: int, b: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.Conv2d(b, b, 3, padding=1))


def unet(setting: Setting) -> CustomTask:
    """Semantic segmentation at 256 pixels."""
    side = setting.resolution or 256

    def sample(number: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(number)
        return torch.rand(3, side, side, generator=g), torch.randint(0, setting.classes, (side, side), generator=g)

    return CustomTask(build_model=lambda: UNet(setting.classes), make_sample=sample, loss=_cross_entropy)


def encoder(setting: Setting) -> CustomTask:
    """A transformer that says the class of each of 256 tokens."""

    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True, dropout=0.1)
        return nn.Sequential(
            nn.Embedding(30_000, 512), nn.TransformerEncoder(layer, 6), nn.Linear(512, setting.classes), _ClassesFirst()
        )

    def sample(number: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(number)
        return torch.randint(0, 30_000, (256,), generator=g), torch.randint(0, setting.classes, (256,), generator=g)

    return CustomTask(build_model=build, make_sample=sample, loss=_cross_entropy)


class _ClassesFirst(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """(n, tokens, classes) -> (n, classes, tokens), as cross_entropy wants it."""
        return x.transpose(1, 2)


def _cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, truth = batch
    return nn.functional.cross_entropy(model(inputs), truth)
