"""Memory that one of several GPUs needs beside the step."""

import importlib
import pkgutil
from dataclasses import replace

import trainfit.step
from test_predict import STORED
from trainfit.gpus.catalogue import MIB, find_gpu
from trainfit.memory import ranks
from trainfit.memory.alloc_conf import AllocatorConfig
from trainfit.memory.hidden import hidden_rows
from trainfit.memory.predict import allocator_room, predict_traced, process_budget
from trainfit.models.setting import make_setting

CONFIG = AllocatorConfig()


def test_the_bucket_is_the_one_that_training_sends() -> None:
    names = [module.name for module in pkgutil.iter_modules(trainfit.step.__path__)]
    modules = [importlib.import_module(f"trainfit.step.{name}") for name in names]
    assert {vars(module)["BUCKET_BYTES"] for module in modules if "BUCKET_BYTES" in vars(module)} == {
        ranks.BUCKET_BYTES
    }


def test_several_gpus_leave_less_room() -> None:
    """By the rows that the report shows: NCCL takes 48 to 192 MiB on a card without NVLink, the bucket 25 to 26."""
    gpu = find_gpu("RTX 3060")
    alone, together = allocator_room(gpu, CONFIG), allocator_room(gpu, CONFIG, 4)
    assert alone.low_bytes - together.low_bytes == (192 + 26) * MIB
    assert alone.high_bytes - together.high_bytes == (48 + 25) * MIB
    assert process_budget(gpu, CONFIG, 4).low_bytes == process_budget(gpu, CONFIG).low_bytes - (192 + 26) * MIB
    more = [row.name for row in hidden_rows(gpu, 4) if row not in hidden_rows(gpu)]
    assert more == ["NCCL", "gradient exchange"]


def test_nvlink_cards_have_more_channels() -> None:
    assert ranks.nccl_bytes(find_gpu("H100")).high_bytes == 768 * MIB
    assert ranks.nccl_bytes(find_gpu("A100")).low_bytes == 48 * MIB


def test_what_just_fits_one_gpu_is_tight_on_several() -> None:
    gpu, setting = find_gpu("RTX 3060"), make_setting("timm:resnet10t", precision="fp32")
    assert hidden_rows(gpu, 1) == hidden_rows(gpu)

    def verdict(memory_bytes: int, gpus: int) -> str:
        card = replace(gpu, memory_bytes=memory_bytes)
        found = predict_traced(setting, card, training=STORED, evaluation=STORED, config=CONFIG, gpus=gpus)
        assert {"NCCL", "gradient exchange"} <= {row.name for row in found.training.hidden} or gpus == 1
        return found.verdict

    needs = predict_traced(setting, gpu, training=STORED, evaluation=STORED, config=CONFIG).needs
    assert verdict(needs.high_bytes, 1) == "fits"
    assert verdict(needs.high_bytes, 2) != "fits"
    assert verdict(needs.high_bytes + (192 + 26) * MIB, 2) == "fits"
