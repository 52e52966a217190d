"""Keeps real values for small fake tensors, so that code that reads values runs: matching, sampling, NMS, `.item()`.

A fake tensor whose inputs are all known has a real CPU tensor (its shadow); views share memory with their base as
real ones do. An unknown value that Python reads is made up: masks are all true, NMS keeps every box, floats are uniform in
[0, 1), integers are 0. Made-up values do not change memory unless a shape depends on them: then the largest shape is
used, and `upper_bounds` names the operator.
"""
# pyright: reportPrivateUsage=false

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from trainfit.tracing.fake_cuda import replace

aten = torch.ops.aten
_LIKE = {
    aten.zeros_like: 0, aten.new_zeros: 0, aten.ones_like: 1, aten.new_ones: 1,
    aten.isnan: 0, aten.isinf: 0, aten.isfinite: 1,
}  # fmt: skip
_FULL = {aten.full_like: 1, aten.new_full: 2}
_KNOWN_LIMIT = 1 << 22  # elements; a detector's anchors against its boxes stay below
_LIKE_LIMIT = 1 << 16  # elements; optimizer state (zeros_like of a parameter) needs no values
_NAME = "trainfit_shadow"


def tensors_in(values: object) -> Iterator[Tensor]:
    """Every tensor in nested lists, tuples and dicts."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        for value in values.values():
            yield from tensors_in(value)


def drop_value(tensor: Tensor) -> None:
    """Drop the known value of `tensor` (a parameter, whose values no control flow reads)."""
    vars(tensor).pop(_NAME, None)


class Shadows:
    """Runs operators on fake tensors and keeps their shadows. Use `call` instead of `op(*args, **kwargs)`."""

    def __init__(self) -> None:
        self.made_up: set[str] = set()
        """Operators that got a made-up value."""
        self.upper_bounds: set[str] = set()
        """Those of them whose made-up value determined a shape."""
        self._random = torch.Generator().manual_seed(0)

    def value(self, tensor: Tensor) -> Tensor | None:
        """The real value of `tensor`, or None if it is unknown."""
        if not isinstance(tensor, FakeTensor):
            return tensor
        shadow: Tensor | None = vars(tensor).get(_NAME)
        return None if shadow is None or vars(shadow.untyped_storage()).get("stale") else shadow

    def value_or_made_up(self, tensor: Tensor, reason: str) -> Tensor:
        """The real value of `tensor`, made up if it is unknown."""
        known = self.value(tensor)
        if known is not None:
            return known
        self.made_up.add(reason)
        with no_dispatch():
            if tensor.dtype == torch.bool:
                real = torch.ones(tensor.shape, dtype=torch.bool)
            elif tensor.is_floating_point():
                real = torch.rand(tensor.shape, generator=self._random).to(tensor.dtype)
            else:
                real = torch.zeros(tensor.shape, dtype=tensor.dtype)
        vars(tensor)[_NAME] = real
        return real

    def call(self, op: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run `op` on fake tensors; an output whose shape depends on values is computed from the shadows."""
        if op.overloadpacket.__name__ == "nms":
            return self._from_values(op, args, kwargs)
        try:
            out = op(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            pass
        else:
            self._follow(op, args, kwargs, out)
            return out
        return self._from_values(op, args, kwargs)

    def _run(self, op: OpOverload, args: object, kwargs: Mapping[str, Any]) -> Any:
        """Run `op` on the known values, on the CPU."""
        on_cpu = {name: x for name, x in kwargs.items() if name not in ("device", "pin_memory")}
        if "device" in kwargs:
            on_cpu["device"] = torch.device("cpu")
        real_args, real_kwargs = tree_map_only(Tensor, self.value, (args, on_cpu))
        with no_dispatch(), torch.no_grad():
            return op(*real_args, **real_kwargs)

    def _follow(self, op: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        """Set the shadows of the outputs, or mark what `op` wrote to as unknown."""
        packet = op.overloadpacket
        if packet is aten._amp_foreach_non_finite_check_and_unscale_:
            return  # The gradients are assumed finite: found_inf stays zero.
        inputs = list(tensors_in((args, kwargs)))
        outputs = [t for t in tensors_in(out) if isinstance(t, FakeTensor)]
        small = all(t.numel() <= _KNOWN_LIMIT for t in outputs)
        known = small and packet not in flop_registry and all(self.value(t) is not None for t in inputs)
        if known and (outputs or op._schema.is_mutable):
            real_outputs = tensors_in(self._run(op, args, kwargs))
            for fake, real in zip(outputs, real_outputs, strict=True):
                if fake.shape == real.shape and fake.dtype == real.dtype:
                    vars(fake)[_NAME] = real
        elif op._schema.is_mutable:
            self._mark_stale(op, args, kwargs)
        elif (packet in _LIKE or packet in _FULL) and outputs[0].numel() <= _LIKE_LIMIT:
            fill = _LIKE[packet] if packet in _LIKE else args[_FULL[packet]]
            with no_dispatch():
                vars(outputs[0])[_NAME] = torch.full(outputs[0].shape, fill, dtype=outputs[0].dtype)

    def _mark_stale(self, op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        for index, argument in enumerate(op._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = args[index] if index < len(args) else kwargs.get(argument.name)
                for tensor in tensors_in(written):
                    shadow = vars(tensor).get(_NAME)
                    if shadow is not None:  # Marked on the storage: every view of it is stale too.
                        vars(shadow.untyped_storage())["stale"] = True
                        drop_value(tensor)

    def _from_values(self, op: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run an operator whose output shape depends on values; unknown values are made up."""
        inputs = list(tensors_in((args, kwargs)))
        packet = op.overloadpacket
        unknown = any(self.value(t) is None for t in inputs)
        device = next((t.fake_device for t in inputs if isinstance(t, FakeTensor)), torch.device("cpu"))
        if packet is aten.index:
            return self._boolean_index(args[0], args[1], device)
        if packet.__name__ == "nms" and unknown:
            self.made_up.add(str(packet))
            with no_dispatch():
                real = torch.arange(len(args[0]))
        else:
            for tensor in inputs:
                self.value_or_made_up(tensor, str(packet))
            real = self._run(op, args, kwargs)
        if unknown and isinstance(real, (Tensor, tuple, list)):
            self.upper_bounds.add(str(packet))
        return tree_map_only(Tensor, partial(self._fake, device=device), real)

    def _fake(self, real: Tensor, device: torch.device) -> Tensor:
        fake = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device=device)
        vars(fake)[_NAME] = real
        return fake

    def _boolean_index(self, x: Tensor, indices: Sequence[Tensor | None], device: torch.device) -> Tensor:
        """`x[mask]`, computed as on CUDA from the positions of the mask's true elements; `x` itself may be large."""
        positions: list[Tensor | None] = []
        for index in indices:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                positions.append(index)
                continue
            if self.value(index) is None:
                self.upper_bounds.add("aten.index")
            mask = self.value_or_made_up(index, "aten.index")
            with no_dispatch():
                true_positions = mask.nonzero().unbind(1)
            positions += [self._fake(real, device) for real in true_positions]
        return self.call(aten.index.Tensor, (x, positions), {})

    def patch_numpy(self) -> None:
        """Let `.numpy()`, `numpy.asarray` and `.tolist()` of a fake tensor see its value. Global."""

        def numpy(tensor: FakeTensor, *_args: Any, **_kwargs: Any) -> np.ndarray[Any, Any]:
            real = self.value_or_made_up(tensor, "numpy")
            with no_dispatch():
                return real.detach().numpy()

        def array(tensor: FakeTensor, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
            return np.array(numpy(tensor), dtype=dtype, copy=copy)

        def tolist(tensor: FakeTensor) -> Any:
            return numpy(tensor).tolist()

        replace(FakeTensor, numpy=numpy, __array__=array, tolist=tolist)
