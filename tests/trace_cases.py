"""Training steps that test_trace.py traces, all in one process that it starts: tracing changes torch for good.

python tests/trace_cases.py    prints one JSON object: case -> what was traced, or the error.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import torch
import torchvision
from hypothesis import strategies
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainfit.errors import TrainfitError
from trainfit.memory.profile import last_window
from trainfit.tracing import selftest
from trainfit.tracing.events import Trace
from trainfit.tracing.fake_cuda import Target
from trainfit.tracing.stored_trace import StoredTrace
from trainfit.tracing.trace import trace_step

TARGET = Target(capability=(8, 6))
WIDTH, BATCH = 64, 32


class Blocks(nn.Module):
    """Linear + GELU, `depth` times, each block checkpointed or not."""

    def __init__(self, depth: int = 3, width: int = WIDTH, checkpointing: str = "none") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(depth))
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            reentrant = self.checkpointing == "reentrant"
            x = block(x) if self.checkpointing == "none" else checkpoint(block, x, use_reentrant=reentrant)
        return x


class TinyViT(nn.Module):
    """A patch convolution and two attention blocks, 4 heads over 64 positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 64, 8, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(64) for _ in range(2))
        self.projections = nn.ModuleList(nn.Linear(64, 192) for _ in range(2))
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        for norm, qkv in zip(self.norms, self.projections, strict=True):
            query, key, value = qkv(norm(x)).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
            x = x + nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.head(x.mean(1))


def resnet() -> nn.Module:
    """A ResNet of four blocks."""
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])


def swin() -> nn.Module:
    """A Swin Transformer of two small stages."""
    return torchvision.models.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=0.0)


@dataclass
class Step:
    """One window of a plain loop."""

    blocks = 0

    device: torch.device
    net: Callable[[], nn.Module]
    loss: Callable[[nn.Module, torch.device], Tensor]
    micro_batches: int = 1
    autocast: torch.dtype | None = None
    channels_last: bool = False
    averaged: bool = False
    clip: bool = False
    optimizer_settings: dict[str, Any] = field(default_factory=lambda: {"foreach": True})

    def __post_init__(self) -> None:
        self.model = self.net().to(self.device).train()
        if self.channels_last:
            self.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.ema = torch.optim.swa_utils.AveragedModel(self.model) if self.averaged else None
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, **self.optimizer_settings)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.autocast == torch.float16)

    def run(self) -> None:
        for _ in range(self.micro_batches):
            with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
                loss = self.loss(self.model, self.device)
            self.scaler.scale(loss).backward()
        if self.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update_parameters(self.model)


def traces_of(script: str) -> dict[str, StoredTrace]:
    """Name -> trace of what a script prints, which traces in a process of its own."""
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: StoredTrace.from_json(text) for name, text in json.loads(done.stdout).items()}


def images(size: int, batch: int = 4, channels_last: bool = False) -> Callable[[nn.Module, torch.device], Tensor]:
    """Cross entropy of square images."""

    def loss(model: nn.Module, device: torch.device) -> Tensor:
        x = torch.rand(batch, 3, size, size).to(device)
        x = x.to(memory_format=torch.channels_last) if channels_last else x
        return nn.functional.cross_entropy(model(x), torch.zeros(batch, dtype=torch.int64, device=device))

    return loss


def rows(batch: int = BATCH, width: int = WIDTH) -> Callable[[nn.Module, torch.device], Tensor]:
    """The sum of a network's output for `batch` rows."""
    return lambda model, device: model(torch.ones(batch, width, device=device)).sum()


def tied() -> nn.Module:
    """Two layers with one weight."""
    net = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    net[1].weight = net[0].weight
    return net


# ---- data-dependent steps: what each does on a real device is in its name -------------------------------------------
def matched(model: nn.Module, device: torch.device) -> Tensor:
    """Hungarian matching of 8 outputs with 3 targets."""
    out = model(torch.ones(8, WIDTH, device=device))
    cost = torch.cdist(out.detach()[:, :4], torch.rand(3, 4).to(device)).cpu()
    output, target = linear_sum_assignment(cost)
    assert sorted(target.tolist()) == [0, 1, 2]
    return out[torch.as_tensor(output, device=device)].sum()


def known_positions(model: nn.Module, device: torch.device) -> Tensor:
    """Six elements are positive; the shape of what follows from them is exact."""
    labels = torch.zeros(BATCH, dtype=torch.int64, device=device)
    labels[:6] = 1
    positions = torch.nonzero(labels > 0).squeeze(1)
    assert positions.shape == (6,)
    assert labels.sum().item() == 6
    return model(torch.ones(BATCH, WIDTH, device=device))[positions].sum()


def unknown_positions(model: nn.Module, device: torch.device) -> Tensor:
    """Which rows are positive only the network knows: all of them is the upper bound."""
    out = model(torch.ones(BATCH, WIDTH, device=device))
    chosen = out[out[:, 0] > 0]
    assert device.type == "cpu" or chosen.shape == (BATCH, WIDTH)
    return chosen.sum()


def overwritten(model: nn.Module, device: torch.device) -> Tensor:
    """A known tensor is no longer known once the network's output is written into a view of it."""
    out = model(torch.ones(BATCH, WIDTH, device=device))
    buffer = torch.zeros(4, WIDTH, device=device)
    buffer[1].copy_(out[0].detach())
    assert device.type == "cpu" or buffer.abs().sum().item() > 0
    return out.sum()


def suppressed(model: nn.Module, device: torch.device) -> Tensor:
    """NMS of unknown boxes keeps all, of known ones what it really keeps."""
    out = model(torch.ones(BATCH, WIDTH, device=device))
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2], [5, 5, 6, 6]], device=device)
    kept = torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7], device=device), 0.5)
    assert kept.tolist() == [0, 2]
    unknown = torchvision.ops.nms(out[:, :4].detach().abs(), out[:, 4].detach(), 0.5)
    return out[unknown].sum()


@torch.library.custom_op("trainfit_test::opaque", mutates_args=())
def opaque(x: Tensor) -> Tensor:
    """An operator without a shape function."""
    return x.clone()


def untraceable(model: nn.Module, device: torch.device) -> Tensor:
    """Calls the operator without a shape function."""
    return opaque(model(torch.ones(BATCH, WIDTH, device=device))).sum()  # this line is named in the error


def _image(net: Callable[[], nn.Module], size: int, **settings: Any) -> Callable[[torch.device], Step]:
    return lambda device: Step(device, net, images(size, channels_last=bool(settings.get("channels_last"))), **settings)


def _rows(checkpointing: str = "none", **settings: Any) -> Callable[[torch.device], Step]:
    return lambda device: Step(device, lambda: Blocks(checkpointing=checkpointing), rows(), **settings)


def _detector(loss: Callable[[nn.Module, torch.device], Tensor]) -> Callable[[torch.device], Step]:
    return lambda device: Step(device, Blocks, loss)


SAME_ON_CPU: dict[str, Callable[[torch.device], Step]] = {
    "resnet": _image(resnet, 64),
    "resnet channels_last": _image(resnet, 64, channels_last=True),
    "resnet clip, 2 micro-batches, EMA": _image(resnet, 64, clip=True, micro_batches=2, averaged=True),
    "vit": _image(TinyViT, 64),
    "swin": _image(swin, 64),
    "tied": lambda device: Step(device, tied, rows()),
    "none": _rows(),
    "non-reentrant": _rows("non-reentrant"),
    "matched": _detector(matched),
    "known positions": _detector(known_positions),
    "overwritten": _detector(overwritten),
}
CUDA_ONLY: dict[str, Callable[[torch.device], Step]] = {
    "reentrant": lambda device: Step(
        device,
        lambda: Blocks(checkpointing="reentrant"),
        lambda model, device: model(torch.ones(BATCH, WIDTH, device=device, requires_grad=True)).sum(),
    ),
    "bf16": _rows(autocast=torch.bfloat16),
    "fp16": _rows(autocast=torch.float16, clip=True),
    "default optimizer": _rows(optimizer_settings={}),
    "fused": _rows(optimizer_settings={"fused": True}),
    "fp16 fused": _rows(autocast=torch.float16, optimizer_settings={"fused": True}),
    "unknown positions": _detector(unknown_positions),
    "suppressed": _detector(suppressed),
    "untraceable": _detector(untraceable),
}


def blocks(device: torch.device, checkpointing: str) -> Step:
    """A factory as `trace_in_subprocess` takes it."""
    return _rows(checkpointing)(device)


def saved_bytes(result: StoredTrace) -> int:
    """Activations alive at the end of the last window's forward."""
    end = [index for index, name in result.trace.marks if name == "backward"][-1]
    held = 0
    for event in result.trace.events[:end]:
        tensor = result.trace.tensors[abs(event) - 1]
        if tensor.category == "activations":
            held += tensor.nbytes if event > 0 else -tensor.nbytes
    return held


def peak_bytes(trace: Trace) -> int:
    """The most bytes that tensors held at once in the last window (before any allocator rounding)."""
    start, held, peak = last_window(trace), 0, 0
    for index, (allocated, tensor) in enumerate(trace):
        held += tensor.nbytes if allocated else -tensor.nbytes
        peak = max(peak, held) if index >= start else held
    return peak


def summary(result: StoredTrace) -> dict[str, Any]:
    """What the tests look at."""
    by_category: dict[str, int] = {}
    for event, tensor in zip(result.trace.events, list(result.trace), strict=True):
        if event > 0:
            by_category[tensor[1].category] = by_category.get(tensor[1].category, 0) + tensor[1].nbytes
    return {
        "peak": peak_bytes(result.trace),
        "saved": saved_bytes(result),
        "allocated": by_category,
        "flops": sum(row.flops for row in result.ops),
        "ops": sorted({(row.op, row.phase) for row in result.ops}),
        "launches": sum(row.count for row in result.ops if row.phase == "forward"),
        "backward of": sorted(
            {(tensor.op, tensor.module) for tensor in result.trace.tensors if tensor.phase == "backward"}
        ),
        "modules": sorted({tensor.module for tensor in result.trace.tensors if tensor.phase == "backward"}),
        "made_up": result.made_up,
        "upper_bounds": result.upper_bounds,
    }


@hypothesis.settings(max_examples=6, deadline=None, database=None, derandomize=True)
@hypothesis.given(
    depth=strategies.integers(1, 3),
    width=strategies.sampled_from([8, 33]),
    batch=strategies.integers(1, 9),
    more=strategies.integers(1, 9),
)
def laws(depth: int, width: int, batch: int, more: int) -> None:
    """A larger batch never allocates less; checkpointing never raises what is saved at the end of forward."""

    def trace(batch: int, checkpointing: str) -> StoredTrace:
        def build(device: torch.device) -> Step:
            return Step(device, lambda: Blocks(depth, width, checkpointing), rows(batch, width))

        return trace_step(build, target=TARGET, steps=1)

    plain = trace(batch, "none")
    larger = trace(batch + more, "none")
    assert peak_bytes(larger.trace) >= peak_bytes(plain.trace)
    assert sum(t.nbytes for t in larger.trace.tensors) > sum(t.nbytes for t in plain.trace.tensors)
    assert saved_bytes(trace(batch, "non-reentrant")) <= saved_bytes(plain)


def main() -> None:
    """Trace everything."""
    found: dict[str, Any] = {}
    for name, build in (SAME_ON_CPU | CUDA_ONLY).items():
        try:
            found[name] = summary(trace_step(build, target=TARGET))
        except TrainfitError as error:
            found[name] = {"error": str(error)}
    once, again = (trace_step(SAME_ON_CPU["vit"], target=TARGET) for _ in range(2))
    found["repeatable"] = once == again == StoredTrace.from_json(once.to_json())
    try:
        laws()
        found["laws"] = "hold"
    except AssertionError as error:
        found["laws"] = str(error)
    selftest.selftest(TARGET)
    selftest.known_bytes = lambda _: {"parameters": 0}
    try:
        selftest.selftest(TARGET)
    except TrainfitError as error:
        found["self-test"] = str(error)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
