"""`accumulate` and `survive_oom` in plain loops, against plain PyTorch on the whole window in float64."""

import difflib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import trainfit
from trainfit.training.parts import part_of, parts_of

ROOT = Path(__file__).parents[1]
IGNORED = 255


@pytest.fixture(autouse=True)
def doubles() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_model(*more: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *more, nn.ReLU(), nn.Conv2d(4, 3, 1))


def pictures(sizes: Sequence[int]) -> list[Any]:
    """Batches of these sizes, of which every image ignores another share of its pixels."""
    g = torch.Generator().manual_seed(1)
    batches: list[Any] = []
    for size in sizes:
        labels = torch.randint(3, (size, 5, 5), generator=g)
        for row in range(size):
            labels[row, : (row + len(batches)) % 4] = IGNORED
        batches.append((torch.randn(size, 3, 5, 5, generator=g), labels))
    return batches


def valid(batch: Any) -> torch.Tensor:
    return (batch[1] != IGNORED).sum()


def loss_of(model: nn.Module, batch: Any, reduction: str = "mean") -> torch.Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1], ignore_index=IGNORED, reduction=reduction)


def joined(batches: Sequence[Any]) -> Any:
    return torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def close(found: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> None:
    assert len(found) == len(truth)
    for one, other in zip(found, truth, strict=True):
        assert float((one - other).norm()) <= 1e-12 * max(float(other.norm()), 1e-3)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=7), st.integers(1, 4), st.sampled_from(["mean", "sum"]))
def test_every_window_has_the_big_batchs_gradient(sizes: list[int], accumulation: int, reduction: Any) -> None:
    """Unequal micro-batches, short last windows, means and sums."""
    model, batches = make_model(), pictures(sizes)
    windows = trainfit.accumulate(batches, accumulation, model=model, counts=valid, reduction=reduction)
    found: list[list[torch.Tensor]] = []
    for batch in windows:
        windows.backward(loss_of(model, batch, reduction))
        if windows.complete:
            found.append(gradients(model))
            model.zero_grad()
    assert len(found) == windows.index == -(-len(sizes) // accumulation)
    for number, window in enumerate(found):
        loss_of(model, joined(batches[number * accumulation : (number + 1) * accumulation])).backward()
        close(window, gradients(model))
        model.zero_grad()


def test_terms_with_counts_of_their_own() -> None:
    model, batches = make_model(), pictures([3, 2, 4])

    def terms(batch: Any, reduction: str) -> dict[str, torch.Tensor]:
        return {
            "class": loss_of(model, batch, reduction),
            "size": (model(batch[0]) ** 2).sum() if reduction == "sum" else size(batch),
        }

    def size(batch: Any) -> torch.Tensor:
        return (model(batch[0]) ** 2).sum() / len(batch[0])

    def counts(batch: Any) -> Mapping[str, Any]:
        return {"class": valid(batch), "size": len(batch[0])}

    windows = trainfit.accumulate(batches, 3, model=model, counts=counts, reduction="sum")
    for batch in windows:
        windows.backward(terms(batch, "sum"))
    found = gradients(model)
    model.zero_grad()
    torch.stack(list(terms(joined(batches), "mean").values())).sum().backward()
    close(found, gradients(model))


def test_a_batch_of_the_loader_is_cut() -> None:
    model, (batch,) = make_model(), pictures([7])
    windows = trainfit.accumulate([batch], micro_batch=3, model=model, counts=valid)
    assert isinstance(windows, trainfit.Accumulation)
    seen: list[int] = []
    for part in windows:
        seen.append(len(part[0]))
        windows.backward(loss_of(model, part))
    assert seen == [3, 3, 1]
    found = gradients(model)
    model.zero_grad()
    loss_of(model, batch).backward()
    close(found, gradients(model))


def trained(
    accumulation: int, sizes: Sequence[int], *, scaler: torch.amp.GradScaler | None = None
) -> list[torch.Tensor]:
    model, batches = make_model(), pictures(sizes)
    if accumulation == 1:
        batches = [joined(batches[:2]), joined(batches[2:])]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    averages: list[float] = []
    windows = trainfit.accumulate(batches, accumulation, model=model, counts=valid, scaler=scaler)
    for batch in windows:
        windows.backward(loss_of(model, batch))
        windows.update(optimizer, clip_norm=0.05, scheduler=scheduler, after_step=lambda: averages.append(1.0))
    assert scheduler.get_last_lr() == [0.125]
    assert len(averages) == 2
    return [p.detach() for p in model.parameters()]


def test_update_scales_clips_steps_and_clears_once_a_window() -> None:
    """The parameters of plain PyTorch: clip, step, schedule, on two big batches."""
    model, batches = make_model(), pictures([2, 3, 4])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for lr, batch in ((0.5, joined(batches[:2])), (0.25, batches[2])):
        optimizer.param_groups[0]["lr"] = lr
        loss_of(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    truth = [p.detach() for p in model.parameters()]
    close(trained(2, [2, 3, 4]), truth)
    close(trained(1, [2, 3, 4]), truth)
    torch.set_default_dtype(torch.float32)
    single = trained(2, [2, 3, 4], scaler=torch.amp.GradScaler("cpu", init_scale=2.0**12))
    for one, other in zip(single, trained(2, [2, 3, 4]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_an_overflow_skips_step_and_schedule() -> None:
    torch.set_default_dtype(torch.float32)
    model, batches = make_model(), pictures([2, 2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    before = [p.detach().clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    windows = trainfit.accumulate(batches, 2, model=model, counts=valid, scaler=scaler)
    for batch in windows:
        windows.backward(loss_of(model, batch) * 100)
        assert not windows.update(optimizer, clip_norm=1.0, scheduler=scheduler)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert scaler.get_scale() == 2.0**126
    assert scheduler.get_last_lr() == [0.5]


def run_windows(*, backward: bool = True, clear: bool = True, reduction: Any = "mean", names: Any = None) -> None:
    model, batches = make_model(), pictures([1, 1, 1])
    batches[1][1][:] = IGNORED if reduction == "none left" else 0
    windows = trainfit.accumulate(batches, 1, model=model, counts=valid)
    for batch in windows:
        loss = loss_of(model, batch)
        if backward:
            windows.backward({names: loss} if names else loss)
        if clear:
            model.zero_grad()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: trainfit.accumulate([], model=nn.Linear(1, 1)), "give either accumulation"),
        (lambda: trainfit.accumulate([], 2, micro_batch=2, model=nn.Linear(1, 1)), "give either accumulation"),
        (lambda: trainfit.accumulate([], 0, model=nn.Linear(1, 1)), "must be at least 1, not 0"),
        (lambda: run_windows(backward=False), "a micro-batch had no backward"),
        (lambda: run_windows(clear=False), "gradients of the last window are still there"),
        (lambda: run_windows(names="boxes"), "losses ['boxes'] and counts ['loss'] must have the same names"),
        (lambda: run_windows(reduction="none left"), "give sums, with reduction='sum'"),
    ],
)
def test_what_a_user_can_repair_is_one_line(call: Any, message: str) -> None:
    with pytest.raises(trainfit.TrainfitError) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_page_shows_the_diff_and_it_has_at_most_five_changed_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import accumulate_loop  # pyright: ignore[reportMissingImports]

    module: Any = accumulate_loop
    naive, exact = (inspect.getsource(f).splitlines()[1:] for f in (module.train_naive, module.train))
    lines = list(difflib.unified_diff(naive, exact, n=99, lineterm=""))[3:]
    added, removed = ([line for line in lines if line.startswith(sign)] for sign in "+-")
    assert len(added) <= 5
    assert len(removed) <= 5
    shown = re.findall(r"```diff\n(.*?)```", (ROOT / "docs" / "own-loop.md").read_text(), flags=re.S)[0]
    assert shown.splitlines() == [
        line[:1] + line[5:] for line in lines if "optimizer =" not in line and "scheduler =" not in line
    ]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("accumulate_loop", "with trainfit: ()"),
        ("survive_oom_loop", "micro-batch 2 after 4 errors\nparameters differ by "),
    ],
)
def test_an_example_runs(name: str, said: str) -> None:
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert said in done.stdout


class Crowded(nn.Module):
    """Has dropout, BatchNorm's statistics, and room for so many images."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.body = make_model(nn.BatchNorm2d(4), nn.Dropout(0.5))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found = self.body(images)
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return found


def survived(room: int, micro_batch: int) -> tuple[list[torch.Tensor], trainfit.SurvivingStep]:
    model = Crowded(room)
    torch.manual_seed(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step = trainfit.survive_oom(
        loss_of, model=model, optimizer=optimizer, micro_batch=micro_batch, counts=valid, clip_norm=0.5
    )
    assert isinstance(step, trainfit.SurvivingStep)
    for batch in pictures([8, 8, 5]):
        step(batch)
    return [value.clone() for value in model.state_dict().values()], step


def test_a_step_survives_as_if_nothing_had_happened() -> None:
    """Parameters and statistics of a run that began with the micro-batch at which the other ended, bit by bit."""
    found, step = survived(2, 8)
    truth, calm = survived(8, 2)
    assert (step.micro_batch, len(step.survived), len(calm.survived), step.steps) == (2, 4, 0, 3)
    assert all(torch.equal(one, other) for one, other in zip(found, truth, strict=True))


def test_a_step_that_cannot_survive_says_so() -> None:
    with pytest.raises(trainfit.OutOfMemory, match="one image does not fit"):
        survived(0, 8)


def test_parts_of_a_batch() -> None:
    images = [torch.randn(3, 4 + n, 5) for n in range(3)]
    batch = {
        "images": images,
        "targets": [{"n": n} for n in range(3)],
        "ids": torch.arange(3),
        "note": "x",
        "scale": torch.tensor(2.0),
    }
    first, second = parts_of(batch, 2)
    assert [tuple(i.shape) for i in (*first["images"], *second["images"])] == [(3, 6, 5)] * 3
    assert [t["n"] for t in (*first["targets"], *second["targets"])] == [0, 1, 2]
    assert (first["ids"].tolist(), second["ids"].tolist(), second["note"], float(second["scale"])) == (
        [0, 1],
        [2],
        "x",
        2.0,
    )
    fields = (torch.arange(3), torch.arange(3) + 3, torch.arange(3) + 6)
    assert [each.tolist() for each in part_of(fields, slice(1, 2), 3)] == [[1], [4], [7]]
