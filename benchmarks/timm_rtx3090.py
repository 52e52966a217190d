"""Does it fit, and how long does it take: predictions against 834 timm models measured on one RTX 3090 in 2022.

    python benchmarks/timm_rtx3090.py trace 230     # about 4 s a model; goes on where it was interrupted; remove the results
                                                    # to predict anew from the traces that the cache folder keeps
    python benchmarks/timm_rtx3090.py report        # the tables
    python benchmarks/timm_rtx3090.py picture       # results/timm_rtx3090.png
    python benchmarks/timm_rtx3090.py check NAME... # scaling a trace to another batch, against a trace at that batch

The measured step (timm `benchmark.py` of July 2022, torch 1.12, `--amp --channels-last`): gradients zeroed in place;
under float16 autocast forward, cross entropy and also backward; no GradScaler, no clipping, no EMA; SGD with Nesterov
momentum 0.9, one parameter at a time (no foreach yet); attention unfused. It began with 512 images and went down the
ladder 512, 384, 256, 192, ... until nothing ran out of memory, so a row below 512 says: this batch fits and the next
one up does not.

Models are drawn by a seed among the rows below 512 that today's timm still has with as many parameters. The first 60
are tested; the next 110 alone give the overhead (CUDA context, cuDNN, ...) and the efficiencies of `timing.roofline`;
those after them are fresh: nobody looked at them before the classes of work in `timing.roofline` were settled.

A model is traced once, at a prime batch: what is divisible by the prime is proportional to the batch.
"""

import csv
import gzip
import json
import multiprocessing
import random
import sys
import time
from collections.abc import Collection, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from trainfit.files import cache_folder
from trainfit.gpus.catalogue import find_gpu
from trainfit.memory.allocator import replay
from trainfit.memory.columns import Columns
from trainfit.memory.overwritten import overwriting
from trainfit.timing.counts import OpCount
from trainfit.timing.roofline import step_seconds
from trainfit.tracing.events import Trace
from trainfit.tracing.fake_cuda import Target
from trainfit.tracing.stored_trace import StoredTrace
from trainfit.tracing.trace import trace_step

MIB = 2**20
DATA = Path(__file__).parents[1].parent / "shared/data/timm_rtx3090/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv"
RESULTS = Path(__file__).parent / "results/timm_rtx3090.jsonl"
CARD_MIB = 24268
TESTED, FITTED = 60, 110
SEED = 3
TIMEOUT_S = 300
LADDER = sorted({size for power in range(11) for size in (2**power, 3 * 2**power // 2)})
GPU = find_gpu("RTX 3090")


@dataclass(frozen=True, kw_only=True)
class Record:
    """What was predicted and measured of one model."""

    model: str
    """Its name."""
    batch: int
    """The batch that fitted; the next of the ladder did not."""
    needed_mib: tuple[int, int]
    """Least capacities at which the two replay without running out of memory, to 16 MiB."""
    measured_s: float
    """Seconds a step."""
    ops: tuple[OpCount, ...]
    """Counts of the step at `batch`."""
    same_model: bool
    """Whether the model has as many parameters as in 2022."""
    trace_s: float
    """Seconds that building and tracing took."""

    @property
    def predicted_s(self) -> float:
        """Seconds a step."""
        return step_seconds(self.ops, GPU).seconds


class Step:
    """The measured step."""

    ema, blocks = None, 0

    def __init__(self, device: torch.device, name: str, batch: int, side: int) -> None:
        """Build model, optimizer and images on `device`."""
        import timm
        import timm.layers

        published = timm.get_pretrained_cfg(name)
        fixed = published is not None and published.fixed_input_size and published.input_size[-1] != side
        size: dict[str, Any] = {"img_size": side} if fixed else {}
        timm.layers.set_fused_attn(False)
        model: Any = timm.create_model(name, **size)
        self.model: torch.nn.Module = model.to(device, memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=1e-4, momentum=0.9, nesterov=True, foreach=False, fused=False
        )
        self.device, self.batch = device, batch
        self.images = torch.randn(batch, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)

    def run(self) -> None:
        """One step."""
        self.optimizer.zero_grad(set_to_none=False)
        with torch.autocast("cuda", dtype=torch.float16):
            out = self.model(self.images)
            out = out[0] if isinstance(out, tuple) else out
            target = torch.empty(self.batch, device=self.device, dtype=torch.int64).random_(1000)
            torch.nn.functional.cross_entropy(out, target).backward()
        self.optimizer.step()


def drawn() -> list[dict[str, str]]:
    """Rows of the table that have a next batch and a model of that name today, in the seed's order."""
    import timm

    with DATA.open() as file:
        rows = [row for row in csv.DictReader(file) if int(row["train_batch_size"]) < 512]
    rows = sorted((row for row in rows if timm.is_model(row["model"])), key=lambda row: row["model"])
    random.Random(SEED).shuffle(rows)
    return rows


def prime_from(number: int) -> int:
    """The first prime from `number` and 61 on."""
    number = max(number, 61)
    while any(number % divisor == 0 for divisor in range(2, int(number**0.5) + 1)):
        number += 1
    return number


@contextmanager
def weights_of_any_values() -> Generator[None]:
    """Models are built without their initial values, which cost most of the time and decide nothing."""
    with ExitStack() as patched:
        for name in ("normal_", "uniform_", "erfinv_"):
            patched.enter_context(patch.object(torch.Tensor, name, _unchanged))
        # torch draws truncated normals again until all are inside, which values that nobody draws may never be.
        patched.enter_context(patch.object(torch.nn.init, "_no_grad_trunc_normal_", _unchanged))
        yield


def _unchanged(tensor: torch.Tensor, *_args: object, **_kwargs: object) -> torch.Tensor:
    return tensor


def traced(row: dict[str, str], batch: int) -> tuple[StoredTrace, int]:
    """The trace at a batch and the number of parameters."""
    built: list[Step] = []

    def build(device: torch.device) -> Step:
        with weights_of_any_values():
            built.append(Step(device, row["model"], batch, int(row["train_img_size"])))
        return built[0]

    result = trace_step(build, target=Target(capability=(8, 6), fused_attention=False))
    return result, sum(p.numel() for p in built[0].model.parameters())


def scaled(trace: Trace, traced_batch: int, batch: int, *, fixed: Collection[str] = ()) -> Trace:
    """The trace of the same step at another batch; tensors of `fixed` categories keep their bytes."""
    tensors = (
        t if t.nbytes % traced_batch or t.category in fixed else replace(t, nbytes=t.nbytes // traced_batch * batch)
        for t in trace.tensors
    )
    return Trace(tensors=tuple(tensors), events=trace.events, marks=trace.marks)


def scaled_ops(ops: tuple[OpCount, ...], factor: float) -> Iterator[OpCount]:
    """Counts at `factor` times the batch, rows that time does not tell apart merged."""
    sums: dict[tuple[str, str, str, int], list[float]] = {}
    for row in ops:
        by_batch = 1 if row.phase in ("inputs", "optimizer") else factor
        name = row.op if ".grouped" in row.op else "aten.mm" if row.flops else "other"
        intensity = int(np.frexp(row.flops / row.bytes)[1]) if row.bytes else 0
        phase = "optimizer" if row.phase in ("update", "optimizer") else "step"
        total = sums.setdefault((name, phase, row.dtype if row.flops else "", intensity), [0, 0, 0])
        for index, value in enumerate((row.count, row.flops * by_batch, row.bytes * by_batch)):
            total[index] += value
    for (name, phase, dtype, _), (count, flops, moved) in sums.items():
        yield OpCount(op=name, phase=phase, dtype=dtype, count=int(count), flops=round(flops), bytes=round(moved))


def needed_mib(trace: Trace) -> int:
    """The least capacity at which the trace replays without running out of memory, to 16 MiB."""
    trace = overwriting(Columns.of(trace)).trace()
    free = replay(trace, capacity_bytes=None)
    low, high = free.peak_requested_bytes // MIB, -(-free.peak_reserved_bytes // MIB)
    while high - low > 16:
        middle = (low + high) // 2
        if replay(trace, capacity_bytes=middle * MIB).oom is None:
            high = middle
        else:
            low = middle
    return high


def record(row: dict[str, str]) -> Record:
    """Trace one model, if its trace is not kept on the disk, and predict."""
    prime = prime_from(int(row["train_batch_size"]))
    path = cache_folder() / f"timm_rtx3090/torch-{torch.__version__.partition('+')[0]}/{row['model']}.json.gz"
    if path.exists():
        kept: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    else:
        start = time.perf_counter()
        result, parameters = traced(row, prime)
        kept = {"trace": result.to_record(), "parameters": parameters, "seconds": time.perf_counter() - start}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(json.dumps(kept, separators=(",", ":")).encode(), compresslevel=3))
    return predicted(row, StoredTrace.from_record(kept["trace"]), prime, kept["parameters"], kept["seconds"])


def predicted(row: dict[str, str], result: StoredTrace, prime: int, parameters: int, trace_s: float) -> Record:
    """What follows from a trace at the batch `prime`."""
    batch = int(row["train_batch_size"])
    following = LADDER[LADDER.index(batch) + 1]
    return Record(
        model=row["model"],
        batch=batch,
        needed_mib=(
            needed_mib(scaled(result.trace, prime, batch)),
            needed_mib(scaled(result.trace, prime, following)),
        ),
        measured_s=float(row["train_step_time"]) / 1e3,
        ops=tuple(scaled_ops(result.ops, batch / prime)),
        same_model=abs(parameters / 1e6 / float(row["param_count"]) - 1) < 0.01,
        trace_s=round(trace_s, 1),
    )


def to_line(row: dict[str, str]) -> str:
    """A line of the results: a record, or why there is none."""
    try:
        return written(record(row))
    except Exception as error:
        return json.dumps({"model": row["model"], "error": f"{type(error).__name__}: {error}"[:300]})


def written(made: Record) -> str:
    """A record as a line."""
    return json.dumps({**vars(made), "ops": [astuple(op) for op in made.ops]}, separators=(",", ":"))


def _child(row: dict[str, str], path: Path) -> None:
    with path.open("a") as file:
        file.write(to_line(row) + "\n")


def trace(count: int) -> None:
    """Trace the first `count` models drawn, each in a process of its own, saving after each."""
    torch.set_num_threads(1)
    done = {json.loads(line)["model"] for line in RESULTS.read_text().splitlines()} if RESULTS.exists() else set[str]()
    context = multiprocessing.get_context("fork")
    for number, row in enumerate(drawn()[:count]):  # `drawn` imports timm: each model's process is a fork of this one
        if row["model"] in done:
            continue
        process = context.Process(target=_child, args=(row, RESULTS))
        start = time.perf_counter()
        process.start()
        process.join(TIMEOUT_S)
        if process.is_alive():
            process.kill()
            with RESULTS.open("a") as file:
                file.write(json.dumps({"model": row["model"], "error": f"not traced in {TIMEOUT_S} s"}) + "\n")
        print(f"{number:4} {row['model']:40}{time.perf_counter() - start:6.1f} s", file=sys.stderr, flush=True)


def _read(entry: dict[str, Any]) -> Record:
    names = ("op", "phase", "dtype", "count", "flops", "bytes")
    ops = tuple(OpCount(**dict(zip(names, op, strict=True))) for op in entry["ops"])
    values: dict[str, Any] = {**entry, "ops": ops, "needed_mib": tuple(entry["needed_mib"])}
    return Record(**values)


def load() -> tuple[list[Record], list[Record], list[Record], list[str]]:
    """Tested, fitted and fresh records, and models left out with the reason."""
    lines = {entry["model"]: entry for entry in map(json.loads, RESULTS.read_text().splitlines())}
    found: list[Record] = []
    left_out: list[str] = []
    for row in drawn():
        entry = lines.get(row["model"])
        if entry is None:
            continue
        if "error" in entry or not entry["same_model"]:
            left_out.append(f"{row['model']}: {entry.get('error', 'not the model of 2022: other parameter count')}")
            continue
        found.append(_read(entry))
    return found[:TESTED], found[TESTED : TESTED + FITTED], found[TESTED + FITTED :], left_out


def wrong(records: list[Record], overhead_mib: int) -> tuple[list[str], list[str]]:
    """Models falsely said to fit (their next batch) and falsely said not to (their batch)."""
    room = CARD_MIB - overhead_mib
    return [r.model for r in records if r.needed_mib[1] <= room], [r.model for r in records if r.needed_mib[0] > room]


def fitted_overhead_mib(records: list[Record]) -> int:
    """The middle of the overheads with the fewest wrong verdicts; between equals, those with as many of each kind."""
    grid = range(0, 4000, 16)
    counts = [tuple(map(len, wrong(records, overhead))) for overhead in grid]
    errors = [(fits + nots, abs(fits - nots)) for fits, nots in counts]
    best = [overhead for overhead, error in zip(grid, errors, strict=True) if error == min(errors)]
    return best[len(best) // 2]


def ordered(predicted: np.ndarray, measured: np.ndarray, apart: float = 0.0) -> float:
    """Share of pairs put in the right order, among those whose measured values are more than `apart` apart."""
    i, j = np.triu_indices(len(measured), 1)
    ratio = np.maximum(measured[i], measured[j]) / np.minimum(measured[i], measured[j])
    kept = ratio > 1 + apart
    return float(np.mean(((predicted[i] > predicted[j]) == (measured[i] > measured[j]))[kept]))


def report() -> None:
    """Print the tables."""
    tested, others, fresh, left_out = load()
    overhead = fitted_overhead_mib(others)
    false_fits, false_nots = wrong(tested, overhead)
    print(
        f"{'tested model':38}{'batch':>6}{'needs MiB':>10}{'next':>6}{'needs MiB':>10}  verdicts{'ms':>12}{'predicted':>11}"
    )
    for r in tested:
        verdict = "wrong: fits" if r.model in false_fits else "wrong: not" if r.model in false_nots else "right"
        following = LADDER[LADDER.index(r.batch) + 1]
        print(f"{r.model:38}{r.batch:6}{r.needed_mib[0]:10}{following:6}{r.needed_mib[1]:10}  {verdict:11}", end="")
        print(f"{r.measured_s * 1e3:9.0f}{r.predicted_s * 1e3:11.0f} ({r.predicted_s / r.measured_s - 1:+.0%})")
    print(f"\nleft out: {'; '.join(left_out) or 'none'}")
    print(f"seed {SEED}; card {CARD_MIB} MiB; overhead {overhead} MiB, fitted on the {len(others)} fitted models")
    for name, records in (("tested", tested), ("fitted", others), ("fresh", fresh)):
        fits, nots = wrong(records, overhead)
        share = 1 - (len(fits) + len(nots)) / (2 * len(records))
        print(f"{name}, {len(records)} models: {share:.1%} of {2 * len(records)} verdicts right")
        print(f"  {len(fits)} false 'fits' {fits}, {len(nots)} false 'does not fit' {nots}")
        predicted, measured = (
            np.array([getattr(r, f"{kind}_s") for r in records]) for kind in ("predicted", "measured")
        )
        batch = np.array([r.batch for r in records])
        error = np.abs(predicted / measured - 1)
        print(
            f"{name}: time error median {np.median(error):.1%}, mean {error.mean():.1%}, p90 {np.quantile(error, 0.9):.1%}"
        )
        for what, one, two in (("step", predicted, measured), ("image", predicted / batch, measured / batch)):
            print(
                f"  pairs in order by time a {what}: {ordered(one, two):.1%}; over 10 % apart {ordered(one, two, 0.1):.1%}"
            )


def check(names: list[str]) -> None:
    """Print how a trace scaled to a batch differs from a trace at that batch."""
    rows = {row["model"]: row for row in drawn()}
    for name in names:
        batch = int(rows[name]["train_batch_size"])
        prime = prime_from(batch)
        one = scaled(traced(rows[name], prime)[0].trace, prime, batch)
        two = traced(rows[name], batch)[0].trace
        same = one.events == two.events
        differing = sum(a.nbytes != b.nbytes for a, b in zip(one.tensors, two.tensors, strict=False))
        print(f"{name}: same events {same}, {differing} of {len(two.tensors)} tensors differ", end="")
        print(f"; needs {needed_mib(one)} and {needed_mib(two)} MiB", flush=True)


def picture() -> None:
    """Draw needed memory against the limit and predicted against measured time."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    tested, others, fresh, _ = load()
    room = (CARD_MIB - fitted_overhead_mib(others)) / 1024
    figure, (memory, seconds) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    shown = [*tested, *fresh]
    needs = sorted((r.needed_mib for r in shown), key=lambda pair: pair[0])
    memory.plot([n[0] / 1024 for n in needs], ".", label="batch that fitted")
    memory.plot([n[1] / 1024 for n in needs], "x", label="next batch, which did not")
    memory.axhline(room, color="k", lw=1, label="card less overhead")
    memory.set(xlabel="tested and fresh models", ylabel="predicted need, GiB")
    memory.legend()
    seconds.loglog([r.measured_s for r in others], [r.predicted_s for r in others], ".", c="0.7", label="fitted on")
    seconds.loglog([r.measured_s for r in shown], [r.predicted_s for r in shown], ".", label="tested and fresh")
    seconds.plot([0.2, 3], [0.2, 3], color="k", lw=1)
    seconds.set(xlabel="measured, s a step", ylabel="predicted, s a step")
    seconds.legend()
    figure.savefig(RESULTS.with_suffix(".png"), dpi=80)


if __name__ == "__main__":
    command, *arguments = sys.argv[1:] or ["report"]
    if command == "trace":
        trace(int(arguments[0]))
    elif command == "check":
        check(arguments)
    else:
        {"report": report, "picture": picture}[command]()
