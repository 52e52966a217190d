"""Samples of image-text pairs as in open_clip: a random resized crop and a tokenized text."""

import hashlib
import math
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image

from trainfit.errors import TrainfitError
from trainfit.models.clip.architecture import Preprocessing, architecture_of, open_clip, quiet
from trainfit.models.images import stack_images, to_device
from trainfit.tasks.pairs.read import read_pixels
from trainfit.tasks.pairs.samples import PairRecord
from trainfit.weights import first_line

CROP_SCALE = (0.9, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
"""open_clip 3.3 transform.py `AugmentationCfg.scale`, and torchvision's `RandomResizedCrop` for the ratio."""
KEY_COLUMNS = 3
KEY_BITS = 21
"""A text's key is stored as integers in float32, which represents those below 2**24 exactly: 63 bits in three columns."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """One image and its text, on the CPU."""

    image: torch.Tensor
    """uint8 (3, height, width); (0,) of a text alone."""
    text: torch.Tensor
    """int64 (context length,): token ids; in evaluation (texts, context length)."""
    key: int = 0
    """63 bits of a hash of the text: equal texts have equal keys."""
    record_id: int = 0
    """Number of the record that it was made of."""


def stacked_images(model: torch.nn.Module, pairs: Sequence[Pair]) -> torch.Tensor:
    """(n, 3, height, width) on the device, normalised as the model's preprocessing says."""
    tower: Any = model
    used = tower.trainfit_preprocessing
    return stack_images([pair.image for pair in pairs], next(model.parameters()), mean=used.mean, std=used.std)


def stacked_texts(model: torch.nn.Module, pairs: Sequence[Pair]) -> torch.Tensor:
    """(n, context length) on the device."""
    return to_device([pair.text[None] for pair in pairs], next(model.parameters()))


def text_keys(model: torch.nn.Module, pairs: Sequence[Pair]) -> tuple[torch.Tensor]:
    """(n, 3): the keys of the texts."""
    columns = [[pair.key >> KEY_BITS * i & (1 << KEY_BITS) - 1 for i in range(KEY_COLUMNS)] for pair in pairs]
    like = next(model.parameters())
    dtype = torch.promote_types(like.dtype, torch.float32)
    return (to_device([torch.tensor(columns, dtype=dtype)], like),)


def key_of(text: str) -> int:
    """A 63-bit hash; texts that differ only in case and white space have the same."""
    plain = " ".join(text.lower().split())
    return int.from_bytes(hashlib.blake2b(plain.encode(errors="surrogatepass"), digest_size=8).digest()) >> 1


def make_sample(
    record: PairRecord,
    *,
    size: int,
    augment: AbstractSet[str],
    generator: torch.Generator,
    architecture: str,
    preprocessing: Preprocessing,
) -> Pair:
    """Decode, crop at random where `augment` has `crop`, and resize; of several texts one is drawn in training.

    `size` is ignored: the input size of the model is that of `preprocessing`.
    """
    del size
    image = torch.zeros(0, dtype=torch.uint8)
    if not record.text_only:
        pixels = read_pixels(record)
        resized = (
            random_crop(pixels, preprocessing, generator) if "crop" in augment else centre_crop(pixels, preprocessing)
        )
        image = torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1).contiguous()
    texts = record.texts
    if not record.for_evaluation and texts:
        texts = (texts[int(torch.randint(len(texts), (), generator=generator))],)
    tokens = tokenize(architecture, texts)
    if not record.for_evaluation and texts:
        return Pair(image=image, text=tokens[0], key=key_of(texts[0]), record_id=record.id)
    return Pair(image=image, text=tokens, record_id=record.id)


def random_crop(image: Image.Image, used: Preprocessing, generator: torch.Generator) -> Image.Image:
    """Torchvision's `RandomResizedCrop`: a part of the area and of a shape drawn at random, resized.

    Source: torchvision 0.29 transforms/transforms.py `RandomResizedCrop.get_params`; the numbers come from `generator`.
    """
    width, height = image.size
    low, high = (math.log(each) for each in CROP_RATIO)
    for _ in range(10):
        share, shape = torch.rand(2, generator=generator).tolist()
        area = width * height * (CROP_SCALE[0] + share * (CROP_SCALE[1] - CROP_SCALE[0]))
        ratio = math.exp(low + shape * (high - low))
        w = round(math.sqrt(area * ratio))
        h = round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(height - h + 1, (), generator=generator))
            left = int(torch.randint(width - w + 1, (), generator=generator))
            return _resized(image.crop((left, top, left + w, top + h)), used)
    ratio = min(max(width / height, CROP_RATIO[0]), CROP_RATIO[1])
    w = min(width, round(height * ratio))
    h = min(height, round(width / ratio))
    left = (width - w) // 2
    top = (height - h) // 2
    return _resized(image.crop((left, top, left + w, top + h)), used)


def _resized(image: Image.Image, used: Preprocessing) -> Image.Image:
    height, width = used.size
    return image.resize((width, height), Image.Resampling.BICUBIC)


def centre_crop(image: Image.Image, used: Preprocessing) -> Image.Image:
    """Open_clip's transform for evaluation: the short side resized and the centre cropped, or the whole image squashed.

    Source: open_clip 3.3 transform.py `image_transform`.
    """
    height, width = used.size
    resampling = Image.Resampling.BILINEAR if used.interpolation == "bilinear" else Image.Resampling.BICUBIC
    if used.resize_mode == "squash":
        return image.resize((width, height), resampling)
    short = min(image.size)
    side = min(width, height)
    grown = tuple(side if edge == short else int(side * edge / short) for edge in image.size)
    if width != height:
        scale = max(width / image.width, height / image.height)
        grown = (round(image.width * scale), round(image.height * scale))
    image = image.resize((grown[0], grown[1]), resampling)
    left = round((image.width - width) / 2)
    top = round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


@cache
def tokenizer_of(architecture: str) -> Any:
    """open_clip's tokenizer of an architecture, or of a file with the configuration of one.

    Raises:
        TrainfitError: it cannot be loaded: a package or a download is missing.
    """
    name = architecture_of(architecture)
    try:
        with quiet():
            return open_clip().get_tokenizer(name)
    except Exception as error:  # transformers and huggingface_hub raise errors of many kinds
        reason = first_line(error)
        raise TrainfitError(
            f"the tokenizer of {architecture} cannot be loaded ({reason}): it may need the package transformers "
            "and a download from the Hugging Face hub"
        ) from error


def tokenize(architecture: str, texts: Sequence[str]) -> torch.Tensor:
    """(texts, context length): token ids; a text that is too long is truncated, as by open_clip."""
    if not texts:
        return torch.zeros((0, 0), dtype=torch.int64)
    return tokenizer_of(architecture)(list(texts)).to(torch.int64)
