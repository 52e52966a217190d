"""What is seen of a loop's operators while it runs: random numbers, ignored labels, pairs of samples, moving averages."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LOW = (torch.float32, torch.float16, torch.bfloat16)
AVERAGING = ("lerp", "add", "mul", "addcmul")
PRODUCTS = ("mm", "addmm", "bmm")
CROSS_ENTROPY = ("nll_loss_forward", "nll_loss2d_forward")


class Operators(TorchDispatchMode):
    """Sees every operator of a run, computes in float64 what the loop asks for in less, and mutes random numbers."""

    def __init__(self, *, mute: bool, double: bool, outside: Callable[[], bool]) -> None:
        """`outside` says whether the loop is neither in a forward, nor in a backward, nor in an optimizer's step."""
        super().__init__()
        self.mute = mute
        self.double = double
        self.outside = outside
        self.random: set[str] = set()
        """Operators that drew random numbers."""
        self.low = False
        """Whether anything was computed in less than float64."""
        self.pairs: set[int] = set()
        """Sides of the square results of matrix products."""
        self.labels: list[tuple[int, int]] = []
        """(labels, ignored labels) of each cross entropy."""
        self.weights: dict[int, int] = {}
        """Addresses of the trainable parameters -> elements."""
        self.averaged: Callable[[], None] = lambda: None
        """Called where something like a moving average of the parameters is computed."""
        self._compared: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operator."""
        named = dict(kwargs or {})
        name = func._schema.name.removeprefix("aten::")
        if self.double and named.get("dtype") in LOW:
            named["dtype"] = torch.float64
        if torch.Tag.nondeterministic_seeded in func.tags and not _is_plain(name, args, named):
            self.random.add(name.rstrip("_"))
            if self.mute:
                return _muted(name, func, args, named)
        result = func(*args, **named)
        self._look(name, args, result)
        return result

    def _look(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        if isinstance(result, torch.Tensor) and result.dtype in LOW and result.numel() > 1:
            self.low = True
        if name in PRODUCTS and result.shape[-1] == result.shape[-2]:
            self.pairs.add(int(result.shape[-1]))
        if name in CROSS_ENTROPY:
            self.labels.append((args[1].numel(), int((args[1] == args[4]).sum())))
        if self.weights and self.outside():
            self._look_for_average(name, args)

    def _look_for_average(self, name: str, args: tuple[Any, ...]) -> None:
        """Arithmetic of a parameter with a tensor of its size that is none: p into a copy, or p minus a copy."""
        plain = name.removeprefix("_foreach_").rstrip("_")
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        addresses = [tensor.untyped_storage().data_ptr() for tensor in tensors]
        of_weights = [
            a in self.weights and self.weights[a] == t.numel() > 1 for a, t in zip(addresses, tensors, strict=True)
        ]
        if name.endswith("_") and addresses and addresses[0] in self._compared:
            self.averaged()
        elif plain in AVERAGING and any(of_weights):
            if not (name.endswith("_") and of_weights[0]):
                self.averaged()
        elif plain == "sub" and any(of_weights):
            self._compared |= {a for a, weight in zip(addresses, of_weights, strict=True) if not weight}


def _is_plain(name: str, args: tuple[Any, ...], named: Mapping[str, Any]) -> bool:
    """Whether an operator that may draw random numbers draws none: attention without dropout, dropout of 0."""
    if name == "native_dropout":
        return args[1] == 0 or args[2] is False
    if "attention" in name:
        return not any(isinstance(value, float) and value > 0 for value in (*args[3:], named.get("dropout_p", 0.0)))
    return name in ("dropout", "rrelu") and not args[-1]


def _muted(name: str, func: Any, args: Sequence[Any], named: dict[str, Any]) -> Any:
    """The operator with its expectation for its random numbers, so that a sample's result depends on the sample alone."""
    plain = name.rstrip("_")
    if plain == "native_dropout":
        return args[0] / (1 - args[1]), torch.ones_like(args[0], dtype=torch.bool)
    if name == "bernoulli_":
        p = args[1] if len(args) > 1 else 0.5
        return args[0].copy_(p) if isinstance(p, torch.Tensor) else args[0].fill_(p)
    if name == "bernoulli":
        return torch.full_like(args[0], args[1]) if len(args) > 1 else args[0].clone()
    if name == "uniform_":
        low = float(args[1]) if len(args) > 1 else 0.0
        high = float(args[2]) if len(args) > 2 else 1.0
        return args[0].fill_((low + high) / 2)
    if name == "normal_":
        return args[0].fill_(args[1] if len(args) > 1 else 0.0)
    if name == "exponential_":
        return args[0].fill_(1.0)
    result = func(*args, **named)
    if plain == "randperm":
        return result.copy_(torch.arange(len(result)))
    if plain in ("rand", "rand_like"):
        return result.fill_(0.5)
    if plain in ("randn", "randn_like", "normal"):
        return result.zero_()
    if plain == "randint" and len(args) > 2:  # randint(low, high, size)
        return result.fill_(args[0])
    if plain in ("randint", "randint_like", "random"):
        return result.zero_()
    torch.manual_seed(0)
    return func(*args, **named)
