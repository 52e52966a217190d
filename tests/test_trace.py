"""The tracer against real CPU runs, bytes counted by hand, and PyTorch's own rules."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import trace_cases
from trainfit.errors import TrainfitError
from trainfit.gpus.capability import kernel_class
from trainfit.models.rfdetr.family import kernels as rfdetr_kernels
from trainfit.tracing import client
from trainfit.tracing.fake_cuda import Target, attention_kernel
from trainfit.tracing.stored_trace import StoredTrace
from trainfit.tracing.trace import trace_step

PARAMETERS = 4 * 3 * (64 * 64 + 64)  # of Blocks
ROWS = 4 * trace_cases.BATCH * trace_cases.WIDTH  # bytes of one activation of Blocks
BACKWARD = {"aten.convolution_backward": torch.nn.Conv2d, "aten.cudnn_batch_norm_backward": torch.nn.BatchNorm2d}
LOSS = 4 + 4  # the loss and its gradient


@pytest.fixture(scope="module")
def traced() -> dict[str, Any]:
    """Every case of trace_cases.py, traced in one other process."""
    script = Path(__file__).with_name("trace_cases.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", trace_cases.SAME_ON_CPU)
def test_peak_equals_that_of_a_real_run_on_the_cpu(name: str, traced: dict[str, Any]) -> None:
    result = trace_step(trace_cases.SAME_ON_CPU[name], target=trace_cases.TARGET, device="cpu")
    # On the CPU AdamW's step counts lie beside the parameters (4 bytes each); attention pads its row sums elsewhere.
    allowed = 4 * sum(tensor.category == "parameters" for tensor in result.trace.tensors) + 4096
    assert abs(traced[name]["peak"] - trace_cases.peak_bytes(result.trace)) <= allowed
    for category in ("parameters", "buffers", "EMA", "gradients"):
        real = sum(tensor.nbytes for tensor in result.trace.tensors if tensor.category == category)
        # AveragedModel leaves its count of averages (8 bytes) on the CPU.
        assert real - traced[name]["allocated"].get(category, 0) == (8 if category == "EMA" and real else 0)


@pytest.mark.parametrize(("policy", "kept"), [("none", 5), ("non-reentrant", 2), ("reentrant", 2)])
def test_bytes_saved_for_backward_by_checkpointing_policy(policy: str, kept: int, traced: dict[str, Any]) -> None:
    # Without checkpoints each block keeps its linear output (for GELU) and, but for the last, its own output (for the
    # next linear layer). With them, the inputs of the second and third block. The first input is not an activation.
    assert traced[policy]["saved"] == kept * ROWS + LOSS
    assert traced[policy]["allocated"]["inputs"] == 2 * ROWS  # one a window


def test_autocast_saves_half_precision_copies(traced: dict[str, Any]) -> None:
    weight = 2 * 64 * 64
    # The input's copy, the weights' (not the first one's: nothing asks for its input's gradient), 5 activations.
    assert traced["bf16"]["saved"] == 2 * weight + 6 * ROWS // 2 + LOSS
    scale_and_scaled_loss = 4 + 4 + 4 + 4  # the scaler's scale is kept from window to window
    assert 0 < traced["fp16"]["saved"] - traced["bf16"]["saved"] <= scale_and_scaled_loss
    assert traced["fp16"]["allocated"]["optimizer state"] == 2 * PARAMETERS  # no made-up overflow skipped the step


def test_optimizers(traced: dict[str, Any]) -> None:
    foreach = 5 * PARAMETERS + 4  # parameters, gradients, two moments, one temporary of all parameters; the loss
    assert traced["none"]["peak"] == foreach
    assert traced["default optimizer"]["peak"] == foreach  # the default of CUDA
    steps = 4 * 6  # fused AdamW counts steps on the device, a float32 for each of 6 parameters
    assert traced["fused"]["allocated"]["optimizer state"] == 2 * PARAMETERS + steps
    assert ["aten._fused_adamw_", "optimizer"] in traced["fused"]["ops"]
    assert ["aten._fused_adamw_", "optimizer"] in traced["fp16 fused"]["ops"]
    assert traced["fused"]["peak"] < foreach


def test_gradient_norm_is_a_foreach_kernel_as_on_cuda(traced: dict[str, Any]) -> None:
    assert ["aten._foreach_norm", "update"] in traced["resnet clip, 2 micro-batches, EMA"]["ops"]


def test_tied_weights_are_one_parameter(traced: dict[str, Any]) -> None:
    assert traced["tied"]["allocated"]["parameters"] == 4 * 64 * 64


def test_backward_names_the_module_of_the_forward(traced: dict[str, Any]) -> None:
    assert {"model.blocks.0.0", "model.blocks.2.1"} <= set(traced["none"]["modules"])
    assert {"model.blocks.0.0", "model.blocks.2.1"} <= set(traced["non-reentrant"]["modules"])


@pytest.mark.parametrize("case", ["resnet", "resnet clip, 2 micro-batches, EMA"])
def test_backward_of_a_convolution_is_credited_to_it_and_not_to_the_norm_behind_it(
    case: str, traced: dict[str, Any]
) -> None:
    names = {f"model.{name}": type(module) for name, module in trace_cases.resnet().named_modules()}
    credited = {op: {module for each, module in traced[case]["backward of"] if each == op} for op in BACKWARD}
    for op, kind in BACKWARD.items():
        assert credited[op] == {name for name, own in names.items() if own is kind}


def test_flops_equal_those_of_pytorchs_counter(traced: dict[str, Any]) -> None:
    torch.manual_seed(0)
    step = trace_cases.SAME_ON_CPU["resnet"](torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        step.run()
    assert traced["resnet"]["flops"] == counter.get_total_flops()
    assert traced["none"]["flops"] == 2 * 32 * 64 * 64 * (3 + 3 + 2)  # forward, weight gradients, two input gradients


def test_kernels_launched_by_a_forward(traced: dict[str, Any]) -> None:
    assert traced["none"]["launches"] == 1 + 3 * 2 + 1 + 1 - 1  # three linear + GELU, the sum, the loss's gradient
    assert ["aten.view", "forward"] not in traced["vit"]["ops"]


def test_shapes_that_follow_from_values(traced: dict[str, Any]) -> None:
    assert traced["known positions"]["made_up"] == []
    assert traced["matched"]["made_up"] == ["numpy"]
    assert traced["matched"]["upper_bounds"] == []
    assert traced["overwritten"]["made_up"] == ["aten._local_scalar_dense"]
    assert traced["unknown positions"]["upper_bounds"] == ["aten.index"]
    assert traced["suppressed"]["upper_bounds"] == ["torchvision.nms"]


def test_untraceable_operator_is_named_with_its_line(traced: dict[str, Any]) -> None:
    message = traced["untraceable"]["error"]
    assert "trainfit_test.opaque" in message
    lines = Path(trace_cases.__file__).read_text().splitlines()
    line = 1 + next(i for i, text in enumerate(lines) if "this line is named in the error" in text)
    assert f"trace_cases.py:{line}" in message
    assert "register_fake" in message


def test_same_trace_again_and_from_json(traced: dict[str, Any]) -> None:
    assert traced["repeatable"] is True


def test_laws(traced: dict[str, Any]) -> None:
    assert traced["laws"] == "hold"


def test_self_test_says_what_to_do(traced: dict[str, Any]) -> None:
    assert torch.__version__ in traced["self-test"]
    assert "--trace-on cpu" in traced["self-test"]


def request(**kwargs: Any) -> dict[str, Any]:
    """For the tracing process."""
    factory = {"factory": "trace_cases:blocks", "kwargs": kwargs}
    return {**factory, "target": asdict(trace_cases.TARGET), "device": "cuda", "steps": 2}


def test_trace_in_a_process_of_its_own(traced: dict[str, Any]) -> None:
    result = StoredTrace.from_json(client.run(request(checkpointing="none"), "blocks"))
    assert trace_cases.peak_bytes(result.trace) == traced["none"]["peak"]
    assert [name for _, name in result.trace.marks if name.startswith("window")] == ["window 0", "window 1"]


def test_failure_in_the_other_process_is_one_line() -> None:
    with pytest.raises(TrainfitError, match=r"tracing my step: exit status 1: .*unexpected keyword argument 'wrong'"):
        client.run(request(wrong=1) | {"device": "cpu"}, "my step")


@pytest.mark.parametrize(
    ("capability", "dtype", "head", "mask", "kernel"),
    [
        ((8, 6), torch.bfloat16, 64, False, "flash"),
        ((8, 6), torch.float16, 64, True, "efficient"),  # flash takes no mask
        ((8, 6), torch.float32, 64, False, "efficient"),
        ((8, 6), torch.float32, 30, False, "math"),  # not a multiple of 4
        ((8, 6), torch.bfloat16, 200, False, "efficient"),  # flash has no backward for it on small shared memory
        ((8, 0), torch.bfloat16, 200, False, "flash"),
        ((7, 5), torch.float16, 64, False, "efficient"),
        ((7, 5), torch.bfloat16, 64, False, "math"),
        ((7, 5), torch.float32, 30, False, "efficient"),
        ((9, 0), torch.bfloat16, 64, True, "cudnn"),
        ((9, 0), torch.float32, 64, False, "efficient"),
        ((12, 0), torch.bfloat16, 64, False, "flash"),
        ((8, 6), torch.float64, 64, False, "math"),
    ],
)
def test_attention_kernel(capability: tuple[int, int], dtype: torch.dtype, head: int, mask: bool, kernel: str) -> None:
    q = torch.empty(2, 4, 16, head, dtype=dtype, device="meta", requires_grad=True)
    attn_mask = torch.empty(16, 16, dtype=torch.bool, device="meta") if mask else None
    target = Target(capability=capability)
    assert attention_kernel(target, q, q, q, mask=attn_mask, dropout=0.0, causal=False) == kernel


@pytest.mark.parametrize("capability", [(5, 0), (6, 1), (7, 0), (7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("head", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_one_card_stands_for_others(capability: tuple[int, int], head: int, dtype: torch.dtype) -> None:
    """For heads as RF-DETR has them, of 32 and 64 numbers: the attention kernel is the stand-in's."""
    stands = kernel_class(capability)
    assert kernel_class(stands) == stands
    stands = rfdetr_kernels(stands)
    query = torch.empty(2, 4, 10, head, dtype=dtype, device="meta", requires_grad=True)
    for mask in (None, torch.empty(10, 10, dtype=dtype, device="meta")):
        kernels = [
            attention_kernel(Target(capability=c), query, query, query, mask=mask, dropout=0.0, causal=False)
            for c in (capability, stands)
        ]
        assert kernels[0] == kernels[1]
