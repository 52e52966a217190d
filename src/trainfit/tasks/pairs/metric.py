"""Retrieval and zero-shot classification as a `Metric`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from trainfit.step import ranks
from trainfit.tasks.classes.metric import MOST_CONFUSED, first_choices
from trainfit.tasks.graphics import Graphic, Plot
from trainfit.tasks.pairs.features import BLOCK, FeatureStore
from trainfit.tasks.pairs.samples import PairFeatures, PairRecord
from trainfit.tasks.task import Evaluation, Table

RECALLS = (1, 5, 10)
MOST_RANK = 50
"""The curve of recall goes to this rank."""
DIRECTIONS = {"image_to_text": "image to text", "text_to_image": "text to image"}


class RetrievalMetric:
    """Recall: the share of images one of whose own texts is among the k most similar of all, and of texts whose image is.

    Similarities are computed in blocks and never held all at once; features wait in temporary files, those of each rank
    on its own machine. Images that are exactly as similar as the right one count half, so that a model that makes all
    features equal is no better than chance.
    """

    def __init__(self) -> None:
        """Start without features."""
        self.images = FeatureStore()
        self.texts = FeatureStore()

    def add(self, outputs: Sequence[PairFeatures]) -> None:
        """Take the features of some records."""
        for output in outputs:
            if output.image is not None and output.texts is not None:
                self.images.add(output.image[None], output.record_id)
                self.texts.add(output.texts, output.record_id)

    def result(self) -> Evaluation:
        """The recalls over all ranks."""
        hits = {
            "image_to_text": _hits(self.images, self.texts),
            "text_to_image": _hits(self.texts, self.images),
        }
        numbers = {f"{name}_{k}": float(recall) for name, of in hits.items() for k, recall in enumerate(of, 1)}
        sizes = {"images": float(len(self.images)), "texts": float(len(self.texts))}
        total = ranks.sum_over_ranks(numbers | sizes)
        images = int(total["images"])
        texts = int(total["texts"])
        of = {"image_to_text": images, "text_to_image": texts}
        recalls = {
            f"{name}_r{k}": total[f"{name}_{k}"] / of[name] if of[name] else None
            for name in DIRECTIONS
            for k in RECALLS
        }
        curves = {
            word: [total[f"{name}_{k}"] / of[name] for k in range(1, MOST_RANK + 1)]
            for name, word in DIRECTIONS.items()
            if of[name]
        }
        return replace(_retrieval(recalls, images, texts), graphics=_curve(curves))


def _curve(recalls: Mapping[str, Sequence[float]]) -> tuple[Graphic, ...]:
    """Recall by the number of best answers that are looked at."""
    lines = tuple((name, tuple(enumerate(values, 1))) for name, values in recalls.items())
    if not lines:
        return ()
    return (Plot(name="recall", title="Recall", x="best answers (k)", y="recall@k", lines=lines, x_most=MOST_RANK),)


def _retrieval(recalls: dict[str, float | None], images: int, texts: int) -> Evaluation:
    known = [value for value in recalls.values() if value is not None]
    score = sum(known) / len(known) if known else None
    among = {"image_to_text": texts, "text_to_image": images}
    rows = tuple((f"{word} R@{k}", recalls[f"{name}_r{k}"]) for name, word in DIRECTIONS.items() for k in RECALLS)
    chance = tuple(f"{word} R@1 {1 / max(1, among[name]):.4f}" for name, word in DIRECTIONS.items())
    return Evaluation(
        score=score,
        score_name="mean recall",
        figures={f"{word} R@1": recalls[f"{name}_r1"] for name, word in DIRECTIONS.items()} | {"mean recall": score},
        record={**recalls, "mean_recall": score},
        tables=(Table(title=f"retrieval: {images} images, {texts} texts", columns=("recall", "value"), rows=rows),),
        details={**recalls, "mean_recall": score, "images": images, "texts": texts},
        notes=(f"By chance, with one text an image: {', '.join(chance)}.",),
    )


def _hits(queries: FeatureStore, gallery: FeatureStore) -> list[int]:
    """Queries of this rank with a right answer among the first k of all ranks' gallery, for k from 1 to `MOST_RANK`.

    The right answers to a query are on its own rank, because they are of the same record.
    """
    best = [torch.full((len(rows),), -torch.inf) for rows, _ in queries.blocks()]
    for others, of in gallery.blocks():
        for best_scores, (rows, numbers) in zip(best, queries.blocks(), strict=True):
            similar = (rows @ others.T).masked_fill_(numbers[:, None] != of, -torch.inf)
            torch.maximum(best_scores, similar.amax(1), out=best_scores)
    before = [torch.zeros(len(best_scores)) for best_scores in best]
    for others, of in _everywhere(gallery):
        for count, best_scores, (rows, numbers) in zip(before, best, queries.blocks(), strict=True):
            similar = (rows @ others.T).masked_fill_(numbers[:, None] == of, -torch.inf)
            count += (similar > best_scores[:, None]).sum(1) + (similar == best_scores[:, None]).sum(1) / 2
    counts = torch.cat(before) if before else torch.zeros(0)
    return [int((counts < k).sum()) for k in range(1, MOST_RANK + 1)]


def _everywhere(store: FeatureStore) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The blocks of all ranks, one of each rank in memory at a time: a collective call."""
    blocks = -(-max(ranks.gather(len(store))) // BLOCK)
    for number in range(blocks):
        yield from (each for each in ranks.gather(store.block(number * BLOCK)) if len(each[1]))


class ZeroShotMetric:
    """Accuracy of the class whose texts' mean feature is most similar to an image's.

    Source: open_clip 3.3 zero_shot_classifier.py `build_zero_shot_classifier`, open_clip_train/zero_shot.py `run`.
    """

    def __init__(self, records: Sequence[PairRecord], classes: Sequence[str]) -> None:
        """Start without features."""
        self.labels = {record.id: record.label for record in records}
        self.classes = classes
        self.images = FeatureStore()
        self.of_classes: dict[int, torch.Tensor] = {}

    def add(self, outputs: Sequence[PairFeatures]) -> None:
        """Take the features of some records: images, or the texts of a class."""
        for output in outputs:
            label = self.labels[output.record_id]
            if output.texts is not None:
                mean = output.texts.mean(0)
                self.of_classes[label] = mean / mean.norm()
            if output.image is not None:
                self.images.add(output.image[None], label)

    def result(self) -> Evaluation:
        """Top-1 and top-5 accuracy over all ranks, and top-1 by class."""
        known: dict[int, torch.Tensor] = {}
        for part in ranks.gather(self.of_classes):
            known |= part
        labels = sorted(known)
        right = torch.zeros(3, len(self.classes), dtype=torch.float64)  # images, first, among the first five
        side = len(self.classes) + 1 if len(self.classes) <= MOST_CONFUSED else 0
        confusion = np.zeros((side, side))
        if labels:
            classifier = torch.stack([known[label] for label in labels])
            names = torch.tensor(labels)
            for rows, truth in self.images.blocks():
                order = names[(rows @ classifier.T).topk(min(5, len(labels)), dim=1).indices]
                hits = order == truth[:, None]
                if side:
                    np.add.at(confusion, (truth.numpy(), order[:, 0].numpy()), 1)
                right.index_add_(1, truth, torch.stack((torch.ones(len(truth)), hits[:, 0], hits.any(1))).double())
        numbers = ranks.sum_numbers([*right.flatten().tolist(), *confusion.flatten().tolist()])
        total = torch.tensor(numbers[: right.numel()]).reshape(right.shape)
        first = np.array(numbers[right.numel() :]).reshape(confusion.shape)
        return replace(_classification(total, self.classes), graphics=first_choices(first, self.classes))


def _classification(total: torch.Tensor, classes: Sequence[str]) -> Evaluation:
    images, first, five = total.tolist()
    count = sum(images)
    top1, top5 = (sum(first) / count, sum(five) / count) if count else (None, None)
    by_class = [(name, hit / n if n else None, int(n)) for name, hit, n in zip(classes, first, images, strict=True)]
    record: dict[str, Any] = {"top1": top1, "top5": top5}
    return Evaluation(
        score=top1,
        score_name="zero-shot top-1",
        figures=record,
        record=record,
        tables=(
            Table(title="zero-shot", columns=("figure", "value"), rows=tuple(record.items())),
            Table(title="by class", columns=("class", "top-1", "images"), rows=tuple(by_class)),
        ),
        details={**record, "images": int(count), "per_class": {name: value for name, value, _ in by_class}},
        notes=(f"By chance: {1 / max(1, len(classes)):.4f}.",),
    )
