"""Plans for other tools: each tool's own parser reads them, and the effective batch is the plan's."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rfdetr import config as upstream
from rfdetr import variants

from emitted_cases import call_arguments, effective_batch, open_clip_flags
from plan_cases import MICRO_BATCHES, make_plan
from trainfit.errors import TrainfitError
from trainfit.models.emit import MEANS, register
from trainfit.models.maskrcnn.detectron2.read import read_configuration
from trainfit.models.maskrcnn.detectron2.translate import translated
from trainfit.models.rfdetr.emit import RFDETR_CLASSES
from trainfit.models.rfdetr.family import RfDetrTraining
from trainfit.models.rfdetr.workload import CONFIGS
from trainfit.models.workload import OptimizerSettings
from trainfit.reports.emit import TOOLS, emit
from trainfit.step.names import Checkpointing

MODELS = {"detectron2": "maskrcnn-r50-v1", "open_clip": "clip:ViT-B-32"}
"""For each tool one that it trains; the others take rfdetr-nano."""


@given(
    tool=st.sampled_from(sorted(TOOLS)),
    effective=st.integers(1, 70),
    gpus=st.integers(1, 4),
    micro_batch=st.sampled_from(MICRO_BATCHES),
    blocks=st.sampled_from(["none", "all", 3]),
    budget_gib=st.floats(0.9, 12),
)
@settings(max_examples=150, deadline=None)
def test_effective_batch_is_the_plans(
    tool: str, effective: int, gpus: int, micro_batch: int, blocks: Checkpointing, budget_gib: float
) -> None:
    """Whatever is chosen: the plan's effective batch in the tool's own arithmetic, or one line that says why not."""
    share = -(-effective // gpus)
    plan = make_plan(
        (min(micro_batch, max(b for b in MICRO_BATCHES if b <= share)), blocks),
        model=MODELS.get(tool, "rfdetr-nano"),
        effective_batch=effective,
        gpus=gpus,
        budget_gib=budget_gib,
        blocks=("none", 3, "all"),
    )
    assert plan.chosen
    try:
        made, refusal = emit(plan, tool), None
    except TrainfitError as error:
        made, refusal = None, str(error)
    if made is not None:
        assert effective_batch(tool, made.text) == effective
        even = len(set(plan.chosen.cuts)) == 1
        assert even or any("cannot express" in note for note in made.notes)
        return
    assert refusal
    assert "\n" not in refusal
    held = [c for c in plan.candidates if c.verdict != "does not fit" and c.setting.checkpointing == "none"]
    cannot = {
        "detectron2": not any(c.cuts == (share,) for c in held),
        "rfdetr": blocks == "all" and not any(len(set(c.cuts)) == 1 for c in held),
        "transformers": blocks != "none" and not any(len(set(c.cuts)) == 1 for c in held),
    }
    assert effective % gpus != 0 or cannot.get(tool)


@pytest.mark.parametrize("model", CONFIGS)
def test_rfdetr_takes_every_key(model: str) -> None:
    """Upstream's configurations refuse unknown keys."""
    knobs: dict[str, Any] = {
        "resolution": 2 * 96,
        "num_queries": 50,
        "groups": 2,
        "freeze_encoder": True,
        "ema": False,
        "multi_scale": False,
    }
    plan = make_plan(
        (4, 3), model=model, blocks=("none", 3), gpus=2, precision="fp16", optimizer="adamw-foreach", **knobs
    )
    text = emit(plan, "rfdetr").text
    name = RFDETR_CLASSES[model]
    kind = getattr(variants, name)
    made = kind.__new__(kind).get_model_config(**call_arguments(text, name))  # what its __init__ does first
    assert type(made) is CONFIGS[model]
    assert (made.resolution, made.num_queries, made.num_select, made.group_detr) == (192, 50, 50, 2)
    # Of a model with masks the first blocks are the mask head's, which upstream does not recompute.
    assert (made.freeze_encoder, made.gradient_checkpointing, made.fused_optimizer) == (
        True,
        "-seg-" not in model,
        False,
    )
    train_kind = upstream.SegmentationTrainConfig if "seg" in model else upstream.TrainConfig
    training = train_kind(**call_arguments(text, "train"))
    assert (training.batch_size, training.grad_accum_steps, training.devices, training.strategy) == (4, 2, 2, "ddp")
    assert (training.lr, training.lr_encoder) == (OptimizerSettings().lr, RfDetrTraining().lr_encoder)
    assert (training.use_ema, training.multi_scale, training.amp_dtype) == (False, "off", "fp16")
    typo: dict[str, Any] = {**call_arguments(text, "train"), "epoch": 3}
    with pytest.raises(ValueError, match="epoch"):
        train_kind(**typo)


def test_a_rate_follows_the_effective_batch() -> None:
    """Adam by the root above 16 images, and the same between 4 and 16."""
    rates = [
        call_arguments(emit(make_plan((4, "none"), effective_batch=n), "rfdetr").text, "train")["lr"]
        for n in (4, 16, 64)
    ]
    assert rates == [1e-4, 1e-4, 2e-4]


@pytest.mark.parametrize("optimizer", ["adamw-fused", "sgd", "adamw-8bit", "adam", "rmsprop"])
def test_rfdetr_optimizers(optimizer: str) -> None:
    made = call_arguments(emit(make_plan((4, "none"), optimizer=optimizer), "rfdetr").text, "train")
    training = upstream.TrainConfig(**made)
    names = {"adamw-fused": "adamw", "adamw-8bit": "bitsandbytes.optim.AdamW8bit"}
    expected = names.get(optimizer, optimizer)
    assert training.optimizer == expected
    assert training.optimizer_kwargs == ({"momentum": 0.9} if optimizer == "sgd" else {})


def test_rfdetr_checkpoints_the_encoder_alone() -> None:
    """12 blocks: no more than upstream does, so that its memory is no more; 13 or all: another candidate, or refused."""
    text = emit(make_plan((8, 3), blocks=("none", 3)), "rfdetr").text
    assert call_arguments(text, "RFDETRNano") == {"gradient_checkpointing": True}
    made = emit(make_plan((8, "all")), "rfdetr")
    assert call_arguments(made.text, "RFDETRNano") == {}
    assert call_arguments(made.text, "train")["batch_size"] == 4
    assert made.notes[0].startswith(
        "rfdetr cannot express the plan's micro-batch 8 x 2, all blocks checkpointed; this is "
    )
    with pytest.raises(TrainfitError, match="rfdetr has not this activation checkpointing"):
        emit(make_plan((4, "all"), blocks=("all",)), "rfdetr")


def test_averaged_weights_on_the_host() -> None:
    """Upstream keeps them on the GPU: 64 MiB of parameters more, said or refused."""
    made = emit(make_plan((4, "none"), ema_on_host=True), "rfdetr")
    assert "rfdetr keeps the EMA weights on the GPU: 0.06 GiB more than planned." in made.notes
    with pytest.raises(TrainfitError, match="--no-ema"):
        emit(make_plan((1, "none"), budget_gib=1.4, ema_on_host=True), "rfdetr")  # 1.39 GiB are needed already


@pytest.mark.parametrize(("precision", "expected"), [("bf16", "amp_bf16"), ("fp16", "amp"), ("fp32", "fp32")])
def test_open_clip_parses_its_flags(precision: str, expected: str) -> None:
    params = pytest.importorskip("open_clip_train.params")
    plan = make_plan((4, "all"), model="clip:ViT-B-16-SigLIP", gpus=2, precision=precision, resolution=192)
    gpus, flags = open_clip_flags(emit(plan, "open_clip").text)
    made = params.parse_args(flags)
    assert gpus * made.batch_size * made.accum_freq == 16
    assert (made.batch_size, made.precision, made.grad_checkpointing, made.workers) == (4, expected, True, 3)
    assert made.lr == pytest.approx(5e-4 * (16 / 32768) ** 0.5, rel=0.01)
    assert (made.force_image_size, made.siglip, made.local_loss, made.gather_with_grad) == ([192], True, True, True)


def test_siglip_is_known_by_its_name() -> None:
    open_clip = pytest.importorskip("open_clip")
    for name in open_clip.list_models():
        biased = "init_logit_bias" in (open_clip.get_model_config(name) or {})
        assert ("siglip" in name.lower()) == biased, name


@pytest.mark.parametrize(("micro_batch", "blocks", "optimizer"), [(4, "none", "sgd"), (8, "all", "adamw-8bit")])
def test_transformers_takes_every_key(micro_batch: int, blocks: Checkpointing, optimizer: str) -> None:
    from transformers import TrainingArguments
    from transformers.training_args import OptimizerNames

    plan = make_plan((micro_batch, blocks), model="timm:resnet50", optimizer=optimizer, precision="fp32")
    made = call_arguments(emit(plan, "transformers").text, "TrainingArguments")
    assert made.keys() <= {field.name for field in dataclasses.fields(cast(Any, TrainingArguments))}
    assert made.get("activation_checkpointing", False) == (blocks == "all")
    assert OptimizerNames(made["optim"])
    pytest.importorskip("accelerate", reason="TrainingArguments needs it; benchmarks/emit_check.py has it")
    assert TrainingArguments(**made, use_cpu=True).train_batch_size == micro_batch


def test_lightning_takes_every_key() -> None:
    lightning = pytest.importorskip("lightning", reason="not a dependency; benchmarks/emit_check.py has it")
    made = call_arguments(emit(make_plan((4, "none")), "lightning").text, "Trainer")
    inspect.signature(lightning.Trainer).bind(**made)


def test_accelerate_takes_every_key(tmp_path: Any) -> None:
    arguments = pytest.importorskip(
        "accelerate.commands.config.config_args", reason="not a dependency; benchmarks/emit_check.py has it"
    )
    path = tmp_path / "accelerate.yaml"
    path.write_text(emit(make_plan((4, "none"), gpus=2), "accelerate").text)
    assert arguments.load_config_from_file(str(path)).num_processes == 2


@pytest.mark.parametrize("model", ["maskrcnn-r50-v1", "maskrcnn-r50-v2"])
def test_detectron2_has_every_key(model: str) -> None:
    """Against the defaults of detectron2 (084acd0), which cannot be installed from the registry."""
    plan = make_plan((4, "none"), model=model, effective_batch=8, gpus=2, classes=7, resolution=640)
    made = emit(plan, "detectron2")
    record = yaml.safe_load(made.text)
    assert record.pop("_BASE_") == "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"
    for path, value in leaves(record):
        assert path in DETECTRON2, path
        assert type(value) is DETECTRON2[path], path
    # Half of the 16 images of detectron2's 3x schedule (0.02, 270,000 iterations, steps at 210,000 and 250,000).
    assert record["SOLVER"] == {
        "IMS_PER_BATCH": 8,
        "BASE_LR": 0.01,
        "MAX_ITER": 540_000,
        "STEPS": [420_000, 500_000],
        "WARMUP_ITERS": 2000,
        "CHECKPOINT_PERIOD": 10_000,
        "AMP": {"ENABLED": True},
    }
    assert record["MODEL"]["ROI_HEADS"] == {"NUM_CLASSES": 7}
    assert record["INPUT"].pop("FORMAT", "BGR") == ("RGB" if model.endswith("v2") else "BGR")
    assert record["INPUT"] == {"MIN_SIZE_TRAIN": [640], "MAX_SIZE_TRAIN": 1066}
    assert any("fp16" in note for note in made.notes)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml", "maskrcnn-r50-v1"),
        ("COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml", "fasterrcnn-r101-v1"),
    ],
)
def test_detectron2s_configuration_comes_back(tmp_path: Path, name: str, model: str) -> None:
    """Read, planned and written: every key has the value that it had, for the batch of 16 that the schedule is for."""
    read = translated(name)
    assert read.model == model
    knobs: dict[str, Any] = {
        "short_sides": "640,672,704,736,768,800",
        "resolution": 800,
        "max_size": 1333,
        "proposals": (2000, 1000),
    }
    plan = make_plan((16, "none"), model=model, effective_batch=16, budget_gib=20, **knobs)
    (tmp_path / "out.yaml").write_text(emit(plan, "detectron2").text)
    written = read_configuration(str(tmp_path / "out.yaml"))
    assert {key: written[key] for key in read.values} == dict(read.values)


def leaves(record: dict[str, Any], above: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in record.items():
        found += leaves(value, f"{above}{key}.") if isinstance(value, dict) else [(above + key, value)]
    return found


def test_what_does_not_go_together() -> None:
    plan = make_plan((4, "none"))
    for tool, words in {
        "detectron2": "detectron2 does not train rfdetr-nano; these do: rfdetr, lightning, transformers, accelerate",
        "rf-detr": "Perhaps you meant rfdetr",
    }.items():
        with pytest.raises(TrainfitError, match=words):
            emit(plan, tool)
    with pytest.raises(TrainfitError, match="nothing fits RTX 3090"):
        emit(make_plan(None, budget_gib=0.5), "rfdetr")
    with pytest.raises(TrainfitError, match=r"16 images do not divide evenly over 3 GPUs.*--effective-batch 15"):
        emit(make_plan((4, "none"), gpus=3), "lightning")
    with pytest.raises(TrainfitError, match="neither gradient accumulation nor activation checkpointing"):
        emit(make_plan((4, "none"), model="maskrcnn-r50-v1"), "detectron2")
    with pytest.raises(TrainfitError, match="rfdetr has no --stage masks"):
        emit(make_plan((4, "none"), model="rfdetr-seg-nano", stage="masks"), "rfdetr")
    with pytest.raises(ValueError, match="two tools"):
        register("rfdetr")(lambda _: ("", ()))


def test_notes_say_what_the_tool_does_otherwise() -> None:
    accumulated, undivided = (emit(make_plan((b, "none"), budget_gib=9), "rfdetr").notes for b in (4, 16))
    assert MEANS in accumulated
    assert MEANS not in undivided
    notes = emit(make_plan((4, "none"), model="clip:ViT-B-32"), "lightning").notes
    assert "A pair is contrasted only with the 4 of its micro-batch: another loss than the plan's." in notes
    assert MEANS not in notes


DETECTRON2 = {
    "MODEL.MASK_ON": bool,
    "MODEL.RESNETS.NORM": str,
    "MODEL.RESNETS.STRIDE_IN_1X1": bool,
    "MODEL.FPN.NORM": str,
    "MODEL.RPN.CONV_DIMS": list,
    "MODEL.ROI_HEADS.NUM_CLASSES": int,
    "MODEL.ROI_BOX_HEAD.NAME": str,
    "MODEL.ROI_BOX_HEAD.NUM_CONV": int,
    "MODEL.ROI_BOX_HEAD.NUM_FC": int,
    "MODEL.ROI_BOX_HEAD.NORM": str,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": int,
    "MODEL.ROI_MASK_HEAD.NORM": str,
    "INPUT.MIN_SIZE_TRAIN": list,  # a tuple there; yacs turns one into the other
    "INPUT.MAX_SIZE_TRAIN": int,
    "SOLVER.IMS_PER_BATCH": int,
    "SOLVER.AMP.ENABLED": bool,
    "SOLVER.BASE_LR": float,
    "SOLVER.MAX_ITER": int,
    "SOLVER.STEPS": list,  # a tuple there
    "SOLVER.WARMUP_ITERS": int,
    "SOLVER.CHECKPOINT_PERIOD": int,
    "MODEL.WEIGHTS": str,
    "MODEL.PIXEL_MEAN": list,
    "MODEL.PIXEL_STD": list,
    "INPUT.FORMAT": str,
    "CUDNN_BENCHMARK": bool,
    "DATALOADER.NUM_WORKERS": int,
}
"""Keys and types of detectron2/config/defaults.py that a plan may name."""
