"""An optimizer's step in units, each of which happens as a whole or not at all."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trainfit.errors import HalfUpdated
from trainfit.step.attempt import attempt

UNIT_BYTES = 8 * 2**20
"""Parameters of one unit where a unit is copied before its step: what bounds the copies, which hold parameters, gradients
and state (for AdamW four times this). A larger parameter is a unit of its own."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Parameters of one group, one device and one dtype that are updated together."""

    group: dict[str, Any]
    """The parameter group that they belong to."""
    parameters: list[torch.Tensor]


def by_kind(tensors: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Tensors of one device and dtype together: what one `_foreach` or `_fused` kernel changes at once."""
    kinds: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(kinds.values())


def units_of(optimizer: torch.optim.Optimizer) -> list[Unit]:
    """Cut an optimizer's parameters into units, in the order of its groups.

    A fused optimizer changes all parameters of a kind in one kernel, which allocates nothing: they are one unit. Others
    run many operators, of which any may fail: their units are small, so that they can be copied first.
    """
    units: list[Unit] = []
    for group in optimizer.param_groups:
        for kind in by_kind(group["params"]):
            parts = [kind] if group.get("fused") else _bounded(kind)
            units += [Unit(group=group, parameters=part) for part in parts]
    return units


def step_unit(optimizer: torch.optim.Optimizer, unit: Unit) -> None:
    """Run the optimizer's step on one unit; where it fails, put everything back that it may have changed.

    Raises:
        HalfUpdated: it failed, and so did putting back.
    """
    put_back = _keep(optimizer, unit)
    groups = optimizer.param_groups
    optimizer.param_groups = [{**unit.group, "params": unit.parameters}]
    try:
        optimizer.step()
    except BaseException:
        _, failure = attempt(put_back)
        if failure is not None:
            raise HalfUpdated(f"a failed optimizer step could not be undone: {failure}") from None
        raise
    finally:
        optimizer.param_groups = groups


def _bounded(parameters: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Cut a list into runs of at most `UNIT_BYTES`."""
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


def _keep(optimizer: torch.optim.Optimizer, unit: Unit) -> Callable[[], None]:
    """Copy what a step of this unit may change before it fails; the function that is returned puts it back.

    A fused kernel changes all or nothing, but torch counts the step before it: of a fused optimizer the counts alone are
    copied. State that the step made is dropped again.
    """
    used = [parameter for parameter in unit.parameters if parameter.grad is not None]
    slots = {parameter: dict(optimizer.state.get(parameter, {})) for parameter in used}
    if unit.group.get("fused"):
        values = [own["step"] for own in slots.values() if "step" in own]
    else:
        values = [value for own in slots.values() for value in own.values()]
        values += used
        values += [parameter.grad for parameter in used]
    put_values_back = _copy([value for value in values if isinstance(value, torch.Tensor)])

    def put_back() -> None:
        for parameter, before in slots.items():
            if before:
                optimizer.state[parameter].clear()
                optimizer.state[parameter].update(before)
            else:
                optimizer.state.pop(parameter, None)
        put_values_back()

    return put_back


@torch.no_grad()
def _copy(tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
    """Copy tensors, by one operator a kind; the function that is returned copies back, and allocates nothing."""
    kinds = by_kind(tensors)
    copies = [torch.cat([tensor.flatten() for tensor in kind]) for kind in kinds]

    @torch.no_grad()
    def put_back() -> None:
        for kind, copy in zip(kinds, copies, strict=True):
            parts = copy.split([tensor.numel() for tensor in kind])
            before = [part.view(tensor.shape) for part, tensor in zip(parts, kind, strict=True)]
            torch._foreach_copy_(kind, before)  # pyright: ignore[reportPrivateUsage]

    return put_back
