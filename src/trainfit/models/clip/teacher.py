"""The teacher of a distillation: a second model that computes features and is not trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trainfit.errors import TrainfitError
from trainfit.models.clip.architecture import Preprocessing, architecture_of, build_model, config_of, preprocessing
from trainfit.models.clip.data import Pair, stacked_images, stacked_texts
from trainfit.models.clip.interop import load_into
from trainfit.models.clip.names import PREFIX
from trainfit.weights import load_weights


class Teacher:
    """Built with the student's step, loaded before training, and moved to the device by its first micro-batch."""

    def __init__(self, model: str, student: str, resolution: int | None) -> None:
        """Find the teacher's architecture from `model` (ARCH, ARCH=FILE or FILE); `student` is the student's.

        Raises:
            TrainfitError: no such architecture, or one with another input than the student's.
        """
        name, _, self.weights = model.partition("=")
        if name.endswith(".safetensors") and not self.weights:
            self.weights = name
            name = _architecture_in(Path(name))
        self.name = architecture_of(name if name.startswith(PREFIX) else f"{PREFIX}{name}")
        self.model: torch.nn.Module | None = None
        _require_alike(self.name, student, preprocessing(student, resolution))
        self.resolution = resolution

    def build(self) -> None:
        """Make the model with random weights."""
        if self.model is None:
            self.model = build_model(f"{PREFIX}{self.name}", resolution=self.resolution)
            self.model.requires_grad_(False).eval()

    def fill(self) -> list[str]:
        """Read the weights; returns remarks for the user.

        Raises:
            TrainfitError: there are none, or they are of another model.
        """
        if not self.weights:
            raise TrainfitError(f"--distill-model {self.name} has no weights: give --distill-model {self.name}=FILE")
        self.build()
        assert self.model is not None
        return load_into(self.model, self.name, self.weights)

    def features(self, model: torch.nn.Module, pairs: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised image and text features of the teacher, each (n, d of the teacher)."""
        assert self.model is not None, "build the student first"
        teacher: Any = self.model.to(next(model.parameters()).device)
        images = teacher.encode_image(stacked_images(teacher, pairs), normalize=True)
        return images, teacher.encode_text(stacked_texts(teacher, pairs), normalize=True)

    def scale(self) -> torch.Tensor:
        """The scale of the teacher's logits."""
        teacher: Any = self.model
        return teacher.logit_scale.exp()


def _architecture_in(path: Path) -> str:
    metadata = load_weights(path)[1]
    model = metadata.get("model", "")
    if not model.startswith(PREFIX):
        raise TrainfitError(f"--distill-model {path}: it does not say its architecture: give ARCH={path}")
    return model


def _require_alike(teacher: str, student: str, used: Preprocessing) -> None:
    """Require that teacher and student take the same pixels and tokens, which open_clip 3.3 main.py assumes."""
    of_teacher = config_of(teacher).get("text_cfg", {})
    of_student = config_of(student).get("text_cfg", {})
    for key, default in (("context_length", 77), ("vocab_size", 49408), ("hf_tokenizer_name", None)):
        if of_teacher.get(key, default) != of_student.get(key, default):
            raise TrainfitError(
                f"--distill-model {teacher}: its {key} is {of_teacher.get(key, default)}, the student's is "
                f"{of_student.get(key, default)}: teacher and student must use the same tokenizer"
            )
    own = preprocessing(teacher)
    if own.size != used.size and config_of(teacher).get("vision_cfg", {}).get("timm_model_name"):
        raise TrainfitError(
            f"--distill-model {teacher} takes {own.size[1]} x {own.size[0]} px, the student {used.size[1]} x "
            f"{used.size[0]}: give --resolution {own.size[0]}"
        )
