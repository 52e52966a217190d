"""A plan as text, JSON and HTML, from plans made by hand; see `plan_cases` for what their candidates need."""

import dataclasses
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plan_cases import MICRO_BATCHES, make_plan
from support.workloads import make_workload
from trainfit.cli.arguments import given_flags
from trainfit.cli.flags import flags_of
from trainfit.errors import TrainfitError
from trainfit.gpus.catalogue import GIB, MIB, find_gpu
from trainfit.models.family import family_of
from trainfit.planning.plan import Plan, knobs
from trainfit.reports import plan_svg as picture
from trainfit.reports.plan import (
    CARDS_GIB,
    ROWS,
    budget_bars,
    card_room_bytes,
    plan_json,
    plan_text,
    smallest_card,
    table_rows,
    train_command,
)
from trainfit.reports.plan_html import plan_html
from trainfit.reports.words import rate
from trainfit.step.names import Checkpointing
from trainfit.training.recipe import BATCH, DEFAULT_EFFECTIVE_BATCH, recipe_type


def lines(plan: Plan) -> list[str]:
    return [line.rstrip() for line in plan_text(plan).splitlines()]


def test_text() -> None:
    assert lines(make_plan(micro_batches=(2, 6, 8))) == TEXT.splitlines()


def test_text_where_nothing_fits() -> None:
    assert lines(make_plan(None, budget_gib=0.7, micro_batches=(1, 2))) == NOTHING.splitlines()


def test_calibrated_times_are_images_per_second() -> None:
    """40 * 4 / 5 = 32; the fastest, 16 at once, makes 40 * 16 / 17 = 37.6."""
    text = plan_text(make_plan((4, "none"), calibrated=True))
    assert "It makes about 32 images/s, 15% slower than the fastest setting" in text
    assert re.search(r"^->  4 x 4 +none +2\.20 to 2\.42 +32 +chosen", text, flags=re.M)
    assert not re.search(r"\d\.\d\dx  ", text)


def test_a_card_without_rates() -> None:
    plan = make_plan((4, "none"), timed=False)
    text = plan_text(plan)
    assert "Its speed is unknown: the rates of RTX 3090 are not known." in text
    assert re.search(r"^->  4 x 4 +none +2\.20 to 2\.42 +- +chosen", text, flags=re.M)
    assert "the rates of RTX 3090 are not" in plan_html(plan)


def test_other_knobs_get_a_column() -> None:
    plan = make_plan((2, "none"), micro_batches=(1, 2))
    on_host = replace(plan.candidates[0], setting=replace(plan.candidates[0].setting, ema_on_host=True))
    head = re.findall(r".*checkpointed.*", plan_text(replace(plan, candidates=(*plan.candidates, on_host))))
    assert re.split("  +", head[0].strip())[:4] == ["micro-batch", "checkpointed", "ema on host", "needs GiB"]
    assert "ema on host" not in plan_text(plan)


@given(
    at=st.tuples(st.sampled_from(range(1, 41)), st.sampled_from(["none", 3, 6, 9, "all"])),
    budget_gib=st.floats(1, 20),
)
@settings(max_examples=30, deadline=None)
def test_rows_of_the_table(at: tuple[int, Checkpointing], budget_gib: float) -> None:
    """Of 200 candidates, 14 at most; the chosen one, the fastest and its next neighbours among them."""
    plan = make_plan(
        at, effective_batch=40, micro_batches=range(1, 41), blocks=("none", 3, 6, 9, "all"), budget_gib=budget_gib
    )
    rows = table_rows(plan)
    assert len(rows) == ROWS == 14
    assert len({(c.setting.micro_batch, c.setting.checkpointing) for c in rows}) == ROWS
    assert plan.chosen in rows
    speeds = [c.images_per_s or 0 for c in rows]
    assert speeds == sorted(speeds, reverse=True)
    assert speeds[0] == max(c.images_per_s or 0 for c in plan.candidates)
    shown = {(c.setting.micro_batch, c.setting.checkpointing) for c in rows}
    for near in (at[0] - 1, at[0] + 1):
        assert (near, at[1]) in shown or not 1 <= near <= 40
    assert plan.knee in {micro_batch for micro_batch, _ in shown}


def test_budget_bars_by_hand() -> None:
    """The least that measured cards offer: 4 GB: 3.81 GiB (GTX 1650 Ti); 6 GB: 5.76 (RTX 2060); 8 GB: 7.37; 12 GB: 11.6.

    So 6 at once (3.30) fit 4 GB, 8 (4.18) fit 6 GB, and 16 (7.70) fit 12 GB, not 8.
    """
    assert card_room_bytes(4) == find_gpu("GTX 1650 Ti").memory_bytes
    assert card_room_bytes(5) == 5 * GIB - 576 * MIB  # no such card: what a driver may keep is left free
    found = budget_bars(make_plan().candidates)
    assert [bar.card_gib for bar in found] == list(CARDS_GIB)
    sizes = [(bar.candidate.setting.micro_batch, bar.candidate.setting.checkpointing) for bar in found if bar.candidate]
    assert sizes == [(6, "none"), (8, "none"), (8, "none"), *[(16, "none")] * 6]
    assert budget_bars(make_plan(micro_batches=(16,)).candidates)[0].candidate is None


@given(st.sets(st.sampled_from(CARDS_GIB), min_size=2), st.integers(1, 48))
@settings(max_examples=30, deadline=None)
def test_more_memory_is_never_slower(sizes_gib: set[int], effective: int) -> None:
    plan = make_plan(None, effective_batch=effective, micro_batches=range(1, 49))
    bars = budget_bars(plan.candidates, sorted(sizes_gib))
    speeds = [bar.candidate.images_per_s or 0 if bar.candidate else 0 for bar in bars]
    assert speeds == sorted(speeds)
    for bar in bars:
        assert bar.candidate is None or bar.candidate.needs.high_bytes < bar.card_gib * GIB


def test_smallest_card() -> None:
    """In fp16 cards before Ampere will do; what no card holds has none."""
    old, new = smallest_card(6 * GIB, "fp16"), smallest_card(6 * GIB, "bf16")
    assert old
    assert new
    assert new.has_bf16
    assert 6 * GIB < old.memory_bytes <= new.memory_bytes < find_gpu("RTX 3090").memory_bytes
    assert smallest_card(10**15, "fp16") is None


@pytest.mark.parametrize(
    ("plan", "command"),
    [
        (make_plan((4, "none")), "trainfit train rfdetr-nano --data DIR --micro-batch 4 --precision bf16 --workers 3"),
        (
            make_plan((8, "all"), gpus=2, effective_batch=32, model="rfdetr-seg-nano", stage="masks", ema=False),
            "torchrun --nproc-per-node 2 -m trainfit train rfdetr-seg-nano --data DIR --effective-batch 32 --micro-batch 8 "
            "--checkpointing all --precision bf16 --no-ema --stage masks "
            "--lr 0.000141 --lr-encoder 0.000212 --workers 3 --weights RUN",
        ),
        (
            make_plan(
                (2, 3), blocks=(3,), resolution=320, multi_scale=False, num_queries=50, groups=2, freeze_encoder=True,
                ema_on_host=True, optimizer="adamw-8bit", eval_micro_batch=1,
            ),
            "trainfit train rfdetr-nano --data DIR --micro-batch 2 --eval-micro-batch 1 --checkpointing 3 --precision bf16 "
            "--optimizer adamw-8bit --ema-on-host --resolution 320 --no-multi-scale --num-queries 50 --groups 2 "
            "--freeze-encoder --workers 3",
        ),
    ],
)  # fmt: skip
def test_command(plan: Plan, command: str) -> None:
    assert train_command(plan) == command


@pytest.mark.parametrize("plan", [make_plan((4, "none")), make_plan((8, "all"), gpus=2, effective_batch=32, ema=False)])
def test_the_command_makes_the_plans_recipe(plan: Plan) -> None:
    """As the command line reads it."""
    import tyro

    words = train_command(plan).replace("DIR", "sample").split()
    words = words[words.index("train") + 1 :]
    made, build = flags_of(recipe_type(family_of(plan.model)[0].setting), BATCH)
    recipe = build(tyro.cli(made, args=words), given_flags(words))
    for name, value in knobs(plan).items():
        read = getattr(recipe, name)
        defaults = {"effective_batch": DEFAULT_EFFECTIVE_BATCH, "eval_micro_batch": recipe.micro_batch}
        assert (read if read is not None else defaults.get(name)) == value, name
    given = {f.name for f in dataclasses.fields(recipe) if getattr(recipe, f.name) != f.default}
    assert given <= knobs(plan).keys() | {"model", "data"}


@pytest.mark.parametrize("model", ["rfdetr-nano", "maskrcnn-r50-v1", "clip:ViT-B-32", "timm:resnet18"])
def test_what_is_not_trained_has_no_command(model: str) -> None:
    """The families with a command are those that training takes."""
    command = train_command(make_plan((4, "none"), model=model))
    if family_of(model)[0].task is not None:
        make_workload(model, ("thing",), {})
        assert command.startswith("trainfit train")
    else:
        with pytest.raises(TrainfitError, match="not there yet"):
            make_workload(model, ("thing",), {})
        assert command == f"(trainfit does not train {model} yet: --emit writes this plan for another tool)"


def test_json_holds_all() -> None:
    plan = make_plan()
    record = json.loads(json.dumps(plan_json(plan)))
    assert (record["schema"], record["model"], record["effective_batch"]) == (1, "rfdetr-nano", 16)
    assert record["command"].startswith("trainfit train rfdetr-nano")
    assert {f.name for f in dataclasses.fields(Plan)} <= record.keys()
    assert (record["chosen"]["cuts"], record["chosen"]["needs"]["low_bytes"]) == ([6, 6, 4], 3 * GIB)
    assert len(record["candidates"]) == 2 * len(MICRO_BATCHES)
    sample = record["prediction"]["training"]["profile"]["timeline"][0]
    assert len(sample["category_bytes"]) == len(record["categories"])
    assert json.loads(json.dumps(plan_json(make_plan(None, budget_gib=0.7))))["command"] is None


@pytest.mark.parametrize("chosen", [(6, "none"), None])
def test_html_stands_alone(chosen: tuple[int, Checkpointing] | None) -> None:
    """No address of another file, well-formed pictures, a dot for each candidate, the budget, a bar for each card."""
    plan = make_plan(chosen, budget_gib=3.5 if chosen else 0.7)
    page = plan_html(plan)
    assert not re.search(r"http|src=|url\(|<link|<script", page)
    pictures = [ET.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page)]
    assert len(pictures) == (2 if chosen else 1)
    dots = list(pictures[0].iter("circle"))
    assert len(dots) == len(plan.candidates)
    texts = [element.text or "" for element in pictures[0].iter("text")]
    assert f"budget {3.5 if chosen else 0.7:.2f} GiB" in texts
    budget = next(line for line in pictures[0].iter("line") if line.get("stroke") == "var(--limit)")
    for dot, candidate in zip(
        dots, sorted(plan.candidates, key=lambda c: c.verdict == "chosen"), strict=True
    ):  # the chosen one is drawn last
        right = float(dot.get("cx", 0)) > float(budget.get("x1", 0))
        assert right == (candidate.verdict == "does not fit")
    for size in CARDS_GIB:
        assert f"<td class='name'>{size} GB: micro-batch" in page
    assert ("head&lt;0&gt;" in page) == (chosen is not None)
    assert ("frees 1.00 GiB  enough  changes what is learned" in page) == (chosen is None)


@pytest.mark.parametrize("chosen", [(6, "none"), None])
def test_picture_stands_alone(chosen: tuple[int, Checkpointing] | None) -> None:
    """A bar up to what each shown candidate needs, beyond the budget's line where it does not fit; two palettes."""
    plan = make_plan(chosen, budget_gib=3.5 if chosen else 0.7)
    text = picture.plan_svg(plan)
    assert not re.search(r"href|url\(|<script", text)
    assert "prefers-color-scheme: dark" in text
    name = "{http://www.w3.org/2000/svg}"
    root = ET.fromstring(text)
    budget = next(line for line in root.iter(f"{name}line") if line.get("stroke") == "var(--limit)")
    ends = [r for r in root.iter(f"{name}rect") if r.get("opacity")]
    assert 1 < len(ends) <= picture.ROWS
    for rect in ends:
        beyond = float(rect.get("x", 0)) + float(rect.get("width", 0)) > float(budget.get("x1", 0)) + 0.2
        assert beyond == (rect.get("fill") == picture.COLORS["does not fit"])
    words = [element.text or "" for element in root.iter(f"{name}text")]
    assert any("Fastest that fits" in each for each in words) == (chosen is not None)


def test_reports_need_no_torch() -> None:
    """A plan answers in under a second from stored traces."""
    code = (
        "import sys, trainfit.reports.plan, trainfit.reports.plan_html, trainfit.reports.emit\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'rfdetr', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


TEXT = """\
rfdetr-nano on RTX 3090: micro-batch 6+6+4, no checkpointing, bf16, adamw-fused: an effective batch of 16. With evaluation it needs 1.23 to 1.39 GiB of 3.50 to 3.70 GiB usable, 3% of the card kept free; where there is room it takes 1.23 to 1.40 GiB. It is 4% slower than the fastest setting, which does not fit.

Settings tried (6 of 6 shown)
    micro-batch   checkpointed  needs GiB     speed  verdict       why
    8 x 2 (knee)  none          3.80 to 4.18  1.04x  does not fit  up to 0.68 GiB short
->  6+6+4         none          3.00 to 3.30  1.00x  chosen        the fastest that fits
    2 x 8         none          1.40 to 1.54  0.78x  fits          slower
    8 x 2 (knee)  all           2.20 to 2.42  0.78x  fits          slower
    6+6+4         all           1.80 to 1.98  0.75x  fits          slower
    2 x 8         all           1.00 to 1.10  0.58x  fits          slower

Frontier: nothing faster needs less
  1.00x  3.00 to 3.30 GiB  micro-batch 6+6+4, no checkpointing
  0.78x  1.40 to 1.54 GiB  micro-batch 2 x 8, no checkpointing
  0.58x  1.00 to 1.10 GiB  micro-batch 2 x 8, all blocks checkpointed

Loading: 3 loader processes per GPU, 2.00 GiB of host memory (4 cores, 1 kept for the trainer)
The recipe's 1e-4 is for an effective batch of 16: it stays.

Assumptions
  Kernels start as fast as on a desktop of 2024.
  One process, the card to itself (a desktop may hold 1.1 GiB: --memory); evaluation follows training.
  torch.backends.cudnn.benchmark is off, as torch leaves it.
  The fullest image has 7 objects (--objects-per-image, or --data).
  Every image is resized to 384 x 384 pixels: no canvas to pad to.
  Multi-scale training: memory at the largest of its sizes, time as the mean over all.
  Largest shape assumed, an upper bound: aten.nonzero.
  Placeholder values for data-dependent operators: aten.item.

Train with it
  trainfit train rfdetr-nano --data DIR --micro-batch 6 --precision bf16 --workers 3
"""  # noqa: E501
NOTHING = """\
rfdetr-nano on RTX 3090: nothing fits. The smallest there is, micro-batch 1 x 16, all blocks checkpointed, needs 0.80 to 0.88 GiB of 0.70 to 0.90 GiB usable: 0.18 GiB too much.

The smallest card of the catalogue that would hold it: RTX 3050 Ti Laptop (3.81 GiB).
  --groups 1     frees 1.00 GiB  enough  changes what is learned
  --ema-on-host  frees 0.12 GiB

Settings tried (4 of 4 shown)
  micro-batch  checkpointed  needs GiB     speed  verdict       why
  2 x 8        none          1.40 to 1.54  1.78x  does not fit  up to 0.84 GiB short
  1 x 16       none          1.00 to 1.10  1.33x  does not fit  up to 0.40 GiB short
  2 x 8        all           1.00 to 1.10  1.33x  does not fit  up to 0.40 GiB short
  1 x 16       all           0.80 to 0.88  1.00x  does not fit  up to 0.18 GiB short

Loading: 3 loader processes per GPU, 2.00 GiB of host memory (4 cores, 1 kept for the trainer)
The recipe's 1e-4 is for an effective batch of 16: it stays.

Assumptions
  Kernels start as fast as on a desktop of 2024.
"""  # noqa: E501


@pytest.mark.parametrize(
    ("per_s", "text"),
    [(None, "-"), (0.3167, "0.317"), (12.5, "12.5"), (999.4, "999"), (2123.0, "2,120"), (12_345.0, "12,300")],
)
def test_a_rate_has_three_digits_and_no_exponent(per_s: float | None, text: str) -> None:
    assert rate(per_s) == text
