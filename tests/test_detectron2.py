"""Detectron2's configurations in: every key is somewhere in the report; what cannot be trained is refused in one line."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from conftest import rows, run, shared_data
from trainfit.errors import TrainfitError
from trainfit.models.maskrcnn.detectron2.read import read_configuration
from trainfit.models.maskrcnn.detectron2.translate import Translation, translated, with_configuration
from trainfit.models.maskrcnn.detectron2.zoo import ZOO
from trainfit.training import run_folder
from trainfit.training.recipe import make_recipe
from trainfit.training.schedule import lr_factor

# Written by hand from Detectron2's documentation (configs/Base-RCNN-FPN.yaml and the two below it), as a user has them.
BASE = """
MODEL:
  META_ARCHITECTURE: "GeneralizedRCNN"
  BACKBONE:
    NAME: "build_resnet_fpn_backbone"
  RESNETS:
    OUT_FEATURES: ["res2", "res3", "res4", "res5"]
  FPN:
    IN_FEATURES: ["res2", "res3", "res4", "res5"]
  ANCHOR_GENERATOR:
    SIZES: [[32], [64], [128], [256], [512]]
    ASPECT_RATIOS: [[0.5, 1.0, 2.0]]
  RPN:
    IN_FEATURES: ["p2", "p3", "p4", "p5", "p6"]
    PRE_NMS_TOPK_TRAIN: 2000
    PRE_NMS_TOPK_TEST: 1000
    POST_NMS_TOPK_TRAIN: 1000
    POST_NMS_TOPK_TEST: 1000
  ROI_HEADS:
    NAME: "StandardROIHeads"
    IN_FEATURES: ["p2", "p3", "p4", "p5"]
  ROI_BOX_HEAD:
    NAME: "FastRCNNConvFCHead"
    NUM_FC: 2
    POOLER_RESOLUTION: 7
  ROI_MASK_HEAD:
    NAME: "MaskRCNNConvUpsampleHead"
    NUM_CONV: 4
    POOLER_RESOLUTION: 14
DATASETS:
  TRAIN: ("coco_2017_train",)
  TEST: ("coco_2017_val",)
SOLVER:
  IMS_PER_BATCH: 16
  BASE_LR: 0.02
  STEPS: (60000, 80000)
  MAX_ITER: 90000
INPUT:
  MIN_SIZE_TRAIN: (640, 672, 704, 736, 768, 800)
VERSION: 2
"""
INSTANCES = """
_BASE_: "../Base-RCNN-FPN.yaml"
MODEL:
  WEIGHTS: "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
  MASK_ON: True
  RESNETS:
    DEPTH: 50
"""
THREE_TIMES = "SOLVER:\n  STEPS: (210000, 250000)\n  MAX_ITER: 270000\n"
FILES = {
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml": INSTANCES + THREE_TIMES,
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml": INSTANCES,
    "COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml": INSTANCES.replace("MASK_ON: True", "MASK_ON: False") + THREE_TIMES,
}


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    folder = tmp_path / "configs"
    for name, text in {**FILES, "Base-RCNN-FPN.yaml": BASE}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def listed(found: Translation) -> list[str]:
    return [*found.carried, *found.same, *(key for key, _ in found.instead), *found.unknown]


@pytest.mark.parametrize("name", FILES)
def test_every_key_is_in_one_list_and_the_known_files_are_detectron2s(configs: Path, name: str) -> None:
    found = translated(str(configs / name))
    assert sorted(listed(found)) == sorted(found.values)
    assert found.unknown == ()
    assert found.values == ZOO[name] == read_configuration(name)
    assert found.model == ("fasterrcnn-r50-v1" if "faster" in name else "maskrcnn-r50-v1")
    text = "\n".join(found.lines())
    for word in ("beta 1/9", "RoIAlign", "RPN losses", "BGR", "3x3 convolution", ".pkl"):
        assert word in text
    for key in listed(found):
        assert key in text


def own(folder: Path, text: str) -> str:
    file = folder / "own.yaml"
    file.write_text(f"_BASE_: COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml\n{text}")
    return str(file)


def after(words: list[str], flag: str, count: int = 1) -> list[str]:
    return words[words.index(flag) + 1 : words.index(flag) + 1 + count]


FASTER = ["--resolution", 64, "--max-size", 96, "--short-sides", 64, "--proposals", 40, 40]
"""What the examples do not set, small enough for a CPU."""
EXAMPLES = {
    "batch and workers": (
        "SOLVER: {IMS_PER_BATCH: 4}\nDATALOADER: {NUM_WORKERS: 2}\nMODEL: {ROI_HEADS: {BATCH_SIZE_PER_IMAGE: 512}}\n",
        FASTER,
        {"effective_batch": 4, "workers": 2, "rois_per_image": 512},
    ),
    "image size": (
        "INPUT: {MIN_SIZE_TRAIN: '(600,)', MAX_SIZE_TRAIN: 800, MIN_SIZE_TEST: '(600,)', MAX_SIZE_TEST: 800}\n",
        ["--effective-batch", 1, "--rois-per-image", 16, "--proposals", 40, 40, "--workers", 0],
        {"resolution": 600, "max_size": 800},
    ),
    "accumulation": (
        "SOLVER: {ACCUMULATION_STEPS: 2, IMS_PER_BATCH: 2}\n",
        [*FASTER, "--rois-per-image", 16, "--workers", 0],
        {"micro_batch": 2, "effective_batch": 4},
    ),
}
"""Name -> (keys of the source's example, flags beside it, what the recipe must hold)."""


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_sources_examples_train(tmp_path: Path, name: str) -> None:
    """How to resolve GPU memory issues during Detectron2 Mask R-CNN training, each for one step on the CPU."""
    text, flags, wanted = EXAMPLES[name]
    out = tmp_path / "run"
    data = ["--data", shared_data("fruits_nuts"), "--val-fraction", 0.03, "--out", out, "--device", "cpu"]
    assert run("train", "--detectron2", own(tmp_path, text), *data, *flags, "--max-steps", 1) == 0
    recipe = json.loads((out / run_folder.RECIPE).read_text())
    assert {key: recipe[key] for key in wanted} == wanted
    trained = rows(out)
    assert trained[0]["images"] == {"batch and workers": 4, "image size": 1, "accumulation": 4}[name]
    assert trained[0]["size"] == wanted.get("resolution", 64)
    assert "segm_ap" in trained[-1]


def test_the_three_examples_of_the_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """How to resolve GPU memory issues during Detectron2 Mask R-CNN training: batch and workers, sizes, accumulation."""
    batch = (
        "SOLVER: {IMS_PER_BATCH: 4}\nDATALOADER: {NUM_WORKERS: 2}\nMODEL: {ROI_HEADS: {BATCH_SIZE_PER_IMAGE: 512}}\n"
    )
    words = with_configuration(["train", "--detectron2", own(tmp_path, batch + "OUTPUT_DIR: ./output/bs4_workers2\n")])
    assert words[:2] == ["train", "maskrcnn-r50-v1"]
    assert after(words, "--effective-batch") == ["4"]
    assert after(words, "--workers") == ["2"]
    assert after(words, "--rois-per-image") == ["512"]
    assert after(words, "--out") == ["./output/bs4_workers2"]
    sizes = "INPUT: {MIN_SIZE_TRAIN: '(600,)', MAX_SIZE_TRAIN: 800, MIN_SIZE_TEST: '(600,)', MAX_SIZE_TEST: 800}\n"
    with pytest.raises(TrainfitError, match=r"INPUT.MIN_SIZE_TEST \[600, 7\] is not a value"):
        translated(own(tmp_path, sizes.replace("TEST: '(600,)'", "TEST: '(600, 7)'")))
    words = with_configuration(["train", "--detectron2", own(tmp_path, sizes)])
    assert after(words, "--resolution") == ["600"]
    assert after(words, "--max-size") == ["800"]
    accumulation = "SOLVER: {ACCUMULATION_STEPS: 2, IMS_PER_BATCH: 2}\n"
    words = with_configuration(["train", "--detectron2", own(tmp_path, accumulation)])
    assert after(words, "--micro-batch") == ["2"]
    assert after(words, "--accumulation") == ["2"]
    words = with_configuration(["plan", "--detectron2", own(tmp_path, accumulation), "--gpu", "T4"])
    assert after(words, "--effective-batch") == ["4"]
    assert "SOLVER.ACCUMULATION_STEPS" in capsys.readouterr().err


def test_the_schedule_is_detectron2s(tmp_path: Path) -> None:
    def trained(text: str) -> list[str]:
        return with_configuration(["train", "--detectron2", own(tmp_path, text), "--data", "d"])

    words = trained("TEST: {EVAL_PERIOD: 5000}\n")
    assert after(words, "--lr-steps", 3) == ["210000", "250000", "--optimizer"]
    assert after(words, "--schedule") == ["step"]
    assert after(words, "--warmup-steps") == ["1000"]  # config/defaults.py
    assert after(words, "--eval-steps") == ["5000"]
    assert after(words, "--eval-every") == ["0"]
    words = trained("SOLVER: {STEPS: '(8, 20)', MAX_ITER: 12, WARMUP_ITERS: 3}\n")
    assert after(words, "--lr-steps", 2) == ["8", "--optimizer"]  # 20 is never reached
    recipe = make_recipe("maskrcnn-r50-v1", data="sample", lr=1.0, schedule="step", lr_steps=(4, 8), warmup_steps=3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    known = torch.optim.lr_scheduler.MultiStepLR(optimizer, [4, 8])
    for step in range(12):
        ours = lr_factor(step, recipe, steps_per_epoch=5, total_steps=12)
        assert ours == pytest.approx(step / 3 if step < 3 else known.get_last_lr()[0])
        optimizer.step()
        known.step()
    assert after(trained("SOLVER: {LR_SCHEDULER_NAME: WarmupCosineLR}\n"), "--schedule") == ["cosine"]
    for text, reason in (
        ("{WARMUP_ITERS: many}", "WARMUP_ITERS must be a whole number, not 'many'"),
        ("{STEPS: soon}", "STEPS must be a list of whole numbers, not 'soon'"),
        ("{LR_SCHEDULER_NAME: Poly}", "LR_SCHEDULER_NAME 'Poly' is not a value that trainfit has"),
    ):
        with pytest.raises(TrainfitError, match=reason):
            trained(f"SOLVER: {text}\n")
    with pytest.raises(TrainfitError, match="--lr-steps goes with --schedule step, not cosine"):
        make_recipe("maskrcnn-r50-v1", data="sample", schedule="cosine", lr_steps=(4,))


def test_flags_of_the_command_line_win(tmp_path: Path) -> None:
    file = own(tmp_path, "SOLVER: {IMS_PER_BATCH: 8}\n")
    words = with_configuration(
        ["train", f"--detectron2={file}", "--lr", "0.1", "--effective-batch", "2", "--data", "d"]
    )
    assert words.count("--lr") == words.count("--effective-batch") == 1
    assert after(words, "--proposals", 2) == ["2000", "1000"]
    assert after(words, "--max-steps") == ["270000"]


def test_what_is_unknown_or_otherwise_is_said(tmp_path: Path) -> None:
    text = "MODEL: {RPN: {BOX_REG_LOSS_TYPE: giou, NMS_THRESH: 0.8}, ROI_HEADS: {NUM_CLASES: 3}}\nINPUT: {RANDOM_FLIP: none}\n"
    found = translated(own(tmp_path, text))
    assert set(found.unknown) == {"MODEL.RPN.BOX_REG_LOSS_TYPE", "MODEL.ROI_HEADS.NUM_CLASES"}
    lines = "\n".join(found.lines())
    assert "MODEL.ROI_HEADS.NUM_CLASES 3: unknown, and not used" in lines
    assert "MODEL.RPN.NMS_THRESH 0.8: not carried over; an NMS threshold of 0.7" in lines
    assert after([*found.training], "--augment") == ["none"]


def test_what_is_of_another_model_or_no_yaml_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def message(file: object) -> str:
        assert run("train", "--detectron2", file, "--data", "sample") == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    files = {
        "lazy.py": ("model = dict()", "is a LazyConfig, which is code"),
        "model.pkl": ("x", "is a checkpoint, not a configuration"),
        "retina.yaml": (
            yaml.safe_dump({"MODEL": {"META_ARCHITECTURE": "RetinaNet"}}),
            "MODEL.META_ARCHITECTURE is 'RetinaNet'",
        ),
        "empty.yaml": ("", "it has no keys"),
        "list.yaml": ("- 1", "it has no keys"),
        "code.yaml": ("a: !!python/object/apply:os.system ['true']", "not YAML that can be read safely"),
        "circle.yaml": ("_BASE_: circle.yaml", "leads back to itself"),
        "nobase.yaml": ("_BASE_: nowhere.yaml", "its _BASE_"),
        "none.yaml": ("SOLVER: {BASE_LR: 0.1}", "no MODEL.META_ARCHITECTURE"),
        "batch.yaml": (
            "_BASE_: Base-RCNN-FPN.yaml\nSOLVER: {IMS_PER_BATCH: 0}",
            "SOLVER.IMS_PER_BATCH must be a whole number",
        ),
        "masks.yaml": (
            "_BASE_: Base-RCNN-FPN.yaml\nMODEL: {MASK_ON: maybe}",
            "MODEL.MASK_ON 'maybe' is not a value that trainfit has",
        ),
        "depth.yaml": ("_BASE_: Base-RCNN-FPN.yaml\nMODEL: {RESNETS: {DEPTH: 18}}", "MODEL.RESNETS.DEPTH is 18"),
    }
    for name, (text, words) in files.items():
        (tmp_path / name).write_text(text)
        assert words in message(tmp_path / name), name
    assert "is not a file" in message(tmp_path / "missing.yaml")
    assert run("detect", "--detectron2", "a.yaml") == 2
    assert "--detectron2 goes with plan, predict, measure and train" in capsys.readouterr().err


def test_the_words_are_flags_of_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = own(tmp_path, "SOLVER: {IMS_PER_BATCH: 2, AMP: {ENABLED: True}}\nINPUT: {MIN_SIZE_TRAIN_SAMPLING: range}\n")
    assert run("train", "--detectron2", file, "--data", tmp_path / "no", "--out", tmp_path / "run") == 2
    assert str(tmp_path / "no") in capsys.readouterr().err.strip().splitlines()[-1]
