"""Real out-of-memory errors: random settings around the limit of a capped GPU, trained through the `Survivor`. None may die.

    python benchmarks/gpu/survive.py [--count 50] [--seed 0] [--windows 4] [--device cpu --count 2]

Each setting is a clean process: one window without a cap tells what it needs, then it is capped to 40 to 105 % of that and
trains. It may go down the ladder or stop with the numbers; any other end is a death (exit status 1). Without a GPU it lists
what it would do (status 2); `--device cpu` tries settings there, without a cap.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).resolve().parents[2] / "src"
sys.path.insert(0, str(SOURCE))  # a bare machine has trainfit's source, not trainfit installed

from trainfit.models.setting import Setting, make_setting, setting_from_json  # noqa: E402

LIMIT_S = 180  # of a process on a GPU
MODELS: dict[str, dict[str, Any]] = {
    "rfdetr-nano": {"micro_batch": (2, 4, 6), "objects_per_image": (5, 100), "groups": (1, 5)},
    "rfdetr-seg-nano": {"micro_batch": (2, 4), "objects_per_image": (5, 50), "groups": (1, 5)},
    "maskrcnn-r50-v2": {"micro_batch": (1, 2, 3), "resolution": (320, 480), "objects_per_image": (5, 60)},
    "timm:resnet50": {"micro_batch": (16, 48, 96), "channels_last": (False, True), "optimizer": ("adamw-fused", "sgd")},
    "clip:ViT-B-32": {"micro_batch": (16, 64), "accumulation": (2, 4)},
}


def draw(count: int, seed: int) -> list[tuple[Setting, float]]:
    """Settings, and each one's share of the memory that it needs."""
    rng = random.Random(seed)
    drawn: list[tuple[Setting, float]] = []
    for _ in range(count):
        model = rng.choice(sorted(MODELS))
        knobs = {"accumulation": (1, 2, 3), "precision": ("auto", "fp32")} | MODELS[model]
        chosen: dict[str, Any] = {name: rng.choice(values) for name, values in knobs.items()}
        drawn.append((make_setting(model=model, **chosen), round(rng.uniform(0.4, 1.05), 3)))
    return drawn


def train(setting: Setting, share: float, windows: int, device_name: str) -> dict[str, Any]:
    """In a process of its own: how the setting fared under the cap."""
    from trainfit.errors import OutOfMemory
    from trainfit.models.build import build_step
    from trainfit.step.checkpointing import repeated_blocks
    from trainfit.training.oom import Survivor, free_cached
    from trainfit.training.shortage import survival_line

    device = torch.device(device_name)
    step = build_step(setting=setting.to_json(), device=device)
    if device.type == "cuda":
        step.run()
        needed = torch.cuda.max_memory_reserved()
        free_cached(device)
        torch.cuda.set_per_process_memory_fraction(share * needed / torch.cuda.mem_get_info()[1])
    survivor = Survivor(setting.micro_batch, blocks=repeated_blocks(step.model))
    outcome = "trained"
    try:
        for number in range(windows):
            result = survivor.run(step.training, step.window, number=number)
            outcome = outcome if all(math.isfinite(float(loss)) for loss in result.losses.values()) else "not finite"
    except OutOfMemory as error:
        outcome = f"stopped: {error}"
    return {"outcome": outcome, "events": [survival_line(event) for event in survivor.survived]}


def main() -> int:
    """Start one process a setting, print a line each and what became of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("--count", 50), ("--seed", 0), ("--windows", 4)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        case = json.loads(arguments.one)
        print(json.dumps(train(setting_from_json(case["setting"]), case["share"], arguments.windows, arguments.device)))
        return 0
    drawn = draw(arguments.count, arguments.seed)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        for setting, share in drawn:
            print(f"would train under {share:.0%} of its need: {_words(setting)}")
        print(f"no NVIDIA GPU on this machine: none of the {len(drawn)} settings was run", file=sys.stderr)
        return 2
    ends: Counter[str] = Counter()
    limit_s = LIMIT_S if arguments.device == "cuda" else None
    kept: dict[str, Any] = {"capture_output": True, "text": True, "env": os.environ | {"HF_HUB_OFFLINE": "1"}}
    for number, (setting, share) in enumerate(drawn, start=1):
        case = json.dumps({"setting": setting.to_json(), "share": share})
        asked = ["--one", case, "--windows", str(arguments.windows), "--device", arguments.device]
        try:
            done = subprocess.run([sys.executable, __file__, *asked], timeout=limit_s, **kept)
            found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
            said = found["outcome"] if found else (done.stderr.strip().splitlines() or ["no message"])[-1]
        except subprocess.TimeoutExpired:
            found, said = None, f"over {LIMIT_S} s"
        end = said.split(":")[0] if found and said.startswith(("trained", "stopped")) else "died"
        ends[end] += 1
        print(f"{number:3} {share:5.0%} {_words(setting)}: {end}; {said}", flush=True)
        print(*(f"      {line}\n" for line in (found["events"] if found else ())), end="", sep="")
    print(f"{ends['trained']} trained, {ends['stopped']} stopped with the numbers, {ends['died']} died")
    return int(ends["died"] > 0)


def _words(setting: Setting) -> str:
    default = make_setting(model=setting.model).to_json()
    return ", ".join(f"{key} {value}" for key, value in setting.to_json().items() if value != default[key])


if __name__ == "__main__":
    sys.exit(main())
