"""Every configuration that `trainfit plan --emit` writes, taken by the tool that it is for; effective batches counted there.

    pip install accelerate lightning yacs    # in an environment of its own; the other tools are trainfit's dependencies
    python benchmarks/emit_check.py

Prints a row for each tool: its version, and its own idea of the effective batch beside the plan's. detectron2 is not on the
package registry; yacs, its parser, merges the YAML onto the defaults that `tests/test_emit.py` lists. No GPU is needed:
Lightning's Trainer is made for the CPU, and transformers is told to use it.
"""

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from emitted_cases import call_arguments, effective_batch, open_clip_flags  # pyright: ignore[reportMissingImports]
from plan_cases import make_plan  # pyright: ignore[reportMissingImports]
from test_emit import DETECTRON2  # pyright: ignore[reportMissingImports]
from trainfit.reports.emit import TOOLS, emit

PLANNED = 16


def by_rfdetr(text: str) -> int:
    from rfdetr.config import RFDETRNanoConfig, TrainConfig

    RFDETRNanoConfig(**call_arguments(text, "RFDETRNano"))
    made = TrainConfig(**call_arguments(text, "train"))
    assert isinstance(made.batch_size, int)
    return made.batch_size * made.grad_accum_steps * int(made.devices)


def by_open_clip(text: str) -> int:
    from open_clip_train.params import parse_args

    gpus, flags = open_clip_flags(text)
    made: Any = parse_args(flags)
    return gpus * made.batch_size * made.accum_freq


def by_transformers(text: str) -> int:
    from transformers import TrainingArguments

    made: Any = TrainingArguments(**call_arguments(text, "TrainingArguments"), use_cpu=True)
    return made.train_batch_size * made.gradient_accumulation_steps * made.world_size


def by_lightning(text: str) -> int:
    from lightning import Trainer
    from torch.utils.data import DataLoader

    dataset: Any = list(range(64))
    loader: Any = DataLoader(dataset, **call_arguments(text, "DataLoader"))
    options: dict[str, Any] = {**call_arguments(text, "Trainer"), "accelerator": "cpu"}
    trainer = Trainer(**options, logger=False, enable_checkpointing=False)
    return loader.batch_size * trainer.accumulate_grad_batches * trainer.num_devices


def by_accelerate(text: str) -> int:
    from accelerate.commands.config.config_args import load_config_from_file

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "accelerate.yaml")
        path.write_text(text)
        made: Any = load_config_from_file(str(path))
    return effective_batch("accelerate", text) // yaml.safe_load(text)["num_processes"] * made.num_processes


def by_detectron2(text: str) -> int:
    from yacs.config import CfgNode  # pyright: ignore[reportMissingImports]

    defaults: Any = CfgNode()
    for path, kind in DETECTRON2.items():
        *above, name = path.split(".")
        node = defaults
        for part in above:
            node = node.setdefault(part, CfgNode())
        node[name] = kind()
    record = yaml.safe_load(text)
    del record["_BASE_"]  # fvcore's loader takes it before yacs merges
    defaults.merge_from_other_cfg(CfgNode(record))
    return defaults.SOLVER.IMS_PER_BATCH


def main() -> None:
    """Print the table; a tool that refuses its configuration ends it."""
    checks = {name.removeprefix("by_"): check for name, check in globals().items() if name.startswith("by_")}
    assert checks.keys() == TOOLS.keys()
    for tool, check in checks.items():
        model = {"detectron2": "maskrcnn-r50-v2", "open_clip": "clip:ViT-B-32"}.get(tool, "rfdetr-nano")
        chosen = 16 if tool == "detectron2" else 6
        text = emit(make_plan((chosen, "none"), model=model, effective_batch=PLANNED, budget_gib=9), tool).text
        package = {"open_clip": "open_clip_torch", "detectron2": "yacs"}.get(tool, tool)
        print(f"{tool:<12}  {package} {version(package):<8}  effective batch {check(text)}, planned {PLANNED}")


if __name__ == "__main__":
    main()
