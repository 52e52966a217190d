"""The steps of the families besides RF-DETR: gradients against the upstream losses on one big batch, and the settings."""

import copy
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.nn import functional

from support.workloads import make_workload
from trainfit.errors import TrainfitError
from trainfit.models.build import build_eval_step, build_step, step_on_worst_window
from trainfit.models.classifier import workload as classifier
from trainfit.models.clip import workload as clip
from trainfit.models.custom.workload import Custom, CustomTask
from trainfit.models.family import family_of
from trainfit.models.images import crowded_sample
from trainfit.models.maskrcnn import workload as maskrcnn_step
from trainfit.models.maskrcnn.family import MaskRcnnSetting, resized
from trainfit.models.maskrcnn.losses import make_objective
from trainfit.models.maskrcnn.model import build_model
from trainfit.models.rfdetr.family import RfDetrKnobs
from trainfit.models.rfdetr.workload import RfDetr
from trainfit.models.setting import make_setting, setting_from_json
from trainfit.models.workload import OptimizerSettings
from trainfit.step.checkpointing import checkpoint_first, repeated_blocks
from trainfit.step.contrastive import Contrastive, accumulate_contrastive
from trainfit.step.ema import ema_copy, ema_decay, update_ema
from trainfit.step.exchange import sum_gradients
from trainfit.step.window import accumulate, cut
from trainfit.tasks.detection.samples import Sample
from trainfit.tracing import client
from trainfit.tracing.trace_cache import TraceRequest, get_trace
from trainfit.user_code import require_named

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    """Models this small are slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def error(found: dict[str, torch.Tensor], known: dict[str, torch.Tensor]) -> float:
    """Relative norm of the difference over all parameters."""
    assert found.keys() == known.keys()
    flat = [torch.cat([g.flatten() for _, g in sorted(grads.items())]) for grads in (found, known)]
    return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()


# ---- settings and names


@hypothesis_settings(max_examples=50, deadline=None)
@given(
    micro_batch=st.integers(1, 4096),
    canvas=st.none() | st.tuples(st.integers(32, 2000), st.integers(32, 2000)),
    resolution=st.none() | st.integers(1, 2000),
    ema=st.none() | st.booleans(),
    precision=st.sampled_from(["auto", "fp32", "bf16", "fp16"]),
)
def test_a_setting_survives_json(**knobs: Any) -> None:
    setting = make_setting(model="maskrcnn-r50-v1", **knobs)
    assert setting_from_json(json.loads(json.dumps(setting.to_json()))) == setting


def test_a_setting_refuses_what_cannot_be() -> None:
    with pytest.raises(TrainfitError, match="--micro-batch must be at least 1, not 0"):
        make_setting(model="rfdetr-nano", micro_batch=0)


def test_names_of_models() -> None:
    assert family_of("MaskRCNN R50_v1")[1] == "maskrcnn-r50-v1"
    named = ["rtdetr-seg-base", "maskrcnn-r50-v2", "clip:ViT-B-16", "timm:resnet50", "my.file:task"]
    assert [family_of(name)[0].name for name in named] == ["rfdetr", "maskrcnn", "clip", "classifier", "custom"]
    with pytest.raises(TrainfitError, match="Perhaps you meant maskrcnn-r50-v1"):
        family_of("maskrcnn-r50-1")[1]
    with pytest.raises(TrainfitError, match=r"training of my\.file:task is not implemented"):
        make_workload("my.file:task", ("a",), {})
    with pytest.raises(TrainfitError, match="Perhaps you meant timm:resnet50"):
        classifier.build_model("resnet_50", classes=2)
    with pytest.raises(TrainfitError, match="Perhaps you meant clip:ViT-B-16"):
        clip.build_model("ViTB16")
    assert family_of("clip-vit-b-32")[1] == family_of("clip:vit_b_32")[1] == "clip:ViT-B-32"
    for name, reason in (("naflex_vit_b", "many sizes"), ("HTSAT-tiny-CLAP", "audio"), ("genlip-b", "no contrastive")):
        with pytest.raises(TrainfitError, match=reason):
            clip.build_model(name)


# ---- CLIP

TINY: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "patch_dropout": 0.4},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2},
}
SIGLIP = {"init_logit_bias": -3.0, "init_logit_scale": 1.0}


def tiny_clip(folder: Path, name: str, changes: dict[str, Any], *, dropout: bool) -> torch.nn.Module:
    config = copy.deepcopy(TINY) | changes
    config["vision_cfg"]["patch_dropout"] = 0.4 if dropout else 0.0
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(0)
    return clip.build_model(name).double()


def pairs(count: int) -> list[clip.Pair]:
    g = torch.Generator().manual_seed(3)
    return [
        clip.Pair(
            image=torch.randint(0, 256, (3, 32, 32), generator=g, dtype=torch.uint8),
            text=torch.randint(1, 50, (8,), generator=g),
        )
        for _ in range(count)
    ]


def one_big_batch(model: Any, window: Sequence[clip.Pair], micro_batch: int) -> dict[str, torch.Tensor]:
    """open_clip's own loss over all pairs at once, in one graph. Features are made in runs of `micro_batch`, so that
    dropout draws what it draws in the cached window; without dropout the runs don't matter.
    """
    model.zero_grad(set_to_none=True)
    parts = [clip.features(model, part) for part in cut(window, micro_batch)]
    images, texts = (torch.cat(list(side)) for side in zip(*parts, strict=True))
    loss = open_clip.ClipLoss() if model.logit_bias is None else open_clip.loss.SigLipLoss()
    bias = {} if model.logit_bias is None else {"logit_bias": model.logit_bias}
    loss(images, texts, model.logit_scale.exp(), **bias).backward()
    return gradients(model)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_cached_window_is_one_big_batch(tmp_path: Path, kind: str, dropout: bool) -> None:
    model = tiny_clip(tmp_path, f"tiny-{kind}-{dropout}", SIGLIP if kind == "siglip" else {}, dropout=dropout)
    window = pairs(10)
    objective = Contrastive(features=clip.features, rows_loss=clip.rows_loss, chunk_rows=4)
    for micro_batch in (3, 1, 10):
        torch.manual_seed(5)
        known = one_big_batch(model, window, micro_batch if dropout else 10)
        after = torch.get_rng_state()
        model.zero_grad(set_to_none=True)
        torch.manual_seed(5)
        accumulate_contrastive(model, objective, cut(window, micro_batch), device=CPU)
        found = gradients(model)
        assert error(found, known) <= 1e-12
        for name in ("logit_scale", "logit_bias") if kind == "siglip" else ("logit_scale",):
            torch.testing.assert_close(found[name], known[name], rtol=1e-12, atol=0)
        assert torch.equal(torch.get_rng_state(), after)  # the replay leaves no trace
    # Another loss, which is why it is labelled: each micro-batch contrasted with itself.
    model.zero_grad(set_to_none=True)
    accumulate(model, clip.PLAIN, cut(window, 3), device=CPU)
    assert error(gradients(model), known) > 0.05


def test_cached_window_moves_batch_norm_once(tmp_path: Path) -> None:
    tower = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "patch_size": None}
    model = tiny_clip(tmp_path, "tiny-resnet", {"vision_cfg": tower}, dropout=False)
    reference = copy.deepcopy(model)
    for part in cut(pairs(6), 2):
        clip.features(reference, part)
    accumulate_contrastive(model, clip.CACHED, cut(pairs(6), 2), device=CPU)
    for found, known in zip(model.buffers(), reference.buffers(), strict=True):
        assert torch.equal(found, known)


SHARES = ([3, 4], [7, 0])
"""Pairs of each rank; one rank may be left without any."""


def rank_gradient(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.set_num_threads(1)
    own = Path(folder) / f"config-{rank}"
    own.mkdir()
    model = tiny_clip(own, "tiny-ranks", {}, dropout=False)
    for number, shares in enumerate(SHARES):
        model.zero_grad(set_to_none=True)
        start = sum(shares[:rank])
        accumulate_contrastive(model, clip.CACHED, cut(pairs(7)[start : start + shares[rank]], 2), device=CPU)
        sum_gradients(model.parameters())
        torch.save(gradients(model), f"{folder}/gradient-{rank}-{number}")
    dist.destroy_process_group()


def test_two_ranks_give_one_big_batch(tmp_path: Path) -> None:
    mp.start_processes(rank_gradient, (str(tmp_path),), nprocs=2, start_method="spawn")
    known = one_big_batch(tiny_clip(tmp_path, "tiny-ranks", {}, dropout=False), pairs(7), 7)
    for name in ("0-0", "1-0", "0-1", "1-1"):
        assert error(torch.load(tmp_path / f"gradient-{name}", weights_only=True), known) <= 1e-12


# ---- Mask R-CNN


class FirstOfEach:
    """A sampler without chance: the first candidates of each kind. The gradient of a cut equals the big batch's given
    the same picks, and torchvision draws them from one stream of random numbers, which another cut reads in another
    order.
    """

    def __init__(self, positives: int, negatives: int) -> None:
        self.limits = ((1, positives), (0, negatives))

    def __call__(self, labels: list[torch.Tensor]) -> tuple[list[torch.Tensor], ...]:
        def picked(label: torch.Tensor, kind: int, limit: int) -> torch.Tensor:
            candidates = label >= 1 if kind else label == 0
            return (candidates & (candidates.cumsum(0) <= limit)).to(torch.uint8)

        return tuple([picked(label, *limit) for label in labels] for limit in self.limits)


def tiny_rcnn() -> Any:
    torch.manual_seed(0)
    setting = MaskRcnnSetting(model="maskrcnn-r50-v1", resolution=64, max_size=96)
    model: Any = build_model(setting, classes=3)
    model.rpn.fg_bg_sampler = FirstOfEach(12, 20)
    model.roi_heads.fg_bg_sampler = FirstOfEach(6, 10)
    model.rpn._pre_nms_top_n["training"] = model.rpn._post_nms_top_n["training"] = 60
    for module in model.backbone.body.modules():
        if hasattr(module, "bn3"):  # As a trained network: a block adds little, so that numbers don't grow with depth.
            module.bn3.weight.fill_(0.2)
    return model.double()


def scenes() -> list[Sample]:
    """Images of two shapes, so that their own canvases differ from the window's; unequal numbers of objects."""
    shapes = [(64, 96, 5), (96, 64, 1), (64, 80, 2)]
    return [crowded_sample(h, w, objects=n, classes=3, masks=True) for h, w, n in shapes]


def torchvision_gradient(model: Any, parts: Sequence[Sequence[Sample]]) -> dict[str, torch.Tensor]:
    """Torchvision's own forward and losses; the mean over micro-batches, as its users accumulate."""
    model.zero_grad(set_to_none=True)
    for part in parts:
        targets = [
            {"boxes": s.boxes.double(), "labels": s.classes + 1, "masks": s.masks.byte()}
            for s in part
            if s.masks is not None
        ]
        losses = model([s.image.double() / 255 for s in part], targets)
        torch.stack(list(losses.values())).sum().backward()  # not divided here: the objectness loss is a float32
    return {name: gradient / len(parts) for name, gradient in gradients(model).items()}


def test_any_cut_of_mask_rcnn_gives_torchvisions_whole_gradient(capsys: pytest.CaptureFixture[str]) -> None:
    model, window = tiny_rcnn(), scenes()
    known = torchvision_gradient(model, [window])
    objective = make_objective()
    found: list[float] = []
    for micro_batch in (1, 2):
        model.zero_grad(set_to_none=True)
        accumulate(model, objective, cut(window, micro_batch), device=CPU)
        found.append(error(gradients(model), known))
    naive = error(torchvision_gradient(model, cut(window, 1)), known)
    with capsys.disabled():
        print(f"\nMask R-CNN in micro-batches of 1, 2: error {found}; mean of torchvision's losses {naive:.0%}")
    assert max(found) <= 1e-12
    assert naive > 0.05


@pytest.mark.parametrize("shape", [(480, 640), (333, 500), (1333, 77), (50, 51)])
def test_resized_is_what_torchvision_makes(shape: tuple[int, int]) -> None:
    model: Any = build_model(MaskRcnnSetting(model="maskrcnn-r50-v1", resolution=160, max_size=267), classes=1)
    images, _ = model.transform([torch.zeros(3, *shape)])
    assert images.image_sizes == [resized(*shape, min_size=160, max_size=267)]


def test_checkpointed_blocks_of_a_copy_run_the_copys_weights() -> None:
    model = build_model(MaskRcnnSetting(model="maskrcnn-r50-v1", resolution=64), classes=1)
    checkpoint_first(repeated_blocks(model.get_submodule("backbone.body")), "all")
    averaged, x = copy.deepcopy(model), torch.ones(1, 3, 64, 64)
    before: Any = averaged.backbone(x)
    for p in model.parameters():
        p.data.zero_()
    assert torch.equal(averaged.backbone(x)["0"], before["0"])


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18", "convnext_atto", "efficientnet_b0"])
def test_checkpointing_changes_no_gradient_and_can_be_taken_back(name: str) -> None:
    torch.manual_seed(0)
    model = classifier.build_model(name, classes=3, resolution=32).double()
    freeze_statistics(model)
    blocks, x = repeated_blocks(model), torch.randn(2, 3, 32, 32).double()
    kinds = [type(block) for block in blocks]
    saved: list[int] = []
    found: list[dict[str, torch.Tensor]] = []
    for wanted in ("none", 2, "all", "none"):
        checkpoint_first(blocks, wanted)
        model.zero_grad(set_to_none=True)
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.nbytes) or t, lambda t: t):
            torch.manual_seed(1)
            loss = model(x).square().sum()
        loss.backward()
        saved.append(sum(kept))
        found.append(gradients(model))
    assert [type(block) for block in blocks] == kinds
    assert all(error(each, found[0]) <= 1e-12 for each in found)
    assert saved[0] == saved[3] > saved[1] > saved[2]


def test_average_on_the_host_is_the_same_average() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    model.get_parameter("0.bias").requires_grad_(False)
    here, host = ema_copy(model), ema_copy(model, on_host=True)
    for step in range(3):
        for p in model.parameters():
            p.data.add_(0.1 if p.requires_grad else 0.0)
        model(torch.randn(5, 4))
        for averaged in (here, host):
            update_ema(averaged, model, ema_decay(step, decay=0.9, tau=2.0))
    assert all(torch.equal(a, b) for a, b in zip(here.state_dict().values(), host.state_dict().values(), strict=True))
    assert not torch.equal(here.get_parameter("0.weight"), model.get_parameter("0.weight"))
    shared = {p.data_ptr() for p in model.parameters()}
    assert sum(p.data_ptr() in shared for p in here.parameters()) == 1  # what is frozen
    assert not any(p.data_ptr() in shared for p in host.parameters())  # moving it would move the model's


def test_a_frozen_encoder_is_no_parameter() -> None:
    knobs = RfDetrKnobs(resolution=64, groups=1, num_queries=10, freeze_encoder=True)
    workload = RfDetr("rfdetr-nano", ("nut",), knobs)
    model = workload.build()
    trained = {id(p) for group in workload.parameter_groups(model, OptimizerSettings()) for p in group["params"]}
    encoder = {id(p) for p in model.get_submodule("backbone.0.encoder").parameters()}
    assert not trained & encoder
    assert trained == {id(p) for p in model.parameters()} - encoder


def freeze_statistics(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()


# ---- classifiers, the user's own model


def test_classifier_gradient_is_the_mean_cross_entropy() -> None:
    torch.manual_seed(0)
    model = classifier.build_model("vit_tiny_patch16_224", classes=5, resolution=32).double()
    g = torch.Generator().manual_seed(1)
    window = [
        classifier.LabelledImage(image=torch.randint(0, 256, (3, 32, 32), generator=g, dtype=torch.uint8), label=n)
        for n in range(5)
    ]
    functional.cross_entropy(classifier.logits(model, window), torch.arange(5)).backward()
    known = gradients(model)
    model.zero_grad(set_to_none=True)
    accumulate(model, classifier.OBJECTIVE, cut(window, 2), device=CPU)
    assert error(gradients(model), known) <= 1e-12


def mean_square(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return functional.mse_loss(model(batch[0]).squeeze(1), batch[1])


def own_task() -> CustomTask:
    torch.manual_seed(0)
    items = [(torch.randn(4, dtype=torch.float64), torch.randn((), dtype=torch.float64)) for _ in range(5)]
    return CustomTask(
        build_model=lambda: torch.nn.Linear(4, 1, dtype=torch.float64), make_sample=items.__getitem__, loss=mean_square
    )


def test_own_model_with_a_mean_loss_is_exact_and_labelled() -> None:
    setting = make_setting(model="x:y", micro_batch=5, optimizer="sgd")
    step = step_on_worst_window(Custom(setting, (), own_task()), CPU)
    images, values = torch.utils.data.default_collate(list(step.window))
    mean_square(step.model, (images, values)).backward()
    known = gradients(step.model)
    step.model.zero_grad(set_to_none=True)
    losses = accumulate(step.model, step.training.objective, cut(step.window, 2), device=CPU)  # type: ignore[arg-type]
    assert error(gradients(step.model), known) <= 1e-12
    assert list(losses) == ["mean of means"]


def test_own_task_is_found_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_task.py").write_text(
        "import torch\nfrom trainfit.models.custom.workload import CustomTask\n"
        "def task(setting):\n"
        "    return CustomTask(build_model=lambda: torch.nn.Linear(3, 1), make_sample=lambda n: torch.ones(3),\n"
        "                      loss=lambda model, batch: model(batch).mean())\n"
        "def other(setting): return 1\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    step = build_step(setting=make_setting(model="my_task:task", micro_batch=2, accumulation=2).to_json(), device=CPU)
    result: Any = step.run()
    assert result.micro_batches == 2
    for name, cause in (
        ("nowhere:task", "run in the folder"),
        ("my_task:tusk", "no attribute"),
        ("my_task:other", "CustomTask"),
    ):
        with pytest.raises(TrainfitError, match=cause):
            build_step(setting=make_setting(model=name).to_json(), device=CPU)


@pytest.mark.parametrize(
    ("model", "cause"),
    [
        ("nowhere:task", "nowhere:task: No module named 'nowhere'; run in the folder that holds nowhere.py"),
        ("deep.nowhere:task", "No module named 'deep'; run in the folder that holds deep/nowhere.py"),
        ("mine:tsk", "module 'mine' has no attribute 'tsk'. Perhaps you meant mine:task"),
    ],
)
def test_a_task_that_is_not_there_is_refused_before_torch_is_imported(
    model: str, cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is run of the module, and no tracing process is started."""
    (tmp_path / "mine.py").write_text("raise SystemExit('it was run')\ndef task(setting): pass\n")
    monkeypatch.chdir(tmp_path)

    def run(*_: object) -> str:
        pytest.fail("a process was asked")

    monkeypatch.setattr(client, "run", run)
    with pytest.raises(TrainfitError, match=re.escape(cause)):
        get_trace(TraceRequest(setting=make_setting(model), part="training", capability=(8, 0)))


def test_a_name_that_a_source_does_not_spell_may_be_there_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for source in ("def task(setting): pass", "from other import *", "globals()['ta' + 'sk'] = print"):
        (tmp_path / "mine.py").write_text(f"{source}\n")
        require_named("mine:task")
    (tmp_path / "parts").mkdir()
    require_named("parts.mine:task")  # whether a package has a module is known when it is imported


# ---- every family runs


@pytest.mark.parametrize(
    "knobs",
    [
        {"model": "timm:resnet10t", "resolution": 64, "channels_last": True},
        {"model": "clip:tiny", "contrastive": "cached", "optimizer": "adamw-foreach"},
        {"model": "maskrcnn-r50-v2", "resolution": 64, "objects_per_image": 3, "ema": True},
        {
            "model": "rfdetr-seg-nano",
            "resolution": 72,
            "groups": 2,
            "num_queries": 20,
            "objects_per_image": 3,
            "multi_scale": False,
        },
        {
            "model": "rfdetr-seg-nano",
            "resolution": 72,
            "groups": 2,
            "num_queries": 20,
            "objects_per_image": 3,
            "multi_scale": False,
            "lean": "off",
        },
    ],
    ids=lambda knobs: " ".join([knobs["model"], knobs.get("lean", "")]).strip(),
)
def test_every_family_trains_and_evaluates_a_window(
    knobs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_clip(tmp_path, "tiny", {}, dropout=False)
    monkeypatch.setattr(maskrcnn_step, "build_model", few_regions(maskrcnn_step.build_model))
    setting = make_setting(**knobs, accumulation=2, eval_micro_batch=2, classes=4)
    step = build_eval_step(setting=setting.to_json(), device=CPU)
    before = gradients_free_copy(step.model)
    result: Any = step.run()
    assert result.micro_batches == 2
    assert torch.isfinite(torch.stack(list(result.losses.values()))).all()
    assert any(not torch.equal(before[name], p) for name, p in step.model.named_parameters())
    assert (step.ema is not None) == (knobs["model"] in ("rfdetr-seg-nano", "maskrcnn-r50-v2"))
    found: Any = step.run()
    assert len(found[0] if isinstance(found, tuple) else found) == 2
    assert step.model.training


def gradients_free_copy(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def few_regions(build: Callable[..., Any]) -> Callable[..., Any]:
    def built(*args: Any, **kwargs: Any) -> Any:
        model = build(*args, **kwargs)
        model.roi_heads.fg_bg_sampler.batch_size_per_image = 8
        model.roi_heads.detections_per_img = 3
        return model

    return built
