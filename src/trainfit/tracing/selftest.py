"""A self-test of the tracer (two seconds): traces a step whose bytes were counted by hand."""

import torch
from torch import Tensor, nn

from trainfit.errors import TrainfitError
from trainfit.gpus.capability import CUDNN_ATTENTION, has_flash_attention
from trainfit.tracing.fake_cuda import Target
from trainfit.tracing.trace import trace_step


class _Net(nn.Module):
    """Convolution, batch norm and attention of 2 heads over 64 positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.qkv = nn.Linear(16, 48)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().flatten(2).transpose(1, 2)
        query, key, value = self.qkv(x).reshape(2, 64, 3, 2, 8).permute(2, 0, 3, 1, 4)
        x = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.head(x.transpose(1, 2).flatten(2).mean(1))


class _Step:
    ema = None
    blocks = 0

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.model = _Net().to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters())

    def run(self) -> None:
        images = torch.zeros(2, 3, 8, 8, device=self.device)
        labels = torch.zeros(2, dtype=torch.int64, device=self.device)
        with torch.autocast("cuda", dtype=torch.float16):
            loss = nn.functional.cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def selftest(target: Target) -> None:
    """Trace a tiny step for `target` and compare with its known bytes.

    Raises:
        TrainfitError: the bytes differ, because this version of torch behaves differently.
    """
    advice = f"this torch ({torch.__version__}) cannot be traced without a GPU; run the step on the CPU instead: --trace-on cpu"
    try:
        result = trace_step(_Step, target=target)
    except Exception as error:
        raise TrainfitError(f"self-test: {advice} ({type(error).__name__}: {error})") from error
    traced = dict.fromkeys(("parameters", "optimizer state", "gradients", "activations"), 0)
    last = next(index for index, name in result.trace.marks if name == "window 1")
    for index, (allocated, tensor) in enumerate(result.trace):
        each_window = tensor.category in ("gradients", "activations")
        if allocated and tensor.category in traced and (index >= last or not each_window):
            traced[tensor.category] += tensor.nbytes
    if traced != known_bytes(target):
        raise TrainfitError(f"self-test: {advice} (traced {traced}, expected {known_bytes(target)})")


def known_bytes(target: Target) -> dict[str, int]:
    """Bytes that the step of the self-test allocates by category, counted by hand."""
    parameters = 4 * (16 * 3 * 9 + 2 * 16 + 48 * 16 + 48 + 4 * 16 + 4)
    positions = 2 * 64  # batch x length; a half-precision tensor of them with 16 channels is 4096 bytes
    casts = 2 * (3 * positions + 16 * 3 * 9 + 48 * 16 + 4 * 16)  # of the images and of the weights
    saved = 3 * 2 * 16 * positions  # convolution, relu, and the copy that makes the tokens contiguous
    small = 2 * 4 * 16 + 2 * 2 * 16 + 2 * 2 * 4 + 2 * 4 * 4 + 3 * 4  # batch statistics, mean, log-softmax, loss
    heads = 2 * positions  # batch x heads x length
    if target.fused_attention:
        flash = has_flash_attention(target.capability) and target.capability not in CUDNN_ATTENTION
        # Projections, output, log-sum-exp, state of the random generator.
        attention = 2 * 48 * positions + 2 * 16 * positions + 4 * heads + (24 if flash else 16)
    else:
        # Copies of query, key and value; softmax in float32, and cast for the product.
        attention = 3 * 2 * 16 * positions + (4 + 2) * heads * 64
    activations = casts + saved + small + attention
    return {
        "parameters": parameters,
        "optimizer state": 2 * parameters,
        "gradients": parameters,
        "activations": activations,
    }
