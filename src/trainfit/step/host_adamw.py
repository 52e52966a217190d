"""AdamW whose moments are in host memory: they come to the device part by part, for the moment of the step."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch.optim.adamw import adamw

from trainfit.step.units import bounded_parts

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """Parameters of one device and dtype that are updated together."""

    parameters: Sequence[torch.Tensor]
    """The parameters, on their device."""
    moments: torch.Tensor
    """Both moments of all of them, one row each; page-locked where the parameters are on a GPU."""

    def views(self, moments: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        """Each parameter's moments in rows like those of `moments`, laid out in memory as the parameter is."""
        begin = 0
        views: list[tuple[torch.Tensor, ...]] = []
        for parameter in self.parameters:
            rows = (row[begin : begin + parameter.numel()] for row in moments)
            views.append(
                tuple(row.as_strided(parameter.size(), parameter.stride(), row.storage_offset()) for row in rows)
            )
            begin += parameter.numel()
        return views


class HostAdamW(torch.optim.AdamW):
    """Fused AdamW with the moments in host memory; the same values, bit for bit.

    Known limits: of the device's memory it takes a buffer for the moments of the largest part (16 MiB, or twice the largest
    parameter), and the link carries every moment to the device and back once a step, while nothing else is done.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        """Make the state too."""
        super().__init__(groups, fused=True)
        self._parts = {
            id(group["params"][0]): _parts_of(group["params"]) for group in self.param_groups if group["params"]
        }
        self._part_of = {id(p): part for part in chain(*self._parts.values()) for p in part.parameters}
        self._buffer_elements = max((part.moments.numel() for part in self._part_of.values()), default=0)
        for part in chain(*self._parts.values()):
            for parameter, moments in zip(part.parameters, part.views(part.moments), strict=True):
                count = torch.zeros((), dtype=torch.float32, device=parameter.device)
                self.state[parameter] = {"step": count, **dict(zip(MOMENTS, moments, strict=True))}

    def parts(self, group: Mapping[str, Any]) -> list[list[torch.Tensor]]:
        """A group's parameters as they are updated together; see `step.units.InParts`."""
        return (
            [list(part.parameters) for part in self._parts.get(id(group["params"][0]), ())] if group["params"] else []
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, part by part.

        The last operator of a part is the one that changes its moments: a failure before it leaves them as they were.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for part in {id(each): each for each in map(self._part, group["params"])}.values():
                self._step_part(group, part)
        return loss

    def _part(self, parameter: torch.Tensor) -> _Part:
        return self._part_of[id(parameter)]

    def _step_part(self, group: Mapping[str, Any], part: _Part) -> None:
        wanted = {id(p) for p in group["params"] if p.grad is not None}
        if not wanted:
            return
        device = part.parameters[0].device
        buffer = torch.empty(self._buffer_elements, dtype=part.moments.dtype, device=device)
        moments = buffer[: part.moments.numel()].view(part.moments.shape)
        moments.copy_(part.moments, non_blocking=True)
        used = [(p, own) for p, own in zip(part.parameters, part.views(moments), strict=True) if id(p) in wanted]
        beta1, beta2 = group["betas"]
        adamw(
            [p for p, _ in used],
            [_gradient(p) for p, _ in used],
            [first for _, (first, _) in used],
            [second for _, (_, second) in used],
            [],
            [self.state[p]["step"] for p, _ in used],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        part.moments.copy_(moments)  # waits: what saves the state reads it on the host

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Fill the moments in place: torch's own would move them to the device."""
        saved: Mapping[Any, dict[str, Any]] = state_dict["state"]
        own = {p: {name: self.state[p][name] for name in MOMENTS} for p in _parameters(self.param_groups)}
        counts = {key: {name: v for name, v in each.items() if name not in MOMENTS} for key, each in saved.items()}
        super().load_state_dict({**state_dict, "state": counts})
        for key, parameter in zip(_parameters(state_dict["param_groups"]), own, strict=True):
            for name, moment in own[parameter].items():
                if key in saved:
                    moment.copy_(saved[key][name])
            self.state[parameter].update(own[parameter])


def _parts_of(parameters: Sequence[torch.Tensor]) -> list[_Part]:
    return [_part(part) for part in bounded_parts(parameters)]


def _part(parameters: Sequence[torch.Tensor]) -> _Part:
    first = parameters[0]
    pinned = first.is_cuda and torch.cuda.is_available()  # a trace has CUDA tensors and no CUDA
    elements = sum(p.numel() for p in parameters)
    return _Part(parameters=parameters, moments=torch.zeros(2, elements, dtype=first.dtype, pin_memory=pinned))


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _parameters(groups: Iterable[Mapping[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(group["params"] for group in groups))
