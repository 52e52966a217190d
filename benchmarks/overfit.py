"""Over-fit eight images of the sample set from random initialisation: proof that the whole loop learns.

    python benchmarks/overfit.py [--steps 400] [--resolution 128]

Prints AP50 (the same eight images are trained on and evaluated), steps and minutes. A few minutes on two CPU cores.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from trainfit.data.sample_set import write_sample_set
from trainfit.reports.progress import TerminalProgress
from trainfit.training.fit import fit
from trainfit.training.recipe import Recipe


def eight_images(folder: Path) -> Path:
    """A data set whose train and val splits are the first eight training images of the sample set."""
    root = write_sample_set(folder / "eight", train=8, val=1)
    train, val = (
        next(p for p in root.rglob("*.json") if name in str(p.relative_to(root))) for name in ("train", "val")
    )
    shutil.rmtree(val.parent)
    shutil.copytree(train.parent, val.parent)
    return root


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--queries", type=int, default=50)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, TerminalProgress() as progress:
        recipe = Recipe(
            model="rfdetr-nano",
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
            augment=False,
            ema=False,
            out=Path(folder) / "run",
        )
        summary = fit(recipe, progress=progress)
    ap = summary.ap["bbox"]
    print(f"AP50 {ap.ap50} AP {ap.ap} after {summary.steps} steps in {summary.train_s / 60:.1f} minutes")


if __name__ == "__main__":
    main()
