"""Of all settings that fit, the fastest. Pure: whoever calls gives the prices."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Literal, Protocol

from trainfit.gpus.context import ByteRange
from trainfit.memory.coupled import coupled_batches
from trainfit.memory.predict import RESERVE, Prediction, has_reserve
from trainfit.models.setting import Setting
from trainfit.planning.comparing import KNEE, describe, explained, faster, least_of, seconds_of
from trainfit.planning.knobs import FREE, MEMORY, STATE, batches, cuts, turned
from trainfit.planning.plan import Candidate, Saving, Verdict
from trainfit.step.names import Checkpointing
from trainfit.timing.roofline import TimeEstimate

EVAL_MICRO_BATCHES = (2, 4, 8, 16, 32)
PARTIAL_TRIES = 3


class Prices(Protocol):
    """What settings cost on one card; `memory.priced.Pricer`."""

    def needs(self, setting: Setting) -> ByteRange:
        """The least that training of one process runs in, its CUDA context included."""
        ...

    def least(self, setting: Setting) -> int:
        """What the top of `needs` is not below, found in a fraction of its time; 0 where that is not possible."""
        ...

    def seconds(
        self, setting: Setting, cuts: Sequence[int], part: Literal["training", "evaluation"] = "training"
    ) -> TimeEstimate:
        """Of a window cut into micro-batches of `cuts` images."""
        ...

    def predict(self, setting: Setting, cuts: Sequence[int]) -> Prediction:
        """Training, and evaluation in the same process."""
        ...

    def blocks(self, setting: Setting) -> int:
        """What activation checkpointing may recompute."""
        ...

    def known(self, setting: Setting) -> bool:
        """Whether `needs` answers at once."""
        ...


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is to be planned."""

    setting: Setting
    """Knobs as the user wants them; micro-batch and accumulation do not count; precision is not "auto"."""
    effective_batch: int
    gpus: int = 1
    budget_bytes: int
    """What a process may have for sure."""
    reserve: float = RESERVE
    """Share of it that is kept free; 0 where nothing leaves so much."""
    exchange_s: float = 0.0
    """Summing the gradients over the GPUs, once a window."""
    micro_batch: int | None = None
    """Plan with this one alone."""
    checkpointing: Checkpointing | None = None
    """Plan with this alone; None: the least that fits."""
    allow: tuple[str, ...] = ()
    """Of `Family.learns`: what may be turned where nothing fits otherwise."""

    @property
    def share(self) -> int:
        """Images of a window on the fullest GPU."""
        return -(-self.effective_batch // self.gpus)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search ends with."""

    chosen: Candidate | None
    prediction: Prediction | None
    candidates: tuple[Candidate, ...]
    knee: int
    """See `plan.Plan.knee`."""
    savings: tuple[Saving, ...]


@dataclass
class _Search:
    """The candidates seen so far, each priced once."""

    wish: Wish
    prices: Prices
    note: Callable[[str], None]
    seen: dict[Setting, Candidate] = field(default_factory=dict[Setting, Candidate])
    times: dict[Setting, float] = field(default_factory=dict[Setting, float])

    def price(self, base: Setting, micro_batch: int) -> Candidate:
        setting = self.at(base, micro_batch)
        known = self.seen.get(setting)
        if known is None or known.needs_more:
            self.note(f"pricing {describe(setting)}...")
            self.seen[setting] = self.candidate(base, micro_batch, self.prices.needs(setting))
        return self.seen[setting]

    def could_fit(self, base: Setting, micro_batch: int) -> bool:
        """Not, if already the least that it may need is too much: then that is its price, found without replays."""
        setting = self.at(base, micro_batch)
        if setting not in self.seen:
            least = self.prices.least(setting)
            if least <= self.wish.budget_bytes:
                return True
            needs = ByteRange(low_bytes=least, high_bytes=least)
            self.seen[setting] = replace(self.candidate(base, micro_batch, needs), needs_more=True)
        return not self.seen[setting].needs_more

    def does_fit(self, base: Setting, micro_batch: int) -> bool:
        """With the reserve that is wished for; priced only where it could."""
        return self.could_fit(base, micro_batch) and self.fits(self.price(base, micro_batch).needs)

    def at(self, base: Setting, micro_batch: int) -> Setting:
        return replace(base, micro_batch=micro_batch, accumulation=len(cuts(self.wish.share, micro_batch)))

    def candidate(self, base: Setting, micro_batch: int, needs: ByteRange) -> Candidate:
        seconds = self.speed(base, micro_batch)
        return Candidate(
            setting=self.at(base, micro_batch),
            cuts=cuts(self.wish.share, micro_batch),
            needs=needs,
            seconds=seconds,
            images_per_s=self.wish.effective_batch / seconds,
            verdict=self.verdict(needs),
            reason="",
        )

    def verdict(self, needs: ByteRange) -> Verdict:
        budget_bytes = self.wish.budget_bytes
        if needs.high_bytes <= (1 - RESERVE) * budget_bytes:
            return "fits"
        return "fits, no reserve" if needs.high_bytes <= budget_bytes else "does not fit"

    def fits(self, needs: ByteRange) -> bool:
        """With the reserve that is wished for."""
        return needs.high_bytes <= (1 - self.wish.reserve) * self.wish.budget_bytes

    def speed(self, base: Setting, micro_batch: int) -> float:
        """Seconds of a window."""
        setting = self.at(base, micro_batch)
        if setting not in self.times:
            found = self.prices.seconds(setting, cuts(self.wish.share, micro_batch))
            self.times[setting] = found.seconds + self.wish.exchange_s
        return self.times[setting]

    def batches(self) -> tuple[int, ...]:
        if self.wish.micro_batch is not None:
            return (self.wish.micro_batch,)
        return (coupled_batches if self.wish.setting.family.coupled(self.wish.setting) else batches)(self.wish.share)

    def largest(self, base: Setting) -> int | None:
        """The largest micro-batch that fits, by bisection; tries the next larger one too. The smallest of all is priced
        where none fits.
        """
        sizes = self.batches()
        low, high = -1, len(sizes)
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
        """Of one base, the smallest micro-batch within `KNEE` of the fastest that fits: the rest is left as headroom."""
        largest = self.largest(base)
        if largest is None:
            return None
        sizes = self.worth(largest)
        best = min(sizes, key=lambda b: (self.speed(base, b), b))
        while not self.does_fit(base, best):  # memory that does not grow with the micro-batch
            sizes.remove(best)
            best = min(sizes, key=lambda b: (self.speed(base, b), b))
        slowest = (1 + KNEE) * self.speed(base, best)
        within = [b for b in sizes if b <= best and self.speed(base, b) <= slowest]
        best = next(b for b in within if self.does_fit(base, b))
        smaller = [b for b in self.batches() if b < best]
        if smaller:
            self.price(base, smaller[-1])
        return self.price(base, best)

    def ideal(self, base: Setting) -> float:
        """Seconds of a window with nothing recomputed, whatever memory it takes: nothing is faster."""
        return min(self.speed(base, b) for b in self.worth(self.wish.share))

    def worth(self, largest: int) -> list[int]:
        """Micro-batches to compare. One image is no faster than two, and is a trace of its own."""
        sizes = [b for b in self.batches() if b <= largest]
        return [b for b in sizes if b > 1] or sizes

    def means(self) -> Iterator[Setting]:
        """Bases in the order of what they cost: EMA weights to the host, then recompute."""
        wanted = self.wish.checkpointing
        for checkpointing in ("none", "all") if wanted is None else (wanted,):
            base = replace(self.wish.setting, checkpointing=checkpointing)
            if wanted is None and checkpointing == "all" and not self.prices.blocks(self.wish.setting):
                return
            yield base
            yield from (setting for knob in FREE for _, setting in turned(base, knob))

    def best(self) -> Candidate | None:
        """Goes on to what costs more as long as it may gain; what cannot be faster than what is found is not priced."""
        found: Candidate | None = None
        ideal = self.ideal(replace(self.wish.setting, checkpointing=self.wish.checkpointing or "none"))
        for base in self.means():
            if found is None or self.may_gain(base, found):
                found = faster(found, self.fastest(base))
            if found is not None and seconds_of(found) <= (1 + KNEE) * ideal:
                return found
        if found is None:
            return None if self.wish.reserve else self.last_resort()
        return found if self.wish.checkpointing is not None else faster(found, self.partial(found))

    def may_gain(self, base: Setting, found: Candidate) -> bool:
        """Whether a micro-batch is faster than what is found, and could fit."""
        sizes = [b for b in self.worth(self.wish.share) if self.speed(base, b) < seconds_of(found)]
        return any(self.could_fit(base, b) for b in sizes)

    def last_resort(self) -> Candidate | None:
        """Where nothing else fits: the optimizer's state in host memory, then saved activations, at the least micro-batch.

        The order is that of what they cost: state is copied once a window, activations once an image. Neither is faster than
        what more memory would allow, so that the law holds that more memory is never slower; and activations are a trace of
        their own, so that they are not tried for a gain. To compute a block again takes less time than to copy what it keeps
        to the host and back: what waits there is what recomputation leaves.
        """
        for setting in self.resorts():
            if setting.checkpointing == "offload" and self.wish.checkpointing is None:
                self.note("nothing fits: pricing saved activations in host memory")
            found = self.price(setting, self.batches()[0])
            if self.fits(found.needs):
                return found
        return None

    def resorts(self) -> Iterator[Setting]:
        """Settings that are tried last, the cheapest first."""
        least = self.wish.setting
        for knob in FREE:
            least = next((setting for _, setting in turned(least, knob)), least)
        on_host = [setting for _, setting in turned(least, STATE)]
        if self.wish.checkpointing is not None:
            yield from (replace(setting, checkpointing=self.wish.checkpointing) for setting in on_host)
            return
        recomputed: Checkpointing = "all" if self.prices.blocks(least) else "none"
        yield from (replace(setting, checkpointing=recomputed) for setting in on_host)
        yield from (replace(setting, checkpointing="offload") for setting in (least, *on_host))

    def partial(self, other: Candidate) -> Candidate | None:
        """Computing only some blocks again, where that is faster than `other`.

        Time and memory of some are taken to lie on a line between none and all, until a trace tells.
        """
        blocks = self.prices.blocks(other.setting)
        tries: list[tuple[float, int, int, Setting]] = []
        for none in (base for base in self.means() if base.checkpointing == "none"):
            for b in self.batches():
                if (1 + KNEE) * self.speed(none, b) > seconds_of(other):
                    continue  # recomputing some blocks is no faster than recomputing none
                every = replace(none, checkpointing="all")
                if self.gain_at_most(none, every, b) * (1 + KNEE) > seconds_of(other):
                    continue
                if self.does_fit(none, b) or not self.does_fit(every, b):
                    continue
                most, least = self.price(none, b), self.price(every, b)
                freed = most.needs.high_bytes - least.needs.high_bytes
                over = most.needs.high_bytes - (1 - self.wish.reserve) * self.wish.budget_bytes
                count = ceil(blocks * over / max(1, freed))
                if 0 < count < blocks:
                    seconds = seconds_of(most) + (seconds_of(least) - seconds_of(most)) * count / blocks
                    tries.append((seconds, b, count, none))
        if not tries:
            return None
        seconds, b, count, base = min(tries, key=lambda each: each[:3])
        if seconds * (1 + KNEE) > seconds_of(other):
            return None
        for _ in range(PARTIAL_TRIES):
            found = self.price(replace(base, checkpointing=count), b)
            if self.fits(found.needs):
                return found
            count += -(-blocks // 8)
            if count >= blocks:
                break
        return None

    def gain_at_most(self, none: Setting, every: Setting, micro_batch: int) -> float:
        """Seconds that a window takes at least where so many blocks are computed again that it could fit: of blocks as `partial`
        counts them, from the least that the two may need.
        """
        most, least = (self.prices.least(self.at(each, micro_batch)) for each in (none, every))
        over = most - (1 - self.wish.reserve) * self.wish.budget_bytes
        share = min(1.0, over / (most - least)) if over > 0 and most > least else 0.0
        slowest, fastest = self.speed(every, micro_batch), self.speed(none, micro_batch)
        return fastest + (slowest - fastest) * share

    def evaluation(self, chosen: Candidate) -> tuple[Candidate, Prediction] | None:
        """With the evaluation micro-batch that is fastest by `KNEE` and fits; None: not even one image fits."""
        wanted = self.wish.setting.eval_micro_batch
        of_training = (
            (chosen.setting.micro_batch,) if chosen.setting.family.coupled(chosen.setting) else EVAL_MICRO_BATCHES
        )
        sizes = of_training if wanted is None else (wanted,)
        time = {e: self.prices.seconds(chosen.setting, (e,), "evaluation").seconds / e for e in sizes}
        knee = next(e for e in sizes if time[e] <= (1 + KNEE) * min(time.values()))
        for e in (*reversed([e for e in sizes if e <= knee]), *(() if wanted else (1,))):
            setting = replace(chosen.setting, eval_micro_batch=e)
            prediction = self.prices.predict(setting, chosen.cuts)
            spare = not self.wish.reserve or has_reserve(prediction.needs, prediction.budget)
            if spare and prediction.evaluation.verdict == "fits":
                return replace(chosen, setting=setting, needs=prediction.needs), prediction
        return None

    def price_neighbours(self, settings: Iterable[Setting]) -> None:
        """Those with another micro-batch, a power of two or the whole share, and all else equal; to be shown beside them.

        Not of a contrastive window, where each would be a trace of its own.
        """
        if self.wish.setting.family.coupled(self.wish.setting):
            return
        for base in dict.fromkeys(replace(each, micro_batch=1, accumulation=1) for each in settings):
            for b in self.batches():
                if b > 1 and (b & (b - 1) == 0 or b == self.wish.share) and self.could_fit(base, b):
                    self.price(base, b)

    def frees(self, chosen: Candidate) -> Iterator[Saving]:
        """What knobs that change memory and time alone would free of the chosen setting, where that takes no trace."""
        for flag, setting in (turn for knob in MEMORY for turn in turned(chosen.setting, knob)):
            if self.prices.known(setting):
                yield self.saving(chosen, flag, setting)

    def savings(self, smallest: Candidate) -> Iterator[Saving]:
        """What each knob would free of the smallest setting, where nothing fits."""
        learns = self.wish.setting.family.learns
        for knob in (*MEMORY, *learns):
            for flag, setting in turned(smallest.setting, knob):
                self.note(f"pricing {flag}")
                yield replace(self.saving(smallest, flag, setting), learns_differently=knob in learns)

    def saving(self, base: Candidate, flag: str, setting: Setting) -> Saving:
        freed = self.prices.needs(base.setting).high_bytes - self.prices.needs(setting).high_bytes
        seconds = self.speed(setting, setting.micro_batch) / self.speed(base.setting, base.setting.micro_batch)
        return Saving(knob=flag, saved_bytes=freed, learns_differently=False, slower=seconds - 1)


def search(wish: Wish, prices: Prices, *, note: Callable[[str], None] = lambda _: None) -> Found:
    """The fastest setting that fits, holding the effective batch; `note` hears of what takes seconds.

    Where nothing fits, the reserve is given up; then allowed knobs are turned one after the other, the gentlest first,
    until something does.
    """
    found = _Search(wish, prices, note)
    best = found.best()
    if best is None and wish.reserve:
        wish = replace(wish, reserve=0.0)
        found = _Search(wish, prices, note, found.seen, found.times)
        best = found.best()
    knobs = [knob for knob in wish.setting.family.learns if knob in wish.allow]
    while best is None and knobs:
        for flag, setting in turned(wish.setting, knobs.pop(0)):
            note(f"nothing fits: trying {flag}")
            wish = replace(wish, setting=setting)
            found = _Search(wish, prices, note, found.seen, found.times)
            best = found.best()
            if best is not None:
                break
    found.price_neighbours([best.setting] if best is not None else list(found.seen))
    evaluated = found.evaluation(best) if best is not None else None
    chosen, prediction = evaluated or (None, None)
    candidates = tuple(
        explained(each, best if evaluated else None, chosen, wish.budget_bytes) for each in found.seen.values()
    )
    smallest = least_of(candidates)
    base = replace(wish.setting, checkpointing=wish.checkpointing or "none")
    ideal = found.ideal(base)
    savings = found.frees(chosen) if chosen is not None else found.savings(smallest)
    return Found(
        chosen=next((each for each in candidates if each.verdict == "chosen"), None),
        prediction=prediction,
        candidates=candidates,
        knee=next(b for b in found.worth(wish.share) if found.speed(base, b) <= (1 + KNEE) * ideal),
        savings=tuple(sorted(savings, key=_cost)),
    )


def _cost(saving: Saving) -> tuple[bool, float, int]:
    """What changes memory and time alone comes first, and of that what costs least time."""
    return saving.learns_differently, saving.slower or 0.0, -saving.saved_bytes
