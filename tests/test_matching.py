"""Hungarian matching of RF-DETR: what a trace shows of it, and its time."""

from typing import Any

import pytest
import torch
from rfdetr.models import _assignment, matcher
from scipy.optimize import linear_sum_assignment

from test_predict import STORED
from trainfit.gpus.catalogue import find_gpu
from trainfit.memory.allocator import AllocatorConfig
from trainfit.memory.predict import predict_traced
from trainfit.memory.priced import Pricer
from trainfit.models.build import build_step
from trainfit.models.rfdetr import tracing
from trainfit.models.rfdetr.family import PUBLISHED, RfDetrSetting, host_seconds
from trainfit.models.rfdetr.matching import COST_S, PROBLEM_S, matching_seconds
from trainfit.tracing.stored_trace import StoredTrace


def test_a_traced_solve_gives_what_upstream_gives_but_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes, groups = [3, 5], 2
    costs = [torch.rand(groups * 20, sum(sizes), generator=generator) for _ in range(3)]
    known = _assignment.assign_many_bucketed(costs, sizes, groups)
    monkeypatch.setattr(_assignment, "_solve_to_indices", tracing.solve_on_device)
    traced = _assignment.assign_many_bucketed(costs, sizes, groups)
    for known_layer, traced_layer in zip(known, traced, strict=True):
        for image, (known_pair, traced_pair) in enumerate(zip(known_layer, traced_layer, strict=True)):
            for known_index, traced_index in zip(known_pair, traced_pair, strict=True):
                assert traced_index.shape == known_index.shape == (groups * sizes[image],)
                assert traced_index.dtype == known_index.dtype
            for rows in (known_pair[0], traced_pair[0]):
                assert len(set(rows.tolist())) == len(rows)  # no query is matched twice


def test_a_traced_solve_leaves_the_costs_on_the_device() -> None:
    costs = torch.empty(6, 20, 5, device="meta")  # which has no values: a copy to the host would raise
    rows, columns = tracing.solve_on_device(costs, 5)
    assert rows.device.type == columns.device.type == "cpu"
    assert rows.shape == columns.shape == (6, 5)


def matching(**values: Any) -> float:
    """Of four images on a T4, Nano's problems."""
    own: dict[str, Any] = {"images": 4, "objects": 30, "queries": 300, "groups": 13, "layers": 2, "masks": False}
    chosen: dict[str, Any] = {**own, "capability": (7, 5), **values}
    return matching_seconds(**chosen)


@pytest.mark.parametrize(
    ("objects", "quick_s", "busy_s"), [(7, 0.0033, 0.004), (30, 0.010, 0.019), (100, 0.040, 0.086)]
)
def test_matching_on_the_host_takes_about_what_was_measured(objects: int, quick_s: float, busy_s: float) -> None:
    """208 problems of 300 queries in SciPy, on one core of an AMD EPYC that was idle and on one that was busy."""
    seconds = matching(objects=objects, layers=3)
    assert 0.5 * busy_s <= seconds <= 1.5 * max(quick_s, busy_s)


@pytest.mark.parametrize(("problems_of_an_image", "ratios"), [(13, (1.15, 1.37)), (52, (2.0, 2.5)), (156, (5.0, 6.5))])
def test_the_kernel_is_as_much_faster_than_scipy_as_upstream_measured(
    problems_of_an_image: int, ratios: tuple[float, float]
) -> None:
    """52, 208 and 624 problems on an L4 (rfdetr 1.11.2 models/_assignment.py): within a fifth."""
    values = {"groups": problems_of_an_image, "layers": 0}
    ratio = matching(**values) / matching(**values, capability=(8, 9))
    if problems_of_an_image > 13:
        assert 0.8 * ratios[0] < ratio < 1.2 * ratios[1]
    else:
        assert 0.8 * ratios[0] < ratio  # below the kernel's hundred problems it is taken to be no slower than SciPy


def test_as_many_problems_as_upstream_solves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in a real step on the CPU, where upstream calls SciPy for each."""
    solved: list[tuple[int, ...]] = []

    def solve(costs: Any, *_: Any, **__: Any) -> Any:
        solved.append(tuple(costs.shape))
        return linear_sum_assignment(costs)

    monkeypatch.setattr(matcher, "linear_sum_assignment", solve)
    setting = RfDetrSetting(
        model="rfdetr-nano",
        micro_batch=2,
        resolution=64,
        multi_scale=False,
        num_queries=20,
        groups=3,
        objects_per_image=5,
        precision="fp32",
        ema=False,
    )
    build_step(setting=setting.to_json(), device=torch.device("cpu")).run()
    layers = PUBLISHED[setting.model].decoder_layers
    one_s = PROBLEM_S + COST_S * solved[0][0] * solved[0][1]
    known = matching(images=2, objects=5, queries=solved[0][0], groups=3, layers=layers) / one_s
    assert len(solved) == pytest.approx(known)


def test_a_window_pays_for_the_matching_of_each_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:

    def scaled(*_: Any) -> None:
        return None

    def trace(*_: Any) -> StoredTrace:
        return STORED

    monkeypatch.setattr(Pricer, "_scaled", scaled)
    monkeypatch.setattr(Pricer, "trace", trace)
    setting, gpu = RfDetrSetting(model="rfdetr-nano", micro_batch=4, accumulation=3, precision="fp16"), find_gpu("T4")
    one_s = host_seconds(setting, 1, (7, 5))
    window = Pricer(gpu=gpu).seconds(setting, (4, 4, 2))
    assert window.parts_s["host work"] == pytest.approx(10 * one_s)
    assert window.seconds == pytest.approx(sum(window.parts_s.values()))
    assert Pricer(gpu=gpu).seconds(setting, (4,), "evaluation").parts_s["host work"] == 0
    alone = predict_traced(setting, gpu, training=STORED, evaluation=STORED, config=AllocatorConfig())
    assert alone.training.time is not None
    assert alone.training.time.parts_s["host work"] == pytest.approx(12 * one_s)


@pytest.mark.parametrize(("images", "objects"), [(1, 30), (4, 10)])
def test_single_images_and_few_masks_are_matched_on_the_host_of_any_card(images: int, objects: int) -> None:
    """As `HungarianMatcher.forward` does: four images of 10 objects stay below its limit, and eight do not."""
    masks = {"images": images, "objects": objects, "queries": 100, "layers": 4, "masks": True}
    assert matching(**masks, capability=(9, 0)) == matching(**masks)
    assert matching(**{**masks, "images": 16}, capability=(9, 0)) < matching(**{**masks, "images": 16})
