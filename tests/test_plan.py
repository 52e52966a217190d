"""`trainfit plan` from end to end: on a small network that is traced here, and on what comes with the package."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from conftest import run
from trainfit.errors import TrainfitError
from trainfit.gpus.catalogue import GIB, find_gpu, gpu_with_memory
from trainfit.measuring.calibration import Calibration
from trainfit.memory import priced
from trainfit.memory.allocator import AllocatorConfig
from trainfit.memory.predict import needed, trace_requests, with_context
from trainfit.memory.priced import Pricer
from trainfit.memory.shipped import is_shipped
from trainfit.models.rfdetr.family import PUBLISHED, RfDetrTraining
from trainfit.models.setting import make_setting, setting_from_json
from trainfit.planning import make
from trainfit.planning.candidates import cuts
from trainfit.planning.make import loading, make_plan
from trainfit.planning.plan import read_plan, with_plan
from trainfit.planning.predict import predict
from trainfit.planning.rates import learning_rate
from trainfit.tasks.detection.sample_set import write_sample_set
from trainfit.timing.roofline import step_seconds
from trainfit.tracing.trace_cache import TraceRequest, get_trace
from trainfit.training.recipe import Recipe

SMALL = ("plan", "timm:resnet18", "--resolution", "64", "--gpu", "RTX 3060")
NETWORK = make_setting(model="timm:resnet18", resolution=64, precision="bf16")
GPU = find_gpu("RTX 3060")


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code = run(*SMALL, "--json", *arguments)
    found = json.loads(capsys.readouterr().out)
    assert (code == 0) == (found["chosen"] is not None)
    return found


def test_plan_agrees_with_the_prediction_of_its_setting(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, "--effective-batch", "12")
    chosen = found["chosen"]["setting"]
    assert chosen["micro_batch"] * chosen["accumulation"] == 12
    assert chosen["precision"] == "bf16"
    setting = setting_from_json(chosen)
    alone = predict(replace(setting, accumulation=2), GPU)
    assert found["chosen"]["needs"]["high_bytes"] == pytest.approx(alone.needs.high_bytes, rel=0.01)
    assert alone.verdict == "fits"


@pytest.mark.parametrize("micro_batch", [2, 3, 5, 12])
def test_scaled_prices_are_those_of_full_traces(micro_batch: int) -> None:
    """Memory and time of a window, against a trace of that very window."""
    setting = replace(NETWORK, micro_batch=micro_batch, accumulation=2)
    pricer, alone = Pricer(gpu=GPU), predict(setting, GPU)
    priced = pricer.predict(setting, (micro_batch, micro_batch))
    assert priced.training.needs.low_bytes == pytest.approx(alone.training.needs.low_bytes, rel=0.01)
    assert priced.training.needs.high_bytes == pytest.approx(alone.training.needs.high_bytes, rel=0.01)
    assert priced.training.profile.peak_allocated_bytes == pytest.approx(
        alone.training.profile.peak_allocated_bytes, rel=0.002
    )
    assert pricer.needs(setting).high_bytes == priced.training.needs.high_bytes
    assert priced.training.time is not None
    assert alone.training.time is not None
    assert priced.training.time.seconds == pytest.approx(alone.training.time.seconds, rel=0.03)


@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("scales", [True, False])
def test_a_window_takes_the_time_of_all_its_micro_batches(
    micro_batch: int, scales: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the trace of the whole window; the price of one image, or of what does not scale, is of its own trace.

    A window's first micro-batch has no gradients to add to: of the two that are traced that is half, of these five a
    fifth, so up to a tenth is missed for a network as small as this.
    """
    if not scales:

        def cannot(request: TraceRequest, **_: Any) -> dict[TraceRequest, None]:
            return {request: None}

        monkeypatch.setattr(priced, "scaled_traces_of", cannot)
    setting = replace(NETWORK, micro_batch=micro_batch, accumulation=5)
    traced = get_trace(trace_requests(setting, GPU)[0])
    whole = step_seconds(traced.ops, GPU).seconds
    assert 0.88 * whole < Pricer(gpu=GPU).seconds(setting, (micro_batch,) * 5).seconds <= 1.01 * whole
    predicted = predict(setting, GPU).training
    assert predicted.time is not None
    assert 0.88 * whole < predicted.time.seconds <= 1.01 * whole
    true = with_context(needed(traced, GPU, AllocatorConfig()), GPU)
    assert predicted.needs.high_bytes == pytest.approx(true.high_bytes, rel=0.002)


def test_uneven_cuts_take_the_time_of_their_parts() -> None:
    pricer = Pricer(gpu=GPU)
    whole, parts = pricer.seconds(NETWORK, (64, 64)), pricer.seconds(NETWORK, (64, 48, 16))
    assert parts.parts_s["optimizer"] == pytest.approx(whole.parts_s["optimizer"])
    assert parts.seconds > whole.seconds  # one start more, the same images


def test_average_on_the_host_frees_its_bytes_and_takes_time() -> None:
    pricer, here = Pricer(gpu=GPU), replace(NETWORK, micro_batch=4, accumulation=2, ema=True)
    there = replace(here, ema_on_host=True)
    parameters = 4 * 11_217_552  # of ResNet-18 for 80 classes, and its BatchNorms' statistics
    peaks = [pricer.predict(each, (4, 4)).training.profile.peak_allocated_bytes for each in (here, there)]
    assert peaks[0] - peaks[1] == pytest.approx(parameters, rel=0.03)  # blocks are larger than tensors
    assert pricer.seconds(there, (4, 4)).seconds - pricer.seconds(here, (4, 4)).seconds == pytest.approx(
        parameters / 3e9, rel=0.02
    )


def test_moments_on_the_host_free_their_bytes_and_take_time() -> None:
    pricer, here = Pricer(gpu=GPU), replace(NETWORK, micro_batch=4, accumulation=2)
    there = replace(here, optimizer="adamw-host")
    moments = 8 * 11_217_552  # of ResNet-18 for 80 classes
    held = [pricer.needs(each).high_bytes for each in (here, there)]
    assert held[0] - held[1] == pytest.approx(moments, rel=0.15)  # at least the buffer of one part stays
    added_s = pricer.seconds(there, (4, 4)).seconds - pricer.seconds(here, (4, 4)).seconds
    assert added_s == pytest.approx(2 * moments / 10e9, rel=0.01)
    assert pricer.known(there)
    assert pricer.offloaded_bytes(there) == pytest.approx(2 * moments, rel=0.01)  # page-locked memory: powers of two
    assert pricer.offloaded_bytes(here) == 0


def test_evaluation_of_ema_weights_on_the_host_pays_for_bringing_them() -> None:
    """Against the trace of that very setting: training without them, evaluation with them."""
    setting = replace(NETWORK, micro_batch=4, accumulation=2, ema=True, ema_on_host=True)
    priced, traced = Pricer(gpu=GPU).predict(setting, (4, 4)), predict(setting, GPU)
    for found, known in ((priced.training, traced.training), (priced.evaluation, traced.evaluation)):
        assert found.profile.peak_allocated_bytes == pytest.approx(known.profile.peak_allocated_bytes, rel=0.002)
        assert found.needs.high_bytes == pytest.approx(known.needs.high_bytes, rel=0.01)
    assert priced.evaluation.profile.peak_op == traced.evaluation.profile.peak_op


def test_a_model_without_blocks_is_planned() -> None:
    plan = make_plan(replace(NETWORK, model="timm:resnet10t"), gpu_with_memory("1200MiB"), effective_batch=64)
    assert {each.setting.checkpointing for each in plan.candidates} <= {"none", "offload"}


def test_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, "--memory", "700MiB")
    assert found["chosen"] is None
    assert run(*SMALL, "--memory", "700MiB") == 1
    assert "nothing" in capsys.readouterr().out.lower()


def test_plan_file_is_taken_by_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    knobs = (
        "--resolution",
        "64",
        "--groups",
        "1",
        "--num-queries",
        "20",
        "--no-multi-scale",
        "--objects-per-image",
        "9",
    )
    asked = ("plan", "rfdetr-nano", "--gpu", "T4", "--effective-batch", "6", "--micro-batch", "4", *knobs)
    assert run(*asked, "--checkpointing", "all", "--out", file) == 0
    assert run(*asked, "--out", file) == 2  # exists
    assert "use --force" in capsys.readouterr().err
    recipe = with_plan(Recipe(plan=file, data="sample", micro_batch=2))
    assert (recipe.model, recipe.effective_batch, recipe.micro_batch) == ("rfdetr-nano", 6, 2)
    values = vars(recipe)
    assert (recipe.checkpointing, recipe.precision, values["groups"], values["multi_scale"]) == (
        "all",
        "fp16",
        1,
        False,
    )
    out = tmp_path / "run"
    trained = ("train", "--plan", file, "--data", "sample", "--precision", "fp32", "--max-steps", "1", "--out", out)
    assert run(*trained, "--workers", "0") == 0
    assert json.loads((out / "plan.json").read_text()) == read_plan(file)
    saved = json.loads((out / "recipe.json").read_text())
    assert (saved["effective_batch"], saved["micro_batch"], saved["precision"]) == (6, 4, "fp32")
    with pytest.raises(TrainfitError, match="is for rfdetr-nano, not rfdetr-small"):
        with_plan(Recipe(plan=file, data="sample", model="rfdetr-small"))


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON"), ('{"schema": 1}', "not a plan file"), (None, "cannot")]
)
def test_a_file_that_is_no_plan(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "plan.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(TrainfitError, match=message):
        read_plan(file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--effective-batch", "2", "--gpus", "4"), "give at least 4"),
        (("--micro-batch", "17"), "between 1 and the 16 images"),
        (("--gpu", "T4", "--precision", "bf16"), "use fp16"),
        (("--gpu", "RTX 3061"), "Perhaps you meant"),
    ],
)
def test_what_cannot_be_meant_is_one_line(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*SMALL, *arguments) == 2
    assert message in capsys.readouterr().err


def test_the_card_of_this_machine_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "rfdetr-nano") == 2
    assert "this machine has no GPU: name one with --gpu" in capsys.readouterr().err


def test_learning_rate_follows_the_effective_batch() -> None:
    nano = make_setting(model="rfdetr-nano")
    assert "stays" in learning_rate(nano, 16)
    assert "multiply it by 2 (root" in learning_rate(nano, 64)
    assert "multiply it by 4 (linear" in learning_rate(replace(nano, optimizer="sgd"), 64)
    assert "multiply it by 0.707 (root" in learning_rate(nano, 2)


def test_learning_rate_stays_where_upstream_trains_with_it() -> None:
    from rfdetr.config import TrainConfig

    nano = make_setting(model="rfdetr-nano")
    theirs = TrainConfig(dataset_dir=".", output_dir=".")
    assert isinstance(theirs.batch_size, int)
    for batch in (theirs.batch_size * theirs.grad_accum_steps, theirs.auto_batch_target_effective):
        assert "stays" in learning_rate(nano, batch)
    assert Recipe.lr == theirs.lr
    assert RfDetrTraining.lr_encoder == theirs.lr_encoder


def test_workers_keep_up_as_far_as_the_cores_go() -> None:
    nano = make_setting(model="rfdetr-nano")
    ample = loading(nano, 16, images_per_s=100, gpus=1, decode_s=0.02, cores=16)
    assert ample.workers == 3  # 100 x 0.02 s, and a fifth more
    scarce = loading(nano, 16, images_per_s=100, gpus=1, decode_s=0.2, cores=4)
    assert scarce.workers == 3
    assert "loading will be the limit" in scarce.reason
    assert ample.host_bytes > 3 * GIB


def test_measurements_correct_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make_plan(NETWORK, GPU)
    measured = Calibration(
        gpu="RTX 3060", driver="580", rows=4, time_factor=2.0, time_factors=(1.9, 2.1), reserved_factors=(0.9, 3.0)
    )
    monkeypatch.setattr(make, "load", {"RTX 3060": measured}.get)
    corrected = make_plan(NETWORK, GPU)
    assert corrected.calibrated
    assert not plain.calibrated
    assert plain.chosen is not None
    assert corrected.chosen is not None
    assert corrected.chosen.images_per_s == pytest.approx((plain.chosen.images_per_s or 0) / 2)
    by_setting = {each.setting: each for each in plain.candidates}
    for each in corrected.candidates:
        if each.verdict != "chosen" and each.setting in by_setting:
            assert each.needs.high_bytes == 3 * by_setting[each.setting].needs.low_bytes


# ---- traces that come with the package


def test_published_sizes_are_upstreams() -> None:
    from trainfit.models.rfdetr.workload import CONFIGS, WITH_MASKS

    for name, kind in {**CONFIGS, **WITH_MASKS}.items():
        fields, known = kind.model_fields, PUBLISHED[name]
        assert known is not None
        assert known.resolution == fields["resolution"].default
        assert known.block == fields["patch_size"].default * fields["num_windows"].default
        assert known.queries == fields["num_queries"].default
        assert known.decoder_layers == fields["dec_layers"].default


@pytest.mark.parametrize(
    ("gpu", "micro_batch"), [("RTX 3060", 16), ("GTX 1650", 3), ("H100", 16), ("V100 16GB", 16), ("GTX 1080 Ti", 8)]
)
def test_a_shipped_model_is_planned_without_torch(tmp_path: Path, gpu: str, micro_batch: int) -> None:
    code = (
        "import sys; from trainfit.cli import main; from trainfit.memory import shipped\n"
        "shipped.changes = lambda _: ()\n"  # as in a release
        f"try: main(['plan', 'rfdetr-nano', '--gpu', '{gpu}', '--json'])\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
    )
    assert done.stderr.strip().endswith("False")
    assert json.loads(done.stdout)["chosen"]["setting"]["micro_batch"] == micro_batch
    assert not list(tmp_path.rglob("*.json.gz"))  # nothing was traced


@pytest.mark.parametrize(
    ("command", "own"),
    [
        ("plan", ("--memory", "8GiB", "--effective-batch", "300")),
        ("predict", ("--gpu", "T4", "--micro-batch", "75", "--accumulation", "4")),
    ],
)
def test_a_contrastive_window_is_answered_without_torch(tmp_path: Path, command: str, own: tuple[str, ...]) -> None:
    """Of any cut, and under the name that people type."""
    code = (
        "import sys; from trainfit.cli import main; from trainfit.memory import shipped\n"
        "shipped.changes = lambda _: ()\n"  # as in a release
        f"try: main([{command!r}, 'clip-vit-b-32', *{own!r}, '--json'])\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    cache = {"XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | cache
    )
    assert done.stderr.strip().endswith("False")
    answer = json.loads(done.stdout)
    setting = (answer["chosen"] if command == "plan" else answer)["setting"]
    assert setting["micro_batch"] * setting["accumulation"] == 300
    assert not list(tmp_path.rglob("*.gz"))  # nothing was traced


@pytest.mark.parametrize("model", ["maskrcnn-r50-v2", "rtdetr-seg-nano"])
def test_a_data_set_is_planned_for_without_torch(tmp_path: Path, model: str) -> None:
    """Its classes, its fullest image and its canvas are not those that were traced."""
    data = write_sample_set(tmp_path / "data", train=2, val=1)
    code = (
        "import sys; from trainfit.cli import main; from trainfit.memory import shipped\n"
        "shipped.changes = lambda _: ()\n"  # as in a release
        f"try: main(['plan', {model!r}, '--memory', '8GiB', '--data', {str(data)!r}, '--json'])\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | cache
    )
    assert done.stderr.strip().endswith("False")
    chosen = json.loads(done.stdout)["chosen"]["setting"]
    assert chosen["classes"] != 80
    assert not list((tmp_path / "cache").rglob("*.gz"))  # nothing was traced


def test_a_shipped_trace_equals_a_fresh_one() -> None:
    setting = make_setting(model="rfdetr-nano", precision="bf16", checkpointing="none")
    pricer = Pricer(gpu=find_gpu("A100"))
    request = pricer.request(setting, "training")
    assert is_shipped(request)
    fresh = predict(replace(setting, micro_batch=4, accumulation=2), find_gpu("A100"), cache=False)
    shipped = pricer.predict(replace(setting, micro_batch=4, accumulation=2), cuts(8, 4))
    assert shipped.training.profile == fresh.training.profile
    assert (shipped.training.needs.low_bytes, shipped.training.needs.high_bytes) == (
        fresh.training.needs.low_bytes,
        fresh.training.needs.high_bytes,
    )


def test_more_memory_is_never_slower_for_a_shipped_model() -> None:
    """Nor does a plan exceed its budget."""
    speeds: list[float] = []
    for gib in (6, 8, 10, 12, 16, 24):
        plan = make_plan(make_setting(model="rfdetr-nano"), gpu_with_memory(f"{gib}GiB"))
        speeds.append(plan.chosen.images_per_s or 0 if plan.chosen else 0)
        assert plan.chosen is None or plan.chosen.needs.high_bytes <= plan.budget.low_bytes
    assert all(later >= 0.97 * earlier for earlier, later in pairwise(speeds))
    assert speeds[-1] > 0
