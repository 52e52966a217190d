"""Over-fit eight images of the sample set with masks, single stage, from random initialisation.

    python benchmarks/overfit_masks.py [--steps 100] [--resolution 120]

Prints mask and box AP50 (the same eight images are trained on and evaluated), steps and minutes.
"""

import argparse
import tempfile
from pathlib import Path

from overfit import eight_images
from trainfit.reports.progress import TerminalProgress
from trainfit.training.fit import fit
from trainfit.training.recipe import make_recipe


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--resolution", type=int, default=120)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--queries", type=int, default=30)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, TerminalProgress() as progress:
        recipe = make_recipe(
            "rfdetr-seg-nano",
            data=str(eight_images(Path(folder))),
            resolution=arguments.resolution,
            groups=arguments.groups,
            num_queries=arguments.queries,
            effective_batch=8,
            micro_batch=4,
            epochs=arguments.steps,
            eval_every=50,
            lr=arguments.lr,
            lr_encoder=arguments.lr,
            multi_scale=False,
            augment="none",
            weights="random",
            ema=False,
            workers=0,
            out=Path(folder) / "run",
        )
        summary = fit(recipe, progress=progress)
    assert summary.evaluation is not None
    masks, boxes = summary.evaluation.details["segm"], summary.evaluation.details["bbox"]
    print(
        f"mask AP50 {masks.ap50} AP {masks.ap}, box AP50 {boxes.ap50} AP {boxes.ap} "
        f"after {summary.steps} steps in {summary.train_s / 60:.1f} minutes"
    )


if __name__ == "__main__":
    main()
