"""What the mask head holds: recomputed in training, and one layer's masks in evaluation."""

import weakref
from typing import Any, cast

import numpy as np
import pytest
import torch
from rfdetr.models.heads.segmentation import SegmentationHead
from rfdetr.models.lwdetr import LWDETR
from torch.utils._python_dispatch import TorchDispatchMode

from test_segmentation import SIDE, SMALL, build, decode_rle, drawn, gradient, move_heads
from trainfit.models.rfdetr import lean_selection
from trainfit.models.rfdetr.data import to_batch
from trainfit.models.rfdetr.family import RfDetrKnobs
from trainfit.models.rfdetr.lean_head import LeanHead
from trainfit.models.rfdetr.lean_selection import LeanTransformer, selection_of
from trainfit.models.rfdetr.workload import RfDetr
from trainfit.step.checkpointing import checkpoint_first
from trainfit.step.names import Precision
from trainfit.step.window import accumulate

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
MASK_SIDE = SIDE // 4


def head_of(model: torch.nn.Module) -> SegmentationHead:
    head = cast(LWDETR, model).segmentation_head
    assert head is not None
    return head


def window_gradient(workload: RfDetr, model: torch.nn.Module, precision: Precision = "fp32") -> torch.Tensor:
    """Of two images, with the random points of one seed."""
    model.zero_grad()
    torch.manual_seed(5)
    accumulate(model, workload.objective, [[drawn(3, 1)], [drawn(2, 2)]], device=CPU, precision=precision)
    return gradient(model)


@pytest.mark.parametrize(("stage", "precision"), [("single", "fp32"), ("single", "bf16"), ("masks", "fp32")])
def test_recompute_covers_what_trains_and_keeps_the_gradient(stage: Any, precision: Precision) -> None:
    workload, model = build(stage)
    blocks = workload.blocks(move_heads(model))
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    head = head_of(model)
    assert blocks[: len(head.blocks) + 1] == [*head.blocks, head.query_features_block]
    assert all(any(p.requires_grad for p in block.parameters()) for block in blocks)
    if stage == "single":
        assert {id(p) for p in model.get_submodule("backbone.0.projector").parameters()} <= inside
    else:
        assert len(blocks) == len(head.blocks) + 1
    before = window_gradient(workload, model, precision)
    assert before.abs().sum() > 0
    for count in (len(head.blocks) + 1, "all"):
        checkpoint_first(blocks, cast(Any, count))
        assert torch.equal(window_gradient(workload, model, precision), before)


def test_a_frozen_encoder_is_not_recomputed() -> None:
    knobs = RfDetrKnobs(resolution=SIDE, groups=SMALL.groups, num_queries=SMALL.num_queries, freeze_encoder=True)
    workload = RfDetr("rfdetr-seg-nano", ("a",), knobs)
    model = workload.build()
    encoder = {id(module) for module in model.get_submodule("backbone.0.encoder").modules()}
    assert not any(id(block) in encoder for block in workload.blocks(model))


@pytest.mark.parametrize("at_once", [1, 2, 99])
def test_the_choice_of_queries_is_upstreams(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against upstream's own function on all groups, in float64: the chosen, and the gradients of tokens and weights."""
    _, model = build("single")
    own: Any = cast(LWDETR, model.double()).transformer
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randn(2, 30, own.d_model, dtype=torch.float64, generator=generator)
    monkeypatch.setattr(lean_selection, "PIECE_BYTES", 4 * tokens[0].numel() * at_once)
    proposals = torch.rand(2, 30, 4, dtype=torch.float64, generator=generator)
    calls: list[int] = []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments[-1])
        return upstream(*arguments)

    upstream = lean_selection.choose
    monkeypatch.setattr(lean_selection, "choose", counted)

    def run(function: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        leaf = tokens.clone().requires_grad_()
        chosen = function(own, leaf, proposals, own.group_detr)
        model.zero_grad()
        sum((each.square().sum() for each in chosen), torch.zeros((), dtype=torch.float64)).backward()
        used = [p.grad for p in own.parameters() if p.grad is not None]
        return list(chosen), [cast(torch.Tensor, leaf.grad), *used]

    lean = LeanTransformer._two_stage_group_selection  # pyright: ignore[reportPrivateUsage]
    theirs = run(upstream)
    for recomputed in (False, True):
        checkpoint_first([selection_of(model)], "all" if recomputed else "none")
        calls.clear()
        ours = run(lean)
        assert max(calls) == min(at_once, own.group_detr)
        assert sum(calls) == own.group_detr * (1 + recomputed)
        for a, b in zip([*ours[0], *ours[1]], [*theirs[0], *theirs[1]], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


class Casts(TorchDispatchMode):
    """Storages of half-precision copies."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.dtype == torch.bfloat16:
            self.made.append(weakref.ref(result.untyped_storage()))
        return result


def test_recomputed_blocks_leave_no_half_precision_parameters() -> None:
    """Autocast would keep them until the forward ends; without recompute, backward needs them anyway."""
    for wanted in ("none", "all"):
        model = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(4)))
        checkpoint_first(list(model), wanted)
        x = torch.randn(8, 32, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16), Casts() as casts:
            loss = model(x).sum()
            alive = sum(each() is not None for each in casts.made)
        assert len(casts.made) >= 8  # weights and biases
        assert (alive == 0) == (wanted == "all")
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())


class MaskTensors(TorchDispatchMode):
    """Counts the results that are as large as all queries' mask logits of an image, or larger."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers, self.count = numbers, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape[-2:] == (MASK_SIDE, MASK_SIDE):
            self.count += result.numel() >= self.numbers and result.shape[-3] == SMALL.num_queries
        return result


def test_evaluation_makes_one_layers_masks_and_upstreams() -> None:
    workload, model = build()
    move_heads(model).eval()
    samples = [drawn(3, 1), drawn(2, 2)]
    batch = to_batch(samples, (SIDE, SIDE), next(model.parameters()))
    assert SMALL.num_queries is not None
    seen = MaskTensors(SMALL.num_queries * MASK_SIDE**2)
    with seen:
        ours = workload.detect(model, samples)
    assert seen.count == 0
    head_of(model).__class__ = SegmentationHead
    with seen, torch.no_grad():
        outputs = model(batch)
    assert seen.count >= workload.config.dec_layers + 1
    results = workload.postprocess(outputs, torch.tensor([[SIDE, SIDE]] * 2))
    for found, theirs in zip(ours, results, strict=True):
        known = workload.is_class[theirs["labels"]]
        assert found.masks is not None
        masks = np.stack([decode_rle(rle, SIDE, SIDE) for rle in found.masks])
        np.testing.assert_array_equal(masks, theirs["masks"][known, 0].numpy())
        assert masks.any()
        assert not masks.all()


def test_upstreams_head_is_kept_where_the_step_is_not_lean() -> None:
    workload, model = build()
    assert type(head_of(model)) is LeanHead
    setting = type(workload.setting)(model="rfdetr-seg-nano", classes=1, resolution=SIDE, lean="off")
    assert type(head_of(RfDetr("rfdetr-seg-nano", ("a",), setting).build())) is SegmentationHead
