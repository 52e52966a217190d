"""CLIP, SigLIP and CoCa models of open_clip."""

import importlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainfit.errors import TrainfitError
from trainfit.models.clip.architecture import (
    architecture_of,
    batchnorm_layers,
    build_model,
    config_of,
    has_caption,
    preprocessing,
)
from trainfit.models.clip.data import Pair, make_sample
from trainfit.models.clip.family import ClipSetting
from trainfit.models.clip.interop import export_upstream, load_into
from trainfit.models.clip.losses import (
    CACHED,
    PLAIN,
    Choices,
    features,
    image_features,
    make_objective,
    rows_loss,
)
from trainfit.models.clip.names import PREFIX
from trainfit.models.clip.teacher import Teacher
from trainfit.models.workload import Decoder, OptimizerSettings
from trainfit.step.checkpointing import repeated_blocks
from trainfit.tasks.pairs.samples import PairFeatures

__all__ = ["CACHED", "PLAIN", "Clip", "Pair", "build_model", "features", "from_upstream", "make_workload", "rows_loss"]


with suppress(ImportError):  # here, so that a process that forks for several traces imports it once
    importlib.import_module("open_clip")


class Clip:
    """A `Workload`: training by the contrastive loss. See that protocol for what the methods do."""

    export_name = "best-open_clip.pt"

    def __init__(self, setting: ClipSetting, classes: tuple[str, ...]) -> None:
        """Find the architecture; no weights yet.

        Raises:
            TrainfitError: open_clip is not installed, or has no such architecture.
        """
        self.setting = setting
        self.classes = classes
        self.architecture = architecture_of(setting.model)
        self.caption = has_caption(self.architecture)
        self.preprocessing = preprocessing(self.architecture, setting.resolution)
        self.eval_size = self.preprocessing.size[0]
        self.remarks: list[str] = []
        self.teacher: Teacher | None = None
        if setting.distill_model is not None:
            self.teacher = Teacher(setting.distill_model, self.architecture, setting.resolution)
        self.objective = PLAIN if setting.contrastive == "plain" else make_objective(self._choices())

    def _choices(self) -> Choices:
        setting = self.setting
        if self.caption and (setting.contrastive == "plain" or self.teacher is not None or setting.text_ratio):
            raise TrainfitError(
                f"{setting.model} has a caption loss, which needs both towers in one forward: "
                "leave --text-ratio, --distill-model and --contrastive plain out"
            )
        if self.teacher is not None and (setting.loss == "siglip" or self._has_bias()):
            raise TrainfitError("--distill-model goes with --loss clip: its loss compares distributions over rows")
        return Choices(
            caption=self.caption,
            frozen="none" if setting.unlocked_groups else setting.freeze,
            text_ratio=setting.text_ratio,
            same_texts=setting.positives == "texts",
            teacher=self.teacher,
        )

    def _has_bias(self) -> bool:
        return self.setting.loss == "auto" and "init_logit_bias" in config_of(self.architecture)

    def build(self) -> torch.nn.Module:
        setting = self.setting
        if self.teacher is not None:
            self.teacher.build()
        return build_model(
            setting.model,
            resolution=setting.resolution,
            loss=setting.loss,
            freeze=setting.freeze,
            unlocked_groups=setting.unlocked_groups,
        )

    def require_trainable(self) -> None:
        """Reject models that the cached loss cannot train exactly; read the teacher's weights.

        Raises:
            TrainfitError: a tower with BatchNorm in training, or a teacher without weights.
        """
        if self.teacher is not None:
            self.remarks += self.teacher.fill()
        if self.setting.contrastive == "cached":
            setting = self.setting
            layers = batchnorm_layers(build_model(setting.model, device="meta"))
            if layers and setting.freeze in ("batchnorm", "image"):
                with torch.random.fork_rng(devices=[]):
                    layers = batchnorm_layers(self.build())
            if layers:
                raise TrainfitError(
                    f"{self.setting.model} has {layers} BatchNorm layers, whose output depends on the other images of a "
                    "micro-batch: the features of a window would depend on its cut. Give --freeze batchnorm, or "
                    "--contrastive plain for another loss"
                )

    def parameter_groups(self, model: torch.nn.Module, settings: OptimizerSettings) -> list[dict[str, Any]]:
        """Upstream's groups: no weight decay of gains, biases and the scale; AdamW's betas and eps by the kind of tower.

        Source: open_clip 3.3 open_clip_train/main.py, and params.py `get_default_params`.
        """
        vit = "vit" in self.architecture.lower()
        shared: dict[str, Any] = {
            "lr": settings.lr,
            "betas": (0.9, 0.98 if vit else 0.999),
            "eps": 1e-6 if vit else 1e-8,
        }
        groups: dict[float, list[torch.nn.Parameter]] = {0.0: [], settings.weight_decay: []}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                plain = parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))
                groups[0.0 if plain else settings.weight_decay].append(parameter)
        return [{**shared, "params": members, "weight_decay": decay} for decay, members in groups.items() if members]

    def blocks(self, model: torch.nn.Module) -> Sequence[torch.nn.Module]:
        tower: Any = model
        of_images = repeated_blocks(tower.visual)
        known = {id(block) for block in of_images}
        of_texts = [block for block in repeated_blocks(model) if id(block) not in known]
        chosen = self.setting.recompute
        return (of_images if chosen != "text" else []) + (of_texts if chosen != "image" else [])

    def saturate(self, model: torch.nn.Module) -> None:
        """Do nothing: no part of a CLIP model grows with the data."""

    def worst_window(self, model: torch.nn.Module, images: int) -> Sequence[Pair]:
        """Two alternating pairs: the loss of equal pairs has no gradient."""
        pairs = [_pair(model, seed=0), _pair(model, seed=1)]
        return [pairs[number % 2] for number in range(images)]

    def eval_sample(self, model: torch.nn.Module) -> Pair:
        return _pair(model, seed=0)

    @torch.no_grad()
    def outputs(self, model: torch.nn.Module, samples: Sequence[Pair]) -> list[PairFeatures]:
        """Features of images and texts on the CPU. Texts, of which an image may have several, run as many at a time as
        there are samples.
        """
        tower: Any = model
        with_images = [sample for sample in samples if sample.image.dim() == 3]
        images = iter(image_features(model, with_images)[0].float().cpu() if with_images else ())
        like = next(model.parameters())
        rows = [sample.text.reshape(-1, sample.text.shape[-1]) for sample in samples if sample.text.numel()]
        tokens = torch.cat(rows) if rows else None
        parts = () if tokens is None else tokens.split(len(samples))
        encoded = [tower.encode_text(part.to(like.device), normalize=True).float().cpu() for part in parts]
        texts = iter(torch.cat(encoded)) if encoded else iter(())
        results: list[PairFeatures] = []
        for sample in samples:
            count = sample.text.numel() // max(1, sample.text.shape[-1])
            own = [next(texts) for _ in range(count)]
            results.append(
                PairFeatures(
                    record_id=sample.record_id,
                    image=next(images) if sample.image.dim() == 3 else None,
                    texts=torch.stack(own) if own else None,
                )
            )
        return results

    def load(self, model: torch.nn.Module, weights: str) -> list[str]:
        return load_into(model, self.architecture, weights)

    def sizes(self) -> tuple[int, ...]:
        return (self.eval_size,)

    def decoder(self) -> Decoder:
        name = self.setting.model.removeprefix(PREFIX)
        file = name if name.endswith(".json") else None
        return partial(make_sample, architecture=file or self.architecture, preprocessing=self.preprocessing)

    def metadata(self) -> dict[str, str]:
        knobs = asdict(self.setting)
        shaping = {key: knobs[key] for key in ("resolution", "loss", "freeze")}
        return {"model": self.setting.model, "classes": json.dumps(self.classes), "knobs": json.dumps(shaping)}

    def export(self, weights: Any, path: Path) -> None:
        export_upstream(weights, path)


make_workload = Clip


def from_upstream(name: str, weights: str) -> tuple[Clip, torch.nn.Module, list[str]]:
    """A model for inference with the weights of a checkpoint of open_clip; and remarks for the user.

    Raises:
        TrainfitError: as `interop.load_into`.
    """
    workload = Clip(ClipSetting(model=name), ("pairs",))
    model = workload.build()
    return workload, model, workload.load(model, weights)


def _pair(model: Any, *, seed: int) -> Pair:
    """Noise, and a text of the full context length; its last token is the largest id, where CLIP pools."""
    height, width = model.trainfit_preprocessing.size
    vocabulary, length = _text_shape(model)
    g = torch.Generator().manual_seed(seed)
    text = torch.randint(1, vocabulary - 1, (length,), generator=g)
    text[-1] = vocabulary - 1
    return Pair(image=torch.randint(0, 256, (3, height, width), generator=g, dtype=torch.uint8), text=text, key=seed)


def _text_shape(model: Any) -> tuple[int, int]:
    """(size of the vocabulary, context length) of the text tower; CoCa keeps both in it."""
    tower = model if hasattr(model, "vocab_size") else model.text
    return int(tower.vocab_size), int(tower.context_length)
