"""What single operators take from the caching allocator beside their inputs and outputs: no trace sees it."""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

Run = Callable[[], object]
Sample = tuple[str, Callable[[], Run]]
"""Name, and what makes the inputs and returns the operator on them."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CONVOLUTIONS = (
    (32, 64, 64, 3, 1, 1, 56),
    (32, 256, 64, 1, 1, 1, 56),
    (32, 3, 64, 7, 2, 1, 224),
    (32, 512, 512, 3, 1, 1, 7),
    (32, 96, 96, 7, 1, 96, 56),
    (4, 256, 256, 3, 1, 1, 200),
    (8, 32, 32, 3, 1, 1, 256),
)
"""Images, channels in, out, kernel, stride, groups, side."""
ATTENTION = ((64, 6, 197, 64), (16, 12, 577, 64), (8, 8, 1024, 32), (8, 16, 77, 64))
"""Images, heads, tokens, width of a head."""


def sample_all() -> list[dict[str, Any]]:
    """Every operator; one that this card or version has not got is there with its error."""
    return [_sample(name, setup) for name, setup in samples()]


def samples() -> Iterator[Sample]:
    """All of them; nothing is on the device before a setup is called."""
    for dtype in FLOATS:
        yield from _both(f"matmul {dtype}", torch.mm, ((1024, 1024), (1024, 1024)), dtype)
    yield from _attention()
    yield from _convolutions()
    yield from _norms_and_losses()
    yield from _sorts()
    yield from _optimizers()


def _attention() -> Iterator[Sample]:
    backends = (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.MATH,
    )
    for backend, dtype, shape in product(backends, FLOATS, ATTENTION):

        def attend(q: Tensor, k: Tensor, v: Tensor, b: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(b):
                return functional.scaled_dot_product_attention(q, k, v)

        yield from _both(f"attention {backend.name} {dtype} {shape}", attend, (shape,) * 3, dtype)


def _convolutions() -> Iterator[Sample]:
    for (n, a, b, k, stride, groups, side), dtype, last in product(CONVOLUTIONS, FLOATS, (False, True)):

        def convolve(x: Tensor, w: Tensor, s: int = stride, g: int = groups) -> Tensor:
            return functional.conv2d(x, w, stride=s, padding=w.shape[-1] // 2, groups=g)

        name = f"convolution{' channels_last' if last else ''} {dtype} {(n, a, b, k, stride, groups, side)}"
        yield from _both(name, convolve, ((n, a, side, side), (b, a // groups, k, k)), dtype, last)


def _norms_and_losses() -> Iterator[Sample]:
    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], weight, bias)

    def normalise(x: Tensor) -> Tensor:
        return functional.batch_norm(x, None, None, training=True)

    def entropy(x: Tensor) -> Tensor:
        return functional.cross_entropy(x, torch.zeros(len(x), dtype=torch.int64, device="cuda"))

    def interpolate(x: Tensor) -> Tensor:
        return functional.interpolate(x, scale_factor=2.0, mode="bilinear")

    for dtype, rows, width in product(FLOATS, (4096, 64 * 197), (384, 1024)):
        yield from _both(f"layer_norm {dtype} {rows}x{width}", layer, ((rows, width), (width,), (width,)), dtype)
    for dtype in FLOATS:
        for last in (False, True):
            layout = " channels_last" if last else ""
            yield from _both(f"batch_norm{layout} {dtype}", normalise, ((32, 64, 112, 112),), dtype, last)
            yield from _both(f"interpolate{layout} {dtype}", interpolate, ((8, 64, 64, 64),), dtype, last)
        yield from _both(f"cross_entropy {dtype}", entropy, ((16384, 1000),), dtype)


def _topk(x: Tensor) -> object:
    return torch.topk(x, 300)


def _nonzero(x: Tensor) -> object:
    return torch.nonzero(x > 0)


def _cumsum(x: Tensor) -> object:
    return torch.cumsum(x, 0)


def _unique(x: Tensor) -> object:
    return torch.unique((x * 100).int())


def _sorts() -> Iterator[Sample]:
    one_dimensional = {"sort": torch.sort, "topk": _topk, "nonzero": _nonzero, "cumsum": _cumsum, "unique": _unique}
    for n in (10**4, 10**6, 10**7):
        for name, op in one_dimensional.items():
            yield f"{name} {n}", lambda n=n, op=op: _forward(op, _x(n))
        yield f"sort rows {n}", lambda n=n: _forward(torch.sort, _x(100, n // 100))
        yield f"index_put accumulate {n}", lambda n=n: _index_put(n)
        yield f"embedding backward {n}", lambda n=n: _embedding(n)


def _index_put(n: int) -> Run:
    into, at, what = _x(n), torch.randint(0, n, (n,), device="cuda"), _x(n)
    return lambda: into.index_put_((at,), what, accumulate=True)


def _embedding(n: int) -> Run:
    at = torch.randint(0, 30_000, (n // 100,), device="cuda")

    def look_up(table: Tensor) -> Tensor:
        return functional.embedding(at, table)

    return _backward(look_up, _x(30_000, 512))


def _optimizers() -> Iterator[Sample]:
    for name, options in (("fused", {"fused": True}), ("foreach", {"foreach": True})):

        def setup(options: dict[str, bool] = options) -> Run:
            parameters = [_x(1024, 1024).requires_grad_() for _ in range(24)]
            for p in parameters:
                p.grad = torch.zeros_like(p)
            return torch.optim.AdamW(parameters, **options).step  # pyright: ignore[reportArgumentType]

        yield f"AdamW {name} 24 MiB numbers", setup


def _x(*shape: int, dtype: torch.dtype = torch.float32, last: bool = False) -> Tensor:
    made = torch.randn(shape, device="cuda").to(dtype)
    return made.contiguous(memory_format=torch.channels_last) if last else made


def _forward(op: Callable[..., object], *inputs: Tensor) -> Run:
    return lambda: op(*inputs)


def _backward(op: Callable[..., Tensor], *inputs: Tensor) -> Run:
    """The gradients of all inputs; what forward saved stays."""
    wanted = [x.requires_grad_() for x in inputs]
    result = op(*wanted)
    gradient = torch.ones_like(result)
    return lambda: torch.autograd.grad(result, wanted, gradient, retain_graph=True)


def _both(
    name: str, op: Callable[..., Tensor], shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, last: bool = False
) -> Iterator[Sample]:
    def inputs() -> list[Tensor]:
        return [_x(*shape, dtype=dtype, last=last) for shape in shapes]

    yield f"{name} forward", lambda: _forward(op, *inputs())
    yield f"{name} backward", lambda: _backward(op, *inputs())


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
    except (RuntimeError, NotImplementedError) as error:
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
