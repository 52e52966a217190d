"""A run folder belongs to one run at a time, and damage to its files costs as little as possible."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch

from conftest import rows, run
from file_corpus import copy_or_link
from trainfit.errors import TrainfitError
from trainfit.models.rfdetr.weights_file import read_weights
from trainfit.tasks.detection.sample_set import write_sample_set
from trainfit.training import run_folder
from trainfit.training.inference import load_model
from trainfit.training.lock import locked
from trainfit.training.run_files import read_rows

TINY: list[object] = ["--resolution", 64, "--groups", 1, "--num-queries", 20, "--no-multi-scale", "--workers", 0]
FAST: list[object] = [*TINY, "--effective-batch", 4, "--micro-batch", 2, "--device", "cpu", "--save-minutes", 0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, with a state after each."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_sample_set(folder / "sample", train=12, val=2)
    out = folder / "run"
    assert run("train", "rfdetr-nano", "--data", data, *FAST, "--max-steps", 2, "--out", out) == 0
    return out


def error_line(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run(*arguments) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("trainfit: error: ")
    return line


# ---- one run in a folder


def test_a_folder_in_use_is_refused_and_a_kill_releases_it(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(trained, tmp_path / "run")
    code = (
        "import sys, time; from pathlib import Path; from trainfit.training.lock import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"held\n"
        before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
        resume = ["train", "--resume", folder, "--max-steps", 3]
        line = error_line(capsys, *resume)
        assert f"{folder} is in use by process {holder.pid} on " in line
        train = ["train", "rfdetr-nano", "--data", trained.parent / "sample", *FAST, "--out", folder]
        assert "is in use by process" in error_line(capsys, *train)
        assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with locked(folder), pytest.raises(TrainfitError, match="is in use by this process"), locked(folder):
        pass


def test_starts_at_once_get_folders_of_their_own(tmp_path: Path) -> None:
    barrier = Barrier(8)

    def start(_number: int) -> Path:
        barrier.wait(timeout=10)
        return run_folder._new_folder(tmp_path / "runs", "rfdetr-nano")  # pyright: ignore[reportPrivateUsage]

    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(start, range(8)))
    assert sorted(folder.name for folder in folders) == [f"rfdetr-nano-{n}" for n in range(1, 9)]


# ---- a damaged state


def flip(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "header": lambda data: flip(data, 1),
    "pickle": lambda data: flip(data, data.index(b"data.pkl") + 80),
    "tensor": lambda data: flip(data, data.index(bytes(range(200))) + 100),
    "cut": lambda data: data[: len(data) * 2 // 3],
    "text": lambda _: b"hello",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_noticed_and_the_previous_one_is_used(damage: str, tmp_path: Path) -> None:
    path = tmp_path / run_folder.STATE
    values = torch.arange(200, dtype=torch.uint8)
    for step in (1, 2):
        run_folder.save_state(path, {"step": step, "values": values})
    assert run_folder.usable_state(tmp_path) == (run_folder.STATE, "")
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(TrainfitError, match=r"state\.pt is damaged .*--weights"):
        run_folder.load_state(path)
    name, remark = run_folder.usable_state(tmp_path)
    assert name == run_folder.PREVIOUS
    assert "is damaged" in remark
    assert run_folder.load_state(tmp_path / name)["step"] == 1
    run_folder.save_state(path, {"step": 3, "values": values})
    assert run_folder.load_state(path)["step"] == 3
    assert run_folder.load_state(tmp_path / run_folder.PREVIOUS)["step"] == 1  # not the damaged one


def test_a_state_that_asks_for_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"step": 1, "evil": Evil()}, tmp_path / run_folder.STATE)
    with pytest.raises(TrainfitError, match="is damaged"):
        run_folder.usable_state(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_resume_of_a_damaged_run_is_the_run_from_its_previous_state(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, damaged = (
        shutil.copytree(trained, tmp_path / name, copy_function=copy_or_link) for name in ("expected", "damaged")
    )
    (expected / run_folder.PREVIOUS).replace(expected / run_folder.STATE)
    state = damaged / run_folder.STATE
    content = state.read_bytes()
    state.unlink()  # it is a link
    state.write_bytes(flip(content, len(content) // 2))
    for name in (run_folder.METRICS, run_folder.TELEMETRY):
        path = damaged / name
        path.write_bytes(b"\n\xff\xfe\nno JSON\n" + path.read_bytes() + b'{"loss": 3}\n{"step": 1, "lo')
    assert run("report", damaged) == 0
    assert "10 unreadable lines" in capsys.readouterr().out
    for folder in (expected, damaged):
        assert run("train", "--resume", folder, "--max-steps", 3) == 0
    notes = capsys.readouterr().err
    assert notes.count("the previous state is used") == 1
    assert f"{damaged / run_folder.METRICS}: 5 unreadable lines dropped" in notes
    assert f"{damaged / run_folder.TELEMETRY}: 5 unreadable lines dropped" in notes
    assert all(json.loads(line) for line in (damaged / run_folder.TELEMETRY).read_text().splitlines())
    assert (damaged / run_folder.METRICS).read_bytes() == (expected / run_folder.METRICS).read_bytes()
    assert [row["step"] for row in rows(damaged) if "loss" in row] == [1, 2, 3]
    for name in (run_folder.BEST, run_folder.LAST):
        (ours, told), (theirs, expected_told) = (run_folder.load_weights(each / name) for each in (damaged, expected))
        assert told == expected_told
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


# ---- bad lines


@pytest.mark.parametrize(
    "bad", [b"", b"not JSON", b'{"loss": 1.0}', b'"\xff\xfe"', b"[1]", b'{"step": "3"}', b"[" * 9000]
)
def test_a_bad_line_is_counted_and_healed(bad: bytes, tmp_path: Path) -> None:
    path = tmp_path / "telemetry.jsonl"
    path.write_bytes(b'{"step": 1}\n' + bad + b'\n{"step": 2}\n')
    assert read_rows(path) == ([{"step": 1}, {"step": 2}], 1)
    assert run_folder.heal(path) == 1
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    assert run_folder.heal(path) == 0


def test_files_of_a_run_are_readable_as_the_umask_says(trained: Path) -> None:
    usual = trained / "usual"
    usual.touch()
    modes = {file.name: file.stat().st_mode for file in trained.iterdir() if file.suffix in (".safetensors", ".pt")}
    assert modes == dict.fromkeys(modes, usual.stat().st_mode)
    assert run_folder.BEST in modes


# ---- weights


def test_weights_of_any_damage_are_one_line(trained: Path, tmp_path: Path) -> None:
    weights, metadata = run_folder.load_weights(trained / run_folder.BEST)
    name = next(key for key, value in weights.items() if value.ndim == 2 and value.is_floating_point())
    odd = {
        "NaN": ({name: weights[name] * float("nan")}, metadata, "holds NaN or infinite values in 1 tensors, first"),
        "int64": ({name: weights[name].long()}, metadata, "is torch.int64, not torch.float32"),
        "shape": ({name: weights[name][:, :1]}, metadata, "has the shape"),
        "bare": ({}, {}, "its metadata lacks"),
        "classes": ({}, metadata | {"classes": "5"}, "no list of class names"),
        "knobs": ({}, metadata | {"knobs": '{"resolution": 1000000000}'}, "--resolution must be at most 8192"),
    }
    for kind, (changes, told, message) in odd.items():
        path = tmp_path / f"{kind}.safetensors"
        run_folder.save_weights(path, weights | changes, told)
        with pytest.raises(TrainfitError, match=message) as caught:
            load_model(path, torch.device("cpu"))
        assert str(path) in str(caught.value)
    for kind, data in {"empty": b"", "text": b"hello", "huge header": (2**62).to_bytes(8, "little") + b"{}"}.items():
        path = tmp_path / f"{kind}.safetensors"
        path.write_bytes(data)
        with pytest.raises(TrainfitError, match="not a readable safetensors file"):
            load_model(path, torch.device("cpu"))


@pytest.mark.parametrize("data", [b"", b"hello\n", b"\x80\x04.", b"PK\x03\x04 cut"])
def test_a_checkpoint_that_is_none_is_one_line(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(data)
    with pytest.raises(TrainfitError, match=r"weights\.pth: not a checkpoint"):
        read_weights(path)
