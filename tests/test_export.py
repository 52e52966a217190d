"""`trainfit export`: upstream's exporter, and the file compared with PyTorch by onnxruntime."""

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper

from conftest import run
from trainfit.models.rfdetr.family import RfDetrKnobs
from trainfit.models.rfdetr.workload import RfDetr
from trainfit.tasks.detection.sample_set import write_sample_set
from trainfit.training.run_folder import save_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a small RF-DETR."""
    torch.manual_seed(0)
    workload = RfDetr("rfdetr-nano", ("cat", "dog"), RfDetrKnobs(resolution=64, groups=1, num_queries=20))
    path = tmp_path_factory.mktemp("run") / "best.safetensors"
    save_weights(path, workload.build().state_dict(), workload.metadata())
    return path


def test_the_file_gives_what_the_model_gives(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On real images, to a few roundings of float32; a file whose numbers were changed is refused."""
    root = write_sample_set(tmp_path / "set", train=1, val=3)
    images = sorted(path for path in root.rglob("*") if path.suffix in (".png", ".jpg"))
    out = tmp_path / "m.onnx"
    assert run("export", weights, *images, "--out", out) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert f"on {len(images)} images by at most dets" in line
    assert float(line.split("dets ")[1].split()[0]) < 1e-4
    graph: Any = onnx.load(out)
    assert [[d.dim_value for d in i.type.tensor_type.shape.dim] for i in graph.graph.input] == [[1, 3, 64, 64]]
    assert run("export", weights, "--out", out) == 2  # never overwritten without --force
    assert "exists" in capsys.readouterr().err
    from trainfit.training import exporting

    loaded = exporting_model(weights)
    exporter = exporting.exporter_of(loaded)
    samples = exporting.samples_of(loaded, weights, images, print)
    head = next(each for each in graph.graph.initializer if "class_embed" in each.name and each.name.endswith("bias"))
    head.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(head) + 1, head.name))
    onnx.save(graph, out)
    worse = exporting.compare(loaded, exporter, out, samples, batch_size=1)
    assert worse.differences["labels"] > 0.5


def exporting_model(weights: Path) -> Any:
    from trainfit.training.inference import load_model

    return load_model(weights, torch.device("cpu"))


def test_other_formats_are_upstreams_command(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("export", weights, "--format", "tensorrt") == 0
    assert "pip install 'rfdetr[tensorrt]'" in capsys.readouterr().out
    assert run("export", weights, "--format", "onxx") == 2
    assert "one of onnx, tensorrt" in capsys.readouterr().err
    from rfdetr.export.registry import resolve_exporter

    assert resolve_exporter("onnx").format == "onnx"


def test_a_family_without_an_exporter_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timm = pytest.importorskip("timm")
    assert timm
    from trainfit.models.build import build_trainable
    from trainfit.models.classifier.family import ClassifierSetting

    workload = build_trainable(ClassifierSetting(model="timm:test_resnet", classes=2), ("a", "b"))
    save_weights(tmp_path / "best.safetensors", workload.build().state_dict(), workload.metadata())
    assert run("export", tmp_path / "best.safetensors") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "timm:test_resnet: its upstream project has no exporter; best-timm.safetensors" in line
