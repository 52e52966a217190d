"""An optimizer's step in units, each of which happens completely or not at all."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from trainfit.errors import HalfUpdated
from trainfit.step.attempt import attempt
from trainfit.step.names import UNIT_BYTES


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Parameters of one group, one device and one dtype that are updated together."""

    group: dict[str, Any]
    """The parameter group that they belong to."""
    parameters: list[torch.Tensor]
    """The parameters."""


@runtime_checkable
class InParts(Protocol):
    """An optimizer that updates a group part by part: the last operator of each part is the one that changes the state."""

    def parts(self, group: Mapping[str, Any]) -> list[list[torch.Tensor]]:
        """The group's parameters, part by part; each part is of one device and dtype."""
        ...


def by_device_and_dtype(tensors: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Group tensors by device and dtype: one `_foreach` or `_fused` kernel changes a group at once."""
    kinds: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(kinds.values())


def units_of(optimizer: torch.optim.Optimizer) -> list[Unit]:
    """Divide an optimizer's parameters into units, in the order of its groups.

    A fused optimizer changes all parameters of one device and dtype in one kernel, which allocates nothing: they are one
    unit. Others run many operators, any of which may fail: their units are small, so that they can be copied first.
    """
    units: list[Unit] = []
    for group in optimizer.param_groups:
        if isinstance(optimizer, InParts):
            parts = optimizer.parts(group)
        elif group.get("fused"):
            parts = by_device_and_dtype(group["params"])
        else:
            parts = bounded_parts(group["params"])
        units += [Unit(group=group, parameters=part) for part in parts]
    return units


def bounded_parts(parameters: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Cut parameters into lists of one device and dtype and of at most `UNIT_BYTES`."""
    return [part for kind in by_device_and_dtype(parameters) for part in _bounded(kind)]


def step_unit(optimizer: torch.optim.Optimizer, unit: Unit) -> None:
    """Run the optimizer's step on one unit; if it fails, restore everything that it may have changed.

    Raises:
        HalfUpdated: the step failed and could not be undone.
    """
    restore = _snapshot(optimizer, unit)
    groups = optimizer.param_groups
    optimizer.param_groups = [{**unit.group, "params": unit.parameters}]
    try:
        optimizer.step()
    except BaseException:
        _, failure = attempt(restore)
        if failure is not None:
            raise HalfUpdated(f"a failed optimizer step could not be undone: {failure}") from None
        raise
    finally:
        optimizer.param_groups = groups


def _bounded(parameters: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Divide a list into parts of at most `UNIT_BYTES`."""
    part: list[torch.Tensor] = []
    part_bytes = 0
    for parameter in parameters:
        if part and part_bytes + parameter.nbytes > UNIT_BYTES:
            yield part
            part = []
            part_bytes = 0
        part.append(parameter)
        part_bytes += parameter.nbytes
    if part:
        yield part


def _snapshot(optimizer: torch.optim.Optimizer, unit: Unit) -> Callable[[], None]:
    """Copy what a step of this unit may change before it fails; returns the function that restores it.

    A fused kernel changes all or nothing, but torch increments the step count before it: for a fused optimizer only the
    counts are copied; for one that works in parts also the parameters, since it changes its state after them. Restoring also
    deletes state that the step created.
    """
    used = [parameter for parameter in unit.parameters if parameter.grad is not None]
    slots = {parameter: dict(optimizer.state.get(parameter, {})) for parameter in used}
    if unit.group.get("fused"):
        values = [own["step"] for own in slots.values() if "step" in own]
        if isinstance(optimizer, InParts):
            values += used
    else:
        values = list[Any]()
        for own in slots.values():
            values += own.values()
        values += used
        values += [parameter.grad for parameter in used]
    restore_values = _copy([value for value in values if isinstance(value, torch.Tensor)])

    def restore() -> None:
        for parameter, before in slots.items():
            if before:
                optimizer.state[parameter].clear()
                optimizer.state[parameter].update(before)
            else:
                optimizer.state.pop(parameter, None)
        restore_values()

    return restore


@torch.no_grad()
def _copy(tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
    """Copy tensors, by one operator per device and dtype; returns the function that copies back, which allocates nothing."""
    kinds = by_device_and_dtype(tensors)
    copies = [torch.cat([tensor.flatten() for tensor in kind]) for kind in kinds]

    @torch.no_grad()
    def restore() -> None:
        for kind, copy in zip(kinds, copies, strict=True):
            parts = copy.split([tensor.numel() for tensor in kind])
            before = [part.view(tensor.shape) for part, tensor in zip(parts, kind, strict=True)]
            torch._foreach_copy_(kind, before)  # pyright: ignore[reportPrivateUsage]

    return restore
