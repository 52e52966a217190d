"""Time over the sizes that multi-scale training draws: memory is priced at the largest, time as the mean."""

from dataclasses import replace

import pytest
from rfdetr.datasets.coco import compute_multi_scale_scales

from test_timing import CARD, PEAK, count
from trainfit.models.family import DrawnSizes
from trainfit.models.maskrcnn import family as maskrcnn
from trainfit.models.rfdetr.family import PUBLISHED, RfDetrSetting, drawn_sizes
from trainfit.models.rfdetr.workload import CONFIGS, WITH_MASKS
from trainfit.timing.roofline import step_seconds, window_seconds

TRACED = {
    "rfdetr-nano": {224: (4.713e11, 1.460e10), 384: (7.281e11, 1.917e10), 544: (1.175e12, 2.521e10)},
    "rfdetr-medium": {416: (1.126e12, 3.030e10), 576: (1.623e12, 3.684e10), 736: (2.414e12, 4.549e10)},
    "rfdetr-seg-medium": {312: (1.677e12, 9.265e10), 432: (2.602e12, 1.547e11), 552: (3.959e12, 2.368e11)},
}
"""Side in pixels -> (FLOPs, bytes) of forward and backward, from `tracing.client.run` with multi-scale off at that side."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_those_that_upstream_draws(name: str) -> None:
    fields = {**CONFIGS, **WITH_MASKS}[name].model_fields
    for resolution in (PUBLISHED[name].resolution, 2 * PUBLISHED[name].block):
        sizes = compute_multi_scale_scales(
            resolution, True, fields["patch_size"].default, fields["num_windows"].default
        )
        drawn = drawn_sizes(RfDetrSetting(model=name, resolution=resolution))
        assert drawn is not None
        assert drawn.pixels == pytest.approx([(side / max(sizes)) ** 2 for side in sizes])
    assert drawn_sizes(RfDetrSetting(model=name, multi_scale=False)) is None


@pytest.mark.parametrize("name", TRACED)
def test_work_grows_with_the_pixels_as_traces_of_other_sizes_do(name: str) -> None:
    """FLOPs and bytes of micro-batches of four images, counted in traces of each size (bf16, 100 objects)."""
    sides = TRACED[name]
    drawn = drawn_sizes(RfDetrSetting(model=name))
    assert drawn is not None
    largest = max(sides)
    for side, known in sides.items():
        pixels = (side / largest) ** 2
        for share, work, most in zip((drawn.flops_share, drawn.bytes_share), known, sides[largest], strict=True):
            assert most * (1 - share * (1 - pixels)) == pytest.approx(work, rel=0.05)


def test_work_of_mask_rcnn_grows_as_traces_of_other_sizes_do() -> None:
    """FLOPs and bytes of a micro-batch of one image at short sides of 800, 640 and 480 (bf16, 512 regions, 20 objects)."""
    traced = {800: (1.5758e12, 2.3537e10), 640: (1.1794e12, 1.6618e10), 480: (8.5277e11, 1.0903e10)}
    drawn = maskrcnn.drawn_sizes(maskrcnn.MaskRcnnSetting(model="maskrcnn-r50-v1", short_sides="480,640,800"))
    assert drawn is not None
    assert drawn.pixels == pytest.approx([(side / 800) ** 2 for side in (480, 640, 800)], rel=0.01)
    for pixels, side in zip(drawn.pixels, (480, 640, 800), strict=True):
        for share, work, most in zip((drawn.flops_share, drawn.bytes_share), traced[side], traced[800], strict=True):
            assert most * (1 - share * (1 - pixels)) == pytest.approx(work, rel=0.02)


def test_fewer_queries_and_groups_leave_more_to_the_pixels() -> None:
    setting = RfDetrSetting(model="rfdetr-nano")
    shares = [drawn_sizes(replace(setting, groups=groups)) for groups in (13, 4, 1)]
    assert [each.flops_share for each in shares if each] == sorted(each.flops_share for each in shares if each)
    everything = drawn_sizes(replace(setting, num_queries=1, groups=1))
    assert everything is not None
    assert everything.bytes_share > 0.99


def test_a_window_takes_the_mean_over_the_sizes() -> None:
    """10 s of products of which half grow with the pixels, 10 s of memory of which a tenth does, an optimizer of 1 s."""
    ops = [
        count(flops=100e12),
        count("aten.relu", bytes=10e9, phase="backward"),
        count("aten.add_", phase="optimizer", bytes=1e9),
    ]
    drawn = DrawnSizes(pixels=(0.2, 0.6, 1.0), flops_share=0.5, bytes_share=0.1)
    assert step_seconds(ops, CARD, efficiency=PEAK).seconds == pytest.approx(21)
    mean = step_seconds(ops, CARD, drawn=drawn, efficiency=PEAK)
    assert mean.parts_s["tensor cores"] == pytest.approx((6 + 8 + 10) / 3)
    assert mean.parts_s["memory"] == pytest.approx((9.2 + 9.6 + 10) / 3)
    assert mean.parts_s["optimizer"] == pytest.approx(1)
    assert mean.seconds == pytest.approx(sum(mean.parts_s.values()))
    window = window_seconds((ops, ops), (1, 2), CARD, cuts=(1, 1), traced_accumulation=1, drawn=drawn, efficiency=PEAK)
    assert window.seconds == pytest.approx(2 * (mean.seconds - 1) + 1)
