"""Damaged and foreign checkpoints, plans, recipes, states, logs and caches, made from real ones, handed to trainfit.

    python benchmarks/fuzz_files.py --cases 400 --seed 0

Each case runs in a process of its own with a limit of time and memory. It holds if trainfit accepts the file or ends
with one line that names the fault; it fails with a traceback, after 30 s, or above 2 GiB of resident memory.
"""

import argparse
import gzip
import json
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from trainfit.cli import main
from trainfit.tasks.detection.sample_set import write_sample_set

LIMIT_S = 30.0
LIMIT_BYTES = 2 << 30
TINY = [
    "--resolution",
    "64",
    "--groups",
    "1",
    "--num-queries",
    "20",
    "--no-multi-scale",
    "--workers",
    "0",
    "--effective-batch",
    "4",
    "--micro-batch",
    "2",
    "--device",
    "cpu",
    "--save-minutes",
    "0",
]
NUMBERS: list[Any] = [-1, 0, 3, 10**9, 10**400, -0.5, 1e308, float("nan"), float("inf")]
ODD: list[Any] = [
    *NUMBERS,
    None,
    True,
    "",
    "x",
    "../../x",
    "\x00",
    "\ud800",
    "a" * 100_000,
    [],
    {},
    [[]],
    {"a": 1},
    [None],
]


@dataclass(frozen=True, kw_only=True)
class Originals:
    """What is damaged."""

    run: Path
    """A run of two steps."""
    data: Path
    plan: Path
    cache: Path
    """A cache folder with the traces of `PREDICT`."""


PREDICT = ["predict", "timm:resnet18", "--gpu", "T4"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a case."""

    verdict: str
    """accepted, named, traceback, hang, memory, or no line."""
    seconds: float
    output: str


# ---- damage


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """Cut, empty, flip, overwrite or replace the bytes of a file."""
    place = rng.randrange(max(1, len(data)))
    flipped = bytearray(data)
    for _ in range(rng.choice([1, 1, 8, 200])):
        if flipped:
            flipped[rng.randrange(min(len(flipped), rng.choice([16, 400, len(flipped)])))] ^= 1 << rng.randrange(8)
    foreign = [
        b"",
        b"hello\n",
        b"\x00" * 4096,
        rng.randbytes(3000),
        b"\x89PNG\r\n\x1a\n" + rng.randbytes(100),
        pickle.dumps(_Evil()),
        gzip.compress(b"x"),
        b"PK\x03\x04" + rng.randbytes(60),
        (2**62).to_bytes(8, "little") + b"{}",
        b"[" * 100_000,
        b"\xef\xbb\xbf" + data,
        data + data,
    ]
    return rng.choice(
        [data[:place], data[place:], bytes(flipped), bytes(flipped), rng.choice(foreign), rng.choice(foreign)]
    )


class _Evil:
    def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
        return Path.touch, (Path("executed"),)


def damage_json(record: Any, rng: random.Random) -> Any:
    """Replace, remove or add one value anywhere in a JSON document."""
    record = json.loads(json.dumps(record))
    places: list[tuple[Any, Any]] = []
    _walk(record, places)
    if not places or rng.random() < 0.04:
        return rng.choice(ODD)
    holder, key = rng.choice(places)
    action = rng.random()
    if action < 0.15:
        del holder[key]
    elif action < 0.25 and isinstance(holder, dict):
        holder[f"{key}s"] = holder.pop(key)
    else:
        holder[key] = rng.choice(ODD)
    return record


def _walk(value: Any, places: list[tuple[Any, Any]]) -> None:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        places.append((value, key))
        _walk(inner, places)


def damage_text(text: str, rng: random.Random) -> bytes:
    """A JSON text with an odd value, or damaged bytes."""
    if rng.random() < 0.25:
        return damage_bytes(text.encode(), rng)
    return json.dumps(damage_json(json.loads(text), rng)).encode()


def damage_lines(data: bytes, rng: random.Random) -> bytes:
    """A JSON-lines file with odd lines."""
    lines = data.splitlines()
    for _ in range(rng.choice([1, 3])):
        place = rng.randrange(len(lines))
        bad = [b"", b"x", b"\xff", b"[]", b"{}", b'{"step": null}', lines[place][:-5], b"[" * 5000]
        odd = json.dumps(damage_json(json.loads(lines[place]), rng)).encode() if lines[place][:1] == b"{" else b""
        lines[place] = rng.choice([odd, odd, rng.choice(bad)])
    return b"\n".join(lines)


def damage_weights(path: Path, metadata: dict[str, str], rng: random.Random) -> None:
    """Rewrite a safetensors file with an odd tensor or odd metadata."""
    weights = load_file(path)
    name = rng.choice(sorted(weights))
    value = weights[name]
    action = rng.choice(
        ["nan", "inf", "int", "drop", "more", "shape", "scalar", "half", "bare", "metadata", "metadata"]
    )
    odd = {"nan": value.float() * float("nan"), "inf": value.float() + float("inf"), "int": value.long()}
    odd |= {"shape": torch.zeros(3, 5), "scalar": torch.tensor(1.0), "half": value.half()}
    if action in odd:
        weights[name] = odd[action]
    elif action == "drop":
        del weights[name]
    elif action == "more":
        weights["foreign.weight"] = torch.zeros(4)
    elif action == "bare":
        metadata = {}
    else:
        key = rng.choice(sorted(metadata))
        try:
            metadata[key] = json.dumps(damage_json(json.loads(metadata[key]), rng))
        except ValueError:
            metadata[key] = rng.choice(["", "x", "rfdetr-large", "[", "1" * 5000])
    save_file(weights, path, metadata=metadata)


def damage_checkpoint(path: Path, rng: random.Random) -> None:
    """Rewrite a file of torch.save with an odd value somewhere."""
    content = torch.load(path, weights_only=True)
    target = rng.choice([content, *(value for value in content.values() if isinstance(value, dict))])
    if target:
        key = rng.choice(sorted(target, key=str))
        value = target[key]
        odd = [None, "x", -1, 3, torch.zeros(2), torch.full((4,), float("nan")), {}, [], torch.zeros(2).long()]
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            odd += [value * float("nan"), value.reshape(-1), value.long()]
        if rng.random() < 0.2:
            del target[key]
        else:
            target[key] = rng.choice(odd)
    torch.save(content, path)


# ---- cases: each prepares a folder and gives the command that reads it


def weights_case(originals: Originals, folder: Path, rng: random.Random) -> list[str]:
    """A damaged weights file, for `detect` or for `train --weights`."""
    suffix = rng.choice([".safetensors", ".safetensors", ".pth"])
    source = originals.run / ("best.safetensors" if suffix == ".safetensors" else "best-rfdetr.pth")
    file = folder / f"weights{suffix}"
    shutil.copyfile(source, file)
    if rng.random() < 0.4:
        file.write_bytes(damage_bytes(file.read_bytes(), rng))
    elif suffix == ".safetensors":
        damage_weights(file, _metadata(source), rng)
    else:
        damage_checkpoint(file, rng)
    if rng.random() < 0.5:
        image = next(iter(sorted(originals.data.rglob("*.jpg")) or sorted(originals.data.rglob("*.png"))))
        return ["detect", str(file), str(image), "--device", "cpu"]
    train = ["train", "rfdetr-nano", "--data", str(originals.data), *TINY, "--max-steps", "1"]
    return [*train, "--weights", str(file), "--out", str(folder / "run")]


def _metadata(path: Path) -> dict[str, str]:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


def plan_case(originals: Originals, folder: Path, rng: random.Random) -> list[str]:
    """A damaged plan file."""
    file = folder / "plan.json"
    file.write_bytes(damage_text(originals.plan.read_text(), rng))
    train = ["train", "--data", str(originals.data), "--plan", str(file), "--max-steps", "1", *TINY]
    return rng.choice(
        [[*train, "--out", str(folder / "run")], ["measure", "rfdetr-nano", "--plan", str(file), "--steps", "0"]]
    )


def recipe_case(originals: Originals, folder: Path, rng: random.Random) -> list[str]:
    """A run folder with a damaged recipe."""
    run = _copy(originals, folder)
    file = run / "recipe.json"
    file.write_bytes(damage_text(file.read_text(), rng))
    return rng.choice([["report", str(run)], *[["train", "--resume", str(run)]] * 3])


def state_case(originals: Originals, folder: Path, rng: random.Random) -> list[str]:
    """A run folder with a damaged state."""
    run = _copy(originals, folder)
    file = run / "state.pt"
    if rng.random() < 0.5:
        file.write_bytes(damage_bytes(file.read_bytes(), rng))
    else:
        damage_checkpoint(file, rng)
    if rng.random() < 0.5:
        (run / "state.previous.pt").unlink()
    return ["train", "--resume", str(run)]


def log_case(originals: Originals, folder: Path, rng: random.Random) -> list[str]:
    """A run folder with damaged logs."""
    run = _copy(originals, folder)
    file = run / rng.choice(["metrics.jsonl", "telemetry.jsonl"])
    file.write_bytes(damage_lines(file.read_bytes(), rng))
    html = ["report", str(run), "--html", str(folder / "page.html")]
    return rng.choice([["report", str(run), "--json"], html, html, ["train", "--resume", str(run)]])


def cache_case(originals: Originals, folder: Path, rng: random.Random) -> list[str]:
    """A cache with a damaged trace."""
    cache = folder / "cache"
    shutil.copytree(originals.cache, cache)
    file = rng.choice(sorted(cache.rglob("*.gz")))
    if rng.random() < 0.5:
        file.write_bytes(damage_bytes(file.read_bytes(), rng))
    else:
        file.write_bytes(gzip.compress(damage_text(gzip.decompress(file.read_bytes()).decode(), rng), 1))
    return PREDICT


def _copy(originals: Originals, folder: Path) -> Path:
    run = folder / "run"
    shutil.copytree(originals.run, run)
    return run


KINDS: dict[str, tuple[int, Callable[[Originals, Path, random.Random], list[str]]]] = {
    "weights": (30, weights_case),
    "plan": (20, plan_case),
    "recipe": (20, recipe_case),
    "state": (8, state_case),
    "log": (20, log_case),
    "cache": (2, cache_case),
}
"""Kind -> share of the cases in percent, and what makes one."""


# ---- running them


def run_limited(arguments: Sequence[str], folder: Path, *, limit_s: float = LIMIT_S) -> Outcome:
    """Run a command in a forked process with limits."""
    log = folder / "output.txt"
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        os._exit(_run_here(arguments, folder, log))
    peak_bytes = 0
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        seconds = time.monotonic() - began
        if done:
            break
        peak_bytes = max(peak_bytes, _resident_bytes(child))
        if seconds > limit_s or peak_bytes > LIMIT_BYTES:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Outcome(verdict="hang" if seconds > limit_s else "memory", seconds=seconds, output=log.read_text())
        time.sleep(0.01)
    output = log.read_text(errors="replace")
    return Outcome(verdict=_verdict(os.waitstatus_to_exitcode(status), output, folder), seconds=seconds, output=output)


def _verdict(code: int, output: str, folder: Path) -> str:
    if (folder / "executed").exists():
        return "code was run"
    if "Traceback" in output or code not in (0, 2, 3):
        return "traceback"
    if code == 0:
        return "accepted"
    errors = [line for line in output.splitlines() if line.startswith("trainfit: error: ")]
    return "named" if len(errors) == 1 and len(errors[0]) < 2000 else "no line"


def _run_here(arguments: Sequence[str], folder: Path, log: Path) -> int:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(folder)
    if (folder / "cache").exists():
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    try:
        main(arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 97
    except BaseException:
        traceback.print_exc()
        return 98
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 99


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def make_originals(folder: Path, *, with_cache: bool) -> Originals:
    """Train, plan and trace once."""
    data = write_sample_set(folder / "data", train=8, val=2)
    originals = Originals(run=folder / "run", data=data, plan=folder / "plan.json", cache=folder / "cache")
    train = ["train", "rfdetr-nano", "--data", str(data), *TINY, "--max-steps", "2", "--out", str(originals.run)]
    plan = ["plan", "rfdetr-nano", "--gpu", "T4", "--micro-batch", "2", "--out", str(originals.plan)]
    for arguments in (train, plan, *([PREDICT] if with_cache else [])):
        originals.cache.mkdir(exist_ok=True)
        scratch = folder / "scratch"
        scratch.mkdir(exist_ok=True)
        os.environ["XDG_CACHE_HOME"] = str(originals.cache)
        outcome = run_limited(arguments, scratch, limit_s=600.0)
        assert outcome.verdict == "accepted", outcome.output
    return originals


def run_cases(
    originals: Originals, folder: Path, *, cases: int, seed: int, kinds: Sequence[str]
) -> Counter[tuple[str, str]]:
    """Run damaged files of each kind by its share; prints the cases that fail. Returns (kind, verdict) -> number."""
    counts: Counter[tuple[str, str]] = Counter()
    whole = sum(KINDS[kind][0] for kind in kinds)
    for kind in kinds:
        share, make = KINDS[kind]
        for number in range(max(1, round(cases * share / whole))):
            name = f"{seed}/{kind}/{number}"
            rng = random.Random(zlib.crc32(name.encode()))
            place = folder / f"{kind}-{number}"
            place.mkdir()
            arguments = make(originals, place, rng)
            outcome = run_limited(arguments, place)
            counts[kind, outcome.verdict] += 1
            if outcome.verdict not in ("accepted", "named"):
                print(f"{name}: {outcome.verdict} after {outcome.seconds:.1f} s: {' '.join(arguments)}")
                print("    " + "\n    ".join(outcome.output.strip().splitlines()[-6:]), flush=True)
            shutil.rmtree(place)
    return counts


def run() -> int:
    """Parse the command line, run the cases, print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        originals = make_originals(folder, with_cache="cache" in options.kinds)
        counts = run_cases(originals, folder, cases=options.cases, seed=options.seed, kinds=options.kinds)
    for (kind, verdict), number in sorted(counts.items()):
        print(f"{kind:<10}{verdict:<12}{number}")
    bad = sum(number for (_, verdict), number in counts.items() if verdict not in ("accepted", "named"))
    print(f"{sum(counts.values())} cases, {bad} failed")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(run())
