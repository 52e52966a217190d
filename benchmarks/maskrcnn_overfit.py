"""Over-fit eight images of fruits_nuts with Mask R-CNN R50-FPN from random weights on the CPU: proof that it learns.

    python benchmarks/maskrcnn_overfit.py [--steps 450] [--resolution 128] [--minutes 60]

Trains and evaluates on the same eight photographs (800 x 600 pixels in the file, 2 to 13 dates, figs and hazelnuts each), with
GroupNorm, because frozen BatchNorm without its statistics is no norm. Prints mask and box AP50, steps and minutes, and is 1
where mask AP50 is below 0.5. `--minutes` ends the training early; the evaluation then counts.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from trainfit.reports.progress import TerminalProgress
from trainfit.training.fit import fit
from trainfit.training.recipe import make_recipe

DATA = Path(__file__).resolve().parents[2] / "shared/data/fruits_nuts"
IMAGES = 8
WANTED = 0.5


def eight_images(source: Path, folder: Path) -> Path:
    """A COCO data set whose train and val splits are the first eight images."""
    content = json.loads((source / "trainval.json").read_text())
    content["images"] = content["images"][:IMAGES]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] in ids]
    (folder / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (folder / split).symlink_to(source / "images")
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


def main() -> int:
    """Train and print; whether mask AP50 is too low."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--minutes", type=float, default=60, help="of process time")
    arguments = parser.parse_args()
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder, TerminalProgress() as progress:
        recipe = make_recipe(
            "maskrcnn-r50-v1",
            data=str(eight_images(arguments.data, Path(folder) / "eight")),
            allow_outside=True,
            weights="random",
            resolution=arguments.resolution,
            rois_per_image=64,
            proposals=(300, 200),
            norm="group",
            effective_batch=arguments.batch,
            micro_batch=arguments.batch,
            epochs=100_000,
            max_steps=arguments.steps,
            warmup_steps=10,
            schedule="cosine",
            eval_every=0,
            lr=arguments.lr,
            augment="none",
            workers=0,
            save_minutes=1000,
            out=Path(folder) / "run",
        )
        limit_s = 60 * arguments.minutes
        summary = fit(recipe, progress=progress, stop=lambda: time.process_time() - began > limit_s)
        if summary.evaluation is None:  # stopped by the clock: the resumed run has no step left, and evaluates
            summary = fit(
                make_recipe("maskrcnn-r50-v1", resume=summary.folder, max_steps=summary.steps), progress=progress
            )
    assert summary.evaluation is not None
    masks, boxes = summary.evaluation.details["segm"], summary.evaluation.details["bbox"]
    print(
        f"mask AP50 {masks.ap50} AP {masks.ap}, box AP50 {boxes.ap50} AP {boxes.ap} "
        f"after {summary.steps} steps in {(time.process_time() - began) / 60:.1f} minutes of process time"
    )
    return int(not masks.ap50 or masks.ap50 < WANTED)


if __name__ == "__main__":
    sys.exit(main())
