"""Any classifier of timm."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from trainfit.errors import TrainfitError
from trainfit.models.classifier.data import decode
from trainfit.models.classifier.family import PREFIX, ClassifierSetting
from trainfit.models.hub import not_downloaded, quiet_hub
from trainfit.models.images import IMAGENET_MEAN, IMAGENET_STD, stack_images, to_device
from trainfit.models.workload import OptimizerSettings, all_parameters
from trainfit.step.checkpointing import repeated_blocks
from trainfit.step.terms import LossTerm, Objective
from trainfit.tasks.classes.metric import BEST
from trainfit.tasks.classes.samples import LabelledImage, Ranking
from trainfit.weights import load_weights, without_warnings

SIDE = 224
"""Side in pixels of the input of a model that does not declare one."""


def build_model(name: str, *, classes: int, resolution: int | None = None) -> Any:
    """A model of timm with random weights, in train mode; `resolution` reaches those that must know it (ViTs).

    Raises:
        TrainfitError: timm is not installed, or has no such model.
    """
    try:
        import timm
    except ImportError as error:
        raise TrainfitError("timm: models need timm: pip install 'trainfit[timm]'") from error
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), n=1)
        hint = f" Perhaps you meant timm:{near[0]}." if near else ""
        raise TrainfitError(f"timm has no model {name!r}.{hint}")
    published = timm.get_pretrained_cfg(name)
    must_know = resolution is not None and published is not None and published.fixed_input_size
    size: dict[str, Any] = {"img_size": resolution} if must_know else {}
    model: Any = timm.create_model(name, pretrained=False, num_classes=classes, **size)
    return model.train()


def logits(model: Any, images: Sequence[LabelledImage]) -> torch.Tensor:
    """(n, classes); images are normalised as the model was published, and take the memory format of its weights."""
    like = next(p for p in model.parameters() if p.dim() == 4)
    published: Mapping[str, Any] = model.default_cfg
    mean = published.get("mean", IMAGENET_MEAN)
    std = published.get("std", IMAGENET_STD)
    batch = stack_images([i.image for i in images], like, mean=mean, std=std)
    last = not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
    try:
        return model(batch.contiguous(memory_format=torch.channels_last) if last else batch)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise TrainfitError(
            "BatchNorm sees one value per channel in a micro-batch of one image, which the last of a window may be: give "
            "a --micro-batch that divides the effective batch, above 1, or a larger --resolution"
        ) from error


def _terms(model: torch.nn.Module, images: Sequence[LabelledImage], _canvas: tuple[int, int]) -> Mapping[str, LossTerm]:
    scores = logits(model, images)
    labels = to_device([torch.tensor([i.label for i in images])], scores)
    return {"class": LossTerm(total=functional.cross_entropy(scores, labels, reduction="sum"), kind="images")}


OBJECTIVE = Objective(terms=_terms, counts=lambda images: {"class": float(len(images))})


class Classifier:
    """A `TrainableWorkload`: training by cross entropy. See that protocol for what the methods do."""

    export_name = "best-timm.safetensors"

    def __init__(self, setting: ClassifierSetting, classes: tuple[str, ...]) -> None:
        """Store the setting; `build` makes the weights."""
        self.setting = setting
        self.classes = classes
        self.objective = OBJECTIVE
        self.name = setting.model.removeprefix(PREFIX)

    @property
    def eval_size(self) -> int:
        """The published side unless the setting has another."""
        import timm

        published: Any = timm.get_pretrained_cfg(self.name)
        return self.setting.resolution or (published.input_size[-1] if published is not None else SIDE)

    @property
    def remarks(self) -> Sequence[str]:
        """Warnings about layers with which accumulation cannot be exact."""
        with torch.device("meta"):
            model = build_model(self.name, classes=len(self.classes), resolution=self.setting.resolution)
        if self.setting.freeze == "body" or not any(isinstance(module, _BatchNorm) for module in model.modules()):
            return ()
        return (f"{self.name} has BatchNorm: its statistics depend on the micro-batch, so accumulation is not exact",)

    def build(self) -> torch.nn.Module:
        model = build_model(self.name, classes=len(self.classes), resolution=self.setting.resolution)
        if self.setting.channels_last:
            model.to(memory_format=torch.channels_last)
        return _only_heads_train(model) if self.setting.freeze == "body" else model

    def load(self, model: torch.nn.Module, weights: str) -> list[str]:
        """Load a file of trainfit or timm (safetensors), or `pretrained`, which timm downloads; the head only if it fits."""
        if weights == "pretrained":
            state = _published(self.name)
            names = None
        else:
            state, metadata = load_weights(Path(weights))
            names = json.loads(metadata["classes"]) if "classes" in metadata else None
        own = model.state_dict()
        if not state.keys() & own.keys():
            raise TrainfitError(
                f"{weights} holds no weights of {self.setting.model}: it has {', '.join([*state][:3])} ..."
            )
        other_classes = names is not None and tuple(names) != self.classes
        head = {f"{name}.weight" for name in _heads(model)} | {f"{name}.bias" for name in _heads(model)}
        fits = {
            name: value
            for name, value in state.items()
            if name in own and value.shape == own[name].shape and not (other_classes and name in head)
        }
        wrong = sorted(own.keys() - fits.keys() - head)
        if wrong:
            raise TrainfitError(
                f"{weights} does not fit {self.setting.model}: {wrong[0]} is missing or has another shape"
            )
        model.load_state_dict(own | fits)
        random = sorted(own.keys() - fits.keys())
        return [f"{weights} is of other classes: the head ({', '.join(random)}) starts at random"] if random else []

    def parameter_groups(self, model: torch.nn.Module, settings: OptimizerSettings) -> list[dict[str, Any]]:
        return all_parameters(model, settings)

    def blocks(self, model: torch.nn.Module) -> Sequence[torch.nn.Module]:
        return repeated_blocks(model)

    def saturate(self, model: torch.nn.Module) -> None:
        """Do nothing: no part of a classifier grows with the data."""

    def worst_window(self, model: torch.nn.Module, images: int) -> Sequence[LabelledImage]:
        return [self.eval_sample(model)] * images

    def eval_sample(self, model: Any) -> LabelledImage:
        side = self.setting.resolution or model.default_cfg["input_size"][-1]
        g = torch.Generator().manual_seed(0)
        return LabelledImage(image=torch.randint(0, 256, (3, side, side), generator=g, dtype=torch.uint8), label=0)

    def outputs(self, model: torch.nn.Module, samples: Sequence[LabelledImage]) -> list[Ranking]:
        scores, classes = logits(model, samples).float().softmax(1).topk(min(BEST, len(self.classes)))
        rows = zip(samples, classes.tolist(), scores.tolist(), strict=True)
        return [Ranking(record_id=s.record_id, classes=tuple(best), scores=tuple(p)) for s, best, p in rows]

    def sizes(self) -> tuple[int, ...]:
        return (self.eval_size,)

    def decoder(self) -> Any:
        return decode

    def metadata(self) -> dict[str, str]:
        knobs = asdict(self.setting)
        return {"model": knobs.pop("model"), "classes": json.dumps(self.classes), "knobs": json.dumps(knobs)}

    def export(self, weights: Mapping[str, torch.Tensor], path: Path) -> None:
        """Write what `timm.create_model(NAME, num_classes=N, checkpoint_path=PATH)` loads."""
        safetensors.torch.save_file({name: value.contiguous() for name, value in weights.items()}, path)


def _published(name: str) -> dict[str, torch.Tensor]:
    """Timm's published weights.

    Raises:
        TrainfitError: there are none, or they cannot be downloaded.
    """
    import timm

    published: Any = timm.get_pretrained_cfg(name)
    if published is None or not published.has_weights:
        raise TrainfitError(f"timm has no published weights of {name}: give --weights FILE, or --weights random")
    try:
        with without_warnings(), quiet_hub():
            return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # the hub's client raises errors of its own
        place = f"https://huggingface.co/{published.hf_hub_id}" if published.hf_hub_id else published.url
        raise TrainfitError(not_downloaded("model.safetensors", place, error)) from error


def _only_heads_train(model: Any) -> Any:
    """The model with the layers that end in the classes as all that trains.

    BatchNorm of the body becomes timm's frozen one, whose statistics do not move in train mode.

    Raises:
        TrainfitError: timm does not say which layers these are.
    """
    from timm.utils.model import freeze_batch_norm_2d

    heads = _heads(model)
    if not heads:
        raise TrainfitError("--freeze body: timm does not name this model's classifier layer: leave it out")
    model = freeze_batch_norm_2d(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(f"{head}." for head in heads)))
    return model


def _heads(model: Any) -> Sequence[str]:
    """Names of the layers whose outputs are the classes."""
    named = model.default_cfg.get("classifier") or ()
    return (named,) if isinstance(named, str) else tuple(named)


make_workload = Classifier
