"""DETR of `transformers` with exact windows: each loss has a count of its own, and all are known from the targets.

Class scores are a weighted mean (boxes weigh 1, the other queries `eos_coefficient`), boxes are divided by the number of
boxes. A mean of means is off by as much as the micro-batches' counts differ.
"""

import torch
from transformers import DetrConfig, DetrForObjectDetection

import trainfit

CLASSES, QUERIES, SIDE = 3, 6, 64
WEIGHTS = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}


def make_model():
    config = DetrConfig(
        backbone="test_resnet",
        use_timm_backbone=True,
        use_pretrained_backbone=False,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=QUERIES,
        num_labels=CLASSES,
        dropout=0.0,
    )
    return DetrForObjectDetection(config)


def make_items(count):
    """Images with one to four boxes."""
    generator = torch.Generator().manual_seed(0)
    items = []
    for number in range(count):
        boxes = 0.2 + 0.3 * torch.rand(1 + number % 4, 4, generator=generator)
        labels = torch.randint(CLASSES, (len(boxes),), generator=generator)
        items.append((torch.randn(3, SIDE, SIDE, generator=generator), {"class_labels": labels, "boxes": boxes}))
    return items


def collate(items):
    return torch.stack([image for image, _ in items]), [target for _, target in items]


def counts(batch):
    images, targets = batch
    boxes = sum(len(target["boxes"]) for target in targets)
    others = len(images) * QUERIES - boxes
    return {"loss_ce": boxes + 0.1 * others, "loss_bbox": boxes, "loss_giou": boxes}


def losses(model, batch):
    images, targets = batch
    found = model(pixel_values=images, labels=targets).loss_dict
    return {name: weight * found[name] for name, weight in WEIGHTS.items()}


def train(model, batches, accumulation):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    windows = trainfit.accumulate(batches, accumulation, model=model, counts=counts)
    for batch in windows:
        windows.backward(losses(model, batch))
        windows.update(optimizer, clip_norm=0.1)


def train_naive(model, batches, accumulation):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for start in range(0, len(batches), accumulation):
        window = batches[start : start + accumulation]
        for batch in window:
            (sum(losses(model, batch).values()) / len(window)).backward()
        optimizer.step()
        optimizer.zero_grad()


def check():
    return trainfit.OwnLoop(model=make_model, items=make_items(14), train=train, collate=collate)


def check_naive():
    return trainfit.OwnLoop(model=make_model, items=make_items(14), train=train_naive, collate=collate)


if __name__ == "__main__":
    for function in (check, check_naive):
        result = trainfit.check_exactness(function)
        worst = max(group.relative_error for group in result.groups)
        print(f"{function.__name__}: error {worst:.1e}, {result.causes}")
