"""Out-of-memory errors injected anywhere: the parameters come out as if nothing had happened."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

from test_exact_gradient import Toy, make_sample, toy_objective
from trainfit.errors import OutOfMemory
from trainfit.step.attempt import attempt, is_out_of_memory
from trainfit.step.contrastive import Contrastive
from trainfit.step.names import Optimizer
from trainfit.step.optimizer import make_optimizer
from trainfit.step.terms import CountKind, Objective
from trainfit.step.training_step import TrainingStep
from trainfit.training.oom import Survivor

CPU = torch.device("cpu")


class FailAt(TorchDispatchMode):
    """Raises out-of-memory instead of running the operators with these numbers; counts all operators."""

    def __init__(
        self, *numbers: int, message: str = "CUDA out of memory. Tried to allocate 1.00 GiB (injected)"
    ) -> None:
        super().__init__()
        self.numbers, self.message, self.seen, self.failed = set(numbers), message, 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        if func.namespace == "profiler":  # allocates nothing
            return func(*args, **(kwargs or {}))
        self.seen += 1
        if self.seen in self.numbers:
            self.failed += 1
            raise torch.OutOfMemoryError(self.message)
        return func(*args, **(kwargs or {}))


def make_step(
    model: torch.nn.Module,
    objective: Objective | Contrastive,
    groups: Any = None,
    *,
    optimizer: Optimizer = "adamw-fused",
    scaler: bool = False,
) -> TrainingStep:
    """A step with EMA; `scaler`: with the loss scaler that fp16 has on a GPU."""
    made = make_optimizer(optimizer, groups or [{"params": [p], "lr": 1e-2} for p in model.parameters()])
    ema = copy.deepcopy(model).requires_grad_(False)
    step = TrainingStep(model=model, objective=objective, optimizer=made, device=CPU, ema=ema)
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaler)
    return step


def toy_step(kind: CountKind) -> TrainingStep:
    return make_step(Toy(), toy_objective(kind))


def everything(step: TrainingStep) -> list[torch.Tensor]:
    assert step.ema is not None
    state = [v for slots in step.optimizer.state.values() for v in slots.values()]
    return [*step.model.state_dict().values(), *step.ema.state_dict().values(), *state]


def train(step: TrainingStep, survivor: Survivor, *fail_at: int) -> FailAt:
    mode = FailAt(*fail_at)
    window = [make_sample(n, i) for i, n in enumerate((0, 3, 6, 2))]
    torch.manual_seed(5)
    for number in range(2):
        if number == 1:
            with mode:
                survivor.run(step, window, number=number)
        else:
            survivor.run(step, window, number=number)
    return mode


def assert_same(one: TrainingStep, other: TrainingStep, tolerance: float = 0.0) -> None:
    for ours, theirs in zip(everything(one), everything(other), strict=True):
        if tolerance:
            assert (ours - theirs).norm() <= tolerance * max(theirs.norm().item(), 1e-12)
        else:
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["images", "targets", "sampled"])
def test_an_error_at_any_operator_of_a_step_changes_nothing(kind: CountKind) -> None:
    undisturbed = toy_step(kind)
    operators = train(undisturbed, Survivor(2)).seen
    assert operators > 60
    for number in range(1, operators + 1):
        step, survivor = toy_step(kind), Survivor(2)
        assert train(step, survivor, number).failed == 1, number
        assert_same(step, undisturbed)
        assert len(survivor.survived) == 1
        assert survivor.micro_batch == 2


def test_a_second_error_halves_the_micro_batch_and_keeps_the_result() -> None:
    undisturbed = toy_step("targets")
    train(undisturbed, Survivor(4))
    step, survivor = toy_step("targets"), Survivor(4)
    train(step, survivor, 3, 6)
    assert survivor.micro_batch == 2
    assert [(s.micro_batch, s.next_micro_batch) for s in survivor.survived] == [(4, 4), (4, 2)]
    assert_same(step, undisturbed, 1e-12)


def test_the_end_of_the_ladder_changes_nothing_and_says_what_to_do() -> None:
    step, survivor = toy_step("targets"), Survivor(2)
    before = [t.clone() for t in everything(step)]
    window = [make_sample(2, 0), make_sample(1, 1)]
    with FailAt(*range(1, 10_000)), pytest.raises(OutOfMemory, match=r"one image does not fit.*lower the resolution"):
        survivor.run(step, window, number=0)
    assert survivor.micro_batch == 1
    assert all(torch.equal(a, b) for a, b in zip(before, everything(step), strict=True))
    assert all(p.grad is None for p in step.model.parameters())


def test_recognition() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("CUDA error: out of memory"))


NCCL = "NCCL error in: NCCLUtils.cpp:77, unhandled cuda error (run with NCCL_DEBUG=INFO for details)\nLast error:\n"


@pytest.mark.parametrize(
    ("text", "who"),
    [
        ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", "CUDA"),
        ("CUDA driver error: out of memory", "the CUDA driver"),
        ("Triton Error [CUDA]: out of memory", "Triton"),
        ("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`. If you", "cuSOLVER"),
        ("cuFFT error: CUFFT_ALLOC_FAILED", "cuFFT"),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", "cuDNN"),
        ("GET was unable to find an engine to execute this computation", "cuDNN"),
        (NCCL + "Cuda failure 2 'out of memory'", "NCCL"),
        (NCCL + "Cuda failure 'out of memory'", "NCCL"),
        (NCCL + "Failed to CUDA calloc 6291456 bytes", "NCCL"),
        (NCCL + "Failed to CUDA host alloc 4096 bytes", "NCCL"),
        ("std::bad_alloc", "the host or CUDA"),
    ],
)
def test_texts_of_libraries(text: str, who: str) -> None:
    """As the libraries write them; the line about memory is the one that is reported."""

    def fails() -> None:
        raise RuntimeError(text)

    message = attempt(fails)[1]
    line = text.splitlines()[-1 if text.startswith("NCCL") else 0]
    assert message == f"{who} ran out of memory ({line})"


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input.",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED_CUDART",
    ],
)
def test_a_status_with_other_causes_counts_where_memory_is_short(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    free_bytes = [2**20]

    def mem_get_info() -> tuple[int, int]:
        if not free_bytes:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return free_bytes[0], 2**33

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    assert is_out_of_memory(RuntimeError(text))
    free_bytes[0] = 2**32
    assert not is_out_of_memory(RuntimeError(text))
    free_bytes.clear()  # a broken device is not a full one
    assert not is_out_of_memory(RuntimeError(text))


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemm(...)`",
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED_LAYOUT",
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that workers are out of shared memory.",
        NCCL + "Cuda failure 1 'invalid argument'",
    ],
)
def test_what_is_not_out_of_memory(text: str) -> None:
    assert not is_out_of_memory(RuntimeError(text))


def test_other_errors_pass_and_nothing_is_kept_alive() -> None:
    def wrong() -> None:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        attempt(wrong)

    import gc
    import weakref

    kept: list[weakref.ref[torch.Tensor]] = []

    def fails() -> None:
        big = torch.zeros(10)
        kept.append(weakref.ref(big))
        raise torch.OutOfMemoryError("full")

    assert attempt(fails) == (None, "full")
    gc.collect()
    assert kept[0]() is None


def rank_trains(rank: int, rendezvous: str, result: str, where: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    window = [make_sample(n, i) for i, n in enumerate((0, 3, 6, 2))][rank::2]
    step, survivor = toy_step("sampled" if where == "count" else "targets"), Survivor(1)
    torch.manual_seed(5)
    for number in range(2):
        # The operators before the ninth agree on the canvas over the ranks, on the CPU.
        numbers = {"count": (9,), "forward": (3,), "backward": (30,), "none": ()}[where]
        with FailAt(*(numbers if rank == 1 and number == 0 else ())):
            survivor.run(step, window, number=number)
    torch.save(step.model.state_dict(), f"{result}-{where}-{rank}")
    assert bool(survivor.survived) == (where != "none")
    dist.destroy_process_group()


@pytest.mark.parametrize("where", ["count", "forward", "backward"])
def test_one_of_two_ranks_runs_out(tmp_path: Path, where: str) -> None:
    for run in (where, "none"):
        rendezvous = str(tmp_path / f"rendezvous-{run}")
        mp.start_processes(rank_trains, (rendezvous, str(tmp_path / "m"), run), nprocs=2, start_method="spawn")
    loaded = [torch.load(tmp_path / f"m-{where}-{rank}", weights_only=True) for rank in range(2)]
    assert all(torch.equal(loaded[0][key], loaded[1][key]) for key in loaded[0])
    if where != "count":  # the other run has another objective
        undisturbed = torch.load(tmp_path / "m-none-0", weights_only=True)
        assert all(torch.equal(loaded[0][key], undisturbed[key]) for key in undisturbed)
