"""The losses of CLIP, SigLIP, distillation and CoCa over a slice of the pairs, and the towers that compute their features."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from trainfit.models.clip.data import Pair, stacked_images, stacked_texts, text_keys
from trainfit.models.clip.family import CHUNK_ROWS
from trainfit.step.contrastive import Contrastive, Features, Tower
from trainfit.step.terms import LossTerm, Objective

LARGEST_SCALE = math.log(100)
"""open_clip 3.3 open_clip_train/train.py clamps the logarithm of the scale to [0, ln 100] after every step."""
CAPTION_WEIGHT = 2.0
"""Weight of CoCa's caption loss; that of its contrastive loss is 1 (open_clip 3.3 open_clip_train/params.py)."""
POSITIONS_AT_ONCE = 4
"""Positions of the texts of a micro-batch whose logits over the vocabulary exist at one time: 1,024 tokens at a micro-batch of 256,
which are 194 MiB in float32 at 49,408 words."""


def image_features(model: torch.nn.Module, pairs: Sequence[Pair]) -> Features:
    """Normalised image features (n, d)."""
    tower: Any = model
    return (tower.encode_image(stacked_images(model, pairs), normalize=True),)


def text_features(model: torch.nn.Module, pairs: Sequence[Pair]) -> Features:
    """Normalised text features (n, d)."""
    tower: Any = model
    return (tower.encode_text(stacked_texts(model, pairs), normalize=True),)


def features(model: torch.nn.Module, pairs: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised image and text features, each (n, d)."""
    return image_features(model, pairs)[0], text_features(model, pairs)[0]


def rows_loss(model: torch.nn.Module, images: torch.Tensor, texts: torch.Tensor, rows: slice) -> torch.Tensor:
    """The contribution of these rows to the mean loss over all pairs: SigLIP's if the model has a bias, else CLIP's.

    Source: open_clip 3.3 loss.py `ClipLoss`, `SigLipLoss`.
    """
    learned: Any = model
    if learned.logit_bias is not None:
        return _siglip(learned, images, texts, rows, None)
    scale = learned.logit_scale.exp()
    truth = torch.arange(rows.start, rows.stop, device=images.device)
    of_images = functional.cross_entropy(scale * images[rows] @ texts.T, truth, reduction="sum")
    of_texts = functional.cross_entropy(scale * texts[rows] @ images.T, truth, reduction="sum")
    return (of_images + of_texts) / (2 * len(images))


def _siglip(
    model: Any, images: torch.Tensor, texts: torch.Tensor, rows: slice, same: torch.Tensor | None
) -> torch.Tensor:
    """Source: open_clip 3.3 loss.py `SigLipLoss`. `same` (rows, N) are further positives."""
    logits = model.logit_scale.exp() * images[rows] @ texts.T + model.logit_bias
    signs = torch.full_like(logits, -1.0)
    truth = torch.arange(rows.start, rows.stop, device=images.device)
    signs[torch.arange(len(truth), device=truth.device), truth] = 1.0
    if same is not None:
        signs.masked_fill_(same, 1.0)
    return -functional.logsigmoid(signs * logits).sum() / len(images)


@dataclass(frozen=True, kw_only=True)
class RowsLoss:
    """A `Contrastive.rows_loss` of named features."""

    names: tuple[str, ...]
    """Name of each feature: "image", "text", "keys" of texts, "teacher image", "teacher text"."""
    teacher_scale: Callable[[], torch.Tensor] | None = None
    """Returns the scale of the teacher's logits."""

    def __call__(self, model: torch.nn.Module, *features_and_rows: Any) -> Mapping[str, torch.Tensor]:
        """(each feature of all pairs, rows) -> the losses of these rows by name."""
        named: dict[str, torch.Tensor] = dict(zip(self.names, features_and_rows[:-1], strict=True))
        rows: slice = features_and_rows[-1]
        images = named["image"]
        texts = named["text"]
        keys = named.get("keys")
        if keys is None and self.teacher_scale is None:
            return {"contrastive": rows_loss(model, images, texts, rows)}
        same = None if keys is None else _same(keys, rows)
        learned: Any = model
        if learned.logit_bias is not None:
            return {"contrastive": _siglip(learned, images, texts, rows, same)}
        return self._extended_loss(learned, named, rows, same)

    def _extended_loss(
        self, model: Any, named: Mapping[str, torch.Tensor], rows: slice, same: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """CLIP's loss with several positives in a row, and distillation (open_clip 3.3 loss.py `DistillClipLoss`)."""
        pairs = len(named["image"])
        truth = torch.arange(rows.start, rows.stop, device=named["image"].device)
        totals: dict[str, list[torch.Tensor]] = {"contrastive": [], "distillation": []}
        for one, other in (("image", "text"), ("text", "image")):
            logits = (model.logit_scale.exp() * named[one][rows] @ named[other].T).log_softmax(dim=1)
            if same is None:
                totals["contrastive"].append(-logits.gather(1, truth[:, None]).sum())
            else:
                positives = torch.where(same, logits, torch.zeros_like(logits)).sum(1) / same.sum(1)
                totals["contrastive"].append(-positives.sum())
            if self.teacher_scale is not None:
                teacher_logits = self.teacher_scale() * named[f"teacher {one}"][rows] @ named[f"teacher {other}"].T
                totals["distillation"].append(-(teacher_logits.softmax(dim=1) * logits).sum())
        return {name: torch.stack(parts).sum() / (2 * pairs) for name, parts in totals.items() if parts}


def _same(keys: torch.Tensor, rows: slice) -> torch.Tensor:
    """(rows, N): whether two texts are the same, by all columns of their keys."""
    columns = keys.unbind(1)
    same = columns[0][rows, None] == columns[0]
    for column in columns[1:]:
        same &= column[rows, None] == column
    return same


def with_caption(model: torch.nn.Module, pairs: Sequence[Pair]) -> tuple[Features, Mapping[str, LossTerm]]:
    """CoCa's features and its caption loss: the sum over all tokens except padding, each predicted from the preceding ones.

    The logits over the vocabulary exist for `POSITIONS_AT_ONCE` tokens of each text at a time, in forward and again in backward.
    Source: open_clip 3.3 coca_model.py `CoCa.forward`, loss.py `CoCaLoss`, transformer.py `MultimodalTransformer.forward`.
    """
    coca: Any = model
    texts = stacked_texts(model, pairs)
    images, image_tokens = coca._encode_image(stacked_images(model, pairs))
    of_texts, tokens = coca._encode_text(texts)
    labels = texts[:, 1:]
    tokens = tokens[:, :-1]
    decoder = coca.text_decoder
    mask = decoder.attn_mask[: tokens.shape[1], : tokens.shape[1]]
    for block, cross_attention in zip(decoder.resblocks, decoder.cross_attn, strict=True):
        tokens = cross_attention(block(tokens, attn_mask=mask), k_x=image_tokens, v_x=image_tokens)
    hidden = decoder.ln_final(tokens)
    total = torch.zeros((), device=hidden.device, dtype=torch.promote_types(hidden.dtype, torch.float32))
    parts = (each.split(POSITIONS_AT_ONCE, dim=1) for each in (hidden, labels))
    for some, targets in zip(*parts, strict=True):
        part = partial(_token_loss, coca.pad_id)
        total = total + checkpoint(part, some, decoder.text_projection, targets, use_reentrant=False)
    return (images, of_texts), {"caption": LossTerm(total=CAPTION_WEIGHT * total, kind="targets")}


def _token_loss(pad_id: int, hidden: torch.Tensor, projection: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = hidden.flatten(0, 1) @ projection
    return functional.cross_entropy(logits, targets.flatten(), ignore_index=pad_id, reduction="sum")


def caption_counts(pairs: Sequence[Pair], pad_id: int = 0) -> Mapping[str, float]:
    """Number of tokens that the caption loss predicts."""
    return {"caption": float(sum(int((pair.text[1:] != pad_id).sum()) for pair in pairs))}


def clamp_scale(model: torch.nn.Module) -> None:
    """Clamp the scale to [1, 100], as open_clip does after every optimizer step."""
    learned: Any = model
    with torch.no_grad():
        learned.logit_scale.clamp_(0, LARGEST_SCALE)


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The options of the objective."""

    caption: bool = False
    """Whether the model is a CoCa."""
    frozen: str = "none"
    """The tower that is not trained: "image" or "text"."""
    text_ratio: float | None = None
    """Texts in a micro-batch of the text tower for each image in one of the image tower; None: both run together."""
    same_texts: bool = False
    """Whether equal texts are positives of each other."""
    teacher: Any = None
    """A `teacher.Teacher`, or None."""
    chunk_rows: int = CHUNK_ROWS
    """Rows of the similarity matrix that are computed at one time."""


def make_objective(choices: Choices) -> Contrastive:
    """The loss of the whole window."""
    parts: list[tuple[tuple[str, ...], Tower]] = []
    if choices.same_texts:
        parts.append((("keys",), Tower(features=text_keys, learns=False)))
    if choices.teacher is not None:
        tower = Tower(features=choices.teacher.features, learns=False)
        parts.append((("teacher image", "teacher text"), tower))
    if choices.caption:
        parts.append((("image", "text"), Tower(features=features, with_terms=with_caption)))
    elif choices.text_ratio is None and choices.frozen not in ("image", "text"):
        parts.append((("image", "text"), Tower(features=features)))
    else:
        ratio = choices.text_ratio or 1.0
        text_tower = Tower(features=text_features, learns=choices.frozen != "text", ratio=ratio)
        image_tower = Tower(features=image_features, learns=choices.frozen != "image")
        towers = [(("text",), text_tower), (("image",), image_tower)]
        parts += sorted(towers, key=lambda part: part[1].learns)
    teacher = choices.teacher
    names: list[str] = []
    for names_of_tower, _ in parts:
        names += names_of_tower
    return Contrastive(
        features=tuple(tower for _, tower in parts),
        rows_loss=RowsLoss(
            names=tuple(names),
            teacher_scale=None if teacher is None else teacher.scale,
        ),
        chunk_rows=choices.chunk_rows,
        names=("contrastive",) if teacher is None else ("contrastive", "distillation"),
        counts=caption_counts if choices.caption else _no_counts,
        constrain=clamp_scale,
    )


def _no_counts(_pairs: Sequence[Pair]) -> Mapping[str, float]:
    return {}


CACHED = make_objective(Choices(chunk_rows=1024))
"""The loss of the whole window."""


def _plain_terms(model: torch.nn.Module, pairs: Sequence[Pair], _canvas: tuple[int, int]) -> Mapping[str, LossTerm]:
    loss = rows_loss(model, *features(model, pairs), slice(0, len(pairs)))
    return {"contrastive": LossTerm(total=loss, kind="mean")}


def _no_canvas(_pairs: Sequence[Pair]) -> tuple[int, int]:
    return 0, 0


PLAIN = Objective(
    terms=_plain_terms,
    counts=lambda pairs: {"contrastive": float(len(pairs))},
    canvas=_no_canvas,
    constrain=clamp_scale,
)
"""The loss of each micro-batch by itself: a mean of means."""
