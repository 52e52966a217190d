"""Hungarian matching of RF-DETR: what a trace shows of it, and its time."""

import pytest
import torch
from rfdetr.models import _assignment

from trainfit.models.rfdetr import step


def test_a_traced_solve_gives_what_upstream_gives_but_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes, groups = [3, 5], 2
    costs = [torch.rand(groups * 20, sum(sizes), generator=generator) for _ in range(3)]
    known = _assignment.assign_many_bucketed(costs, sizes, groups)
    monkeypatch.setattr(_assignment, "_solve_to_indices", step._solve_on_device)  # pyright: ignore[reportPrivateUsage]
    traced = _assignment.assign_many_bucketed(costs, sizes, groups)
    for known_layer, traced_layer in zip(known, traced, strict=True):
        for image, (known_pair, traced_pair) in enumerate(zip(known_layer, traced_layer, strict=True)):
            for known_index, traced_index in zip(known_pair, traced_pair, strict=True):
                assert traced_index.shape == known_index.shape == (groups * sizes[image],)
                assert traced_index.dtype == known_index.dtype
            for rows in (known_pair[0], traced_pair[0]):
                assert len(set(rows.tolist())) == len(rows)  # no query is matched twice


def test_a_traced_solve_leaves_the_costs_on_the_device() -> None:
    costs = torch.empty(6, 20, 5, device="meta")  # which has no values: a copy to the host would raise
    rows, columns = step._solve_on_device(costs, 5)  # pyright: ignore[reportPrivateUsage]
    assert rows.device.type == columns.device.type == "cpu"
    assert rows.shape == columns.shape == (6, 5)
