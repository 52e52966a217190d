"""What single operators take from the caching allocator beside their inputs and outputs: no trace sees it."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Run = Callable[[], object]
Sample = tuple[str, Callable[[], Run]]
"""Name, and what makes the inputs and returns the operator on them."""
Shapes = tuple[tuple[int, ...], ...]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
CONVOLUTIONS = (
    (32, 64, 64, 3, 1, 1, 56),
    (32, 256, 64, 1, 1, 1, 56),
    (32, 3, 64, 7, 2, 1, 224),
    (32, 512, 512, 3, 1, 1, 7),
    (32, 96, 96, 7, 1, 96, 56),
    (4, 256, 256, 3, 1, 1, 200),
    (8, 32, 32, 3, 1, 1, 256),
    *((images, 16, 48, 1, 1, 1, 43) for images in (215, 373, 377, 700)),
    *((images, 3, 32, 3, 2, 1, 86) for images in (215, 373, 377, 700)),
    *((images, 64, 64, 3, 1, 1, 86) for images in (128, 339)),
    *((images, 128, 128, 3, 1, 1, 43) for images in (128, 339)),
)
"""Images, channels in, out, kernel, stride, groups, side. The last are of MNASNet and VGG in xMem's runs, whose reserved memory no
rule explains (docs/prediction.md): MNASNet's is 17 % too low up to 373 images and right from 377 on."""
ATTENTION = ((64, 6, 197, 64), (16, 12, 577, 64), (8, 8, 1024, 32), (8, 16, 77, 64))
"""Images, heads, tokens, width of a head."""
BACKENDS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")


def sample_all(most: int | None = None) -> list[dict[str, Any]]:
    """The first `most` operators, or all; one that this card or version has not got is there with its error."""
    return [_sample(name, setup) for name, setup in islice(samples(), most)]


def samples() -> Iterator[Sample]:
    """All of them; nothing is on the device before a setup is called."""
    for dtype in FLOATS:
        yield from _both("matmul", torch.mm, ((1024, 1024),) * 2, dtype)
        yield from _both("cross_entropy", _entropy, ((16384, 1000),), dtype)
        for backend, shape in product(BACKENDS, ATTENTION):
            yield from _both(f"attention {backend}", partial(_attend, backend), (shape,) * 3, dtype)
        for rows, width in product((4096, 64 * 197), (384, 1024)):
            yield from _both("layer_norm", _layer_norm, ((rows, width), (width,), (width,)), dtype)
        for layout in LAYOUTS:
            yield from _both("batch_norm", _batch_norm, ((32, 64, 112, 112),), dtype, layout)
            yield from _both("interpolate", _grow, ((8, 64, 64, 64),), dtype, layout)
            for n, a, b, k, stride, groups, side in CONVOLUTIONS:
                convolve = partial(_convolve, stride, groups)
                shapes = (n, a, side, side), (b, a // groups, k, k)
                yield from _both(f"convolution stride {stride} groups {groups}", convolve, shapes, dtype, layout)
    for n, (name, op) in product((10**4, 10**6, 10**7), FORWARD.items()):
        yield f"{name} {n}", partial(_forward, op, n)
    for name, parameters in (("fused", {"fused": True}), ("foreach", {"foreach": True})):
        yield f"AdamW {name} 24 tensors of 4 MiB", partial(_adamw, parameters)


def _entropy(x: Tensor) -> Tensor:
    return F.cross_entropy(x, torch.zeros(len(x), dtype=torch.int64, device=x.device))


def _attend(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(getattr(SDPBackend, backend)):
        return F.scaled_dot_product_attention(q, k, v)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def _batch_norm(x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True)


def _grow(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear")


def _embedding_backward(x: Tensor, at: Tensor, _: Tensor) -> Tensor:
    return torch.ops.aten.embedding_dense_backward(x.view(-1, 10), at[::10], 1000, -1, False)


def _unique(_: Tensor, at: Tensor, __: Tensor) -> Tensor:
    return torch.unique(at)


def _convolve(stride: int, groups: int, x: Tensor, w: Tensor) -> Tensor:
    return F.conv2d(x, w, stride=stride, padding=w.shape[-1] // 2, groups=groups)


FORWARD: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
    "sort": lambda x, _, __: torch.sort(x),
    "sort 100 rows": lambda x, _, __: torch.sort(x.view(100, -1)),
    "topk 300": lambda x, _, __: torch.topk(x, 300),
    "nonzero": lambda x, _, __: torch.nonzero(x > 0),
    "cumsum": lambda x, _, __: torch.cumsum(x, 0),
    "unique": _unique,
    "index_put": lambda x, at, y: x.index_put_((at,), y),
    "index_put accumulate": lambda x, at, y: x.index_put_((at,), y, accumulate=True),
    "embedding backward": _embedding_backward,
}
"""On n random numbers, n random indices below 1000, and n numbers more."""


def _forward(op: Callable[[Tensor, Tensor, Tensor], object], n: int) -> Run:
    at = torch.randint(0, 1000, (n,), device="cuda")
    return partial(op, torch.randn(n, device="cuda"), at, torch.randn(n, device="cuda"))


def _adamw(options: dict[str, bool]) -> Run:
    parameters = [torch.randn(1024, 1024, device="cuda", requires_grad=True) for _ in range(24)]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    return torch.optim.AdamW(parameters, **options).step  # pyright: ignore[reportArgumentType]


def _both(
    name: str,
    op: Callable[..., Tensor],
    shapes: Shapes,
    dtype: torch.dtype,
    layout: torch.memory_format = torch.contiguous_format,
) -> Iterator[Sample]:
    """Forward, and the gradients of all inputs, where what forward saved stays."""

    def inputs() -> list[Tensor]:
        made = [torch.randn(shape, device="cuda").to(dtype) for shape in shapes]
        return [
            x.contiguous(memory_format=layout).requires_grad_() if x.dim() == 4 else x.requires_grad_() for x in made
        ]

    def backward() -> Run:
        wanted = inputs()
        result = op(*wanted)
        ones = torch.ones_like(result)
        return lambda: torch.autograd.grad(result, wanted, ones, retain_graph=True)

    label = f"{name} {str(dtype)[6:]} {str(layout)[6:]} {shapes}"
    yield f"{label} forward", lambda: partial(op, *inputs())
    yield f"{label} backward", backward


def _sample(name: str, setup: Callable[[], Run]) -> dict[str, Any]:
    """Run twice: what the first run keeps (workspaces, optimizer state), and what the second frees before it ends."""
    torch.cuda.empty_cache()
    empty = _bytes("current")
    try:
        run = setup()
        ready = _bytes("current")
        run()
        kept = _bytes("current") - ready
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = _bytes("current")
        result = run()
        after, peak = _bytes("current"), _bytes("peak")
        del result
    except RuntimeError as error:
        return {"operator": name, "error": str(error).splitlines()[0]}
    return {
        "operator": name,
        "inputs_bytes": ready - empty,
        "outputs_bytes": after - before,
        "beyond_bytes": peak - after,
        "kept_bytes": kept,
    }


def _bytes(which: str) -> int:
    """Bytes asked for, without the allocator's rounding."""
    torch.cuda.synchronize()
    return torch.cuda.memory_stats().get(f"requested_bytes.all.{which}", 0)
