"""What the mask stage keeps for backward against the single stage, and what the optimizer has a state for. No GPU needed.

    python benchmarks/stage_memory.py [--models rfdetr-seg-nano rtdetr-seg-nano] [--images 2] [--objects 10]

Counts, on the CPU and under bf16 autocast, the bytes of distinct storages (parameters apart) that the forward and the losses
of one micro-batch save, at the model's published resolution.
"""

import argparse

import torch

from trainfit.models.rfdetr.family import RfDetrKnobs, Stage
from trainfit.models.rfdetr.workload import RfDetr
from trainfit.models.workload import OptimizerSettings
from trainfit.tasks.detection.samples import Sample

STAGES: tuple[Stage, ...] = ("single", "detector", "masks")


def crowded(side: int, objects: int, *, masks: bool) -> Sample:
    """An image with boxes on a grid, filled."""
    corners = torch.tensor(
        [[(i % 10) * side // 10, (i // 10) * side // 10] for i in range(objects)], dtype=torch.float32
    )
    boxes = torch.cat([corners, corners + side // 12], 1)
    drawn = torch.zeros(objects, side, side, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(drawn, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    return Sample(
        image=torch.randint(0, 256, (3, side, side), dtype=torch.uint8),
        boxes=boxes,
        classes=torch.zeros(objects, dtype=torch.int64),
        masks=drawn if masks else None,
        image_id=0,
        original_size=(side, side),
    )


def saved_bytes(workload: RfDetr, model: torch.nn.Module, images: int, objects: int) -> int:
    """Bytes kept for backward by one micro-batch."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    held: list[torch.Tensor] = []  # a freed storage's address would be given out again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor.detach())
        return tensor

    samples = [crowded(workload.resolution, objects, masks=workload.masks) for _ in range(images)]
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        workload.objective.terms(model, samples, (workload.resolution, workload.resolution))
    return sum(kept.values())


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["rfdetr-seg-nano", "rtdetr-seg-nano"])
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--objects", type=int, default=10)
    arguments = parser.parse_args()
    print(f"{'model':<18}{'stage':<10}{'saved MiB':>10}{'':>8}{'trained':>12}{'AdamW MiB':>11}")
    for name in arguments.models:
        whole = 0
        for stage in STAGES:
            torch.manual_seed(0)
            workload = RfDetr(name, ("a",), RfDetrKnobs(stage=stage))
            model = workload.build()
            saved = saved_bytes(workload, model, arguments.images, arguments.objects)
            whole = whole or saved
            groups = workload.parameter_groups(model, OptimizerSettings())
            trained = sum(p.numel() for g in groups for p in g["params"])
            share = f"{100 * (saved / whole - 1):+.0f} %"
            print(f"{name:<18}{stage:<10}{saved / 2**20:>10.0f}{share:>8}{trained:>12}{8 * trained / 2**20:>11.1f}")


if __name__ == "__main__":
    main()
