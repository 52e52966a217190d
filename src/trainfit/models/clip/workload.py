"""CLIP and SigLIP models of open_clip."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch.nn import functional

from trainfit.errors import TrainfitError
from trainfit.models.clip.family import PREFIX, ClipSetting
from trainfit.models.images import stack_images, to_device
from trainfit.models.workload import OptimizerSettings, all_parameters
from trainfit.step.checkpointing import repeated_blocks
from trainfit.step.contrastive import Contrastive
from trainfit.step.terms import LossTerm, Objective

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""open_clip 3.3 constants.py OPENAI_DATASET_MEAN, OPENAI_DATASET_STD."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """One image and its text, on the CPU."""

    image: torch.Tensor
    """uint8 (3, height, width)."""
    text: torch.Tensor
    """int64 (context length,): token ids."""


def build_model(architecture: str, *, resolution: int | None = None) -> torch.nn.Module:
    """A model of open_clip with random weights, in train mode.

    Raises:
        TrainfitError: open_clip is not installed, no such architecture, or one that has losses besides (CoCa).
    """
    try:
        import open_clip
    except ImportError as error:
        raise TrainfitError("CLIP models need open_clip: pip install 'trainfit[clip]'") from error
    known = open_clip.list_models()
    if architecture not in known:
        near = get_close_matches(architecture, known, n=1)
        hint = f" Perhaps you meant {PREFIX}{near[0]}." if near else ""
        raise TrainfitError(f"open_clip has no architecture {architecture!r}.{hint}")
    if "multimodal_cfg" in (open_clip.get_model_config(architecture) or {}):
        raise TrainfitError(f"{PREFIX}{architecture} has losses besides the contrastive one, which are not there yet")
    model: Any = open_clip.create_model(
        architecture, load_weights=False, pretrained_text=False, force_image_size=resolution, output_dict=False
    )
    return model.train()


def features(model: torch.nn.Module, pairs: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised image and text features, each (n, d)."""
    like = next(model.parameters())
    images = stack_images([pair.image for pair in pairs], like, mean=MEAN, std=STD)
    texts = to_device([pair.text[None] for pair in pairs], like)
    of_images, of_texts, *_ = model(images, texts)
    return of_images, of_texts


def rows_loss(model: torch.nn.Module, images: torch.Tensor, texts: torch.Tensor, rows: slice) -> torch.Tensor:
    """These rows' part of the mean loss over all pairs: SigLIP's where the model has a bias, CLIP's otherwise.

    Source: open_clip 3.3 loss.py `ClipLoss`, `SigLipLoss`.
    """
    learned: Any = model
    scale = learned.logit_scale.exp()
    truth = torch.arange(rows.start, rows.stop, device=images.device)
    logits = scale * images[rows] @ texts.T
    if learned.logit_bias is not None:
        signs = torch.full_like(logits, -1.0)
        signs[torch.arange(len(truth), device=truth.device), truth] = 1.0
        return -functional.logsigmoid(signs * (logits + learned.logit_bias)).sum() / len(images)
    of_images = functional.cross_entropy(logits, truth, reduction="sum")
    of_texts = functional.cross_entropy(scale * texts[rows] @ images.T, truth, reduction="sum")
    return (of_images + of_texts) / (2 * len(images))


CACHED = Contrastive(features=features, rows_loss=rows_loss)
"""The loss of the whole window."""


def _plain_terms(model: torch.nn.Module, pairs: Sequence[Pair], _canvas: tuple[int, int]) -> Mapping[str, LossTerm]:
    loss = rows_loss(model, *features(model, pairs), slice(0, len(pairs)))
    return {"contrastive": LossTerm(total=loss, kind="mean")}


PLAIN = Objective(terms=_plain_terms, counts=lambda pairs: {"contrastive": float(len(pairs))})
"""Each micro-batch contrasted with itself alone: a mean of means."""


class Clip:
    """A `Workload`: training by the contrastive loss on full texts. See that protocol for what the methods do."""

    def __init__(self, setting: ClipSetting, classes: tuple[str, ...]) -> None:
        """Note what is to be built; no weights yet."""
        self.setting = setting
        self.classes = classes
        self.objective = CACHED if setting.contrastive == "cached" else PLAIN

    def build(self) -> torch.nn.Module:
        return build_model(self.setting.model.removeprefix(PREFIX), resolution=self.setting.resolution)

    def parameter_groups(self, model: torch.nn.Module, settings: OptimizerSettings) -> list[dict[str, Any]]:
        return all_parameters(model, settings)

    def blocks(self, model: torch.nn.Module) -> Sequence[torch.nn.Module]:
        return repeated_blocks(model)

    def saturate(self, model: torch.nn.Module) -> None:
        """Nothing in a CLIP model depends on the data."""

    def worst_window(self, model: torch.nn.Module, images: int) -> Sequence[Pair]:
        """Two pairs alternating: of equal pairs the loss has no gradient."""
        pairs = [_pair(model, seed=0), _pair(model, seed=1)]
        return [pairs[number % 2] for number in range(images)]

    def eval_sample(self, model: torch.nn.Module) -> Pair:
        return _pair(model, seed=0)

    def outputs(self, model: torch.nn.Module, samples: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of both towers, as zero-shot evaluation computes them."""
        return features(model, samples)


make_workload = Clip


def _pair(model: Any, *, seed: int) -> Pair:
    """Noise, and a text that fills the context; its last token is the largest id, which CLIP pools at."""
    side: int | tuple[int, int] = model.visual.image_size
    height, width = side if isinstance(side, tuple) else (side, side)
    g = torch.Generator().manual_seed(seed)
    text = torch.randint(1, model.vocab_size - 1, (model.context_length,), generator=g)
    text[-1] = model.vocab_size - 1
    return Pair(image=torch.randint(0, 256, (3, height, width), generator=g, dtype=torch.uint8), text=text)
