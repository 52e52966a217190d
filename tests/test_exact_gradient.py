"""The gradient of any cut of a window equals the whole window's: RF-DETR and toy models, one rank and two."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfit.models.rfdetr.family import RfDetrKnobs
from trainfit.models.rfdetr.workload import RfDetr
from trainfit.step.exchange import sum_gradients
from trainfit.step.terms import CountKind, LossTerm, Objective
from trainfit.step.window import accumulate, cut
from trainfit.tasks.detection.samples import Sample

CPU = torch.device("cpu")
SIDE = 64


def make_sample(objects: int, seed: int, *, masks: bool = False) -> Sample:
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(objects, 2, generator=g) * SIDE * 0.7
    boxes = torch.cat([corner, corner + 2 + torch.rand(objects, 2, generator=g) * SIDE * 0.25], 1)
    drawn = torch.zeros(objects, SIDE, SIDE, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(drawn, boxes.round().int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    return Sample(
        image=torch.randint(0, 256, (3, SIDE, SIDE), generator=g, dtype=torch.uint8),
        boxes=boxes,
        classes=torch.randint(0, 3, (objects,), generator=g),
        masks=drawn if masks else None,
        image_id=seed,
        original_size=(SIDE, SIDE),
    )


def nano(groups: int = 3) -> tuple[RfDetr, torch.nn.Module]:
    """RF-DETR Nano in float64 with heads moved off their constant start, so that every parameter gets a gradient."""
    torch.manual_seed(0)
    workload = RfDetr("rfdetr-nano", ("a", "b", "c"), RfDetrKnobs(resolution=SIDE, groups=groups, num_queries=30))
    model = workload.build().double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "class_embed" in name or "bbox_embed" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return workload, model


def gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def window_gradient(workload: RfDetr, model: torch.nn.Module, parts: Sequence[Sequence[Sample]]) -> torch.Tensor:
    model.zero_grad(set_to_none=True)
    accumulate(model, workload.objective, parts, device=CPU)
    return gradient(model)


def upstream_gradient(workload: RfDetr, model: torch.nn.Module, parts: Sequence[Sequence[Sample]]) -> torch.Tensor:
    """What upstream's trainer adds up: the mean over micro-batches of each one's own normalised loss."""
    from trainfit.models.rfdetr.data import to_batch, to_targets

    model.zero_grad(set_to_none=True)
    like = next(model.parameters())
    for part in parts:
        targets = to_targets(part, like)
        losses = workload.criterion(model(to_batch(part, (SIDE, SIDE), like), targets), targets)
        weights = workload.criterion.weight_dict
        (torch.stack([losses[k] * w for k, w in weights.items() if k in losses]).sum() / len(parts)).backward()
    return gradient(model)


@pytest.mark.parametrize("boxes", [(0, 3, 20, 8), (1, 3, 20, 8)])
def test_any_cut_of_rfdetr_gives_the_whole_gradient(boxes: tuple[int, ...], capsys: pytest.CaptureFixture[str]) -> None:
    workload, model = nano()
    window = [make_sample(n, i) for i, n in enumerate(boxes)]
    whole = window_gradient(workload, model, [window])
    # The oracle is not us: upstream's criterion on the whole window, with its own count of boxes.
    big_batch = upstream_gradient(workload, model, [window])
    assert ((whole - big_batch).norm() / big_batch.norm()).item() <= 1e-12
    for parts in (cut(window, 1), cut(window, 2), cut(window, 3), [window[:1], window[1:]]):
        error = (window_gradient(workload, model, parts) - big_batch).norm() / big_batch.norm()
        assert error.item() <= 1e-12
    ones = cut(window, 1)
    theirs = ((upstream_gradient(workload, model, ones) - big_batch).norm() / big_batch.norm()).item()
    ours = ((window_gradient(workload, model, ones) - big_batch).norm() / big_batch.norm()).item()
    with capsys.disabled():
        print(f"\n4 micro-batches of 1, boxes {boxes}: gradient error ours {ours:.1e}, upstream's {theirs:.0%}")
    assert theirs > 0.5


def rank_gradient(rank: int, world_size: int, rendezvous: str, result: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    torch.set_num_threads(1)
    workload, model = nano()
    window = [make_sample(n, i) for i, n in enumerate((0, 3, 20, 8, 2))]
    accumulate(model, workload.objective, cut(window[rank::world_size], 2), device=CPU)
    sum_gradients(model.parameters())
    torch.save(gradient(model), f"{result}-{rank}")
    dist.destroy_process_group()


def test_two_ranks_give_the_gradient_of_one(tmp_path: Path) -> None:
    mp.start_processes(
        rank_gradient, (2, str(tmp_path / "rendezvous"), str(tmp_path / "gradient")), nprocs=2, start_method="spawn"
    )
    workload, model = nano()
    whole = upstream_gradient(workload, model, [[make_sample(n, i) for i, n in enumerate((0, 3, 20, 8, 2))]])
    for rank in range(2):
        own = torch.load(tmp_path / f"gradient-{rank}", weights_only=True)
        assert ((own - whole).norm() / whole.norm()).item() <= 1e-12


class Toy(torch.nn.Module):
    """A pixel-wise model whose `sampled` count follows from random numbers drawn in the forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = torch.nn.Conv2d(3, 4, 3, padding=1, dtype=torch.float64)
        self.head = torch.nn.Conv2d(4, 1, 1, dtype=torch.float64)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(images)))


def toy_objective(kind: CountKind) -> Objective:
    def terms(model: torch.nn.Module, samples: Sequence[Sample], _canvas: tuple[int, int]) -> Mapping[str, LossTerm]:
        heat = model(torch.stack([s.image for s in samples]).double() / 255).square()
        per_image = heat.mean((1, 2, 3))
        weights = torch.tensor([float(len(s.classes)) for s in samples], dtype=torch.float64)
        if kind == "images":
            return {"loss": LossTerm(total=per_image.sum(), kind=kind)}
        if kind == "mean":
            return {"loss": LossTerm(total=per_image.mean(), kind=kind)}
        if kind == "targets":
            return {"loss": LossTerm(total=(per_image * weights).sum(), kind=kind)}
        drawn = torch.rand(len(samples), dtype=torch.float64) < 0.6
        chosen = (drawn * (weights + 1)).detach()
        return {"loss": LossTerm(total=(per_image * chosen).sum(), kind=kind, count=chosen.sum())}

    def counts(samples: Sequence[Sample]) -> Mapping[str, float]:
        known = {
            "mean": float(len(samples)),
            "images": float(len(samples)),
            "targets": float(sum(len(s.classes) for s in samples)),
        }
        return {"loss": known[kind]} if kind in known else {}

    return Objective(terms=terms, counts=counts, samples_counts=("loss",) if kind == "sampled" else ())


@settings(max_examples=40, deadline=None)
@given(
    boxes=st.lists(st.integers(0, 9), min_size=1, max_size=7),
    micro_batch=st.integers(1, 7),
    kind=st.sampled_from(["images", "targets", "sampled", "mean"]),
)
def test_any_cut_of_any_kind_of_term(boxes: list[int], micro_batch: int, kind: CountKind) -> None:
    window = [make_sample(n, i) for i, n in enumerate(boxes)]
    gradients: list[torch.Tensor] = []
    for parts in ([window], cut(window, micro_batch)):
        model = Toy()
        torch.manual_seed(7)
        accumulate(model, toy_objective(kind), parts, device=CPU)
        gradients.append(gradient(model))
    whole, split = gradients
    assert (split - whole).norm().item() <= 1e-12 * max(1e-9, whole.norm().item()) + 1e-18


def test_sampled_counts_leave_buffers_and_random_numbers_as_they_were() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3, dtype=torch.float64), Toy())
    window = [make_sample(n, i) for i, n in enumerate((1, 2, 3))]
    accumulate(model, toy_objective("sampled"), cut(window, 1), device=CPU)
    assert int(model.get_buffer("0.num_batches_tracked")) == 3  # once a micro-batch, not twice
