"""Small models of open_clip with each loss, the same loss by upstream's own functions over one big batch, and upstream's loop."""

import copy
import json
import logging
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip import loss as upstream
from torch.nn import functional

from trainfit.models.clip.architecture import build_model
from trainfit.models.clip.data import Pair, key_of
from trainfit.models.clip.losses import Choices, image_features, make_objective, text_features
from trainfit.models.clip.teacher import Teacher
from trainfit.step.contrastive import Contrastive
from trainfit.step.window import cut

CPU = torch.device("cpu")
VOCABULARY = 50
LENGTH = 8
TINY: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": LENGTH, "vocab_size": VOCABULARY, "width": 32, "heads": 2, "layers": 2},
}
SIGLIP = {"init_logit_bias": -3.0, "init_logit_scale": 1.0}
COCA: dict[str, Any] = {
    "custom_text": True,
    "vision_cfg": {
        **TINY["vision_cfg"],
        "attentional_pool": True,
        "attn_pooler_heads": 2,
        "attn_pooler_queries": 5,
        "output_tokens": True,
    },
    "text_cfg": {**TINY["text_cfg"], "width": 16, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {"context_length": LENGTH, "vocab_size": VOCABULARY, "width": 16, "heads": 2, "layers": 2}
    | {"attn_pooler_heads": 2},
}
TEACHER = {"embed_dim": 24}
DROPOUT = 0.4


def register(folder: Path, name: str, changes: Mapping[str, Any], *, dropout: float = 0.0) -> str:
    """Make an architecture known to open_clip; returns its model's name."""
    config = copy.deepcopy(TINY) | copy.deepcopy(dict(changes))
    config["vision_cfg"]["patch_dropout"] = dropout
    path = folder / f"{name}.json"
    path.write_text(json.dumps(config))
    return f"clip:{path}"


def random_pairs(count: int, *, texts: int | None = None) -> list[Pair]:
    """Pairs of noise; with `texts` only so many different texts."""
    g = torch.Generator().manual_seed(3)
    rows = torch.randint(1, VOCABULARY, (texts or count, LENGTH), generator=g)
    return [
        Pair(
            image=torch.randint(0, 256, (3, 32, 32), generator=g, dtype=torch.uint8),
            text=rows[number % len(rows)],
            key=key_of(str(number % len(rows))),
            record_id=number,
        )
        for number in range(count)
    ]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model with one of the losses."""

    model: Any
    objective: Contrastive
    big_batch: Callable[[Sequence[Pair], int], torch.Tensor]
    """(window, micro-batch) -> the loss by upstream's functions over all pairs at once, in one graph. Features are made in runs
    of a micro-batch, so that dropout draws what it draws in the cached window."""
    names: tuple[str, ...] = ("contrastive",)


KINDS = ("clip", "siglip", "distillation", "coca", "same texts", "siglip same texts")


def make_case(
    folder: Path, kind: str, *, dropout: bool = False, frozen: str = "none", text_ratio: float | None = None
) -> Case:
    """A case in float64."""
    changes: Mapping[str, Any] = COCA if kind == "coca" else SIGLIP if kind.startswith("siglip") else {}
    name = register(folder, f"tiny-{kind.replace(' ', '-')}", changes, dropout=DROPOUT if dropout else 0.0)
    torch.manual_seed(0)
    model: Any = build_model(name).double()
    if kind == "coca":  # of these open_clip leaves some uninitialised, which may be anything
        for parameter in model.text_decoder.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    teacher = None
    if kind == "distillation":
        teacher = Teacher(register(folder, "tiny-teacher", TEACHER), "tiny-distillation", None)
        teacher.build()
        assert teacher.model is not None
        teacher.model.double()
    objective = make_objective(
        Choices(
            caption=kind == "coca",
            same_texts="same texts" in kind,
            teacher=teacher,
            chunk_rows=4,
            frozen=frozen,
            text_ratio=text_ratio,
        )
    )

    def big_batch(window: Sequence[Pair], micro_batch: int) -> torch.Tensor:
        return big_batch_loss(model, kind, cut(window, micro_batch), teacher)

    return Case(model=model, objective=objective, big_batch=big_batch)


def big_batch_loss(model: Any, kind: str, parts: Sequence[Sequence[Pair]], teacher: Teacher | None) -> torch.Tensor:
    """open_clip's own loss over all pairs at once, in one graph."""
    if kind == "coca":
        outputs = [model(pixels(part), torch.stack([pair.text for pair in part])) for part in parts]
        joined = {key: torch.cat([each[key] for each in outputs]) for key in outputs[0] if key != "logit_scale"}
        coca = upstream.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)
        return sum(coca(**joined, logit_scale=model.logit_scale.exp()), torch.zeros(()))
    images = torch.cat([image_features(model, part)[0] for part in parts])
    texts = torch.cat([text_features(model, part)[0] for part in parts])
    window = [pair for part in parts for pair in part]
    scale, bias = model.logit_scale.exp(), model.logit_bias
    if "same texts" in kind:
        keys = torch.tensor([pair.key for pair in window])
        same = (keys[:, None] == keys).double()
        if bias is not None:
            return -functional.logsigmoid((2 * same - 1) * (scale * images @ texts.T + bias)).sum() / len(window)
        logits, wanted = scale * images @ texts.T, same / same.sum(1, keepdim=True)
        return (functional.cross_entropy(logits, wanted) + functional.cross_entropy(logits.T, wanted)) / 2
    if teacher is not None:
        assert teacher.model is not None
        theirs: Any = teacher.model
        of_teacher = (
            theirs.encode_image(pixels(window), normalize=True),
            theirs.encode_text(texts_of(window), normalize=True),
        )
        return sum(
            upstream.DistillClipLoss()(images, texts, scale, *of_teacher, theirs.logit_scale.exp()), torch.zeros(())
        )
    loss = upstream.ClipLoss() if bias is None else upstream.SigLipLoss()
    return loss(images, texts, scale, **({} if bias is None else {"logit_bias": bias}))


def pixels(part: Sequence[Pair]) -> torch.Tensor:
    """Images as the models take them, by another way than the package's."""
    mean, std = (torch.tensor(each, dtype=torch.float64)[:, None, None] for each in STATISTICS)
    return (torch.stack([pair.image for pair in part]).double() / 255 - mean) / std


STATISTICS = (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)


def texts_of(part: Sequence[Pair]) -> torch.Tensor:
    """Token ids (n, length)."""
    return torch.stack([pair.text for pair in part])


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The gradient of every parameter that has one, by name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def error(found: Mapping[str, torch.Tensor], known: Mapping[str, torch.Tensor]) -> float:
    """The largest relative difference of a parameter's gradient; those that are zero up to rounding are left out."""
    assert found.keys() == known.keys()
    largest = max(value.norm().item() for value in known.values())
    shown = [name for name, value in known.items() if value.norm().item() > 1e-9 * largest]
    return max((found[name] - known[name]).norm().item() / known[name].norm().item() for name in shown)


def prepared(window: Sequence[Pair], micro_batch: int, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The micro-batches of a window as upstream's loader gives them."""
    return [(pixels(part).to(dtype), texts_of(part)) for part in cut(window, micro_batch)]


def upstream_window(model: Any, window: Sequence[Pair], *, micro_batch: int, optimizer: torch.optim.Optimizer) -> None:
    """Run open_clip_train's own `train_one_epoch` over one window in micro-batches of so many pairs."""
    parts = prepared(window, micro_batch, model.logit_scale.dtype)
    upstream_epoch(model, parts, accumulation=len(parts), optimizer=optimizer)


def upstream_epoch(
    model: Any,
    parts: Sequence[tuple[torch.Tensor, torch.Tensor]],
    *,
    accumulation: int,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Run open_clip_train's own `train_one_epoch` over micro-batches, with `--accum-freq`."""
    from open_clip_train.train import train_one_epoch

    arguments = types.SimpleNamespace(
        accum_freq=accumulation,
        batch_size=len(parts[0][0]),
        device="cpu",
        distill=False,
        distributed=False,
        grad_clip_norm=None,
        horovod=False,
        log_every_n_steps=10**9,
        precision="fp32",
        rank=1,
        save_logs=False,
        skip_scheduler=True,
        wandb=False,
        world_size=1,
    )

    class Loader(list[Any]):
        num_batches = len(parts)
        num_samples = sum(len(texts) for _, texts in parts)

    def set_epoch(epoch: int) -> None:
        assert epoch == 0

    data = {"train": types.SimpleNamespace(dataloader=Loader(parts), set_epoch=set_epoch)}
    loss = upstream.ClipLoss() if model.logit_bias is None else upstream.SigLipLoss()
    level, before = logging.getLogger().level, model.output_dict
    logging.getLogger().setLevel(logging.ERROR)
    model.output_dict = True
    try:
        train_one_epoch(model, data, loss, 0, optimizer, None, None, None, arguments)
    finally:
        model.output_dict = before
        logging.getLogger().setLevel(level)
