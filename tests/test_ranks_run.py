"""Whole runs of two ranks (gloo): memory ends on one of them in an evaluation, or one of them is killed.

A workload of one linear layer stands in for a detector, because each rank is a process that imports and saves it again.
"""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from conftest import rows, run
from trainfit.errors import OutOfMemory
from trainfit.models.setting import make_setting
from trainfit.step.terms import LossTerm, Objective
from trainfit.tasks.detection.sample_set import write_sample_set
from trainfit.tasks.detection.samples import ImageDetections, ImageRecord, Sample
from trainfit.training import fit, run_folder
from trainfit.training.recipe import Recipe

SIDE = 64


class Line(torch.nn.Module):
    """Mean colour -> one box and one score, behind dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.line = torch.nn.Dropout(0.2), torch.nn.Linear(3, 5)

    def forward(self, samples: Sequence[Sample]) -> torch.Tensor:
        return self.line(self.drop(torch.stack([s.image.float().mean((1, 2)) / 255 for s in samples])))


def decode(record: ImageRecord, **_options: Any) -> Sample:
    drawn = torch.Generator().manual_seed(record.id)
    return Sample(
        image=torch.randint(0, 256, (3, 4, 4), generator=drawn, dtype=torch.uint8),
        boxes=torch.from_numpy(record.boxes).float(),
        classes=torch.from_numpy(record.classes),
        masks=None,
        image_id=record.id,
        original_size=(record.height, record.width),
    )


def terms(model: torch.nn.Module, samples: Sequence[Sample], _canvas: tuple[int, int]) -> Mapping[str, LossTerm]:
    objects = torch.tensor([[float(len(s.classes))] for s in samples])
    return {"loss": LossTerm(total=(model(samples) - objects).square().sum(), kind="images")}


class LineWorkload:
    """What a run asks of a detector."""

    eval_size, masks, max_detections, export_name = SIDE, False, 100, "best-rfdetr.pth"
    setting = make_setting("rfdetr-nano")
    remarks = ()
    objective = Objective(terms=terms, counts=lambda window: {"loss": float(len(window))})

    def __init__(self, classes: tuple[str, ...]) -> None:
        self.classes = classes
        self.failures = 0

    def build(self) -> torch.nn.Module:
        return Line()

    def parameter_groups(self, model: torch.nn.Module, _settings: Any) -> list[dict[str, Any]]:
        return [{"params": list(model.parameters()), "lr": 1e-2}]

    def blocks(self, _model: torch.nn.Module) -> list[torch.nn.Module]:
        return []

    def sizes(self, **_options: Any) -> tuple[int, ...]:
        return (SIDE,)

    def decoder(self) -> Any:
        return decode

    @torch.no_grad()
    def outputs(self, model: torch.nn.Module, samples: Sequence[Sample]) -> list[ImageDetections]:
        if self.failures:
            self.failures -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        nothing = torch.zeros(1, dtype=torch.int64)
        return [
            ImageDetections(image_id=s.image_id, boxes=row[None, :4] * SIDE, scores=row[4:].sigmoid(), classes=nothing)
            for s, row in zip(samples, model(samples), strict=True)
        ]

    def metadata(self) -> dict[str, str]:
        return {"model": self.setting.model}

    def export(self, weights: Mapping[str, torch.Tensor], path: Path) -> None:
        torch.save(dict(weights), path)


def line_workload(_recipe: Recipe, classes: tuple[str, ...]) -> LineWorkload:
    """Stands in for `training.setup.workload_of`."""
    return LineWorkload(classes)


def use(workload: LineWorkload | None = None) -> None:
    """Let every run of this process train a `LineWorkload`."""
    fit.workload_of = lambda _recipe, classes: workload or LineWorkload(classes)  # type: ignore[assignment,return-value]


def environment(rank: int, port: str) -> dict[str, str]:
    """What torchrun tells a rank of two."""
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return own | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def rank_evaluates(rank: int, folder: str, ports: Sequence[str]) -> None:
    torch.set_num_threads(1)
    undisturbed, disturbed = Path(folder, "undisturbed"), Path(folder, "disturbed")
    recipe = Recipe(
        model="rfdetr-nano",
        data=f"{folder}/data",
        out=undisturbed,
        effective_batch=4,
        micro_batch=2,
        epochs=2,
        eval_micro_batch=2,
        device="cpu",
        workers=0,
    )
    workload = LineWorkload(("box",) * 9)
    use(workload)
    os.environ |= environment(rank, ports[0])
    fit.fit(recipe)

    os.environ |= environment(rank, ports[1])
    workload.failures = 99 * rank
    with pytest.raises(OutOfMemory, match=r"rank 1: one image does not fit.*trainfit train --resume"):
        fit.fit(dataclasses.replace(recipe, out=disturbed))
    assert run_folder.load_state(disturbed / run_folder.STATE)["pending_evaluation"] is True

    os.environ |= environment(rank, ports[2])
    workload.failures = 2 * rank  # the same part is tried once more, then halved
    summary = fit.fit(Recipe(model="rfdetr-nano", data="", resume=disturbed))
    event = summary.survived[-1]
    assert (event.cause, event.micro_batch, event.next_micro_batch) == ("unknown" if rank else "other rank", 2, 1)


def test_one_of_two_ranks_runs_out_of_memory_in_an_evaluation(tmp_path: Path) -> None:
    write_sample_set(tmp_path / "data", train=8, val=4)
    ports = [free_port() for _ in range(3)]
    mp.start_processes(rank_evaluates, (str(tmp_path), ports), nprocs=2, start_method="spawn")
    known, state = (run_folder.load_state(tmp_path / name / run_folder.STATE) for name in ("undisturbed", "disturbed"))
    assert known["step"] == 4
    assert rows(tmp_path / "disturbed") == rows(tmp_path / "undisturbed")
    for part in ("model", "ema"):
        assert all(torch.equal(value, state[part][key]) for key, value in known[part].items()), part


def start_rank(rank: int, arguments: Sequence[object], port: str) -> subprocess.Popen[str]:
    code = "import test_ranks_run, trainfit.cli; test_ranks_run.use(); trainfit.cli.main()"
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    variables = os.environ | environment(rank, port) | {"PYTHONPATH": paths}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True)


def test_a_killed_rank_is_named_in_one_line_and_one_rank_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sample_set(tmp_path / "data", train=8, val=3)
    out, port = tmp_path / "run", free_port()
    arguments = ["train", "rfdetr-nano", "--data", tmp_path / "data", "--out", out, "--device", "cpu", "--workers", 0]
    arguments += ["--micro-batch", 1, "--accumulation", 2, "--eval-every", 0, "--save-minutes", 0, "--epochs", 9999]
    survivor, killed = (start_rank(rank, arguments, port) for rank in range(2))
    try:
        deadline = time.monotonic() + 120
        while not (out / run_folder.STATE).exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        killed.send_signal(signal.SIGKILL)
        _, said = survivor.communicate(timeout=60)
    finally:
        survivor.kill()
        killed.kill()
        killed.communicate()
    assert survivor.returncode == 2
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("trainfit: error: another process of this run was lost (its connection is closed)")
    saved = run_folder.load_state(out / run_folder.STATE)["step"]
    assert f"saved after step {saved} with torchrun --nproc-per-node 2 -m trainfit train --resume {out}" in last
    # With one rank the effective batch of 2 ranks x 2 micro-batches of 1 stays.
    monkeypatch.setattr(fit, "workload_of", line_workload)
    assert run("train", "--resume", out, "--max-steps", saved + 1) == 0
    noted = capsys.readouterr().err
    assert "goes on with 1 process after 2: the effective batch stays 4" in noted
    assert [(row["step"], row["images"]) for row in rows(out) if "loss" in row] == [
        (n + 1, 4) for n in range(saved + 1)
    ]
