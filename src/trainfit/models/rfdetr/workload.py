"""RF-DETR, detection and segmentation: the one place that touches upstream's builders."""

import dataclasses
import json
import logging
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from rfdetr import config as upstream
from rfdetr.datasets.coco import compute_multi_scale_scales
from rfdetr.models import build_criterion_from_config, build_model_from_config
from rfdetr.models.backbone.dinov2_with_windowed_attn import Dinov2WithRegistersDropPath
from rfdetr.models.heads.segmentation import SegmentationHead
from rfdetr.models.lwdetr import LWDETR

from trainfit.errors import TrainfitError
from trainfit.models.images import crowded_sample
from trainfit.models.rfdetr.data import make_sample, to_batch
from trainfit.models.rfdetr.family import RfDetrKnobs, RfDetrSetting, RfDetrTraining
from trainfit.models.rfdetr.interop import (
    MASK_HEAD,
    attach_mask_head,
    export_upstream,
    fill,
    find_weights,
    load_weights,
)
from trainfit.models.rfdetr.lean_head import LeanHead, Masks, masks_of
from trainfit.models.rfdetr.lean_selection import LeanTransformer, selection_of
from trainfit.models.rfdetr.losses import make_lean, make_objective
from trainfit.models.rfdetr.weights_file import read_weights
from trainfit.models.workload import Decoder, OptimizerSettings
from trainfit.step.checkpointing import runs_several_times
from trainfit.step.lora import adapt, merged
from trainfit.tasks.detection.samples import ImageDetections, Sample

CONFIGS: Mapping[str, type[upstream.ModelConfig]] = {
    "rfdetr-nano": upstream.RFDETRNanoConfig,
    "rfdetr-small": upstream.RFDETRSmallConfig,
    "rfdetr-medium": upstream.RFDETRMediumConfig,
    "rfdetr-large": upstream.RFDETRLargeConfig,
    "rfdetr-seg-nano": upstream.RFDETRSegNanoConfig,
    "rfdetr-seg-small": upstream.RFDETRSegSmallConfig,
    "rfdetr-seg-medium": upstream.RFDETRSegMediumConfig,
    "rfdetr-seg-large": upstream.RFDETRSegLargeConfig,
    "rfdetr-seg-xlarge": upstream.RFDETRSegXLargeConfig,
    "rfdetr-seg-2xlarge": upstream.RFDETRSeg2XLargeConfig,
}

WITH_MASKS: Mapping[str, type[upstream.ModelConfig]] = {
    "rtdetr-seg-nano": upstream.RFDETRNanoConfig,
    "rtdetr-seg-small": upstream.RFDETRSmallConfig,
    "rtdetr-seg-base": upstream.RFDETRBaseConfig,
    "rtdetr-seg-medium": upstream.RFDETRMediumConfig,
    "rtdetr-seg-large": upstream.RFDETRLargeDeprecatedConfig,
}
"""Detection sizes with upstream's mask head added, by the names of the RT-DETR-Seg guide; see docs/segmentation.md."""

LARGEST_RESOLUTION = 4096
"""Pixels; a larger resolution in a file is ignored."""
LAYER_DECAY = 0.8
"""Each encoder layer's rate is this times the next layer's (rfdetr 1.11.2 config.py `lr_vit_layer_decay`)."""
COMPONENT_DECAY = 0.7
"""Decoder: lr x this; encoder: lr_encoder x this squared (`lr_component_decay`)."""
ENCODER_LAYERS = "backbone.0.encoder.encoder.encoder.layer"
DECODER_LAYERS = "transformer.decoder.layers"
PROJECTOR = "backbone.0.projector"
FROZEN_PARTS = {"projector": PROJECTOR, "decoder": "transformer.decoder"}
"""Part of `--freeze` -> what the names of its parameters begin with; upstream's builder freezes the encoder."""
ADAPTED = ("query", "key", "value")
"""Linear layers of the encoder's attention that `--lora` adapts (rfdetr 1.11.2 models/weights.py `apply_lora`)."""


class RfDetr:
    """A `Workload`. See that protocol for what the methods do."""

    def __init__(
        self, name: str, classes: tuple[str, ...], knobs: RfDetrKnobs | None = None, *, outputs: int | None = None
    ) -> None:
        """Make the configuration; no weights yet.

        `outputs` is the number of rows of the class heads: one more than there are classes, if not given. A class
        named "" is a row that is no class.
        """
        knobs = knobs or RfDetrKnobs()
        own = {field.name: getattr(knobs, field.name) for field in dataclasses.fields(RfDetrKnobs)}
        is_setting = isinstance(knobs, RfDetrSetting)
        self.setting = knobs if is_setting else RfDetrSetting(model=name, classes=len(classes), **own)
        outputs = outputs or len(classes) + 1
        self.name = name
        self.classes = classes
        self.knobs = knobs
        self.config = make_config(name, outputs - 1, knobs)
        self.resolution = self.eval_size = self.config.resolution
        self.export_name = "best-rfdetr.pth"
        legal = knobs.resolution in (None, self.resolution)
        remark = f"resolution {knobs.resolution} is not legal for {name}: using {self.resolution}"
        self.remarks = () if legal else (remark,)
        self.masks = self.config.segmentation_head
        train_config = upstream.SegmentationTrainConfig if self.masks else upstream.TrainConfig
        train = train_config(dataset_dir=".", output_dir=".")
        criterion, self.postprocess = build_criterion_from_config(self.config, train)
        criterion.train()  # it counts groups in train mode
        if knobs.stage == "masks":
            criterion.losses = ["masks"]  # the others are constants of a frozen detector
        if self.masks and self.setting.lean == "on":
            make_lean(criterion)
        self.criterion = criterion
        self.max_detections = train.eval_max_dets
        self.is_class = torch.tensor([name != "" for name in classes] + [False] * (outputs - len(classes)))
        self.objective = make_objective(
            criterion, groups=self.config.group_detr, masks=self.masks, masks_only=knobs.stage == "masks"
        )

    def build(self) -> torch.nn.Module:
        with _quiet():
            # With a name here, upstream leaves out the download of DINOv2's weights (base and large would try it).
            model = build_model_from_config(self.config.model_copy(update={"pretrain_weights": "later"}))
        for name, parameter in model.named_parameters():
            # Upstream never uses the encoder's mask token: without this it would be a parameter that gets no gradient.
            if name.endswith("mask_token") or (self.knobs.stage == "masks" and not name.startswith(MASK_HEAD)):
                parameter.requires_grad_(False)
        freeze(model, self.knobs)
        if self.knobs.drop_path:
            drop_layers(model, self.knobs.drop_path)
        if self.setting.lean == "on":
            model.transformer.__class__ = LeanTransformer
        if self.masks:
            runs_several_times(_head(model).query_features_block)
            if self.setting.lean == "on":
                _head(model).__class__ = LeanHead
        return model.train()

    def load(self, model: torch.nn.Module, weights: str) -> list[str]:
        if self.knobs.stage == "masks":
            return attach_mask_head(cast(LWDETR, model), Path(weights), classes=self.classes)
        with _quiet():
            return load_weights(cast(LWDETR, model), self.config, weights, name=self.name, classes=self.classes)

    def parameter_groups(self, model: torch.nn.Module, settings: OptimizerSettings) -> list[dict[str, Any]]:
        """Upstream's groups: rate by layer in the encoder, lower in the decoder; no decay of norms and biases there.

        Source: rfdetr 1.11.2 training/param_groups.py `get_param_dict` (not importable without its `train` extra).
        """
        encoder = _encoder_groups(model, self.config, settings)
        merged: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            lr = settings.lr
            decay = settings.weight_decay
            if name in encoder:
                lr, decay = encoder[name]
            elif "transformer.decoder" in name:
                lr = settings.lr * COMPONENT_DECAY
            merged.setdefault((lr, decay), []).append(parameter)
        return [{"params": params, "lr": lr, "weight_decay": wd} for (lr, wd), params in merged.items()]

    def blocks(self, model: torch.nn.Module) -> list[torch.nn.Module]:
        """The mask head's and the choice of queries (they free most for their time); then encoder, projector, decoder."""
        encoder, decoder = (model.get_submodule(name).children() for name in (ENCODER_LAYERS, DECODER_LAYERS))
        selection = [selection_of(model)] if self.setting.lean == "on" else []
        blocks = [*selection, *encoder, model.get_submodule(PROJECTOR), *decoder]
        if self.masks:
            head = _head(model)
            blocks = [*head.blocks, head.query_features_block, *blocks]
        return [block for block in blocks if any(parameter.requires_grad for parameter in block.parameters())]

    def saturate(self, model: torch.nn.Module) -> None:
        """Do nothing: no part of an RF-DETR grows with the data."""

    def worst_window(self, model: torch.nn.Module, images: int) -> Sequence[Sample]:
        """Images of the largest size, each with the largest number of objects."""
        side = max(self.sizes())
        objects = self.setting.objects_per_image
        return [crowded_sample(side, side, objects=objects, classes=len(self.classes), masks=self.masks)] * images

    def eval_sample(self, model: torch.nn.Module) -> Sample:
        return crowded_sample(self.resolution, self.resolution, objects=1, classes=len(self.classes), masks=False)

    def outputs(self, model: torch.nn.Module, samples: Sequence[Sample]) -> list[ImageDetections]:
        return self.detect(model, samples)

    def sizes(self) -> tuple[int, ...]:
        if not self.knobs.multi_scale:
            return (self.resolution,)
        return tuple(compute_multi_scale_scales(self.resolution, True, self.config.patch_size, self.config.num_windows))

    def decoder(self) -> Decoder:
        return partial(make_sample, masks=self.masks)

    @torch.no_grad()
    def detect(self, model: torch.nn.Module, samples: Sequence[Sample]) -> list[ImageDetections]:
        like = next(model.parameters())
        outputs = model(to_batch(samples, (self.resolution, self.resolution), like))
        sizes = torch.tensor([s.original_size for s in samples], device=like.device)
        # Upstream would compute all masks of all images at image size at once.
        masks: Masks | None = outputs.pop("pred_masks", None)
        _, _, queries = self.postprocess._select_topk(outputs["pred_logits"])  # pyright: ignore[reportPrivateUsage]
        is_class = self.is_class.to(like.device)
        detections: list[ImageDetections] = []
        for i, (sample, result) in enumerate(zip(samples, self.postprocess(outputs, sizes), strict=True)):
            known = is_class[result["labels"]]
            detections.append(
                ImageDetections(
                    image_id=sample.image_id,
                    boxes=result["boxes"][known].float().cpu(),
                    scores=result["scores"][known].float().cpu(),
                    classes=result["labels"][known].cpu(),
                    masks=None if masks is None else masks_of(masks, i, queries[i][known], sample.original_size),
                )
            )
        return detections

    def metadata(self) -> dict[str, str]:
        own = {field.name: getattr(self.knobs, field.name) for field in dataclasses.fields(RfDetrKnobs)}
        knobs = own | {"resolution": self.resolution}
        return {"model": self.name, "classes": json.dumps(self.classes), "knobs": json.dumps(knobs)}

    def export(self, weights: Mapping[str, torch.Tensor], path: Path) -> None:
        export_upstream(self.config, merged(weights), self.classes, path)


def freeze(model: torch.nn.Module, knobs: RfDetrKnobs) -> None:
    """Leave out of training what `--freeze` names, and with `--lora` the encoder but its adapters, which are added."""
    prefixes = tuple(FROZEN_PARTS[part] for part in knobs.frozen if part in FROZEN_PARTS)
    for name, parameter in model.named_parameters():
        if prefixes and name.startswith(prefixes):
            parameter.requires_grad_(False)
    if knobs.lora and knobs.stage != "masks":
        model.get_submodule("backbone.0.encoder").requires_grad_(False)
        layers = model.get_submodule(ENCODER_LAYERS)
        named = [(name, module) for name, module in layers.named_modules() if isinstance(module, torch.nn.Linear)]
        adapt([module for name, module in named if name.rpartition(".")[2] in ADAPTED], knobs.lora)


def drop_layers(model: torch.nn.Module, rate: float) -> None:
    """Upstream's stochastic depth in the encoder, from 0 in the first layer to `rate` in the last.

    Upstream's `update_drop_path` sets rates where its builder has put the modules, which it does not for rfdetr's models.
    """
    layers: Any = model.get_submodule(ENCODER_LAYERS)
    for layer in layers:
        layer.drop_path = Dinov2WithRegistersDropPath(0.0)
    cast(LWDETR, model).update_drop_path(rate, len(layers))


def from_upstream(name: str, weights: str) -> tuple[RfDetr, torch.nn.Module, list[str]]:
    """A model for inference as a checkpoint of upstream's has it, filled with its weights; and remarks for the user.

    Classes, queries and resolution are the file's; where it does not say, the published ones of `name`. Classes that
    the file does not name are called "class 0" and so on. One query group is built: inference uses the first alone.

    Raises:
        TrainfitError: as `interop.load_weights`.
    """
    with _quiet():
        file = read_weights(find_weights(make_config(name, 1, RfDetrKnobs()), weights))
        names = file.class_names or tuple(f"class {row}" for row in range(file.class_rows - 1))
        layout = file.query_layout
        resolution = file.config.get("resolution")
        knobs = RfDetrKnobs(
            resolution=resolution if isinstance(resolution, int) and 0 < resolution <= LARGEST_RESOLUTION else None,
            num_queries=layout[1] if layout else None,
            groups=1,
        )
        workload = RfDetr(name, names, knobs, outputs=file.class_rows)
        published = type(workload.config).model_fields["num_select"].default
        selected = file.config.get("num_select")
        workload.postprocess.num_select = selected if isinstance(selected, int) and selected > 0 else published
        model = workload.build()
        remarks = fill(cast(LWDETR, model), workload.config, file, name=name, classes=None)
    return workload, model, remarks


def make_config(name: str, classes: int, knobs: RfDetrKnobs) -> upstream.ModelConfig:
    """Upstream's configuration of a published size with the user's changes.

    Raises:
        TrainfitError: a resolution that is not legal, with snapping off.
    """
    kind = {**CONFIGS, **WITH_MASKS}[name]
    changes: dict[str, Any] = {"num_classes": classes, "freeze_encoder": "encoder" in knobs.frozen}
    if knobs.num_queries is not None:
        changes |= {"num_queries": knobs.num_queries, "num_select": knobs.num_queries}
    if knobs.groups is not None:
        changes["group_detr"] = knobs.groups
    if name in WITH_MASKS or knobs.stage != "single":
        changes["segmentation_head"] = knobs.stage != "detector"
    if knobs.resolution is not None:
        fields = kind.model_fields
        block = fields["patch_size"].default * fields["num_windows"].default
        changes["resolution"] = legal_resolution(knobs.resolution, block, snap=knobs.snap)
    with warnings.catch_warnings():
        # Upstream warns that random weights are worse than its checkpoint; trainfit says so in its own words.
        warnings.simplefilter("ignore", upstream.PretrainWeightsCompatibilityWarning)
        return kind(pretrain_weights=None, device="cpu", **changes)


@contextmanager
def _quiet() -> Generator[None]:
    """Suppress upstream's log messages below errors: trainfit's own remarks contain what matters."""
    logger = logging.getLogger("rf-detr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def legal_resolution(resolution: int, block: int, *, snap: bool) -> int:
    """The nearest multiple of `block` (at least one block); ties go up."""
    nearest = max(block, (resolution + block // 2) // block * block)
    if nearest != resolution and not snap:
        raise TrainfitError(
            f"--resolution {resolution} is not a multiple of {block} (patch size x windows): "
            f"use {nearest}, or leave --no-snap out"
        )
    return nearest


def _encoder_groups(
    model: torch.nn.Module, config: upstream.ModelConfig, settings: OptimizerSettings
) -> dict[str, tuple[float, float]]:
    """Parameter name -> (lr, weight decay) of the encoder, by upstream's own method."""
    from types import SimpleNamespace

    training = settings.training if isinstance(settings.training, RfDetrTraining) else RfDetrTraining()
    arguments = SimpleNamespace(
        out_feature_indexes=config.out_feature_indexes,
        lr_encoder=training.lr_encoder,
        lr_vit_layer_decay=LAYER_DECAY,
        lr_component_decay=COMPONENT_DECAY,
        weight_decay=settings.weight_decay,
    )
    backbone: Any = model.get_submodule("backbone.0")
    pairs = backbone.get_named_param_lr_pairs(arguments, prefix="backbone.0")
    return {name: (group["lr"], group["weight_decay"]) for name, group in pairs.items()}


def _head(model: torch.nn.Module) -> SegmentationHead:
    head = cast(LWDETR, model).segmentation_head
    assert head is not None
    return head


def make_workload(setting: RfDetrSetting, classes: tuple[str, ...]) -> RfDetr:
    """The workload of a setting."""
    return RfDetr(setting.model, classes, setting)
