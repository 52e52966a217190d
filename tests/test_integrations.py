"""Trainers of other libraries: what they accumulate, against the same trainer with every window as one batch."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader

import trainfit
import trainfit.cli.predict  # pyright: ignore[reportUnusedImport]
from conftest import run
from exactness_cases import images, loop

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

ROOT = Path(__file__).parents[1]
SIZES: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
PICTURES: dict[str, Any] = {"image_size": 8, "patch_size": 4, "num_labels": 3}


def vit() -> torch.nn.Module:
    zero = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, **PICTURES, **zero))


def clip() -> torch.nn.Module:
    towers = {"vision_config": {**SIZES, **PICTURES}, "text_config": {**SIZES, "vocab_size": 9}}
    return transformers.CLIPForImageClassification(transformers.CLIPConfig(**towers, projection_dim=4, num_labels=3))


def labelled(count: int) -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, 8, 8, generator=g), "labels": number % 3} for number in range(count)]


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_is_exact_for_vit_and_adds_up_for_clips_classifier(tmp_path: Path) -> None:
    """Issue 47688 of transformers: the classifier of CLIP drops the count, so four micro-batches weigh four times."""
    from trainfit.integrations.transformers import AccumulationCheck, drops_count, trainer_loop

    exact = trainfit.check_exactness(trainer_loop(vit, labelled(20)))
    assert exact.exact, exact.findings
    assert max(group.relative_error for group in exact.groups) < 1e-12
    added = trainfit.check_exactness(trainer_loop(clip, labelled(16)))
    assert added.causes == ("normaliser",)
    assert added.findings[0].explanation.startswith("the gradient is 4 x the big batch's")
    batch = torch.utils.data.default_collate(labelled(2))
    assert (drops_count(vit(), batch), drops_count(clip(), batch)) == (False, True)
    arguments = transformers.TrainingArguments(str(tmp_path), gradient_accumulation_steps=4, report_to=[], use_cpu=True)
    trainer = transformers.Trainer(
        model=clip(), args=arguments, train_dataset=labelled(8), callbacks=[AccumulationCheck()]
    )
    with pytest.raises(trainfit.TrainfitError, match="CLIPForImageClassification drops num_items_in_batch"):
        trainer.train()


def with_accelerate(model: torch.nn.Module, batches: Any, accumulation: int) -> None:
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=accumulation, cpu=True)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    prepared, optimizer, loader, scheduler = accelerator.prepare(
        model, optimizer, DataLoader(batches, batch_size=None), scheduler
    )
    for pictures, labels in loader:
        with accelerator.accumulate(prepared):
            accelerator.backward(functional.cross_entropy(prepared(pictures), labels))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def test_accelerate_is_exact_for_full_windows_and_divides_a_short_one_by_too_much() -> None:
    assert trainfit.check_exactness(loop(with_accelerate, items=images(16))).exact
    (finding,) = trainfit.check_exactness(loop(with_accelerate, items=images(20))).findings
    assert finding.cause == "short last window"
    assert "its gradient is 0.5 of the big batch's" in finding.explanation


@pytest.mark.parametrize(
    ("name", "said"),
    [("detr_transformers", "check_naive: error 4.0e-01, ('normaliser',)"), ("deeplab", "exact: True")],
)
def test_an_example_runs(name: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    text = capsys.readouterr().out
    assert said in text
    errors = [float(word.rstrip(",")) for word in text.split() if "e-1" in word]
    assert errors
    assert max(errors) <= 1e-12


def test_a_budget_is_a_gate(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 0 at what a small model of one's own may need, 1 below it; the budget is the card unless one is named."""
    monkeypatch.chdir(ROOT / "examples")
    words = ("predict", "small_task:task", "--micro-batch", 2, "--json")
    found: list[Any] = []
    predicted = trainfit.api.predict

    def once(*given: Any, **named: Any) -> Any:
        found.extend([] if found else [predicted(*given, **named)])
        return found[0]

    monkeypatch.setattr(trainfit.api, "predict", once)
    assert run(*words, "--budget", "4GiB") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["gpu"]["name"] == "4 GiB card"
    assert run(*words, "--gpu", "t4", "--budget", "200MiB") == 1
    assert "over budget: it may need" in capsys.readouterr().err
    assert run(*words, "--budget", "much") == 2
    assert "--budget 'much' is not a memory size" in capsys.readouterr().err
