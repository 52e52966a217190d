"""Parts that do not train, low-rank adapters and stochastic depth: what moves, what is saved, what a trace holds."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from conftest import rows, run
from trainfit.errors import TrainfitError
from trainfit.models.build import build_trainable, workload_from_metadata
from trainfit.models.setting import make_setting
from trainfit.step.lora import adapt, has_adapters, merged
from trainfit.weights import load_weights

SMALL: dict[str, Any] = {"resolution": 32, "groups": 1, "num_queries": 8, "multi_scale": False}
FLAGS = ("--resolution", 32, "--no-multi-scale", "--groups", 1, "--num-queries", 8)
TRAIN = ("--data", "sample", "--effective-batch", 2, "--workers", 0, "--device", "cpu", "--weights", "random")


def trained(values: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in values.items() if not torch.equal(value, other[name])}


def build(**knobs: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    names = ("circle", "square", "triangle", "star")
    return build_trainable(make_setting("rfdetr-nano", classes=4, **SMALL, **knobs), names).build()


@pytest.mark.parametrize(
    ("freeze", "beginnings"),
    [
        ("encoder", ("backbone.0.encoder.",)),
        ("projector,decoder", ("backbone.0.projector.", "transformer.decoder.")),
    ],
)
def test_frozen_parts(freeze: str, beginnings: tuple[str, ...]) -> None:
    """Exactly the parameters under these names do not train, besides the one that never does."""
    for name, parameter in build(freeze=freeze).named_parameters():
        frozen = name.startswith(beginnings) or name.endswith("mask_token")
        assert parameter.requires_grad != frozen


def test_the_old_switch_is_the_encoder() -> None:
    flags = [
        [p.requires_grad for p in build(**knobs).parameters()]
        for knobs in ({"freeze": "encoder"}, {"freeze_encoder": True})
    ]
    assert flags[0] == flags[1]


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"freeze": "encodr"}, "Perhaps you meant encoder"),
        ({"lora": 4, "freeze": "encoder"}, "leave one of the two out"),
        ({"drop_path": 1.0}, "--drop-path must be at most 0.9"),
    ],
)
def test_what_cannot_be(knobs: dict[str, Any], words: str) -> None:
    with pytest.raises(TrainfitError, match=words):
        make_setting("rfdetr-nano", **knobs)


def test_an_adapter_is_the_product_of_its_factors() -> None:
    """Gradients and outputs are those of a linear layer with the product added; merging gives the same layer."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 5).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    before = layer(x)
    adapt([layer], 2)
    assert torch.equal(layer(x), before)
    factors: Any = layer
    with torch.no_grad():
        factors.lora_up.normal_()
    down, up = (getattr(layer, name).detach().clone().requires_grad_() for name in ("lora_down", "lora_up"))
    expected = functional.linear(x, layer.weight.detach() + up @ down, layer.bias.detach())
    torch.testing.assert_close(layer(x), expected)
    layer(x).square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(factors.lora_down.grad, down.grad)
    torch.testing.assert_close(factors.lora_up.grad, up.grad)
    assert layer.weight.grad is None
    plain = torch.nn.Linear(6, 5).double()
    plain.load_state_dict(merged(layer.state_dict()))
    torch.testing.assert_close(plain(x), expected)


def test_a_run_with_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained, resumed and evaluated; upstream's file has the adapters merged: a plain model with it detects the same."""
    out = tmp_path / "run"
    words = ("train", "rfdetr-nano", *FLAGS, *TRAIN, "--lora", 2, "--drop-path", 0.3, "--no-ema", "--eval-every", 0)
    assert run(*words, "--max-steps", 2, "--lr-encoder", 0.01, "--out", out) == 0
    weights, metadata = load_weights(out / "best.safetensors")
    first = build(lora=2, drop_path=0.3).state_dict()
    encoder = {name for name in trained(weights, first) if name.startswith("backbone.0.encoder.")}
    assert encoder
    assert all("lora" in name for name in encoder)
    assert run("evaluate", out, "--data", "sample", "--device", "cpu", "--json") == 0
    capsys.readouterr()
    workload = workload_from_metadata(metadata)
    model = workload.build()
    model.load_state_dict(weights)
    assert has_adapters(model)
    plain = build()
    upstream = torch.load(out / workload.export_name, weights_only=True)
    plain.load_state_dict(upstream["model"])
    assert not has_adapters(plain)
    sample = workload.eval_sample(model)
    with torch.no_grad():
        one, other = (workload.outputs(each.eval(), [sample])[0] for each in (model, plain))
    torch.testing.assert_close(one.scores, other.scores, rtol=1e-4, atol=1e-5)
    assert run("train", "rfdetr-nano", *FLAGS, *TRAIN[:-1], out, "--max-steps", 1, "--out", tmp_path / "next") == 0
    recipe = json.loads((tmp_path / "next" / "recipe.json").read_text())
    assert recipe["lora"] == 2
    assert len(rows(tmp_path / "next")) == 2


def test_stochastic_depth_is_upstream_s() -> None:
    """Rates rise to the last layer; evaluation leaves nothing out."""
    model: Any = build(drop_path=0.4)
    layers = model.get_submodule("backbone.0.encoder.encoder.encoder.layer")
    rates = [layer.drop_path.drop_prob for layer in layers]
    assert rates == pytest.approx([0.4 * i / (len(rates) - 1) for i in range(len(rates))])
    x = torch.ones(64, 3, 4)
    last = layers[-1].drop_path
    torch.manual_seed(0)
    kept = last.train()(x)[:, 0, 0]
    assert sorted(set(kept.tolist())) == pytest.approx([0, 1 / 0.6])
    assert torch.equal(last.eval()(x), x)
