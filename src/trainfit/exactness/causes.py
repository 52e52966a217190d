"""Derives, from what was recorded of a loop, why its windows do not have the gradient of the big batch."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from trainfit.exactness.fitting import FIT, counted_again, fitted, norm_of, ratio_of
from trainfit.exactness.loop import Cause, Deviation
from trainfit.exactness.record import Gradients, LoopWindow, Run
from trainfit.exactness.runs import How, Runner, parameter_errors, whole

Windows = Sequence[Sequence[Sequence[Any]]]
IGNORED = (-100, -1, 255)
"""Labels that losses usually ignore: torch's losses, detection and segmentation."""


def events(micro: Run, alone: Run, windows: Windows, *, accumulation: int) -> list[Deviation]:
    """Faults that can be seen without the gradient: steps, EMA, schedulers, scalers and exchanges at the wrong moment."""
    findings: list[Deviation] = []

    def say(cause: Cause, explanation: str) -> None:
        if cause not in [each.cause for each in findings]:
            findings.append(Deviation(cause=cause, explanation=explanation))

    batches = sum(len(window) for window in windows)
    if len(micro.windows) > len(alone.windows):
        steps = f"{len(micro.windows)} steps for {batches} micro-batches in {len(windows)} windows"
        say("step", f"the optimizer steps within the window: {steps}; step once after every {accumulation}")
    each = steps_of(alone, windows)
    for number, got in enumerate(micro.windows[: each * len(windows)]):
        expected = sum(len(window) for window in windows[: number // each + 1])
        if 0 < got.taken < expected:
            where = f"after {got.taken} micro-batches where {expected} belong to the windows so far"
            say("step", f"the optimizer steps {where}: step after every {accumulation}")
    for explanation in _dropped(micro, alone, windows, batches):
        say("short last window", explanation)
    for window in (*micro.windows, *alone.windows):
        if window.left_over:
            say("zero_grad", "gradients of the window before are still in .grad: call zero_grad once after every step")
        if window.cleared:
            say(
                "zero_grad",
                "gradients vanish within the window, so only the last micro-batches count: call zero_grad after the step",
            )
        for cause, explanation in _moments(window):
            say(cause, explanation)
    return findings


def steps_of(alone: Run, windows: Windows) -> int:
    """Optimizer steps per window that follow a backward of their own: two if two optimizers take turns."""
    return max(1, len(alone.windows) // max(len(windows), 1))


def _dropped(micro: Run, alone: Run, windows: Windows, batches: int) -> Iterator[str]:
    short = len(windows[-1])
    if len(micro.windows) >= len(alone.windows):
        return
    if micro.trailing_backwards:
        yield (
            f"{micro.trailing_backwards} micro-batches at the end go backward without a step after them: "
            "step also where the data end"
        )
    elif micro.taken <= batches - short or len(micro.windows) == len(windows) - 1:
        yield f"the last window, of {short} micro-batches, is left out: train on it too, divided by its own count"


def _moments(window: LoopWindow) -> Iterator[tuple[Cause, str]]:
    """Yield what happens more than once, or too late, within one window."""
    if window.backwards > 1:
        if len(window.averages) > 1:
            yield (
                "EMA",
                f"the average of the weights moves {len(window.averages)} times in one window: update it once after the step",
            )
        counts = [len(moments) for moments in window.schedules.values()]
        if max(counts, default=0) > 1:
            yield (
                "scheduler",
                f"the scheduler steps {max(counts)} times in one window: step it once after the optimizer",
            )
        elif len({rates for rates in window.rates if rates}) > 1:
            yield "scheduler", "the learning rate changes within the window: set it once after the step"
        if len({backwards for backwards, _ in window.clips}) > 1:
            yield "clip", "the gradient is clipped within the window: clip once, before the step"
    if any(scaled for _, scaled in window.clips):
        yield (
            "scaler",
            "the gradient is clipped while it is still scaled: call scaler.unscale_(optimizer) before the clip",
        )
    if window.scaled_at_step:
        yield "scaler", "the optimizer steps on scaled gradients: call scaler.step(optimizer), which unscales them"
    if len(window.scales) > 1:
        yield (
            "scaler",
            f"the loss scale changes within the window ({sorted(window.scales)}): call scaler.update() once after the step",
        )
    if window.synchronised and not window.synchronised[-1]:
        yield (
            "not synchronised",
            "the window's last micro-batch runs in no_sync, so the ranks step on gradients of their own: leave no_sync for it",
        )


def differences(
    runner: Runner,
    micro: Run,
    alone: Run,
    windows: Windows,
    findings: Sequence[Deviation],
    *,
    accumulation: int,
    limit: float,
) -> list[Deviation]:
    """Find out why the gradient of a window differs from that of the big batch; nothing if it does not."""
    known = [finding.cause for finding in findings]
    if any(cause in known for cause in ("step", "zero_grad", "clip")):
        return []  # they change the gradient themselves
    result: list[Deviation] = []
    if _error(micro.windows[0], alone.windows[0]) > limit:
        result = _of_first_window(runner, micro, alone, windows[0], accumulation=accumulation, limit=limit)
        result += _short_window(runner, micro, windows, steps_of(alone, windows), accumulation=accumulation)
    else:
        for number in range(1, min(len(micro.windows), len(alone.windows))):
            if _error(micro.windows[number], alone.windows[number]) > limit:
                result = _of_later_window(runner, micro, alone, windows, number, accumulation=accumulation, limit=limit)
                break
    return [finding for finding in result if finding.cause not in known or finding.cause == "short last window"]


def _error(one: LoopWindow, other: LoopWindow) -> float:
    return max(parameter_errors(one.gradients, other.gradients).values(), default=0.0)


def _of_later_window(
    runner: Runner, micro: Run, alone: Run, windows: Windows, number: int, *, accumulation: int, limit: float
) -> list[Deviation]:
    """Explain a window that is not exact although the first one is, by the number or the contents of its micro-batches."""
    one = micro.windows[number]
    other = alone.windows[number]
    ratio = ratio_of(one.gradients, other.gradients)
    rest = windows[number // steps_of(alone, windows) :]
    size = len(rest[0])
    if size < accumulation and ratio is not None:
        return [
            Deviation(
                cause="short last window",
                explanation=f"its gradient is {ratio:.4g} of the big batch's: it has {size} micro-batches, and its losses "
                f"are weighted as those of {accumulation}: divide by its own count (the normaliser)",
            )
        ]
    if size > 1:
        again_micro = runner.run(rest[:1], accumulation=accumulation)
        again_alone = runner.run(whole(rest[:1]), accumulation=1)
        if (
            again_micro.windows
            and again_alone.windows
            and _error(again_micro.windows[0], again_alone.windows[0]) > limit
        ):
            return _of_first_window(runner, again_micro, again_alone, rest[0], accumulation=accumulation, limit=limit)
    return [_unknown(_error(one, other), f"in window {number + 1}, which is exact on its own")]


def _short_window(runner: Runner, micro: Run, windows: Windows, each: int, *, accumulation: int) -> Iterator[Deviation]:
    """Whether a short last window has another weight than by itself, with its own count: whatever else is wrong too."""
    size = len(windows[-1])
    if size == accumulation or len(windows) == 1 or len(micro.windows) != each * len(windows):
        return
    how = How(one_canvas=True, freeze_norms=bool(micro.batch_norms), mute=bool(micro.random))
    among = runner.run(windows, accumulation=accumulation, how=how).windows
    by_itself = runner.run(windows[-1:], accumulation=size, how=how).windows
    if len(among) != each * len(windows) or not by_itself:
        return
    ratio = ratio_of(among[-each].gradients, by_itself[0].gradients)
    if ratio is not None and abs(ratio - 1) > FIT:
        yield Deviation(
            cause="short last window",
            explanation=f"its gradient is {ratio:.4g} of what it is by itself: it has {size} micro-batches, and its losses "
            f"are weighted as those of {accumulation}: divide by its own count (the normaliser)",
        )


def _of_first_window(
    runner: Runner, micro: Run, alone: Run, window: Sequence[Sequence[Any]], *, accumulation: int, limit: float
) -> list[Deviation]:
    """Remove all possible causes, then all but one: those that make a difference are causes. Then judge the weights."""
    error = _error(micro.windows[0], alone.windows[0])
    whole_window = whole([window])
    canvases = runner.shapes([*window, whole_window[0][0]])
    possible: dict[Cause, str] = {}
    if len(canvases) > 1:
        possible["canvas padding"] = "one_canvas"
    if micro.batch_norms or alone.batch_norms:
        possible["BatchNorm"] = "freeze_norms"
    if micro.random or alone.random:
        possible["RNG"] = "mute"
    clean = How(**dict.fromkeys(possible.values(), True))

    def runs(how: How) -> tuple[Run, Run]:
        return (
            runner.run([window], accumulation=accumulation, how=how),
            runner.run(whole_window, accumulation=1, how=how),
        )

    result: list[Deviation] = []
    one, other = runs(clean)
    left = _error(one.windows[0], other.windows[0])
    for cause, knob in possible.items():
        with_cause = [run.windows[0] for run in runs(replace(clean, **{knob: False}))]
        if _error(with_cause[0], with_cause[1]) > max(limit, 3 * left if left <= limit else 0) and _differs(
            with_cause, [one.windows[0], other.windows[0]], limit
        ):
            result.append(Deviation(cause=cause, explanation=_inherent(cause, micro, canvases)))
    if left > limit and micro.random & {"Python's random", "numpy.random"}:
        other_seed = runner.run(whole_window, accumulation=1, how=replace(clean, seed=1))
        if _error(other_seed.windows[0], other.windows[0]) > limit:
            random_numbers = Deviation(cause="RNG", explanation=_inherent("RNG", micro, canvases))
            return [*(each for each in result if each.cause != "RNG"), random_numbers]
    if left > limit:
        result += _weights(runner, one, other, window, how=clean, limit=limit)
    elif not result:
        result.append(
            _unknown(error, "which goes away when padding, BatchNorm and random numbers are taken away together")
        )
    return result


def _differs(with_cause: Sequence[LoopWindow], without: Sequence[LoopWindow], limit: float) -> bool:
    """Whether a cause changes the distance between micro-batches and big batch, beyond what remains without it."""

    def gap(pair: Sequence[LoopWindow]) -> Gradients:
        mine = pair[0].gradients
        truth = pair[1].gradients
        return {name: mine.get(name, torch.zeros_like(value)) - value for name, value in truth.items()}

    one = gap(with_cause)
    other = gap(without)
    size = max(norm_of(with_cause[1].gradients), 1e-300)
    return norm_of({name: one[name] - other[name] for name in one if name in other}) / size > limit


def _inherent(cause: Cause, micro: Run, canvases: set[tuple[Any, ...]]) -> str:
    if cause == "BatchNorm":
        kinds = ", ".join(micro.batch_norms)
        return (
            f"{kinds} uses the micro-batch's statistics, which no accumulation makes those of the window: "
            "freeze it, or use GroupNorm"
        )
    if cause == "RNG":
        kinds = ", ".join(sorted(micro.random)) or "the loop"
        return f"random numbers ({kinds}) are drawn by micro-batch, others than for the big batch: equal only in distribution"
    return (
        f"micro-batches are padded to {len(canvases)} different canvases, and padding changes the result: pad each to "
        "the canvas of its window"
    )


def _weights(
    runner: Runner, micro: Run, alone: Run, window: Sequence[Sequence[Any]], *, how: How, limit: float
) -> list[Deviation]:
    """Compare the weight that the loop gives each micro-batch with its weight in the big batch."""
    mine = micro.windows[0].gradients
    truth = alone.windows[0].gradients
    parts = len(window)
    ratio = ratio_of(mine, truth)
    if ratio is not None:
        if abs(ratio - parts) < FIT * parts:
            why = f"losses of {parts} micro-batches are added, not divided by their number: divide each by {parts}"
        elif abs(ratio * parts - 1) < FIT:
            why = f"losses are divided by {parts} once too often"
        else:
            why = "every micro-batch has the same wrong weight"
        return [Deviation(cause="normaliser", explanation=f"the gradient is {ratio:.6g} x the big batch's: {why}")]
    scaled = counted_again(mine, truth, parts, limit)
    if scaled:
        return [
            Deviation(
                cause="scale parameter",
                explanation=f"{', '.join(scaled[:3])} is in the loss of every one of the {parts} backward passes, so its gradient "
                f"is {parts} x the big batch's, while all others are right: keep its gradient of one pass, or divide it",
            )
        ]
    own = [each.gradients for each in runner.run([window], accumulation=1, how=how).windows]
    weights, residual = fitted(own, truth)
    if residual < FIT:
        used, _ = fitted(own, mine)
        text = f"micro-batches weigh {_numbers(used)}, in the big batch {_numbers(weights)}"
        ignored = _ignored(micro, weights) or _ignored_in_data(runner, window, weights)
        if ignored:
            return [
                Deviation(
                    cause="ignored labels", explanation=f"{text}: {ignored}; divide sums by the window's valid labels"
                )
            ]
        sizes = [len(m) for m in window]
        if _same(weights, sizes):
            return [Deviation(cause="normaliser", explanation=f"{text}: they have {sizes} items; weight means by them")]
        return [
            Deviation(
                cause="normaliser",
                explanation=f"a mean of means: {text}; divide each sum by the count of the whole window",
            )
        ]
    if micro.pairs and any(len(m) in micro.pairs for m in window) and sum(len(m) for m in window) in alone.pairs:
        return [
            Deviation(
                cause="coupled loss",
                explanation="the loss compares every sample with every other of its batch (a square product of that side), so "
                "micro-batches lack pairs: use cached features (trainfit.Contrastive)",
            )
        ]
    text = "no weights of the micro-batches give the big batch's gradient: several loss terms with a count of their own each"
    if _label_shares(micro):
        return [Deviation(cause="ignored labels", explanation=f"{text}, one of which leaves labels out")]
    return [Deviation(cause="normaliser", explanation=f"{text} (mean of means), or a loss that couples samples")]


def _ignored(micro: Run, weights: Sequence[float]) -> str:
    shares = _label_shares(micro)
    for counts in shares:
        if len(counts) == len(weights) and _same(weights, counts):
            return f"they have {counts} labels that count, the others are ignored"
    return ""


def _ignored_in_data(runner: Runner, window: Sequence[Sequence[Any]], weights: Sequence[float]) -> str:
    """Describe the case that the weights equal the numbers of labels other than a usual mark of ignored ones; else empty."""
    tensors = [runner.tensors(m) for m in window]
    for value in IGNORED:
        for several in zip(*tensors, strict=False):
            if not any(t.is_floating_point() or t.dtype == torch.bool for t in several):
                counts = [int((t != value).sum()) for t in several]
                if counts != [t.numel() for t in several] and _same(weights, counts):
                    return f"they have {counts} labels that are not {value}, the others are ignored"
    return ""


def _label_shares(micro: Run) -> list[list[int]]:
    """Numbers of counted labels in each backward, for the cross entropies that ignored some."""
    backwards = micro.windows[0].backwards if micro.windows else 0
    calls = micro.labels
    if not calls or not backwards or len(calls) % backwards or not any(ignored for _, ignored in calls):
        return []
    each = len(calls) // backwards
    return [[total - ignored for total, ignored in calls[k::each]] for k in range(each)]


def _same(weights: Sequence[float], counts: Sequence[float]) -> bool:
    total = sum(counts)
    return total > 0 and all(abs(w - c / total) < FIT for w, c in zip(weights, counts, strict=True))


def _numbers(weights: Sequence[float]) -> str:
    return ", ".join(f"{weight:.3g}" for weight in weights)


def _unknown(error: float, where: str) -> Deviation:
    return Deviation(
        cause="unknown",
        explanation=f"the gradient is {error:.2g} off the big batch's, {where}: none of the known causes explains it",
    )
