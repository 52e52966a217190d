"""The gradient of a contrastive window is that of one big batch: every loss, any cut, 2 and 3 ranks, beside upstream's scheme."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from clip_cases import CPU, KINDS, Case, error, gradients, make_case, random_pairs, upstream_window
from trainfit.models.clip.architecture import freeze_parts, unlock
from trainfit.models.clip.data import Pair
from trainfit.models.clip.family import Freeze
from trainfit.step.contrastive import accumulate_contrastive
from trainfit.step.exchange import sum_gradients
from trainfit.step.window import cut


def known_gradient(case: Case, window: list[Pair], micro_batch: int) -> tuple[dict[str, torch.Tensor], float]:
    case.model.zero_grad(set_to_none=True)
    loss = case.big_batch(window, micro_batch)
    loss.backward()
    return gradients(case.model), loss.item()


def our_gradient(case: Case, window: list[Pair], micro_batch: int) -> tuple[dict[str, torch.Tensor], float]:
    case.model.zero_grad(set_to_none=True)
    losses = accumulate_contrastive(case.model, case.objective, cut(window, micro_batch), device=CPU)
    return gradients(case.model), sum(value.item() for value in losses.values())


@pytest.mark.parametrize("kind", KINDS)
def test_any_cut_is_one_big_batch(tmp_path: Path, kind: str) -> None:
    case, window = make_case(tmp_path, kind), random_pairs(10, texts=7 if "same" in kind else None)
    known, loss = known_gradient(case, window, 10)
    for micro_batch in (1, 3, 10):
        found, value = our_gradient(case, window, micro_batch)
        assert error(found, known) <= 1e-12
        assert value == pytest.approx(loss, rel=1e-12)
        for name in ("logit_scale", "logit_bias"):
            if name in known:
                torch.testing.assert_close(found[name], known[name], rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["clip", "distillation", "coca"])
def test_dropped_patches_are_dropped_again(tmp_path: Path, kind: str) -> None:
    case, window = make_case(tmp_path, kind, dropout=True), random_pairs(7)
    torch.manual_seed(5)
    known, _ = known_gradient(case, window, 3)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    found, _ = our_gradient(case, window, 3)
    assert error(found, known) <= 1e-12
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("ratio", [1.0, 2.0, 0.5])
def test_towers_with_micro_batches_of_their_own(tmp_path: Path, ratio: float) -> None:
    case, window = make_case(tmp_path, "clip", dropout=True, text_ratio=ratio), random_pairs(9)
    for micro_batch in (1, 2, 9):
        torch.manual_seed(5)
        known, _ = known_gradient(case, window, micro_batch)
        torch.manual_seed(5)
        found, _ = our_gradient(case, window, micro_batch)
        assert error(found, known) <= 1e-12


@pytest.mark.parametrize("frozen", ["image", "text"])
def test_a_tower_frozen_in_part_has_the_gradient_of_one_big_batch(tmp_path: Path, frozen: Freeze) -> None:
    case, window = make_case(tmp_path, "clip", dropout=True), random_pairs(8)
    unlock(case.model, frozen, 2)
    torch.manual_seed(5)
    known, _ = known_gradient(case, window, 3)
    torch.manual_seed(5)
    found, _ = our_gradient(case, window, 3)
    assert error(found, known) <= 1e-12
    assert len(known) < len(list(case.model.parameters()))


@pytest.mark.parametrize(("frozen", "cost"), [("none", (4 * 8 - 2, 4 * 8 - 2)), ("image", (8, 30)), ("text", (30, 8))])
def test_a_locked_tower_runs_once_and_the_last_micro_batch_keeps_its_graph(
    tmp_path: Path, frozen: Freeze, cost: tuple[int, int]
) -> None:
    """Forwards of each tower by images, where a backward counts two: 4 - 1/A of the window, and 1 of a locked tower's."""
    case, window = make_case(tmp_path, "clip", frozen=frozen), random_pairs(8)
    freeze_parts(case.model, frozen)
    seen = {"image": 0, "text": 0}

    def count(tower: str, factor: int, rows: int) -> None:
        seen[tower] += factor * rows

    def watch(tower: str, block: torch.nn.Module) -> None:
        def forward(_module: Any, inputs: Any, _output: Any) -> None:
            count(tower, 1, inputs[0].shape[0])

        def backward(_module: Any, _into: Any, out: Any) -> None:
            count(tower, 2, out[0].shape[0])

        block.register_forward_hook(forward)
        block.register_full_backward_hook(backward)

    watch("image", case.model.visual.transformer.resblocks[1])
    watch("text", case.model.transformer.resblocks[1])
    known, _ = known_gradient(case, window, 8)
    seen.update(image=0, text=0)
    found, _ = our_gradient(case, window, 2)
    assert error(found, known) <= 1e-12
    assert (seen["image"], seen["text"]) == cost


SHARES = {3: (4, 0, 5), 2: (2, 7)}
"""Pairs of each rank; one may have none."""


def of_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    own = Path(folder) / f"rank-{rank}"
    own.mkdir()
    for world_size, shares in SHARES.items():
        if rank >= world_size:
            break
        store = f"file://{folder}/rendezvous-{world_size}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
        for kind in KINDS:
            case, window = make_case(own, kind), random_pairs(9, texts=7 if "same" in kind else None)
            first = sum(shares[:rank])
            mine = window[first : first + shares[rank]]
            losses = accumulate_contrastive(case.model, case.objective, cut(mine, 2), device=CPU)
            sum_gradients(case.model.parameters())
            value = sum(loss.item() for loss in losses.values())
            torch.save((gradients(case.model), value), f"{folder}/{world_size}-{rank}-{kind}")
        dist.destroy_process_group()


def test_ranks_together_are_one_big_batch(tmp_path: Path) -> None:
    # Forked, because each new process would import open_clip for seconds; nothing here runs a thread that would be missed.
    mp.start_processes(of_rank, (str(tmp_path),), nprocs=3, start_method="fork")
    for kind in KINDS:
        case, window = make_case(tmp_path, kind), random_pairs(9, texts=7 if "same" in kind else None)
        known, loss = known_gradient(case, window, 9)
        for world_size in SHARES:
            parts = [torch.load(tmp_path / f"{world_size}-{rank}-{kind}") for rank in range(world_size)]
            assert all(error(found, known) <= 1e-12 for found, _ in parts)
            assert sum(value for _, value in parts) == pytest.approx(loss, rel=1e-12)


RATE = 2.0**-8
"""Low enough that upstream's clamp of the scale changes nothing."""


def upstream_gradient(case: Case, window: list[Pair], micro_batch: int) -> dict[str, torch.Tensor]:
    """What upstream's loop steps by: with SGD the parameters move by minus the gradient times the rate."""
    before = {name: parameter.detach().clone() for name, parameter in case.model.named_parameters()}
    upstream_window(
        case.model, window, micro_batch=micro_batch, optimizer=torch.optim.SGD(case.model.parameters(), lr=RATE)
    )
    moved = {name: (before[name] - parameter.detach()) / RATE for name, parameter in case.model.named_parameters()}
    with torch.no_grad():
        for name, parameter in case.model.named_parameters():
            parameter.copy_(before[name])
    return moved


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_upstreams_loop_multiplies_the_gradient_of_scale_and_bias(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """open_clip 3.3's `train_one_epoch`: exact for the encoders, A times too much for what enters each of the A losses."""
    case, window = make_case(tmp_path, kind), random_pairs(8)
    known, _ = known_gradient(case, window, 8)
    theirs = upstream_gradient(case, window, 2)
    learned = [name for name in ("logit_scale", "logit_bias") if name in known]
    factors = {name: (theirs[name] / known[name]).item() for name in learned}
    with capsys.disabled():
        print(f"\n{kind}: upstream's gradient at --accum-freq 4 over the big batch's: {factors}")
    assert all(factor == pytest.approx(4.0, rel=1e-9) for factor in factors.values())
    encoders = [name for name in known if name not in learned]
    assert error({name: theirs[name] for name in encoders}, {name: known[name] for name in encoders}) <= 1e-9
    ours, _ = our_gradient(case, window, 2)
    assert all(torch.allclose(ours[name], known[name], rtol=1e-12, atol=0) for name in learned)


def test_upstreams_loop_draws_other_patches_in_its_second_pass(tmp_path: Path) -> None:
    case, window = make_case(tmp_path, "clip", dropout=True), random_pairs(8)
    torch.manual_seed(5)
    known, _ = known_gradient(case, window, 2)
    torch.manual_seed(5)
    theirs = upstream_gradient(case, window, 2)
    torch.manual_seed(5)
    ours, _ = our_gradient(case, window, 2)
    theirs = {name: theirs[name] for name in known}
    assert error(ours, known) <= 1e-12
    assert error(theirs, known) > 0.05


def test_the_scale_is_clamped_after_the_step_as_upstream_does(tmp_path: Path) -> None:
    from trainfit.step.optimizer import make_optimizer
    from trainfit.step.training_step import TrainingStep

    moved: list[float] = []
    for of_upstream in (False, True):
        case, window = make_case(tmp_path, "clip"), random_pairs(8)
        with torch.no_grad():
            case.model.logit_scale.fill_(math.log(100) - 1e-4)
            for parameter in case.model.visual.parameters():
                parameter.mul_(1.3)
        if of_upstream:
            upstream_window(
                case.model, window, micro_batch=8, optimizer=torch.optim.AdamW(case.model.parameters(), lr=0.1)
            )
        else:
            optimizer = make_optimizer("adamw-foreach", [{"params": list(case.model.parameters()), "lr": 0.1}])
            step = TrainingStep(
                model=case.model, objective=case.objective, optimizer=optimizer, device=CPU, clip_norm=0.0
            )
            for group in optimizer.param_groups:
                group["weight_decay"] = 0.01
            step.run(window, micro_batch=2, step=0)
        moved.append(case.model.logit_scale.item())
        assert 0 <= moved[-1] <= math.log(100)
    assert moved[0] == pytest.approx(moved[1], rel=1e-9)
