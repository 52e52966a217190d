"""Memory of the contrastive loss: row chunks against the full matrix, and of a whole window over its accumulation.

    python benchmarks/clip_loss_memory.py fake [--pairs 32768] [--width 512]   # bytes of every tensor, on fake tensors
    python benchmarks/clip_loss_memory.py measured [--pairs 4096]              # resident memory of a process on the CPU
    python benchmarks/clip_loss_memory.py window                               # a window of 1 to 16 micro-batches, fake

The full matrix is open_clip's `ClipLoss` on all features, forward and backward. `window` runs the whole step of a small CLIP,
whose inputs stay on the host: what grows with the accumulation is the features and their gradients.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainfit.models.clip.architecture import build_model
from trainfit.models.clip.data import Pair
from trainfit.models.clip.losses import CHUNK_ROWS, Choices, make_objective, rows_loss
from trainfit.step.contrastive import Contrastive, accumulate_contrastive
from trainfit.step.window import cut

MIB = 2**20
CPU = torch.device("cpu")


class Peak(TorchDispatchMode):
    """The most bytes that tensors made within it hold at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                entry = (StorageWeakRef(storage), storage.nbytes())
                self.live.setdefault(storage._cdata, entry)  # pyright: ignore[reportPrivateUsage]
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.live.values()))
        return out


class Scale(torch.nn.Module):
    """What the loss reads of a CLIP model; its "towers" give the features that are in a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.0))
        self.logit_bias = None


def full_matrix(images: torch.Tensor, texts: torch.Tensor) -> None:
    """open_clip's loss of one big batch."""
    model = Scale()
    open_clip.ClipLoss()(images.requires_grad_(), texts.requires_grad_(), model.logit_scale.exp()).backward()


def in_chunks(images: torch.Tensor, texts: torch.Tensor) -> None:
    """The loss as the step takes it, of one micro-batch that is the whole window."""

    def features(_model: torch.nn.Module, _samples: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return images.requires_grad_(), texts.requires_grad_()

    objective = Contrastive(features=features, rows_loss=rows_loss, chunk_rows=CHUNK_ROWS)
    accumulate_contrastive(Scale(), objective, [range(len(images))], device=CPU)


WAYS: dict[str, Callable[[torch.Tensor, torch.Tensor], None]] = {"full matrix": full_matrix, "row chunks": in_chunks}


def unit_rows(pairs: int, width: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(pairs, width), dim=1)


def fake(pairs: int, width: int) -> None:
    for name, way in WAYS.items():
        with FakeTensorMode():
            images, texts = unit_rows(pairs, width), unit_rows(pairs, width)
            with Peak() as peak:
                way(images, texts)
        print(f"{name:12} {pairs} x {width}: peak {peak.bytes / MIB:9.0f} MiB beside the features (fake tensors)")


def measured(pairs: int, width: int) -> None:
    for name in WAYS:
        command = [sys.executable, __file__, "one", "--way", name, "--pairs", str(pairs), "--width", str(width)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        print(f"{name:12} {pairs} x {width}: {float(done.stdout):9.0f} MiB more than before (resident, CPU)")


def one(way: str, pairs: int, width: int) -> None:
    WAYS[way](unit_rows(64, width), unit_rows(64, width))  # what is loaded once
    images, texts = unit_rows(pairs, width), unit_rows(pairs, width)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    WAYS[way](images, texts)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def window() -> None:
    config = {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 64, "layers": 4, "width": 128, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 32, "vocab_size": 1000, "width": 128, "heads": 4, "layers": 4},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.json"
        path.write_text(json.dumps(config))
        model = build_model(f"clip:{path}")
    pair = Pair(image=torch.zeros(3, 64, 64, dtype=torch.uint8), text=torch.ones(32, dtype=torch.int64))
    parameters = sum(p.numel() for p in model.parameters()) * 4
    for accumulation in (1, 2, 4, 8, 16):
        pairs = 32 * accumulation
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            model.zero_grad(set_to_none=True)
            with Peak() as peak:
                accumulate_contrastive(model, make_objective(Choices()), cut([pair] * pairs, 32), device=CPU)
        grown = 4 * pairs * 128 * 4  # two features and their gradients
        rest = peak.bytes - parameters
        print(
            f"A = {accumulation:2}, {pairs:3} pairs: peak {rest / MIB:6.2f} MiB beside parameters' gradients, "
            f"{grown / MIB:5.2f} MiB of them features and their gradients"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["fake", "measured", "window", "one"])
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--way", choices=list(WAYS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if arguments.what == "fake":
        fake(arguments.pairs or 32768, arguments.width)
    elif arguments.what == "measured":
        measured(arguments.pairs or 4096, arguments.width)
    elif arguments.what == "one":
        one(arguments.way, arguments.pairs or 4096, arguments.width)
    else:
        window()


if __name__ == "__main__":
    main()
