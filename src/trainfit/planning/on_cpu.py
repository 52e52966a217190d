"""How training on the CPU cuts its batch: by host memory, from the stored traces of a GPU's step."""

from collections.abc import Iterator
from dataclasses import replace

from trainfit.errors import TrainfitError
from trainfit.gpus.catalogue import GIB, gpu_with_memory
from trainfit.memory.priced import Pricer
from trainfit.models.setting import Setting
from trainfit.training.headroom import available_host_bytes
from trainfit.training.recipe import DEFAULT_MICRO_BATCH

FLOAT32 = 2
"""Bytes of a step in float32 over those of the same step in bf16, at most: what autocast has in two bytes takes four."""
OWN_BYTES = 2 * GIB
"""Kept for loader processes and for what the CPU's kernels allocate besides tensors."""


def cut_for_host_memory(setting: Setting, share: int, *, checkpointing_given: bool) -> tuple[Setting, str]:
    """The setting with the largest micro-batch, up to the default, that host memory holds, and a line that says so.

    The need is an upper bound: a float32 trace would take some 20 s, and on the CPU a larger micro-batch is not needed for speed.

    Args:
        setting: What is to be trained, on these data.
        share: Images of a window on each process.
        checkpointing_given: Whether the user chose the setting's checkpointing, so that it stays.

    Raises:
        TrainfitError: no stored trace covers the setting, or this machine does not tell its free memory.
    """
    available = available_host_bytes()
    if available is None:
        raise TrainfitError("this machine does not tell its free memory")
    pricer = Pricer(gpu=gpu_with_memory("80GiB"))
    budget = available - OWN_BYTES
    needs = 0
    candidate = setting
    for candidate in _candidates(setting, share, checkpointing_given=checkpointing_given):
        on_gpu = replace(candidate, precision="bf16")
        if not pricer.answers(on_gpu):
            raise TrainfitError("no stored trace covers this setting")
        needs = FLOAT32 * pricer.predict(on_gpu, (candidate.micro_batch,) * candidate.accumulation).needs.high_bytes
        if needs <= budget:
            break
    cut = f"micro-batch {candidate.micro_batch} x {candidate.accumulation}"
    if candidate.checkpointing != setting.checkpointing:
        cut += f", checkpointing {candidate.checkpointing}"
    size = f"at most {needs / GIB:.1f} of {max(0, budget) / GIB:.1f} GiB of host memory"
    if needs > budget:
        return candidate, f"no setting is sure to fit: starting with the smallest, {cut}, which needs {size}"
    return candidate, f"planned for the CPU: {cut}, {size} (--micro-batch N overrides)"


def _candidates(setting: Setting, share: int, *, checkpointing_given: bool) -> Iterator[Setting]:
    """Smaller and smaller settings, the wanted one first; recompute, which takes time, comes last."""
    micro = min(DEFAULT_MICRO_BATCH, share)
    smaller = setting
    while micro:
        smaller = replace(setting, micro_batch=micro, accumulation=-(-share // micro))
        yield smaller
        micro //= 2
    if not checkpointing_given and setting.checkpointing == "none":
        yield replace(smaller, checkpointing="all")
