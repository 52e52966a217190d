"""A training whose images take artificially long to load, then the same with the workers that its verdict suggests.

    python benchmarks/slow_loader.py [--delay 0.08] [--epochs 5]

The delay is a sleep in the decoder, so that more workers help on any machine. The truth beside the verdict: with the
training process loading, what a window waits is its images' delays.
"""

import argparse
import tempfile
import time
from collections.abc import Set as AbstractSet
from dataclasses import replace
from pathlib import Path

import torch

from trainfit.models.rfdetr.workload import RfDetr
from trainfit.models.workload import Decoder
from trainfit.reports.run_report import read_run
from trainfit.tasks.detection.samples import ImageRecord, Sample
from trainfit.training.fit import fit
from trainfit.training.recipe import make_recipe

BATCH = 8


class Delayed:
    """A decoder that sleeps first."""

    def __init__(self, decode: Decoder, delay_s: float) -> None:
        self.decode, self.delay_s = decode, delay_s

    def __call__(
        self, record: ImageRecord, *, size: int, augment: AbstractSet[str], generator: torch.Generator
    ) -> Sample:
        """Sleep, then decode."""
        time.sleep(self.delay_s)
        return self.decode(record, size=size, augment=augment, generator=generator)


def main() -> None:
    """Train twice and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay", type=float, default=0.08)
    parser.add_argument("--epochs", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    original = RfDetr.decoder
    RfDetr.decoder = lambda self: Delayed(original(self), given.delay)
    recipe = make_recipe(
        "rfdetr-nano",
        data="sample",
        device="cpu",
        weights="random",
        resolution=64,
        groups=1,
        num_queries=30,
        multi_scale=False,
        effective_batch=BATCH,
        epochs=given.epochs,
        eval_every=0,
        workers=0,
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in ("first", "then"):
            summary = fit(replace(recipe, out=Path(folder) / name))
            report = read_run(summary.folder)
            assert report.loader is not None
            verdict, delay_s = report.loader, BATCH * given.delay
            print(f"{recipe.workers} workers: {summary.loader}")
            print(
                f"  decoding {verdict['load_s']:.3f} s a window ({delay_s:.3f} slept), compute {verdict['compute_s']:.3f} s"
            )
            if recipe.workers == 0:
                truth = delay_s / (delay_s + verdict["compute_s"])
                print(f"  waiting {100 * verdict['wait_share']:.1f} %; the sleeps alone are {100 * truth:.1f} %")
            recipe = replace(recipe, workers=verdict["suggested_workers"])


if __name__ == "__main__":
    main()
