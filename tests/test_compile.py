"""Regional torch.compile with the CPU's inductor against eager blocks."""

import copy
import shutil
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from trainfit.errors import TrainfitError
from trainfit.step import compiling
from trainfit.step.checkpointing import checkpoint_first
from trainfit.step.compiling import compile_blocks

CPU = torch.device("cpu")


class Block(nn.Module):
    """A residual block that inductor fuses."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(functional.gelu(self.up(self.norm(x))))


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(8), Block(8), nn.Linear(8, 3))


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    functional.cross_entropy(model(x), torch.arange(len(x)) % 3).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo looks at it
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles for the CPU with g++")
def test_compiled_blocks_equal_eager_ones() -> None:
    """Loss and every gradient within float32 rounding; with recompute around them, after it was switched on and off, and of a
    copy; the compiled code runs, and it is one for both blocks.
    """
    eager, model = make(), make()
    names = [*model.state_dict()]
    blocks = [*model.children()][:2]
    compile_blocks(blocks, CPU)
    assert [*model.state_dict()] == names
    assert type(blocks[0]) is type(blocks[1])
    twin = copy.deepcopy(model)
    torch._dynamo.utils.counters.clear()  # pyright: ignore[reportPrivateUsage]
    for size in (6, 9):
        x = torch.randn(size, 8, generator=torch.Generator().manual_seed(size))
        wanted = gradients(eager, x)
        for each, recompute in ((model, "none"), (model, "all"), (model, "none"), (twin, "none")):
            checkpoint_first([*each.children()][:2], recompute)  # pyright: ignore[reportArgumentType]
            found = gradients(each, x)
            assert found.keys() == wanted.keys()
            for name, value in wanted.items():
                torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    frames: Any = torch._dynamo.utils.counters["frames"]  # pyright: ignore[reportPrivateUsage]
    assert frames["ok"] == frames["total"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]  # pyright: ignore[reportPrivateUsage]


def test_without_blocks_or_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainfitError, match="no repeated blocks"):
        compile_blocks([], CPU)

    def broken(_function: object) -> Any:
        raise RuntimeError("Failed to find a C++ compiler\nmore lines")

    monkeypatch.setattr(compiling.torch, "compile", broken)
    with pytest.raises(TrainfitError, match=r"does not work here \(Failed to find a C\+\+ compiler\); leave it out"):
        compiling.require_compiler(CPU)
