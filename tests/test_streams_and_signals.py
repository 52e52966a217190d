"""Signals end a command in one line, in every phase; output that cannot be written is one line and a failure."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainfit.models.build import build_trainable
from trainfit.models.setting import make_setting
from trainfit.tasks.detection.sample_set import write_sample_set
from trainfit.training import run_folder
from videos import write_video

FAST: list[object] = ["--resolution", 64, "--groups", 1, "--num-queries", 20, "--no-multi-scale", "--workers", 0]
PLAN = ("plan", "rfdetr-nano", "--gpu", "T4", "--micro-batch", "2")


def start(*arguments: object, **environment: str) -> "subprocess.Popen[bytes]":
    """A command in a process of its own, which hears SIGHUP even where the tests run under nohup."""
    command = [sys.executable, "-m", "trainfit", *map(str, arguments)]
    environ = os.environ | environment
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ)
    finally:
        signal.signal(signal.SIGHUP, before)


def shell(redirections: str, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = f'exec "$0" -m trainfit "$@" {redirections}'
    return subprocess.run(
        ["/bin/sh", "-c", command, sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | environment,
    )


# ---- output


@pytest.mark.parametrize("arguments", [("report", "RUN"), ("check-data", "sample", "--no-decode")])
def test_a_full_stdout_is_one_line_and_a_failure(arguments: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps({"model": "rfdetr-nano"}))
    done = shell("> /dev/full", *(str(tmp_path) if word == "RUN" else word for word in arguments))
    assert done.returncode == 2
    line = "trainfit: error: the result cannot be written to standard output: No space left on device"
    assert done.stderr.strip() == line


def test_a_closed_stdout_is_one_line_and_a_failure() -> None:
    done = shell(">&-", *PLAN)
    assert done.returncode == 2
    assert done.stderr.strip() == "trainfit: error: standard output is closed: redirect it to a file or to /dev/null"


@pytest.mark.parametrize("redirection", ["2>&-", "2> /dev/full"])
def test_stderr_is_not_needed_for_a_result(redirection: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps({"model": "rfdetr-nano"}))
    done = shell(redirection, "report", str(tmp_path))
    assert done.returncode == 0
    assert "rfdetr-nano" in done.stdout
    assert shell(redirection, "report", "/nowhere").returncode == 2


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_a_narrow_encoding_gets_escapes(environment: dict[str, str], tmp_path: Path) -> None:
    data = write_sample_set(tmp_path / "d\u00e4ta", train=2, val=1)
    done = shell("", "check-data", str(data), **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_a_result_file_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    for file in (tmp_path / "none" / "plan.json", tmp_path):
        done = shell("", *PLAN, "--out", str(file), "--force")
        assert done.returncode == 2
        assert done.stderr.startswith(f"trainfit: error: {file} cannot be written")
        assert not done.stdout


# ---- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_modules_are_imported_is_one_line(number: signal.Signals) -> None:
    process = start("train", "rfdetr-nano", "--data", "/nowhere", PYTHONPROFILEIMPORTTIME="1")
    assert process.stderr is not None
    for line in process.stderr:  # a report of imports: `trainfit.cli` is there, and torch is being imported
        if b" torch._C" in line:
            break
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    lines = [line for line in error.decode().splitlines() if not line.startswith("import time:")]
    assert process.returncode == 128 + number
    assert list(filter(None, lines)) == ["trainfit: stopped at once; what was saved before is intact"]


@pytest.fixture(scope="module")
def sample_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample_set(tmp_path_factory.mktemp("set") / "sample", train=12, val=4)


def wait_for(process: "subprocess.Popen[bytes]", file: Path) -> None:
    deadline = time.monotonic() + 120
    while not file.exists() or not file.stat().st_size:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)


def test_hanging_up_saves_and_a_second_signal_stops_at_once(sample_set: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train = ["train", "rfdetr-nano", "--data", sample_set, *FAST, "--effective-batch", 4, "--micro-batch", 2]
    process = start(*train, "--epochs", 500, "--eval-every", 0, "--device", "cpu", "--out", out)
    wait_for(process, out / run_folder.METRICS)
    process.send_signal(signal.SIGHUP)
    printed, error = process.communicate(timeout=120)
    assert process.returncode == 129, error.decode()
    assert f"--resume {out}" in printed.decode()
    assert b"Traceback" not in error
    step = run_folder.load_state(out / run_folder.STATE)["step"]
    lines = (out / run_folder.METRICS).read_bytes()
    process = start("train", "--resume", out)
    while (out / run_folder.METRICS).read_bytes() == lines:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in error
    assert run_folder.load_state(out / run_folder.STATE)["step"] >= step


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_tracing_process_ends_with_its_parent(number: signal.Signals) -> None:
    process = start("predict", "timm:resnet18", "--gpu", "T4", "--no-cache", OMP_NUM_THREADS="1")
    task = Path(f"/proc/{process.pid}/task")
    found: list[int] = []
    deadline = time.monotonic() + 60
    while not found:
        assert time.monotonic() < deadline
        assert process.poll() is None
        found = [int(pid) for thread in task.iterdir() for pid in (thread / "children").read_text().split()]
        time.sleep(0.02)
    if number == signal.SIGKILL:
        time.sleep(1.0)  # until the child watches its parent
    began = time.monotonic()
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    while any(map(is_alive, found)):
        assert time.monotonic() - began < 5
        time.sleep(0.02)
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        assert time.monotonic() - began < 8  # no other process is started for what nobody waits for
        *progress, last = error.decode().splitlines()
        assert last == "trainfit: stopped"
        assert all("tracing" in line or "predicting" in line for line in progress)


SLOW_LOOP = """
import time
from pathlib import Path
import torch
import trainfit

def train(model, batches, accumulation):
    Path("began").touch()
    time.sleep(120)

def check():
    return trainfit.OwnLoop(model=lambda: torch.nn.Linear(2, 1), items=[torch.ones(2)] * 32, train=train)
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_ends_a_check_of_a_loop_in_one_line(ranks: int, tmp_path: Path) -> None:
    """A terminal sends it to every process of the command, so to the ranks as well."""
    (tmp_path / "slow.py").write_text(SLOW_LOOP)
    words = ["check-exactness", "slow:check", "--ranks", str(ranks)]
    with subprocess.Popen(
        [sys.executable, "-m", "trainfit", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        start_new_session=True,
    ) as process:
        wait_for_file(process, tmp_path / "began")
        os.killpg(process.pid, signal.SIGINT)
        printed, error = process.communicate(timeout=60)
        assert process.returncode == 130
        assert (printed, error.decode()) == (b"", "trainfit: stopped\n")
    began = time.monotonic()
    while any(is_alive(pid) for pid in of_session(process.pid)):  # no rank is left, nor what Python starts beside them
        assert time.monotonic() - began < 10
        time.sleep(0.02)


def of_session(number: int) -> list[int]:
    """Processes of a session, which has the number of the process that began it."""
    found: list[int] = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
        except OSError:  # it ended
            continue
        if int(fields[3]) == number:
            found.append(int(file.parent.name))
    return found


def wait_for_file(process: "subprocess.Popen[bytes]", file: Path) -> None:
    deadline = time.monotonic() + 120
    while not file.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)


def test_ctrl_c_ends_explain_in_one_line() -> None:
    """Also while it waits for what is piped in."""
    command = [sys.executable, "-c", "import sys; from trainfit.cli import main; main(sys.argv[1:])", "explain", "-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wchan = Path(f"/proc/{process.pid}/wchan")
        deadline = time.monotonic() + 60
        while "pipe_read" not in wchan.read_text():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert process.stderr.read() == b"trainfit: stopped\n"
        assert process.wait(timeout=30) == 130


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the smallest detector."""
    setting = make_setting("rfdetr-nano", resolution=64, groups=1, num_queries=20)
    workload = build_trainable(setting, ("square", "circle"))
    path = tmp_path_factory.mktemp("weights") / "best.safetensors"
    run_folder.save_weights(path, workload.build().state_dict(), workload.metadata())
    return path


@pytest.mark.parametrize("piped", [False, True])
def test_ctrl_c_ends_detect_in_one_line(piped: bool, weights: Path, tmp_path: Path) -> None:
    """Of a file nothing half written is left; of a stream, whose end it may be, what was detected is."""
    content = write_video(tmp_path / "clip.mkv", 500)
    out = tmp_path / "a.json"
    source = "-" if piped else tmp_path / "clip.mkv"
    words = ["detect", weights, source, "--threshold", 0, "--out", out, "--device", "cpu"]
    command = [sys.executable, "-m", "trainfit", *map(str, words)]
    environ = os.environ | {"TMPDIR": str(tmp_path)}
    with (tmp_path / "lines").open("wb") as lines:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=lines,
            stderr=subprocess.PIPE,
            env=environ | {"PYTHONUNBUFFERED": "1"},
        )
    with process:
        assert process.stdin is not None
        assert process.stderr is not None
        if piped:
            process.stdin.write(content[:60_000])  # a pipe holds as much, and it stays open
            process.stdin.flush()
        wait_for(process, tmp_path / ".a.json.partial")
        process.send_signal(signal.SIGINT)
        error = process.stderr.read().decode().splitlines()
        assert process.wait(timeout=30) == 130
    assert error[-1] == "trainfit: stopped"
    left = sorted(path.name for path in tmp_path.iterdir())
    if not piped:
        assert error[-2] == f"{out} is not written, as it would not be whole"
        assert left == ["clip.mkv", "lines"]
        return
    assert left == ["a.json", "clip.mkv", "lines"]
    assert json.loads(out.read_text())["detections"][0]["frame"] == 0


def test_ctrl_c_ends_detect_in_a_folder_in_one_line(weights: Path, sample_set: Path, tmp_path: Path) -> None:
    """What was drawn stays, and is named; a file of rows that is not whole is not there, and a line says so."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    original = next(path for path in (sample_set / "train").iterdir() if path.suffix != ".json")
    for number in range(300):
        (pictures / f"{number}{original.suffix}").symlink_to(original)
    out = tmp_path / "a.json"
    words = [
        "detect",
        weights,
        pictures,
        "--threshold",
        0.99,
        "--out",
        out,
        "--draw",
        tmp_path / "drawn",
        "--device",
        "cpu",
    ]
    process = start(*words)
    while not list((tmp_path / "drawn").glob("*.png")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    *wrote, unfinished, last = error.decode().splitlines()
    assert last == "trainfit: stopped"
    assert unfinished == f"{out} is not written, as it would not be whole"
    drawn = {f"wrote {path}" for path in (tmp_path / "drawn").iterdir()}
    assert {line for line in wrote if line.startswith("wrote")} <= drawn
    assert len(drawn) < 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drawn", "pictures"]


def test_ctrl_c_ends_check_data_in_one_line(sample_set: Path, tmp_path: Path) -> None:
    """While records are decoded, which other processes may do."""
    for split, label in (("train", "a"), ("train", "b"), ("val", "a"), ("val", "b")):
        (tmp_path / split / label).mkdir(parents=True)
    original = next(path for path in (sample_set / "train").iterdir() if path.suffix != ".json")
    for number in range(8_000):
        (tmp_path / "train" / "a" / f"{number}{original.suffix}").symlink_to(original)
    for folder in ("train/b", "val/a", "val/b"):
        (tmp_path / folder / f"0{original.suffix}").symlink_to(original)
    process = start("check-data", tmp_path, "--allow-outside")
    assert process.stderr is not None
    first = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert first.startswith(b"decoded ")
    assert [line for line in error.splitlines() if not line.startswith(b"decoded ")] == [b"trainfit: stopped"]
    assert not [pid for pid in of_session(os.getsid(0)) if is_alive(pid) and str(tmp_path) in command_of(pid)]


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:  # it ended
        return ""
