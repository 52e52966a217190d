"""Searches for the fastest setting that fits. Pure functions over prices that the caller provides."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from math import ceil

from trainfit.gpus.context import ByteRange
from trainfit.memory.coupled import coupled_batches
from trainfit.memory.predict import RESERVE, Prediction, has_reserve
from trainfit.models.setting import Setting
from trainfit.planning.candidates import (
    FREE,
    KNEE,
    MEMORY,
    STATE,
    batches,
    cuts,
    describe,
    explained,
    faster,
    least_of,
    seconds_of,
    turned,
)
from trainfit.planning.plan import Candidate, Saving, SearchRequest, SearchResult, Verdict
from trainfit.planning.prices import Prices
from trainfit.step.names import Checkpointing

EVAL_MICRO_BATCHES = (2, 4, 8, 16, 32)
PARTIAL_TRIES = 3
TRACE_GAIN = 0.1
"""Speed that is worth the minutes which tracing a candidate takes; what gains less is named, not priced."""


@dataclass
class _Search:
    """The state of a search: the candidates considered so far, each priced once."""

    request: SearchRequest
    """What is asked."""
    prices: Prices
    """Tells the memory of a setting."""
    note: Callable[[str], None]
    """Called with what is done next."""
    seen: dict[Setting, Candidate] = field(default_factory=dict[Setting, Candidate])
    """Setting -> its candidate."""
    times: dict[Setting, float] = field(default_factory=dict[Setting, float])
    """Setting -> seconds of an optimizer step."""
    not_priced: list[str] = field(default_factory=list[str])
    """Why settings were left out."""

    def price(self, base: Setting, micro_batch: int) -> Candidate:
        setting = self.at(base, micro_batch)
        known = self.seen.get(setting)
        if known is None or known.needs_more:
            self.note(f"pricing {describe(setting)}...")
            self.seen[setting] = self.candidate(base, micro_batch, self.prices.needs(setting))
        return self.seen[setting]

    def could_fit(self, base: Setting, micro_batch: int) -> bool:
        """Whether a setting may fit. It cannot if the lower bound of its need exceeds the budget: that bound is then its price,
        without replays.
        """
        setting = self.at(base, micro_batch)
        if setting not in self.seen:
            least = self.prices.least(setting)
            if least <= self.request.budget_bytes:
                return True
            needs = ByteRange(low_bytes=least, high_bytes=least)
            self.seen[setting] = replace(self.candidate(base, micro_batch, needs), needs_more=True)
        return not self.seen[setting].needs_more

    def does_fit(self, base: Setting, micro_batch: int) -> bool:
        """Whether a setting fits with the requested reserve; it is priced only if it may fit."""
        return self.could_fit(base, micro_batch) and self.fits(self.price(base, micro_batch).needs)

    def at(self, base: Setting, micro_batch: int) -> Setting:
        return replace(base, micro_batch=micro_batch, accumulation=len(cuts(self.request.share, micro_batch)))

    def candidate(self, base: Setting, micro_batch: int, needs: ByteRange) -> Candidate:
        seconds = self.speed(base, micro_batch)
        return Candidate(
            setting=self.at(base, micro_batch),
            cuts=cuts(self.request.share, micro_batch),
            needs=needs,
            seconds=seconds,
            images_per_s=self.request.effective_batch / seconds,
            verdict=self.verdict(needs),
            reason="",
        )

    def verdict(self, needs: ByteRange) -> Verdict:
        budget_bytes = self.request.budget_bytes
        if needs.high_bytes <= (1 - RESERVE) * budget_bytes:
            return "fits"
        return "fits, no reserve" if needs.high_bytes <= budget_bytes else "does not fit"

    def fits(self, needs: ByteRange) -> bool:
        """Whether a need fits with the requested reserve."""
        return needs.high_bytes <= (1 - self.request.reserve) * self.request.budget_bytes

    def speed(self, base: Setting, micro_batch: int) -> float:
        """Seconds of a window."""
        setting = self.at(base, micro_batch)
        if setting not in self.times:
            estimate = self.prices.seconds(setting, cuts(self.request.share, micro_batch))
            self.times[setting] = estimate.seconds + self.request.exchange_s
        return self.times[setting]

    def batches(self) -> tuple[int, ...]:
        if self.request.micro_batch is not None:
            return (self.request.micro_batch,)
        return (coupled_batches if self.prices.traces_each(self.request.setting) else batches)(self.request.share)

    def largest(self, base: Setting) -> int | None:
        """The largest micro-batch that fits, by bisection, which also tries the next larger one. If none fits, the smallest
        is priced.
        """
        sizes = self.batches()
        low = -1
        high = len(sizes)
        while high - low > 1:
            middle = (low + high) // 2
            if self.does_fit(base, sizes[middle]):
                low = middle
            else:
                high = middle
        if low < 0:
            self.price(base, sizes[0])
        return sizes[low] if low >= 0 else None

    def fastest(self, base: Setting) -> Candidate | None:
        """The candidate of one base with the smallest micro-batch within `KNEE` of the fastest that fits; the remaining memory
        is left as headroom.
        """
        largest = self.largest(base)
        if largest is None:
            return None
        sizes = self.worth(largest)
        best = min(sizes, key=lambda b: (self.speed(base, b), b))
        while not self.does_fit(base, best):  # memory may not grow monotonically with the micro-batch
            sizes.remove(best)
            best = min(sizes, key=lambda b: (self.speed(base, b), b))
        slowest = (1 + KNEE) * self.speed(base, best)
        within = [b for b in sizes if b <= best and self.speed(base, b) <= slowest]
        best = next(b for b in within if self.does_fit(base, b))
        smaller = [b for b in self.worth(best) if b < best]
        if smaller:
            self.price(base, smaller[-1])
        return self.price(base, best)

    def ideal(self, base: Setting) -> float:
        """Seconds of a window without recompute and without a memory limit: a lower bound for all candidates."""
        return min(self.speed(base, b) for b in self.worth(self.request.share))

    def worth(self, largest: int) -> list[int]:
        """Micro-batches to compare. One image is not faster than two, and needs its own trace."""
        sizes = [b for b in self.batches() if b <= largest]
        return [b for b in sizes if b > 1] or sizes

    def bases(self) -> Iterator[Setting]:
        """Settings without a micro-batch, in the order of their cost: EMA weights to the host, then recompute."""
        requested = self.request.checkpointing
        for checkpointing in ("none", "all") if requested is None else (requested,):
            base = replace(self.request.setting, checkpointing=checkpointing)
            if requested is None and checkpointing == "all" and not self.prices.blocks(self.request.setting):
                return
            yield base
            for knob in FREE:
                for _, setting in turned(base, knob):
                    yield setting

    def best(self) -> Candidate | None:
        """The fastest candidate that fits. More expensive bases are considered as long as they may be faster; settings that
        cannot be faster than the best so far are not priced.
        """
        best: Candidate | None = None
        ideal = self.ideal(replace(self.request.setting, checkpointing=self.request.checkpointing or "none"))
        for base in self.bases():
            if best is None or self.may_gain(base, best):
                best = faster(best, self.fastest(base))
            if best is not None and seconds_of(best) <= (1 + KNEE) * ideal:
                return best
        if best is None:
            return None if self.request.reserve else self.last_resort()
        return best if self.request.checkpointing is not None else faster(best, self.partial(best))

    def may_gain(self, base: Setting, best: Candidate) -> bool:
        """Whether the candidate that `fastest` would choose of a base may be faster than the best candidate, and may fit."""
        sizes = self.worth(self.request.share)
        for fastest in sizes:
            slowest = (1 + KNEE) * self.speed(base, fastest)
            smallest = next(b for b in sizes if self.speed(base, b) <= slowest)
            if self.speed(base, smallest) < seconds_of(best) and self.could_fit(base, fastest):
                return True
        return False

    def last_resort(self) -> Candidate | None:
        """If nothing else fits: the optimizer's state in host memory, then saved activations, at the smallest micro-batch.

        They are tried in the order of their cost: state is copied once per window, activations once per image. Neither is
        faster than what more memory would allow, so that more memory never makes a plan slower. Offloaded activations need
        their own trace, so that they are not tried for speed alone. Recomputing a block takes less time than copying its
        activations to the host and back, so that only what recompute leaves is offloaded.
        """
        for setting in self.resorts():
            if setting.checkpointing == "offload" and self.request.checkpointing is None:
                self.note("nothing fits: pricing saved activations in host memory")
            candidate = self.price(setting, self.batches()[0])
            if self.fits(candidate.needs):
                return candidate
        return None

    def resorts(self) -> Iterator[Setting]:
        """Settings to try last, cheapest first."""
        least = self.request.setting
        for knob in FREE:
            least = next((setting for _, setting in turned(least, knob)), least)
        on_host = [setting for _, setting in turned(least, STATE)]
        if self.request.checkpointing is not None:
            yield from (replace(setting, checkpointing=self.request.checkpointing) for setting in on_host)
            return
        recomputed: Checkpointing = "all" if self.prices.blocks(least) else "none"
        yield from (replace(setting, checkpointing=recomputed) for setting in on_host)
        yield from (replace(setting, checkpointing="offload") for setting in (least, *on_host))

    def partial(self, other: Candidate) -> Candidate | None:
        """A candidate that recomputes only some blocks, if that is faster than `other`.

        Time and memory are interpolated between none and all blocks before a candidate is priced.
        """
        blocks = self.prices.blocks(other.setting)
        found = self.interpolated(other, blocks)
        if found is None:
            return None
        seconds, b, count, base = found
        gain = seconds_of(other) / seconds - 1
        if gain < KNEE:
            return None
        if gain < TRACE_GAIN and not self.prices.known(self.at(replace(base, checkpointing=count), b)):
            self.not_priced.append(
                f"Recomputing {count} of {blocks} blocks at micro-batch {b} may be {gain:.0%} faster; "
                f"--micro-batch {b} --checkpointing {count} traces and prices it, which takes minutes."
            )
            return None
        for _ in range(PARTIAL_TRIES):
            candidate = self.price(replace(base, checkpointing=count), b)
            if self.fits(candidate.needs):
                return candidate
            count += -(-blocks // 8)
            if count >= blocks:
                break
        return None

    def interpolated(self, other: Candidate, blocks: int) -> tuple[float, int, int, Setting] | None:
        """Of the fastest setting that recomputes some blocks: its seconds, micro-batch, number of blocks, and base.

        Those that may be the fastest come first, and what cannot be faster than the best so far is not priced.
        """
        bounds = sorted(self.bounds(other), key=lambda each: each[:2])
        best: tuple[float, int, int, Setting] | None = None
        for bound, b, none in bounds:
            if best is not None and bound > best[0]:
                break
            every = replace(none, checkpointing="all")
            if self.does_fit(none, b) or not self.does_fit(every, b):
                continue
            most = self.price(none, b)
            least = self.price(every, b)
            freed = most.needs.high_bytes - least.needs.high_bytes
            over = most.needs.high_bytes - (1 - self.request.reserve) * self.request.budget_bytes
            count = ceil(blocks * over / max(1, freed))
            if 0 < count < blocks:
                seconds = seconds_of(most) + (seconds_of(least) - seconds_of(most)) * count / blocks
                if best is None or (seconds, b, count) < best[:3]:
                    best = seconds, b, count, none
        return best

    def bounds(self, other: Candidate) -> Iterator[tuple[float, int, Setting]]:
        """Of each setting that may be faster than `other` with some blocks recomputed: the least seconds, micro-batch and base."""
        for none in (base for base in self.bases() if base.checkpointing == "none"):
            for b in self.batches():
                if (1 + KNEE) * self.speed(none, b) > seconds_of(other):
                    continue  # recomputing some blocks is not faster than recomputing none
                seconds = self.least_seconds(none, replace(none, checkpointing="all"), b)
                if (1 + KNEE) * seconds <= seconds_of(other):
                    yield seconds, b, none

    def least_seconds(self, none: Setting, every: Setting, micro_batch: int) -> float:
        """A lower bound of the seconds of a window that recomputes as many blocks as it needs to fit, interpolated as in
        `partial` from the lower bounds of the two needs.
        """
        most, least = (self.prices.least(self.at(each, micro_batch)) for each in (none, every))
        over = most - (1 - self.request.reserve) * self.request.budget_bytes
        share = min(1.0, over / (most - least)) if over > 0 and most > least else 0.0
        slowest = self.speed(every, micro_batch)
        fastest = self.speed(none, micro_batch)
        return fastest + (slowest - fastest) * share

    def evaluation(self, chosen: Candidate) -> tuple[Candidate, Prediction] | None:
        """The candidate with the smallest evaluation micro-batch within `KNEE` of the fastest that fits; None if not even one
        image fits.
        """
        requested = self.request.setting.eval_micro_batch
        of_training = (chosen.setting.micro_batch,) if self.prices.traces_each(chosen.setting) else EVAL_MICRO_BATCHES
        sizes = of_training if requested is None else (requested,)
        time = {e: self.prices.seconds(chosen.setting, (e,), "evaluation").seconds / e for e in sizes}
        knee = next(e for e in sizes if time[e] <= (1 + KNEE) * min(time.values()))
        for e in (*reversed([e for e in sizes if e <= knee]), *(() if requested else (1,))):
            setting = replace(chosen.setting, eval_micro_batch=e)
            prediction = self.prices.predict(setting, chosen.cuts)
            leaves_reserve = not self.request.reserve or has_reserve(prediction.needs, prediction.budget)
            if leaves_reserve and prediction.evaluation.verdict == "fits":
                return replace(chosen, setting=setting, needs=prediction.needs), prediction
        return None

    def price_neighbours(self, settings: Iterable[Setting]) -> None:
        """Price settings with other micro-batches, powers of two and the whole share, to be shown beside `settings`.

        Contrastive windows that cannot be composed are left out, since each would need its own trace.
        """
        if self.prices.traces_each(self.request.setting):
            return
        for base in dict.fromkeys(replace(each, micro_batch=1, accumulation=1) for each in settings):
            for b in self.batches():
                if b > 1 and (b & (b - 1) == 0 or b == self.request.share) and self.could_fit(base, b):
                    self.price(base, b)

    def frees(self, chosen: Candidate) -> Iterator[Saving]:
        """The memory that knobs which change only memory and time would free of the chosen setting, if no trace is needed."""
        for knob in MEMORY:
            for flag, setting in turned(chosen.setting, knob):
                if self.prices.known(setting):
                    yield self.saving(chosen, flag, setting)

    def savings(self, smallest: Candidate) -> Iterator[Saving]:
        """The memory that each knob would free of the smallest setting, if nothing fits."""
        learns = self.request.setting.family.learns
        for knob in (*MEMORY, *learns):
            for flag, setting in turned(smallest.setting, knob):
                self.note(f"pricing {flag}")
                yield replace(self.saving(smallest, flag, setting), learns_differently=knob in learns)

    def saving(self, base: Candidate, flag: str, setting: Setting) -> Saving:
        """What a setting frees of another: of the peaks of their tensors where these are known. The needs are found to 0.5 %,
        which may be as much as the difference.
        """
        before = self.prices.least(base.setting)
        after = self.prices.least(setting)
        if not (before and after):
            before, after = (self.prices.needs(each).high_bytes for each in (base.setting, setting))
        seconds = self.speed(setting, setting.micro_batch) / self.speed(base.setting, base.setting.micro_batch)
        return Saving(knob=flag, saved_bytes=before - after, learns_differently=False, slower=seconds - 1)


def search(request: SearchRequest, prices: Prices, *, note: Callable[[str], None] = lambda _: None) -> SearchResult:
    """The fastest setting that fits, holding the effective batch; `note` hears of what takes seconds.

    Where nothing fits, the reserve is given up; then allowed knobs are turned one after the other, the gentlest first,
    until something does.
    """
    state = _Search(request, prices, note)
    best = state.best()
    if best is None and request.reserve:
        request = replace(request, reserve=0.0)
        state = _Search(request, prices, note, state.seen, state.times)
        best = state.best()
    knobs = [knob for knob in request.setting.family.learns if knob in request.allow]
    while best is None and knobs:
        for flag, setting in turned(request.setting, knobs.pop(0)):
            note(f"nothing fits: trying {flag}")
            request = replace(request, setting=setting)
            state = _Search(request, prices, note, state.seen, state.times)
            best = state.best()
            if best is not None:
                break
    state.price_neighbours([best.setting] if best is not None else list(state.seen))
    evaluated = state.evaluation(best) if best is not None else None
    chosen, prediction = evaluated or (None, None)
    candidates = tuple(
        explained(each, best if evaluated else None, chosen, request.budget_bytes) for each in state.seen.values()
    )
    smallest = least_of(candidates)
    base = replace(request.setting, checkpointing=request.checkpointing or "none")
    ideal = state.ideal(base)
    savings = state.frees(chosen) if chosen is not None else state.savings(smallest)
    return SearchResult(
        chosen=next((each for each in candidates if each.verdict == "chosen"), None),
        prediction=prediction,
        candidates=candidates,
        knee=next(b for b in state.worth(request.share) if state.speed(base, b) <= (1 + KNEE) * ideal),
        savings=tuple(sorted(savings, key=_cost)),
        not_priced=tuple(state.not_priced),
    )


def _cost(saving: Saving) -> tuple[bool, float, int]:
    """Sort key: savings that change only memory and time come first, and among these the fastest."""
    return saving.learns_differently, saving.slower or 0.0, -saving.saved_bytes
