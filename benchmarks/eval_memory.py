"""Peak memory of an evaluation with masks, for data sets of 10 to 200 images with 60 objects each: it should be flat.

    python benchmarks/eval_memory.py [--images 10 50 200] [--width 1280 --height 960]

One process a size. Host: the growth of VmHWM over what the process had after its model was built and one image evaluated.
Device: torch's own peak where there is a GPU.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from trainfit.models.rfdetr.family import RfDetrKnobs
from trainfit.models.rfdetr.workload import RfDetr
from trainfit.tasks.detection.metric import DetectionMetric
from trainfit.tasks.detection.samples import ImageRecord
from trainfit.training.evaluation import evaluate_model

OBJECTS = 60


def make_records(path: Path, count: int, size: tuple[int, int]) -> list[ImageRecord]:
    """`count` images with 60 polygons of 40 corners each; they share one file."""
    width, height = size
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(path)
    turn = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    records: list[ImageRecord] = []
    for number in range(count):
        middle = rng.uniform(0.1, 0.9, (OBJECTS, 2)) * [width, height]
        corners = middle[:, None] + np.stack([np.cos(turn), np.sin(turn)], 1) * 0.04 * height
        records.append(
            ImageRecord(
                id=number,
                path=path,
                width=width,
                height=height,
                boxes=np.concatenate([corners.min(1), corners.max(1)], 1),
                classes=rng.integers(0, 3, OBJECTS),
                crowd=np.zeros(OBJECTS, np.bool_),
                areas=np.full(OBJECTS, np.pi * (0.04 * height) ** 2),
                segmentations=tuple((c.ravel(),) for c in corners),
                object_ids=np.arange(OBJECTS) + number * OBJECTS,
            )
        )
    return records


def peak_host_bytes() -> int:
    """This process's largest resident size so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def one(count: int, size: tuple[int, int]) -> None:
    """Evaluate and print a row."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    workload = RfDetr("rfdetr-seg-nano", ("a", "b", "c"), RfDetrKnobs(resolution=96))
    model = workload.build().to(device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "class_embed" in name or "bbox_embed" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    with tempfile.TemporaryDirectory() as folder:
        records = make_records(Path(folder) / "image.png", count, size)

        def evaluate(some: list[ImageRecord]) -> int:
            metric = DetectionMetric(some, workload.classes, masks=True, max_detections=100)
            found = evaluate_model(model, workload, some, metric, micro_batch=4, precision="fp32", device=device)
            return found.details["segm"].detections

        evaluate(records[:4])
        before = peak_host_bytes()
        detections = evaluate(records)
    grown = (peak_host_bytes() - before) / 2**20
    gpu = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else float("nan")
    print(f"{count:>8}{detections:>12}{peak_host_bytes() / 2**20:>12.0f}{grown:>12.0f}{gpu:>12.0f}")


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[10, 50, 200])
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=960)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size = (arguments.width, arguments.height)
    if arguments.one:
        one(arguments.one, size)
        return
    print(f"{'images':>8}{'detections':>12}{'host MiB':>12}{'growth MiB':>12}{'device MiB':>12}", flush=True)
    for count in arguments.images:
        place = ["--one", str(count), "--width", str(size[0]), "--height", str(size[1])]
        subprocess.run([sys.executable, "-W", "ignore", __file__, *place], check=True)


if __name__ == "__main__":
    main()
