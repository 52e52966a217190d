"""Two models of a user's own: `custom_tasks:deeplab` and `custom_tasks:encoder`."""

import torch
from torch import Tensor, nn
from torchvision.models.segmentation import deeplabv3_resnet50

from trainfit.models.custom.family import CustomSetting
from trainfit.models.custom.workload import CustomTask


class _Logits(nn.Module):
    """A model whose output is (n, classes, ...), as cross_entropy wants it."""

    def __init__(self, model: nn.Module, *, transposed: bool) -> None:
        super().__init__()
        self.model, self.transposed = model, transposed

    def forward(self, x: Tensor) -> Tensor:
        found = self.model(x)
        return found.transpose(1, 2) if self.transposed else found["out"]


def deeplab(setting: CustomSetting) -> CustomTask:
    """Semantic segmentation at 256 pixels."""
    side = setting.resolution or 256

    def build() -> nn.Module:
        model = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=setting.classes)
        return _Logits(model, transposed=False)

    def sample(number: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(number)
        return torch.rand(3, side, side, generator=g), torch.randint(0, setting.classes, (side, side), generator=g)

    return CustomTask(build_model=build, make_sample=sample, loss=_cross_entropy)


def encoder(setting: CustomSetting) -> CustomTask:
    """A transformer that says the class of each of 256 tokens."""

    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True)
        layers = nn.TransformerEncoder(layer, 6), nn.Linear(512, setting.classes)
        return _Logits(nn.Sequential(nn.Embedding(30_000, 512), *layers), transposed=True)

    def sample(number: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(number)
        return torch.randint(0, 30_000, (256,), generator=g), torch.randint(0, setting.classes, (256,), generator=g)

    return CustomTask(build_model=build, make_sample=sample, loss=_cross_entropy)


def _cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, truth = batch
    return nn.functional.cross_entropy(model(inputs), truth)
