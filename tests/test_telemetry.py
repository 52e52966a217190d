"""Waiting against computing, the verdict on the loader, GPU readings, and the gradient noise scale, against known truths."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pynvml
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from test_gpus import FakeDevice, FakeError, FakeNvml, NotSupportedError
from test_oom import FailAt
from trainfit.gpus.catalogue import MIB
from trainfit.gpus.usage import GpuUsage, UsageNvml, usage_meter
from trainfit.step.contrastive import Contrastive
from trainfit.step.terms import LossTerm, Objective
from trainfit.step.training_step import TrainingStep
from trainfit.tasks.augment import Augmentation
from trainfit.tasks.detection.samples import ImageRecord, Sample
from trainfit.training import window_progress
from trainfit.training.headroom import LoaderFacts, available_host_bytes, judge, verdict_line, worker_host_bytes
from trainfit.training.loader import Loaded, WindowPlan, training_loader
from trainfit.training.noise_scale import NoiseSample, noise_line, noise_scale
from trainfit.training.noise_watch import EVERY, NoiseWatch
from trainfit.training.telemetry import Clock, Spent, meter

CPU = torch.device("cpu")
GIB = 2**30
FACTS = LoaderFacts(
    windows=100,
    compute_s=0.1,
    waited_s=8.0,
    load_s=0.36,
    workers=2,
    cores=8,
    available_bytes=16 * GIB,
    worker_bytes=GIB // 2,
)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "loader bound: 44 % waiting; 4 workers would do (now 2)"),
        ({"waited_s": 0.2}, "compute bound: 2 % waiting"),
        ({"windows": 9, "waited_s": 0.72}, "44 % waiting; 9 windows are too few for a verdict on the loader"),
        (
            {"cores": 3},
            "loader bound: 44 % waiting; 4 workers would do (now 2), limited by cores to 3: about 17 % waiting then",
        ),
        (
            {"available_bytes": GIB // 2},
            "loader bound: 44 % waiting; 4 workers would do (now 2), limited by host memory to 3: about 17 % waiting then",
        ),
        (
            {"cores": 2},
            "loader bound: 44 % waiting; 4 workers would do, limited by cores to the 2 there are; "
            "images stored at the training size load faster",
        ),
        (
            {"load_s": 0.15},
            "loader bound: 44 % waiting, though 2 decode fast enough: it is the handing over; "
            "images stored at the training size load faster",
        ),
        ({"workers": 0, "load_s": 0.09}, "loader bound: 44 % waiting; 1 worker would do (now 0)"),
        ({"available_bytes": None, "cores": 64}, "loader bound: 44 % waiting; 4 workers would do (now 2)"),
    ],
)
def test_verdicts(changes: dict[str, Any], line: str) -> None:
    facts = replace(FACTS, **changes)
    assert verdict_line(judge(facts), facts) == line


@given(
    compute_s=st.floats(0.001, 10),
    load_s=st.floats(0.001, 100),
    workers=st.integers(0, 32),
    cores=st.integers(1, 128),
    available_gib=st.none() | st.integers(0, 64),
)
def test_the_suggestion_keeps_to_the_machine_and_leaves_no_wait_that_more_workers_could_end(
    compute_s: float, load_s: float, workers: int, cores: int, available_gib: int | None
) -> None:
    each_s = compute_s + load_s if workers == 0 else max(compute_s, load_s / workers)
    waited_s = 100 * (each_s - compute_s)
    available = None if available_gib is None else available_gib * GIB
    facts = LoaderFacts(
        windows=100,
        compute_s=compute_s,
        waited_s=waited_s,
        load_s=load_s,
        workers=workers,
        cores=cores,
        available_bytes=available,
        worker_bytes=GIB,
    )
    verdict = judge(facts)
    assert verdict.headroom == pytest.approx(each_s / compute_s)
    assert verdict.wait_share == pytest.approx(1 - compute_s / each_s, abs=1e-9)
    assert verdict.suggested_workers >= workers
    assert verdict.expected_wait_share <= verdict.wait_share + 1e-9
    if verdict.suggested_workers > workers:
        assert verdict.suggested_workers <= cores
        assert available is None or (verdict.suggested_workers - workers) * GIB <= available
        assert verdict.limit or load_s / verdict.suggested_workers <= compute_s * (1 + 1e-9)


def slow_decode(record: ImageRecord, *, size: int, augment: AbstractSet[str], generator: torch.Generator) -> Sample:
    """Takes 100 ms."""
    del augment, generator
    time.sleep(0.1)
    nothing = torch.zeros(0)
    image = torch.zeros((3, size, size), dtype=torch.uint8)
    return Sample(image=image, boxes=nothing, classes=nothing, masks=None, image_id=record.id, original_size=(1, 1))


def slow_loader(workers: int, windows: int = 25) -> Iterator[Loaded]:
    none = np.zeros(0, np.int64)
    record = ImageRecord(
        id=0,
        path=Path("none"),
        width=8,
        height=8,
        boxes=np.zeros((0, 4)),
        classes=none,
        crowd=np.zeros(0, np.bool_),
        areas=np.zeros(0),
        segmentations=(),
        object_ids=none,
    )
    records = [record] * 160
    plan = WindowPlan(images=160, effective_batch=1, sizes=(8,), seed=0)
    return training_loader(records, slow_decode, plan, steps=range(windows), augment=Augmentation(), workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_wait_share_of_a_slow_loader(workers: int) -> None:
    """A window sleeps 100 ms in the decoder and 40 ms in the step; 3 workers would load three windows in 120 ms.

    Without workers 5 of 7 parts are waiting, with two 1 of 5. Sleeps last longer on a busy machine, so the truth is
    taken from this loop's own watch.
    """
    clock, computed_s, began, truth = Clock(CPU, time.perf_counter()), 0.0, 0.0, 0.0
    for window in clock.fetch(slow_loader(workers)):
        arrived = time.perf_counter()
        began = began or arrived
        time.sleep(0.04)
        computed_s += time.perf_counter() - arrived
        clock.window_done(len(window))
        clock.read()
        if clock.total.windows == 25:
            truth = 1 - computed_s / (time.perf_counter() - began)  # before the workers end, which is no waiting
    spent = clock.total
    assert spent.waited_s / spent.elapsed_s == pytest.approx(truth, abs=0.03)
    assert (spent.windows, spent.images) == (25, 25)
    if workers == 0:  # with workers, late ones of a busy machine add waiting of their own
        assert truth == pytest.approx(5 / 7, abs=0.1)
        facts = replace(FACTS, windows=25, compute_s=spent.compute_s / 25, load_s=spent.load_s / 25, workers=0)
        assert judge(replace(facts, waited_s=spent.waited_s)).suggested_workers == 3


def test_the_start_and_pauses_are_no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0

    def passes(seconds: float) -> None:
        nonlocal now
        now += seconds

    def items() -> Iterator[Loaded]:
        for wait_s in (5.0, 0.5, 0.25):
            passes(wait_s)
            item = Loaded()
            item.load_s = wait_s
            yield item

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = Clock(CPU, 99.0)
    for number, _ in enumerate(clock.fetch(items())):
        passes(2.0)
        clock.window_done(3)
        if number == 1:
            assert clock.read() == Spent(windows=2, images=6, elapsed_s=4.5, waited_s=0.5, compute_s=4.0, load_s=5.5)
            passes(30.0)
            assert clock.pause() == 30.0
    clock.read()
    assert clock.start_s == 6.0
    assert clock.total == Spent(windows=3, images=9, elapsed_s=6.75, waited_s=0.75, compute_s=6.0, load_s=5.75)


class FakeGpu:
    """A GPU that works 50 ms on a window, behind a host that queues it in no time. The host's clock is `now`."""

    def __init__(self) -> None:
        self.now = self.busy_until = 0.0

    def event(self, **_: object) -> Any:
        gpu = self

        class Event:
            def record(self) -> None:
                self.at = max(gpu.now, gpu.busy_until)

            def synchronize(self) -> None:
                gpu.now = max(gpu.now, self.at)

            def elapsed_time(self, other: "Event") -> float:
                assert other.at <= gpu.now, "not ready"
                return 1000 * (other.at - self.at)

        return Event()

    def fetch(self, load_s: float) -> Iterator[Loaded]:
        for _ in range(20):
            self.now += load_s
            item = Loaded()
            item.load_s = load_s
            yield item


@pytest.mark.parametrize(("load_s", "share"), [(0.04, 40 / 540), (0.08, 350 / 850)])
def test_on_a_gpu_only_its_idle_time_is_waiting(monkeypatch: pytest.MonkeyPatch, load_s: float, share: float) -> None:
    gpu = FakeGpu()
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(time, "perf_counter", lambda: gpu.now)
    clock, spent = Clock(torch.device("cuda"), 0.0), Spent()
    for number, _ in enumerate(clock.fetch(gpu.fetch(load_s)), start=1):
        gpu.busy_until = max(gpu.now, gpu.busy_until) + 0.05
        clock.window_done(4)
        if number % 10 == 0:
            spent = clock.read()  # the second of two: it ends when the GPU does, and 10 windows' data came before that
    assert spent.compute_s == pytest.approx(10 * 0.05)
    assert spent.waited_s / spent.elapsed_s == pytest.approx(share, abs=0.001)


def test_host_memory_is_read() -> None:
    free = available_host_bytes()
    if sys.platform != "linux":
        assert free is None
        return
    total = next(int(r.split()[1]) for r in Path("/proc/meminfo").read_text().splitlines() if r.startswith("MemTotal"))
    assert free is not None
    assert 64 * MIB < free <= total * 1024


def hold(size_bytes: int, ready: Any, done: Any) -> None:
    block = bytearray(b"x" * size_bytes)
    ready.set()
    done.wait()
    del block


def seen_beside_a_worker(size_bytes: int) -> int:
    context = mp.get_context("fork")
    ready, done = context.Event(), context.Event()
    child = context.Process(target=hold, args=(size_bytes, ready, done))
    child.start()
    ready.wait()
    seen = worker_host_bytes()
    done.set()
    child.join()
    return seen


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_workers_memory_is_its_own_pages() -> None:
    # From a young process: pages that the tests before this one left, and that either side writes to, become private.
    with ProcessPoolExecutor(1, mp_context=mp.get_context("spawn")) as young:
        seen = young.submit(seen_beside_a_worker, 500 * MIB).result()
    assert 500 * MIB <= seen < 620 * MIB


class BusyNvml(FakeNvml):
    """A card at work; `power` None: it does not tell."""

    def __init__(self, *cards: FakeDevice, power: int | None = 231_500) -> None:
        super().__init__(*cards)
        self.power, self.started = power, 0

    def nvmlInit(self) -> None:  # noqa: N802
        super().nvmlInit()
        self.started += 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeDevice:  # noqa: N802
        found = [card for card in self.cards if card.uuid == uuid]
        if not found:
            raise FakeError("Not Found")
        return found[0]

    def nvmlDeviceGetUtilizationRates(self, handle: FakeDevice) -> Any:  # noqa: N802
        del handle
        return type("Rates", (), {"gpu": 87})()

    def nvmlDeviceGetPowerUsage(self, handle: FakeDevice) -> int:  # noqa: N802
        del handle
        if self.power is None:
            raise NotSupportedError("Not Supported")
        return self.power


CARD = FakeDevice(name="NVIDIA GeForce RTX 3060", uuid="GPU-1", total_mib=12288, reserved_mib=200, used_mib=3000)


def test_gpu_readings() -> None:
    nvml = BusyNvml(CARD)
    read = usage_meter("GPU-1", nvml)
    full = GpuUsage(gpu_utilization=0.87, gpu_power_w=231.5, gpu_memory_used_bytes=3000 * MIB)
    assert [read(), read()] == [full, full]
    assert nvml.started == 1
    assert usage_meter("GPU-1", BusyNvml(CARD, power=None))() == replace(full, gpu_power_w=None)


def test_without_nvml_or_its_gpu_readings_are_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    assert usage_meter("GPU-9", BusyNvml(CARD))() == GpuUsage()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert usage_meter("GPU-1")() == GpuUsage()
    assert set(meter(CPU)().values()) == {None}


def test_the_protocol_is_nvidias_own() -> None:
    assert [name for name in vars(UsageNvml) if name.startswith("nvml") and not hasattr(pynvml, name)] == []


def test_the_allocators_figures_have_torchs_names() -> None:
    """Keys as torch's documentation of memory_stats lists them."""
    told = torch.cuda.memory_stats.__doc__ or ""
    assert "num_alloc_retries" in told
    assert "allocated_bytes.{all,large_pool,small_pool}.{current,peak" in told


# The gradient noise scale. Toy: y = w.x with x ~ N(0, I) in d dimensions and noise of variance s2. At w off by delta, one
# image's gradient of (w.x - y)^2 / 2 has mean delta and covariance of trace |delta|^2 (d + 1) + s2 d.

DIMENSIONS, OFF, NOISE = 20, 0.5, 3.0
TRACE = OFF**2 * (DIMENSIONS + 1) + NOISE * DIMENSIONS
TRUTH = TRACE / OFF**2


class Line(nn.Module):
    """w, off by a vector of length OFF."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((DIMENSIONS,), OFF / DIMENSIONS**0.5, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w


def drawn(number: int, images: int) -> list[torch.Tensor]:
    """Rows of x and y; the truth is w = 0."""
    generator = torch.Generator().manual_seed(number)
    table = torch.randn(images, DIMENSIONS + 1, generator=generator, dtype=torch.float64)
    table[:, -1] *= NOISE**0.5
    return list(table)


def line_objective() -> Objective:
    def terms(model: nn.Module, rows: Sequence[torch.Tensor], _canvas: tuple[int, int]) -> Mapping[str, LossTerm]:
        table = torch.stack(list(rows))
        squares = (model(table[:, :-1]) - table[:, -1]).square() / 2
        return {"loss": LossTerm(total=squares.sum(), kind="images")}

    def counts(rows: Sequence[torch.Tensor]) -> Mapping[str, float]:
        return {"loss": float(len(rows))}

    return Objective(terms=terms, counts=counts, canvas=lambda _: (1, 1))


def line_step(model: nn.Module | None = None) -> TrainingStep:
    model = model or Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return TrainingStep(model=model, objective=line_objective(), optimizer=optimizer, device=CPU, clip_norm=0.1)


def watch(
    step: TrainingStep, window: Sequence[Any], micro_batch: int, *, disturbed: bool = False
) -> NoiseSample | None:
    watcher = NoiseWatch(step)
    with watcher.window(EVERY - 1):
        result = step.run(window, micro_batch=micro_batch, step=0)
    return watcher.sample(result, disturbed=disturbed)


@pytest.mark.parametrize(("images", "micro_batch"), [(32, 4), (30, 7)])
def test_the_noise_scale_of_a_regression(images: int, micro_batch: int) -> None:
    samples = [watch(line_step(), drawn(number, images), micro_batch) for number in range(600)]
    known = [sample for sample in samples if sample is not None]
    assert len(known) == 600
    assert sum(s.trace for s in known) / 600 == pytest.approx(TRACE, rel=0.05)
    assert sum(s.square for s in known) / 600 == pytest.approx(OFF**2, rel=0.25)
    scales = [noise_scale(known[i : i + 50]) for i in range(0, 600, 50)]
    inside = [scale is not None and scale.low <= TRUTH <= scale.high for scale in scales]
    assert sum(inside) >= 9  # 90 % of 12 is 10.8


def test_one_window_is_the_textbooks_arithmetic() -> None:
    """Every micro-batch's own gradient, by autograd, in McCandlish's formulas for equal micro-batches."""
    window, small, big = drawn(3, 24), 4, 24
    gradients: list[torch.Tensor] = []
    for i in range(0, big, small):
        table, model = torch.stack(window[i : i + small]), Line()
        ((model(table[:, :-1]) - table[:, -1]).square() / 2).mean().backward()
        assert model.w.grad is not None
        gradients.append(model.w.grad)
    small_square = torch.stack([g.square().sum() for g in gradients]).mean().item()
    big_square = torch.stack(gradients).mean(0).square().sum().item()
    found = watch(line_step(), window, small)
    assert found is not None
    assert found.square == pytest.approx((big * big_square - small * small_square) / (big - small), rel=1e-6)
    assert found.trace == pytest.approx((small_square - big_square) / (1 / small - 1 / big), rel=1e-6)


def test_watching_changes_no_gradient_and_leaves_no_hook() -> None:
    window = drawn(1, 9)
    plain, watched = line_step(), line_step()
    plain.gradient(window, micro_batch=2)
    with NoiseWatch(watched).window(EVERY - 1):
        watched.gradient(window, micro_batch=2)
    for step in (plain, watched):
        step.gradient(window, micro_batch=4)
    assert [torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters, watched.parameters, strict=True)] == [True]  # pyright: ignore[reportArgumentType]
    assert watched.after_micro_batch is None
    assert not watched.parameters[0]._backward_hooks


def test_a_window_that_takes_long_reports_its_images(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 0.0, *(10.0 * n for n in range(1, 20))])
    monkeypatch.setattr(window_progress, "monotonic", lambda: next(now))
    step, notes = line_step(), list[str]()
    progress = window_progress.WindowProgress(step, notes.append)
    progress.begin(EVERY, [None] * 9)
    with NoiseWatch(step).window(EVERY - 1):  # it counts micro-batches too
        step.gradient(drawn(1, 9), micro_batch=2)
    assert notes == ["window 32: 6 of 9 images after 30 s"]
    step.gradient(drawn(1, 9), micro_batch=2)  # memory ran out, and the window starts again
    assert notes[1] == "window 32: 2 of 9 images after 60 s"


def test_what_is_not_watched_and_why() -> None:
    step = line_step()
    watcher = NoiseWatch(step)
    for number in range(EVERY - 1):
        with watcher.window(number):
            result = step.run(drawn(number, 8), micro_batch=2, step=0)
        assert watcher.sample(result, disturbed=False) is None
    assert watcher.reason is None
    assert watch(step, drawn(0, 8), 2, disturbed=True) is None
    with watcher.window(EVERY - 1):
        result = step.run(drawn(0, 8), micro_batch=8, step=0)
    assert watcher.sample(result, disturbed=False) is None
    assert watcher.reason == "a window is one micro-batch: there is nothing to compare"


def features(_model: nn.Module, _samples: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    raise NotImplementedError


def rows_loss(_model: nn.Module, _one: torch.Tensor, _other: torch.Tensor, _rows: slice) -> torch.Tensor:
    raise NotImplementedError


def test_refusals() -> None:
    normed = nn.Sequential(nn.BatchNorm1d(DIMENSIONS), Line())
    assert NoiseWatch(line_step(normed)).reason == "BatchNorm in training couples the images of a micro-batch"
    assert NoiseWatch(line_step(normed.eval())).reason is None
    coupled = line_step()
    coupled.objective = Contrastive(features=features, rows_loss=rows_loss)
    watcher = NoiseWatch(coupled)
    assert watcher.reason == "a contrastive loss couples all images of a window"
    with watcher.window(EVERY - 1):
        assert coupled.after_micro_batch is None


def rank_watches(rank: int, rendezvous: str, result: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    found = watch(line_step(), drawn(5, 12)[rank::2], 2)
    assert found is not None
    torch.save([found.trace, found.square], f"{result}-{rank}")
    dist.destroy_process_group()
    if sys.platform == "linux":  # a thread of gloo that lives on may abort the process at its end
        names = [task.joinpath("comm").read_text() for task in Path("/proc/self/task").iterdir()]
        assert not [name for name in names if "gloo" in name], names


def test_two_ranks_see_what_one_sees(tmp_path: Path) -> None:
    arguments = (str(tmp_path / "rendezvous"), str(tmp_path / "found"))
    mp.start_processes(rank_watches, arguments, nprocs=2, start_method="spawn")
    rows = drawn(5, 12)
    one = watch(line_step(), [*rows[::2], *rows[1::2]], 2)
    assert one is not None
    for rank in range(2):
        assert torch.load(tmp_path / f"found-{rank}") == pytest.approx([one.trace, one.square], rel=1e-9)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (8, "effective batch 8 is below it"),
        (60, "effective batch 60 is of that order"),
        (999, "effective batch 999 is above it"),
    ],
)
def test_the_hint_in_words(batch: int, words: str) -> None:
    scale = noise_scale([NoiseSample(trace=60.0 + i, square=1.0) for i in (-30, -10, 0, 10, 30)])
    assert scale is not None
    assert scale.images == 60
    assert 30 <= scale.low < 60 < scale.high <= 90
    line = noise_line(scale, batch)
    assert line.startswith("gradient noise scale about 60 (")
    assert "over 5 windows" in line
    assert words in line
    assert line.endswith("(a hint only)")


def test_noise_that_hides_the_gradient_gives_no_number() -> None:
    scale = noise_scale([NoiseSample(trace=5.0, square=s) for s in (-0.5, 0.1, -0.2, 0.2, 0.1)])
    assert scale is not None
    assert noise_line(scale, 4).startswith("gradient noise scale above ")
    assert noise_scale([NoiseSample(trace=1.0, square=1.0)] * 4) is None


def test_a_window_that_is_not_watched_allocates_nothing_outside_its_gradient() -> None:
    """Outside the gradient running out of memory ends the run."""
    step = line_step()
    watch = NoiseWatch(step)
    for number in (0, EVERY - 1):
        with FailAt(1) as mode, watch.window(number):
            pass
        assert mode.seen == 0
