"""Weights in and out: trainfit's safetensors files, torchvision's state dictionaries, torchvision's download."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torchvision.models import detection
from torchvision.ops import FrozenBatchNorm2d

from trainfit.errors import TrainfitError
from trainfit.models.maskrcnn.family import MaskRcnnSetting
from trainfit.tasks.detection.class_names import positions
from trainfit.weights import load_weights, not_downloaded, read_checkpoint, require_kinds, require_sound

PUBLISHED: Mapping[str, Any] = {
    "maskrcnn-r50-v1": detection.MaskRCNN_ResNet50_FPN_Weights.COCO_V1,
    "maskrcnn-r50-v2": detection.MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1,
    "fasterrcnn-r50-v1": detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1,
    "fasterrcnn-r50-v2": detection.FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1,
}
"""Weights that torchvision offers."""
CLASS_HEADS = {
    "roi_heads.box_predictor.cls_score": 1,
    "roi_heads.box_predictor.bbox_pred": 4,
    "roi_heads.mask_predictor.mask_fcn_logits": 1,
}
"""Layers with rows for each class, the background's first -> rows of a class."""
ROWS = "roi_heads.box_predictor.cls_score.bias"
WITHOUT_EPSILON = ("maskrcnn_resnet50_fpn_coco-", "fasterrcnn_resnet50_fpn_coco-")
"""Files that torchvision runs with an epsilon of 0 in frozen BatchNorm (`overwrite_eps`), by the beginning of their names."""
PICKLE_OF_DETECTRON2 = (
    "is a .pkl, as Detectron2's model zoo has them: unpickling runs whatever code a file holds, so trainfit does not. In an "
    "environment with detectron2, torch.save(DetectionCheckpointer(model).load(FILE), 'weights.pth') keeps its tensors, but its "
    "layers are not torchvision's; start from --weights pretrained instead"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class TorchvisionFile:
    """Tensors, and what the file says of the model that they belong to."""

    path: Path
    """The file."""
    state: dict[str, torch.Tensor]
    """Parameter name -> tensor, on the CPU."""
    class_names: tuple[str, ...]
    """The name of each class without the background, "" where a row is no class; empty where the file does not say."""
    made_for: str | None = None
    """trainfit's name of the model, in a file of trainfit."""

    @property
    def classes(self) -> int:
        """Classes besides the background."""
        return len(self.state[ROWS]) - 1


def load(model: torch.nn.Module, setting: MaskRcnnSetting, classes: Sequence[str], weights: str) -> list[str]:
    """Fill `model`; returns remarks for the user.

    Rows of the class heads follow the names of the classes; a class that the file does not name starts at random, and
    without any names the rows are taken as they are where there are as many.

    Raises:
        TrainfitError: no such file, not a checkpoint, a checkpoint of another model, no network for `pretrained`.
    """
    return fill(model, setting, read_weights(find_weights(setting, weights)), classes)


def read_weights(path: Path) -> TorchvisionFile:
    """A file of trainfit (.safetensors) or of torchvision (a state dictionary, or a checkpoint of its references).

    Raises:
        TrainfitError: the file cannot be read safely, or holds no such model.
    """
    if path.suffix == ".pkl":
        raise TrainfitError(f"{path} {PICKLE_OF_DETECTRON2}")
    if path.suffix == ".safetensors":
        state, metadata = load_weights(path)
        try:
            names = tuple(map(str, json.loads(metadata["classes"])))
            made_for = metadata["model"]
        except (KeyError, TypeError, ValueError) as error:
            raise TrainfitError(f"{path}: not a weights file of trainfit (its metadata: {error!r})") from error
        return TorchvisionFile(path=path, state=_require_rcnn(state, path), class_names=names, made_for=made_for)
    content = read_checkpoint(path, lambda file: torch.load(file, map_location="cpu", weights_only=True))
    if isinstance(content, dict) and isinstance(cast(dict[Any, Any], content).get("model"), dict):
        content = cast(dict[Any, Any], content)["model"]
    state = _require_rcnn(content, path)
    names = _coco_names() if len(state[ROWS]) == len(_coco_names()) + 1 else ()
    return TorchvisionFile(path=path, state=_with_epsilon(state, path), class_names=names)


def export(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a state dictionary, which torchvision's model loads."""
    torch.save({name: value.detach().cpu() for name, value in weights.items()}, path)


def _coco_names() -> tuple[str, ...]:
    """COCO's names by category id, which are the rows of torchvision's files; "" for an id that COCO left out."""
    listed = PUBLISHED["maskrcnn-r50-v1"].meta["categories"][1:]
    return tuple("" if name == "N/A" else name for name in listed)


def find_weights(setting: MaskRcnnSetting, weights: str) -> Path:
    """The file that `weights` names; `pretrained` is downloaded.

    Raises:
        TrainfitError: no such file, nothing published, or no network for `pretrained`.
    """
    if weights != "pretrained":
        path = Path(weights)
        if not path.is_file():
            raise TrainfitError(
                f"--weights: no such file: {weights} (a .safetensors of trainfit, a .pth of torchvision, or `pretrained`)"
            )
        return path
    published = PUBLISHED.get(setting.model)
    if published is None:
        raise TrainfitError(
            f"--weights pretrained: torchvision has no weights of {setting.model}, only of {', '.join(PUBLISHED)}: "
            "give a file, or --weights random"
        )
    name = published.url.rpartition("/")[2]
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if not (folder / name).is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(published.url, str(folder / name), progress=False)
        except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors; RuntimeError: wrong checksum
            raise TrainfitError(not_downloaded(folder / name, type(error).__name__)) from error
    return folder / name


def _require_rcnn(content: Any, path: Path) -> dict[str, torch.Tensor]:
    defect = f"{path}: not a checkpoint of torchvision's Mask R-CNN or Faster R-CNN"
    if not isinstance(content, dict) or not isinstance(cast(dict[Any, Any], content).get(ROWS), torch.Tensor):
        raise TrainfitError(f"{defect} (it has no {ROWS})")
    state = cast(dict[Any, Any], content)
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise TrainfitError(f"{defect} ({key!r} is no name of a tensor)")
    if state[ROWS].ndim != 1 or not len(state[ROWS]):
        raise TrainfitError(f"{defect} (its class head has no rows)")
    require_sound(state, path)
    return dict(state)


def _with_epsilon(state: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """Variances from which the epsilon of frozen BatchNorm is taken, where torchvision runs the file with none."""
    if not path.name.startswith(WITHOUT_EPSILON):
        return state
    epsilon = FrozenBatchNorm2d(1).eps
    return {name: value - epsilon if name.endswith("running_var") else value for name, value in state.items()}


def fill(model: torch.nn.Module, setting: MaskRcnnSetting, file: TorchvisionFile, classes: Sequence[str]) -> list[str]:
    """Fill `model` from a file; returns remarks for the user.

    Raises:
        TrainfitError: the file is of another model.
    """
    if file.made_for not in (None, setting.model):
        raise TrainfitError(
            f"{file.path} holds weights of {file.made_for}, not {setting.model}: train {file.made_for}, or pass other "
            "--weights"
        )
    own = model.state_dict()
    state = dict(file.state)
    remarks = _fit_classes(own, state, file, classes)
    require_kinds(model, state, file.path)
    other = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    counted = {name for name in own.keys() ^ state.keys() if name.endswith("num_batches_tracked")}
    missing = own.keys() - state.keys() - counted
    unexpected = state.keys() - own.keys() - counted
    for defect, names in (("has other shapes for", other), ("lacks", missing), ("has in addition", unexpected)):
        if names:
            raise TrainfitError(
                f"{file.path} is a checkpoint of another model than {setting.model} with --norm {setting.norm}: it {defect} "
                f"{len(names)} tensors, first {min(names)}"
            )
    model.load_state_dict(own | {name: value for name, value in state.items() if name in own})
    return remarks


def _fit_classes(
    own: Mapping[str, torch.Tensor], state: dict[str, torch.Tensor], file: TorchvisionFile, classes: Sequence[str]
) -> list[str]:
    """Give each class the rows of its name in `state`, in place; returns a remark where that changed them."""
    if tuple(classes) == file.class_names:
        return []
    matched = positions(classes, file.class_names)
    if not any(row is not None for row in matched):
        if not file.class_names and file.classes == len(classes):
            return []
        matched = [None] * len(classes)
    rows = [0, *(None if row is None else row + 1 for row in matched)]
    for layer, each in CLASS_HEADS.items():
        for name in (f"{layer}.weight", f"{layer}.bias"):
            if name not in own or name not in state or len(state[name]) != each * (file.classes + 1):
                continue
            fitted = own[name].clone()
            for target, source in enumerate(rows):
                if source is not None:
                    fitted[each * target : each * (target + 1)] = state[name][each * source : each * (source + 1)]
            state[name] = fitted
    random = [name for name, row in zip(classes, matched, strict=True) if row is None]
    if not random:
        return [f"class heads: all {len(classes)} classes start from the rows of their names in {file.path.name}"]
    some = ", ".join(random[:8]) + (f" and {len(random) - 8} more" if len(random) > 8 else "")
    return [f"class heads: {some} start at random, because {file.path.name} does not name them"]
