"""Rates for a card of which only the memory is known."""

from dataclasses import replace
from functools import cache

from trainfit.gpus.catalogue import FLOPS_RATES, Gpu, find_gpu

RATES_LIKE = "RTX 3060"
"""The card whose rates rank settings for a card of which only the memory is known."""


def rated(gpu: Gpu) -> Gpu:
    """The card; with the rates of another where its own are not known: settings are ranked, times mean nothing."""
    if gpu.bandwidth_bytes_per_s is not None and gpu.fp32_flops_per_s is not None:
        return gpu
    like = _like()
    return replace(gpu, **{name: getattr(like, name) for name in ("bandwidth_bytes_per_s", *FLOPS_RATES)})


@cache
def _like() -> Gpu:
    return find_gpu(RATES_LIKE)
