"""Optimizers and EMA weights that are priced from the trace of another setting, against traces of their own."""

from dataclasses import replace
from typing import Any

import pytest

from trainfit.gpus.catalogue import find_gpu
from trainfit.memory.allocator import AllocatorConfig
from trainfit.memory.columns import Columns
from trainfit.memory.derived import derived_columns, derived_ops, traced_as
from trainfit.memory.host_ema import without_ema
from trainfit.memory.priced import Pricer
from trainfit.memory.quick_replay import QuickReplay
from trainfit.models.setting import Setting, make_setting
from trainfit.tracing.stored_trace import StoredTrace
from trainfit.tracing.trace_cache import TraceRequest, get_traces

SMALL = make_setting("timm:resnet10t", resolution=32, precision="fp32", ema=False, micro_batch=2)
OPTIMIZERS: tuple[Any, ...] = ("adam", "sgd", "sgd-plain")


def peaks(trace: Columns) -> tuple[int, int]:
    """Allocated and reserved."""
    replay = QuickReplay(trace, AllocatorConfig())
    return replay.peak_requested_bytes, replay.peak_reserved_bytes


def traces_of(*settings: Setting) -> tuple[StoredTrace, ...]:
    return get_traces(
        [TraceRequest(setting=each, part="training", capability=(8, 0)) for each in settings], cache=False
    )


def update_bytes(ops: Any) -> float:
    return sum(row.bytes for row in ops if row.phase in ("optimizer", "update"))


def test_settings_are_priced_as_they_would_be_traced() -> None:
    others = [replace(SMALL, optimizer=name) for name in OPTIMIZERS]
    with_ema = replace(SMALL, ema=True)
    base, averaged, *traced = traces_of(SMALL, with_ema, *others)
    columns = Columns.of(base.trace)
    assert len({peaks(Columns.of(each.trace)) for each in (base, averaged, *traced)}) == 4  # all but Adam's differ
    for setting, own in zip(others, traced, strict=True):
        assert traced_as(setting) == SMALL
        assert peaks(derived_columns(columns, setting, "training")) == peaks(Columns.of(own.trace)), setting.optimizer
        moved = update_bytes(derived_ops(base.ops, setting))
        assert moved == pytest.approx(update_bytes(own.ops), rel=0.1), setting.optimizer
    assert peaks(without_ema(Columns.of(averaged.trace))) == peaks(columns)


def test_built_in_models_answer_without_ema_weights_and_with_other_optimizers() -> None:
    pricer = Pricer(gpu=find_gpu("RTX 3060"), cache=False)
    nano = make_setting("rfdetr-nano", micro_batch=2, accumulation=2, precision="bf16")
    sgd, plain = (replace(nano, optimizer=name) for name in ("sgd", "sgd-plain"))
    settings = [nano, sgd, plain, replace(nano, ema=False), replace(plain, ema=False)]
    assert all(pricer.answers(each) for each in settings)
    adamw_needs, sgd_needs, plain_needs, without_ema_needs, least_needs = (
        pricer.needs(each).high_bytes for each in settings
    )
    assert least_needs < plain_needs < sgd_needs < adamw_needs
    assert least_needs < without_ema_needs < adamw_needs
    seconds = [pricer.seconds(each, (2, 2)).seconds for each in settings]
    assert seconds[4] < seconds[2] < seconds[1] < seconds[0]
    assert seconds[3] < seconds[0]
    assert not pricer.answers(replace(nano, optimizer="adamw-8bit"))


def test_an_optimizer_with_temporaries_and_that_of_a_users_own_model_are_traced() -> None:
    for setting in (
        replace(SMALL, optimizer="rmsprop"),
        replace(SMALL, optimizer="adamw-8bit"),
        make_setting("mine:task", optimizer="sgd", ema=False),
    ):
        assert traced_as(setting) == setting
