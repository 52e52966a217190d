"""Is it a leak: what a report says of memory that grows."""

from pathlib import Path
from typing import Any

import torch

from trainfit.gpus.catalogue import GIB
from trainfit.reports.run_memory import growth_words, growths
from trainfit.tasks.detection import task as detection
from trainfit.tasks.detection.samples import Sample
from trainfit.tasks.task import Extents, task_of
from trainfit.training.extents import largest_of, largest_over
from trainfit.training.loader import Loaded, Unreadable


def reading(step: int, gib: float, *, pixels: int = 100, objects: int = 3, rois: int = 40, gpu: bool = True) -> Any:
    item = {"step": step, "item": f"/data/{step}.jpg"}
    return {
        "step": step,
        "windows": 10,
        "reserved_bytes": int(gib * GIB) if gpu else None,
        "memory_bytes": int(gib * GIB),
        "largest": {"pixels": {"value": pixels, **item}, "objects": {"value": objects, **item}},
        "window_numbers": {"rois": rois},
    }


def test_growth_with_a_larger_image_or_more_regions_is_no_leak() -> None:
    steady = [reading(10, 2.0), reading(20, 2.0, pixels=90), reading(30, 2.01)]
    assert growth_words(steady) == "no growth after the first 10 windows: no leak"
    crowded = [*steady, reading(40, 3.0, objects=212), reading(50, 3.0)]
    assert growth_words(crowded) == (
        "grew 2.01 -> 3.00 GiB with its input, no leak; most at step 40: 40.jpg with 212 objects at step 40"
    )
    assert [each.because for each in growths([*crowded, reading(60, 4.0, rois=80)])][1] == ("80 regions in a window",)


def test_growth_without_a_reason_is_named() -> None:
    leaking = [reading(10 * n, 2 + 0.1 * n) for n in range(1, 6)]
    words = growth_words(leaking)
    assert words is not None
    assert words.startswith("grew 2.10 -> 2.50 GiB; at step 20, 30, 40, 50 nothing explains it: no larger image")
    evaluated = [reading(10, 2.0), reading(20, 3.0)]
    assert "nothing explains" in str(growth_words(evaluated))
    assert "the evaluation or save before it" in str(growth_words(evaluated, [{"step": 10}]))
    assert growth_words([reading(10, 2.0)]) is None  # too short
    host = [reading(10, 2.0, gpu=False), reading(20, 2.05, gpu=False), reading(30, 2.2, gpu=False)]
    assert [each.step for each in growths(host)] == [30]


def test_the_largest_sample_of_a_window_is_known_by_its_file() -> None:
    def sample(height: int, width: int, objects: int) -> Sample:
        return Sample(
            image=torch.zeros(3, height, width, dtype=torch.uint8),
            boxes=torch.zeros(objects, 4),
            classes=torch.zeros(objects, dtype=torch.int64),
            masks=None,
            image_id=1,
            original_size=(height, width),
        )

    window = Loaded([sample(4, 6, 1), Unreadable("broken"), sample(5, 5, 9)])
    window.paths = ["a.jpg", "b.jpg", "c.jpg"]
    found = largest_of(task_of("detection"), window, 7)
    assert isinstance(detection, Extents)
    assert found == {
        "pixels": {"value": 25, "item": "c.jpg", "step": 7},
        "objects": {"value": 9, "item": "c.jpg", "step": 7},
    }
    assert largest_of(task_of("pairs"), window, 7) == {}
    other = {"pixels": {"value": 30.0, "item": str(Path("d.jpg")), "step": 8}}
    assert largest_over([found, other]) == {**other, "objects": found["objects"]}
