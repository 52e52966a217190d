"""The gradient noise scale: how large an effective batch could usefully be (McCandlish et al. 2018, arXiv 1812.06162).

B_simple = tr(S) / |G|^2, with S the covariance of one image's gradient and G the true gradient: below it twice the
batch needs nearly half the steps, far above it twice the batch changes little. Imports no torch.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from statistics import fmean

FEWEST = 5
"""Measured windows that a hint needs."""
TOO_FEW = f"fewer than {FEWEST} windows were measured"
RECENT = 50
"""The hint speaks of this many windows at most, the last: the scale grows while a model learns."""


@dataclass(frozen=True, kw_only=True)
class NoiseSample:
    """Unbiased estimates from one window; single ones scatter widely, and either may be negative."""

    trace: float
    """Estimate of tr(S)."""
    square: float
    """Estimate of |G|^2."""


@dataclass(frozen=True, kw_only=True)
class NoiseScale:
    """B_simple in images, with the 5 and 95 % points of a bootstrap over windows; infinite: no gradient above the noise."""

    images: float
    """Estimate of the noise scale in images."""
    low: float
    """Low end of its interval."""
    high: float
    """High end of its interval."""
    windows: int
    """Windows that it was estimated from."""


def sample(*, shares_square: float, gradient_square: float, images: int, micro_batches: int) -> NoiseSample:
    """Estimates from one window of micro-batches of any sizes.

    With g_j the mean gradient of micro-batch j of b_j images and g the window's, of B images,
    E[sum b_j |g_j|^2 - B |g|^2] = (J - 1) tr(S): the formulas of the paper's appendix A.1 where all b_j are equal.

    Args:
        shares_square: Sum over j of b_j |g_j|^2.
        gradient_square: |g|^2.
        images: B.
        micro_batches: J, two at least.
    """
    trace = (shares_square - images * gradient_square) / (micro_batches - 1)
    return NoiseSample(trace=trace, square=gradient_square - trace / images)


def noise_scale(samples: Sequence[NoiseSample]) -> NoiseScale | None:
    """The scale over the last `RECENT` windows; None for fewer than `FEWEST`."""
    recent = samples[-RECENT:]
    if len(recent) < FEWEST:
        return None
    draw = random.Random(0)
    drawn = sorted(_ratio(draw.choices(recent, k=len(recent))) for _ in range(400))
    return NoiseScale(images=_ratio(recent), low=drawn[20], high=drawn[379], windows=len(recent))


def _ratio(samples: Sequence[NoiseSample]) -> float:
    trace = fmean(s.trace for s in samples)
    square = fmean(s.square for s in samples)
    return max(0.0, trace / square) if square > 0 else inf


def noise_line(scale: NoiseScale, effective_batch: int) -> str:
    """The hint in words. It is only a guide: a bound on the useful batch (Merrill et al. 2025, arXiv 2505.23971)."""
    if scale.images == inf:
        about = f"above {scale.low:.0f}" if scale.low < inf else "not measurable"
        about += f" (over {scale.windows} windows; the noise hides the gradient)"
    else:
        high = f"{scale.high:.0f}" if scale.high < inf else "more"
        about = f"about {scale.images:.0f} ({scale.low:.0f} to {high} over {scale.windows} windows)"
    place = "of that order"
    if effective_batch < scale.low:
        place = "below it, a larger one would need fewer steps"
    elif effective_batch > scale.high:
        place = "above it, a smaller one would need fewer images"
    return f"gradient noise scale {about}: effective batch {effective_batch} is {place} (a hint only)"
