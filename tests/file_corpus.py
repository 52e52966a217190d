"""Damaged and foreign checkpoints, plans, recipes, states, logs and caches, made from real ones."""

import gzip
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

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


# ---- damage


def damage_file(file: Path, rng: random.Random, damaged: Callable[[bytes], bytes]) -> None:
    """Replace a file by what `damaged` makes of it, now and then by a pipe, a folder, or nothing."""
    content = file.read_bytes()
    chance = rng.random()
    file.unlink()
    if chance > 0.08:
        file.write_bytes(damaged(content))
    elif chance < 0.04:
        os.mkfifo(file)
    elif chance < 0.06:
        file.mkdir()


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


def damage_text(text: bytes, rng: random.Random) -> bytes:
    """A JSON text with an odd value, or damaged bytes."""
    if rng.random() < 0.25:
        return damage_bytes(text, rng)
    return json.dumps(damage_json(json.loads(text), rng)).encode()


def damage_lines(data: bytes, rng: random.Random) -> bytes:
    """A JSON-lines file with odd lines."""
    lines = data.splitlines()
    for place in rng.sample(range(len(lines)), min(len(lines), rng.choice([1, 3]))):
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
    path.unlink()
    torch.save(content, path)


# ---- cases: each prepares a folder and gives the command that reads it


def weights_case(originals: Originals, folder: Path, rng: random.Random) -> list[str]:
    """A damaged weights file, for `detect` or for `train --weights`."""
    suffix = rng.choice([".safetensors", ".safetensors", ".pth"])
    source = originals.run / ("best.safetensors" if suffix == ".safetensors" else "best-rfdetr.pth")
    file = folder / f"weights{suffix}"
    shutil.copyfile(source, file)
    if rng.random() < 0.4:
        damage_file(file, rng, partial(damage_bytes, rng=rng))
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
    shutil.copyfile(originals.plan, file)
    damage_file(file, rng, partial(damage_text, rng=rng))
    train = ["train", "--data", str(originals.data), "--plan", str(file), "--max-steps", "1", *TINY]
    train += ["--precision", "fp32"]  # the plan's is for a GPU
    return rng.choice(
        [[*train, "--out", str(folder / "run")], ["measure", "rfdetr-nano", "--plan", str(file), "--steps", "0"]]
    )


def recipe_case(originals: Originals, folder: Path, rng: random.Random) -> list[str]:
    """A run folder with a damaged recipe."""
    run = _copy(originals, folder)
    file = run / "recipe.json"
    damage_file(file, rng, partial(damage_text, rng=rng))
    return rng.choice([["report", str(run)], *[["train", "--resume", str(run)]] * 3])


def state_case(originals: Originals, folder: Path, rng: random.Random) -> list[str]:
    """A run folder with a damaged state."""
    run = _copy(originals, folder)
    file = run / "state.pt"
    if rng.random() < 0.5:
        damage_file(file, rng, partial(damage_bytes, rng=rng))
    else:
        damage_checkpoint(file, rng)
    if rng.random() < 0.5:
        (run / "state.previous.pt").unlink()
    return ["train", "--resume", str(run)]


def log_case(originals: Originals, folder: Path, rng: random.Random) -> list[str]:
    """A run folder with damaged logs."""
    run = _copy(originals, folder)
    file = run / rng.choice(["metrics.jsonl", "telemetry.jsonl"])
    damage_file(file, rng, partial(damage_lines, rng=rng))
    html = ["report", str(run), "--html", str(folder / "page.html")]
    return rng.choice([["report", str(run), "--json"], html, html, ["train", "--resume", str(run)]])


def cache_case(originals: Originals, folder: Path, rng: random.Random) -> list[str]:
    """A cache with a damaged trace."""
    cache = folder / "cache"
    shutil.copytree(originals.cache, cache)
    file = rng.choice(sorted(cache.rglob("*.gz")))
    if rng.random() < 0.5:
        damage_file(file, rng, partial(damage_bytes, rng=rng))
    else:
        file.write_bytes(gzip.compress(damage_text(gzip.decompress(file.read_bytes()), rng), 1))
    return PREDICT


def _copy(originals: Originals, folder: Path) -> Path:
    """A copy of the run folder; its large files, which are only ever replaced whole, are links."""
    run = folder / "run"
    shutil.copytree(originals.run, run, copy_function=copy_or_link)
    return run


def copy_or_link(source: str, target: str) -> None:
    """Link a run's large files, of which the state has 400 MB, and copy the others."""
    if source.endswith((".pt", ".pth", ".safetensors")):
        os.link(source, target)
    else:
        shutil.copyfile(source, target)


KINDS: dict[str, tuple[int, Callable[[Originals, Path, random.Random], list[str]]]] = {
    "weights": (30, weights_case),
    "plan": (20, plan_case),
    "recipe": (20, recipe_case),
    "state": (8, state_case),
    "log": (20, log_case),
    "cache": (2, cache_case),
}
"""Kind -> share of the cases in percent, and what makes one."""
