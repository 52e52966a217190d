"""The search over settings, with prices that a formula gives: its laws, and its answer against trying everything."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from test_predict import STORED, card
from trainfit.errors import TrainfitError
from trainfit.gpus.context import ByteRange
from trainfit.memory.alloc_conf import AllocatorConfig
from trainfit.memory.predict import RESERVE, Prediction, predict_traced
from trainfit.models.rfdetr.family import RfDetrSetting
from trainfit.models.setting import Setting, make_setting
from trainfit.planning.candidates import KNEE, batches, cuts, frontier, turned
from trainfit.planning.plan import SearchRequest, SearchResult
from trainfit.planning.search import search
from trainfit.timing.roofline import KINDS, TimeEstimate


def groups_of(setting: Setting) -> int | None:
    """The query groups of a setting of RF-DETR."""
    assert isinstance(setting, RfDetrSetting)
    return setting.groups


BASE = make_setting(model="rfdetr-nano", precision="bf16")


def estimate(seconds: float) -> TimeEstimate:
    return TimeEstimate(
        seconds=seconds, parts_s=dict.fromkeys(KINDS, seconds / len(KINDS)), bound="memory", calibrated=False
    )


@dataclass(frozen=True, kw_only=True)
class Formula:
    """A step of `blocks` equal blocks beside a rest, priced by hand."""

    fixed: int = 1000
    image: int = 100
    """Bytes of an image outside the blocks."""
    block: int = 50
    """Bytes of an image in one block."""
    blocks_: int = 4
    averaged: int = 200
    image_s: float = 0.01
    start_s: float = 0.02
    """Once a micro-batch."""
    again_s: float = 0.001
    """One block of one image again."""
    host_s: float = 0.03
    offload_s: float = 0.05
    """Copying what one image still keeps for backward to host memory and back."""
    state: int = 120
    """The optimizer's, on the GPU; of its buffer a sixth stays there."""
    state_s: float = 0.02
    """Copying it to the GPU and back, once a window."""
    eval_image: int = 60
    pieces: int = 90
    """What the allocator takes beside tensors."""

    def count(self, setting: Setting) -> int:
        known = {"none": 0, "all": self.blocks_, "offload": self.blocks_}
        return known[setting.checkpointing] if isinstance(setting.checkpointing, str) else setting.checkpointing

    def needs(self, setting: Setting) -> ByteRange:
        kept = self.image + self.block * (self.blocks_ - self.count(setting))
        kept = kept // 4 if setting.checkpointing == "offload" else kept
        groups = {None: 1.0, 4: 0.6, 1: 0.4}[groups_of(setting)]
        on_host = setting.optimizer == "adamw-host"
        high = self.fixed + self.averaged * (not setting.ema_on_host) + int(kept * groups * setting.micro_batch)
        high -= self.state * 5 // 6 * on_host
        return ByteRange(low_bytes=high * 9 // 10, high_bytes=high)

    def least(self, setting: Setting) -> int:
        return max(1, self.needs(setting).high_bytes - self.pieces)

    def seconds(self, setting: Setting, cuts: Sequence[int], part: str = "training") -> TimeEstimate:
        if part == "evaluation":
            return estimate(sum(cuts) * self.image_s / 3 + self.start_s)
        per_image = self.image_s + self.again_s * self.count(setting)
        per_image += self.offload_s * (setting.checkpointing == "offload")
        once = self.host_s * setting.ema_on_host + self.state_s * (setting.optimizer == "adamw-host")
        return estimate(sum(self.start_s + per_image * n for n in cuts) + once)

    def predict(self, setting: Setting, cuts: Sequence[int]) -> Prediction:
        assert sum(cuts)
        return predict_traced(setting, card(2**40), training=STORED, evaluation=STORED, config=AllocatorConfig())

    def blocks(self, setting: Setting) -> int:
        del setting
        return self.blocks_

    def traces_each(self, setting: Setting) -> bool:
        return setting.family.coupled(setting)

    def known(self, setting: Setting) -> bool:
        return setting.checkpointing != "offload"


def find(budget: int, prices: Formula | None = None, **wish: Any) -> SearchResult:
    wanted: dict[str, Any] = {"setting": BASE, "effective_batch": 16, "reserve": 0.0, **wish}
    return search(SearchRequest(budget_bytes=budget, **wanted), prices or Formula())


def seconds(found: SearchResult) -> float:
    assert found.chosen is not None
    assert found.chosen.seconds is not None
    return found.chosen.seconds


FORMULAS = st.builds(
    Formula,
    fixed=st.integers(0, 3000),
    image=st.integers(1, 300),
    block=st.integers(0, 200),
    blocks_=st.sampled_from([0, 1, 4, 12]),
    averaged=st.integers(0, 500),
    start_s=st.floats(0, 0.2),
    again_s=st.floats(0, 0.01),
    host_s=st.floats(0, 0.1),
)
BATCHES = st.integers(1, 70)
GPUS = st.integers(1, 5)


@hypothesis.given(share=st.integers(1, 300))
def test_cuts_hold_the_share_exactly(share: int) -> None:
    sizes = batches(share)
    assert sizes[0] == 1
    assert sizes[-1] == share
    for b in sizes:
        assert sum(cuts(share, b)) == share
        assert max(cuts(share, b)) == b
    numbers = {len(cuts(share, b)) for b in range(1, share + 1)}
    assert {len(cuts(share, b)) for b in sizes} == numbers  # nothing is lost by leaving the others out
    assert len(sizes) == len(numbers)


@hypothesis.given(prices=FORMULAS, batch=BATCHES, gpus=GPUS, budget=st.integers(0, 40000))
def test_a_plan_is_within_its_budget_and_holds_the_effective_batch(
    prices: Formula, batch: int, gpus: int, budget: int
) -> None:
    hypothesis.assume(batch >= gpus)
    found = find(budget, prices, effective_batch=batch, gpus=gpus)
    share = -(-batch // gpus)
    for each in found.candidates:
        assert sum(each.cuts) == share
        assert len(each.cuts) == each.setting.accumulation
        assert (each.needs.high_bytes <= budget) == (each.verdict != "does not fit") or each.verdict == "chosen"
    if found.chosen is not None:
        assert prices.needs(found.chosen.setting).high_bytes <= budget
        assert all(not saving.learns_differently for saving in found.savings)
    else:
        least = replace(BASE, micro_batch=1, checkpointing="offload", ema_on_host=True, optimizer="adamw-host")
        assert prices.needs(least).high_bytes > budget


@hypothesis.example(  # what fits with less than the reserve has the optimizer's state on the host
    prices=Formula(fixed=0, image=1, block=0, blocks_=0, averaged=0, start_s=0.0, again_s=0.0, host_s=0.0),
    batch=1,
    budget=1,
)
@hypothesis.given(prices=FORMULAS, batch=BATCHES, budget=st.integers(0, 40000))
def test_the_reserve_is_given_up_only_where_nothing_leaves_it(prices: Formula, batch: int, budget: int) -> None:
    """Whatever fits with less than 97 % of the budget is chosen as if that were all; else as if nothing were kept.

    What costs time on the host is tried only without the reserve.
    """
    kept = find(budget, prices, effective_batch=batch, reserve=RESERVE)
    small, whole = (find(b, prices, effective_batch=batch) for b in (int((1 - RESERVE) * budget), budget))
    assert (kept.chosen is None) == (whole.chosen is None)
    if small.chosen is not None and not is_last_resort(small.chosen.setting):
        assert kept.chosen is not None
        assert prices.needs(kept.chosen.setting).high_bytes <= (1 - RESERVE) * budget
        assert seconds(kept) == seconds(small)
    for each in kept.candidates:
        if each.verdict != "chosen":
            fits = each.needs.high_bytes <= budget
            spare = each.needs.high_bytes <= (1 - RESERVE) * budget
            assert each.verdict == ("fits" if spare else "fits, no reserve" if fits else "does not fit")


@hypothesis.given(prices=FORMULAS, batch=BATCHES, budget=st.integers(0, 40000), more=st.integers(0, 20000))
def test_more_memory_is_never_slower(prices: Formula, batch: int, budget: int, more: int) -> None:
    """By more than the 3 % that count as equal speed."""
    little, much = (find(b, prices, effective_batch=batch) for b in (budget, budget + more))
    if little.chosen is not None:
        assert seconds(much) <= (1 + KNEE) * seconds(little)


def is_last_resort(setting: Setting) -> bool:
    """Whether activations or the optimizer's state are in host memory."""
    return setting.checkpointing == "offload" or setting.optimizer == "adamw-host"


@hypothesis.given(prices=FORMULAS, batch=BATCHES, budget=st.integers(0, 40000))
def test_nothing_that_fits_is_faster(prices: Formula, batch: int, budget: int) -> None:
    """Against trying every micro-batch, every number of blocks, the average here and there."""
    found = find(budget, prices, effective_batch=batch)
    every = [
        replace(BASE, micro_batch=b, checkpointing=count, ema_on_host=host)
        for b in batches(batch)
        for count in range(prices.blocks_ + 1)
        for host in (False, True)
    ]
    fitting = [s for s in every if prices.needs(s).high_bytes <= budget]
    last = replace(BASE, micro_batch=1, checkpointing="offload", ema_on_host=True, optimizer="adamw-host")
    assert (found.chosen is not None) == (bool(fitting) or prices.needs(last).high_bytes <= budget)
    if fitting:
        best = min(prices.seconds(s, cuts(batch, s.micro_batch)).seconds for s in fitting)
        assert seconds(found) <= (1 + KNEE) ** 2 * best + 1e-12


def test_recomputation_comes_last_and_only_as_much_as_is_needed() -> None:
    ample = find(100_000)
    assert ample.chosen is not None
    assert (ample.chosen.setting.micro_batch, ample.chosen.setting.checkpointing) == (16, "none")
    # 16 images need 6000 bytes; with the average on the host 5800, with two of the four blocks again 4400.
    starts = Formula(
        start_s=1.0, host_s=1.0, again_s=0.01
    )  # micro-batches are dear, so that memory is worth recomputation
    tight = find(4400, starts)
    assert tight.chosen is not None
    assert (tight.chosen.setting.micro_batch, tight.chosen.setting.checkpointing) == (16, 2)
    assert find(4399, starts).chosen != tight.chosen


def test_the_knee_is_the_smallest_micro_batch_of_equal_speed() -> None:
    # 16 images: 0.16 s and 0.02 s a micro-batch; 16 x 1 takes 0.18, 8 x 2 takes 0.2.
    assert find(100_000).knee == 16
    assert find(100_000, Formula(start_s=0.002)).knee == 6  # 3 micro-batches: 0.166, one: 0.162


def test_memory_is_not_spent_for_a_gain_within_the_knee() -> None:
    """With ample memory 6 + 6 + 4 images are 2.5 % slower than 16 at once, and need 3000 bytes less."""
    found = find(100_000, Formula(start_s=0.002))
    assert found.chosen is not None
    assert found.chosen.setting.micro_batch == 6
    faster = [each for each in found.candidates if "faster, and needs more" in each.reason]
    assert {each.setting.micro_batch for each in faster} == {8, 16}
    asked = find(100_000, Formula(start_s=0.002), micro_batch=16)
    assert asked.chosen is not None
    assert asked.chosen.setting.micro_batch == 16  # whoever wants the speed names the micro-batch


@hypothesis.given(prices=FORMULAS, batch=BATCHES, budget=st.integers(0, 40000))
def test_no_smaller_micro_batch_is_as_fast(prices: Formula, batch: int, budget: int) -> None:
    """Against trying every smaller micro-batch of the chosen base; partial recomputation is chosen for its own."""
    chosen = find(budget, prices, effective_batch=batch).chosen
    if chosen is None or isinstance(chosen.setting.checkpointing, int):
        return

    def window_s(micro_batch: int) -> float:
        return prices.seconds(replace(chosen.setting, micro_batch=micro_batch), cuts(batch, micro_batch)).seconds

    sizes = [b for b in batches(batch) if b > 1] or [1]
    fitting = [b for b in sizes if prices.needs(replace(chosen.setting, micro_batch=b)).high_bytes <= budget]
    if fitting:
        fastest_s = min(map(window_s, fitting))
        smaller = [b for b in fitting if b < chosen.setting.micro_batch]
        assert all(window_s(b) > (1 + KNEE) * fastest_s * (1 - 1e-12) for b in smaller)


def test_offload_comes_where_nothing_else_fits() -> None:
    """One image with all blocks again and the average on the host takes 1100 bytes, of which the optimizer's state frees 100,
    and 75 are freed where what is kept for backward waits on the host too.
    """
    for budget, checkpointing, optimizer in (
        (1100, "all", "adamw-fused"),
        (1099, "all", "adamw-host"),
        (1000, "all", "adamw-host"),
        (999, "offload", "adamw-host"),
        (925, "offload", "adamw-host"),
    ):
        chosen = find(budget).chosen
        assert chosen is not None
        assert (chosen.setting.checkpointing, chosen.setting.optimizer) == (checkpointing, optimizer)
        assert chosen.setting.ema_on_host
    assert find(924).chosen is None
    little = find(1099, Formula(state=60)).chosen  # 50 bytes are not enough, 75 are
    assert little is not None
    assert (little.setting.checkpointing, little.setting.optimizer) == ("all", "adamw-host")
    less = find(1030, Formula(state=60)).chosen
    assert less is not None
    assert (less.setting.checkpointing, less.setting.optimizer) == ("offload", "adamw-fused")
    asked = find(100_000, checkpointing="offload").chosen
    assert asked is not None
    assert asked.setting.checkpointing == "offload"


def test_a_plan_says_what_each_knob_would_free() -> None:
    found = find(100_000)
    assert found.chosen is not None
    images = found.chosen.setting.micro_batch
    freed = {saving.knob: saving.saved_bytes for saving in found.savings}
    # Offload would take a trace.
    assert freed == {"--checkpointing all": 4 * 50 * images, "--ema-on-host": 200, "--optimizer adamw-host": 100}
    assert list(freed) == [
        "--optimizer adamw-host",
        "--ema-on-host",
        "--checkpointing all",
    ]  # in the order of their time
    slower = [saving.slower for saving in found.savings]
    assert slower == pytest.approx([each / seconds(found) for each in (0.02, 0.03, 0.001 * 4 * 16)])


def test_nothing_fits_names_what_each_knob_frees() -> None:
    found = find(919)
    assert found.chosen is None
    assert found.prediction is None
    freed = {saving.knob: saving.saved_bytes for saving in found.savings}
    assert freed["--groups 1"] == 15  # of the 25 bytes that the one image takes with all blocks recomputed and offload
    learning = [saving.learns_differently for saving in found.savings]
    assert learning == sorted(learning)  # what changes what is learned comes last
    assert all(learning)  # the smallest setting has everything else


def test_knobs_that_change_learning_are_turned_only_when_allowed() -> None:
    assert find(914).chosen is None
    allowed = find(914, allow=("groups",))
    assert allowed.chosen is not None
    assert groups_of(allowed.chosen.setting) == 1  # 4 groups would need 915
    assert groups_of(find(916, allow=("groups",)).chosen.setting) == 4  # pyright: ignore[reportOptionalMemberAccess]
    assert find(100_000, allow=BASE.family.learns).chosen == find(100_000).chosen


def test_fixed_knobs_stay() -> None:
    found = find(100_000, micro_batch=3, checkpointing=1)
    assert found.chosen is not None
    assert (found.chosen.setting.micro_batch, found.chosen.setting.checkpointing) == (3, 1)
    assert found.chosen.cuts == (3, 3, 3, 3, 3, 1)


def test_frontier_is_what_nothing_faster_needs_less_than() -> None:
    found = find(100_000)
    front = frontier(found.candidates)
    assert front[0].setting == (found.chosen or front[1]).setting
    for faster, slower in pairwise(front):
        assert faster.needs.high_bytes > slower.needs.high_bytes
        assert (faster.seconds or 0) <= (slower.seconds or 0)
    for each in found.candidates:
        if each.verdict != "does not fit":
            assert any(f.seconds <= each.seconds and f.needs.high_bytes <= each.needs.high_bytes for f in front)  # pyright: ignore


@pytest.mark.parametrize(
    ("knob", "flags"),
    [
        ("groups", ["--groups 4", "--groups 1"]),
        ("queries", ["--num-queries 150"]),
        ("resolution", ["--resolution 288", "--resolution 192"]),
        ("multi-scale", ["--no-multi-scale"]),
        ("encoder", ["--freeze-encoder"]),
        ("optimizer", ["--optimizer adamw-8bit"]),
    ],
)
def test_turned_knobs(knob: str, flags: list[str]) -> None:
    assert [flag for flag, _ in turned(BASE, knob)] == flags
    for _, setting in turned(BASE, knob):
        assert setting != BASE


def test_an_unknown_knob_is_refused() -> None:
    from trainfit.planning.make import make_plan

    with pytest.raises(TrainfitError, match="--allow speed: no such knob"):
        make_plan(BASE, card(2**34), allow=("speed",))
