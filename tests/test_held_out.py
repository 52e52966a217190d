"""What the package answers, against traces made at random points that no law was found with (`benchmarks/seconds.py`)."""

import json
from pathlib import Path
from typing import Any

import pytest

from trainfit.gpus.catalogue import find_gpu
from trainfit.memory.priced import HALVES, Pricer
from trainfit.models.setting import make_setting, setting_from_json

POINTS = Path(__file__).parents[1] / "benchmarks" / "results" / "held_out.jsonl"
ROWS = [json.loads(line) for line in POINTS.read_text().splitlines()][::8]


@pytest.mark.parametrize("row", ROWS, ids=[str(row["number"]) for row in ROWS])
def test_an_answer_is_not_below_the_trace_at_its_point(row: dict[str, Any]) -> None:
    """The highest peaks are of few objects, whose losses run in fewer pieces than those of the stored trace."""
    pricer = Pricer(gpu=find_gpu("A100"), cache=False)
    setting = setting_from_json(row["setting"])
    assert pricer.answers(setting)
    assert 0.99 * row["true"]["needs"] <= pricer.reserved(setting).high_bytes <= 1.1 * row["true"]["needs"]
    made = pricer.columns(setting, "training").columns
    assert 0.99 * row["true"]["allocated"] <= made.peak_bytes() <= 1.04 * row["true"]["allocated"]


@pytest.mark.parametrize("model", ["rfdetr-seg-nano", "maskrcnn-r50-v2"])
def test_fp16_is_answered_from_bf16_where_the_card_has_both(model: str) -> None:
    """With more room, and a line that says so."""
    pricer = Pricer(gpu=find_gpu("A100"), cache=False)
    bf16, fp16 = (make_setting(model, precision=each, micro_batch=2, accumulation=2) for each in ("bf16", "fp16"))
    assert pricer.answers(fp16)
    assert pricer.reserved(fp16).low_bytes < pricer.reserved(bf16).low_bytes
    assert pricer.reserved(fp16).high_bytes > pricer.reserved(bf16).high_bytes
    assert HALVES in pricer.predict(fp16, (2, 2)).assumptions
    assert HALVES not in pricer.predict(bf16, (2, 2)).assumptions
    assert Pricer(gpu=find_gpu("T4"), cache=False).request(fp16, "training").setting.precision == "fp16"


@pytest.mark.parametrize(
    ("model", "knobs", "peak_bytes", "needs_bytes"),
    [
        ("rfdetr-nano", {}, 584_327_168, 1_940_620_574),
        ("maskrcnn-r50-v2", {"canvas": (800, 1066)}, 1_706_801_152, 2_658_020_570),
    ],
)
def test_evaluation_of_more_images_than_are_trained_at_a_time_needs_no_trace(
    model: str, knobs: dict[str, Any], peak_bytes: int, needs_bytes: int
) -> None:
    """Figures of traces of one image in training, and then four in evaluation."""
    pricer = Pricer(gpu=find_gpu("A100"), cache=False)
    setting = make_setting(model, precision="bf16", micro_batch=1, eval_micro_batch=4, accumulation=2, **knobs)
    assert pricer.answers(setting)
    evaluated = pricer.predict(setting, (1, 1)).evaluation
    assert evaluated.profile.peak_allocated_bytes == pytest.approx(peak_bytes, rel=1e-3)
    assert needs_bytes <= evaluated.needs.high_bytes <= 1.02 * needs_bytes
