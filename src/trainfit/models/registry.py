"""Steps and workloads of models by name. A family's code, and torch, are imported when they are asked for."""

import importlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trainfit.errors import TrainfitError
from trainfit.models.family import family_of
from trainfit.models.setting import setting_from_json

if TYPE_CHECKING:
    import torch

    from trainfit.models.fixed_step import FixedStep
    from trainfit.models.workload import Workload


def build_step(*, setting: Mapping[str, Any], device: "torch.device") -> "FixedStep":
    """The training step of a setting (`Setting.to_json`) with its worst window: the factory of a traced or measured step."""
    chosen = setting_from_json(setting)
    return importlib.import_module(chosen.family.step).build_step(chosen, device)


def build_eval_step(*, setting: Mapping[str, Any], device: "torch.device") -> "FixedStep":
    """The evaluation of a setting: the first `run` trains a window, every later one evaluates."""
    chosen = setting_from_json(setting)
    return importlib.import_module(chosen.family.step).build_eval_step(chosen, device)


def make_workload(name: str, classes: tuple[str, ...], knobs: Mapping[str, Any]) -> "Workload":
    """The workload of a model; `knobs` are the family's own, None where not chosen.

    Raises:
        TrainfitError: no such model, or its family can be predicted but not yet trained.
    """
    family, name = family_of(name)
    if family.workload is None:
        raise TrainfitError(f"training of {name} is not there yet; `trainfit predict {name}` works")
    make = _imported(family.workload)
    return make(name, classes, {key: value for key, value in knobs.items() if value is not None})


def from_metadata(metadata: Mapping[str, str]) -> "Workload":
    """The workload that a weights file was made by; see `Workload.metadata`.

    Raises:
        TrainfitError: the metadata is not that of trainfit.
    """
    try:
        name, classes, knobs = metadata["model"], json.loads(metadata["classes"]), json.loads(metadata["knobs"])
    except KeyError as error:
        raise TrainfitError(f"not a weights file of trainfit: its metadata lacks {error}") from error
    except (ValueError, RecursionError) as error:
        raise TrainfitError("the metadata of the weights file is damaged: no JSON") from error
    if (
        not isinstance(classes, list)
        or not all(isinstance(each, str) for each in classes)
        or not isinstance(knobs, dict)
    ):
        raise TrainfitError("the metadata of the weights file is damaged: no list of class names, or no knobs")
    return make_workload(name, tuple(classes), knobs)


def from_upstream(name: str, weights: str) -> "tuple[Workload, torch.nn.Module, list[str]]":
    """A model for inference from a checkpoint of its upstream project, or `pretrained`; and remarks for the user.

    Raises:
        TrainfitError: no such model or file, or not a checkpoint of this model.
    """
    family, name = family_of(name)
    if family.checkpoint is None:
        raise TrainfitError(f"checkpoints of {name} cannot be evaluated yet")
    return _imported(family.checkpoint)(name, weights)


def _imported(path: str) -> Any:
    """What "module:function" names."""
    module, _, function = path.partition(":")
    return getattr(importlib.import_module(module), function)
