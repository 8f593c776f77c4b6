"""Training killed at any moment goes on as if nothing had happened, to the last bit."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jupyter_client
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

from temi import checkpoints
from temi.checkpoints import BEST, EMERGENCY, LATEST

if not hasattr(os, "fork"):
    pytest.skip("this system cannot fork", allow_module_level=True)

SERVER = Path(__file__).with_name("training_server.py")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SERVER.parents[1])}
KILLS = int(os.environ.get("TEMI_KILLS", "20"))
EPOCHS = 8
EVERYTHING = {"checkpoint_every": 2, "log_every": 5}  # the mode whose cost the benchmark measures


class Server:
    """Starts trainings in children of one warm process."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, SERVER], env=ENVIRONMENT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def start(self, run_dir: Path, epochs: int = EPOCHS, die=None, **options) -> int:
        options = {**EVERYTHING, "resume": "auto", **options}
        job = {"run_dir": str(run_dir), "epochs": epochs, "options": options}
        job |= {} if die is None else {"die": die}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(int(self.process.stdout.readline()))

    def run(self, *arguments, **options) -> int:
        self.start(*arguments, **options)
        return self.wait()


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.process.stdin.close()
    server.process.wait()
    server.process.stdout.close()


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """An uninterrupted run and the seconds that it takes."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert server.run(run_dir) == 0
    clock = time.monotonic()
    assert server.run(run_dir.with_name("again")) == 0
    seconds = time.monotonic() - clock
    assert_same(run_dir.with_name("again"), run_dir)
    return run_dir, seconds


def assert_same(run_dir: Path, whole: Path) -> None:
    """Weights, marginals, history and labels are equal to the bit."""
    for name in (LATEST, BEST):
        ours, theirs = (checkpoints.load(d / "checkpoints" / name) for d in (run_dir, whole))
        for part in ("student", "teacher"):
            for key, value in theirs[part].items():
                assert torch.equal(ours[part][key], value), (part, key)
        assert torch.equal(ours["marginal"], theirs["marginal"])
        assert torch.equal(ours["labels"], theirs["labels"])
        for entry in ours["history"] + theirs["history"]:
            del entry["seconds"]
        assert ours["history"] == theirs["history"]
    tables = [pd.read_csv(d / "assignments.csv") for d in (run_dir, whole)]
    pd.testing.assert_frame_equal(*tables)
    names = [sorted(p.name for p in (d / "checkpoints").iterdir()) for d in (run_dir, whole)]
    assert names[0] == names[1]
    assert json.loads((run_dir / "final_results.json").read_text())["finished"]


def kill_again_and_again(server, whole, folder: Path, number: int, kills: int) -> list[int]:
    """Run after run, killed at random moments; epochs and steps done at each kill."""
    whole_run, seconds = whole
    moments = random.Random(0)
    chain, done = 0, []
    while len(done) < kills:
        assert chain < 10 * kills, "the trainings finish as if they were not killed"
        run_dir = folder / f"run{chain}"
        pid = server.start(run_dir)
        time.sleep(moments.uniform(0, 0.6 * seconds))
        with contextlib.suppress(ProcessLookupError):  # it has finished by itself
            os.kill(pid, number)
        if server.wait() == 0:
            assert_same(run_dir, whole_run)
            chain += 1
            continue
        found = [path.name for path in (run_dir / "checkpoints").glob("*.pth")]
        done.append(EMERGENCY in found if number != signal.SIGKILL else LATEST in found)
        for path in (run_dir / "config.json", run_dir / "final_results.json"):
            assert not path.exists() or json.loads(path.read_text())
    assert server.run(run_dir) == 0
    assert_same(run_dir, whole_run)
    return done


def test_killed_at_random_moments(server, whole, tmp_path):
    done = kill_again_and_again(server, whole, tmp_path, signal.SIGKILL, KILLS)
    assert sum(done) > KILLS / 4  # not all came before the first checkpoint


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_at_random_moments(server, whole, tmp_path, number):
    assert any(kill_again_and_again(server, whole, tmp_path, number, 5))


@pytest.mark.parametrize(
    "die", [("write", 1), ("write", 4), ("before rename", 3), ("after rename", 2), ("link", 5)]
)
def test_killed_while_a_checkpoint_is_written(server, whole, tmp_path, die):
    run_dir = tmp_path / "run"
    assert server.run(run_dir, die=die) == -signal.SIGKILL
    assert server.run(run_dir) == 0
    assert_same(run_dir, whole[0])


def test_a_stop_keeps_the_very_step(server, tmp_path):
    run_dir = tmp_path / "run"
    pid = server.start(run_dir, epochs=2000)
    wait_for(run_dir / "checkpoints" / LATEST)
    os.kill(pid, signal.SIGTERM)
    assert server.wait() == -signal.SIGTERM
    emergency = checkpoints.load(run_dir / "checkpoints" / EMERGENCY)
    assert emergency["epoch"] == len(emergency["history"]) >= 1
    results = json.loads((run_dir / "final_results.json").read_text())
    assert len(results["history"]) == emergency["epoch"]
    assert not results["finished"]
    assert len(pd.read_csv(run_dir / "assignments.csv")) == 240


def test_more_epochs_equal_a_longer_run(server, whole, tmp_path):
    run_dir = tmp_path / "run"
    assert server.run(run_dir, epochs=5) == 0
    before = (run_dir / "final_results.json").read_text()
    path = str(run_dir / "checkpoints" / LATEST)
    assert server.run(tmp_path / "longer", resume=path) == 0
    assert (run_dir / "final_results.json").read_text() == before
    assert server.run(run_dir) == 0  # in its own directory, by resume="auto"
    for longer in (run_dir, tmp_path / "longer"):
        ours, theirs = (checkpoints.load(d / "checkpoints" / LATEST) for d in (longer, whole[0]))
        for part in ("student", "teacher"):
            assert all(torch.equal(ours[part][k], v) for k, v in theirs[part].items())
        np.testing.assert_array_equal(ours["labels"], theirs["labels"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["longer", "run"]


def wait_for(path: Path) -> None:
    for _ in range(1200):
        if path.exists():
            return
        time.sleep(0.05)
    raise TimeoutError(path)


def code(run_dir: Path, epochs: int) -> str:
    return (
        "import temi\nfrom tests.training_server import SETTINGS, X\n"
        f"config = temi.TrainConfig(**SETTINGS, epochs={epochs})\n"
        f"temi.train(X, config, run_dir={str(run_dir)!r}, checkpoint_every=2, log_every=5)"
    )


LONG = 40


@pytest.fixture(scope="module")
def whole_long(server, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("long") / "run"
    assert server.run(run_dir, epochs=LONG) == 0
    return run_dir


def test_interrupted_through_papermill(server, whole_long, tmp_path):
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(code(tmp_path / "run", LONG))]
    )
    nbformat.write(notebook, tmp_path / "in.ipynb")
    command = [sys.executable, "-m", "papermill", "-k", "python3", "in.ipynb", "out.ipynb"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(tmp_path / "run" / "checkpoints" / LATEST)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) != 0
    wait_for(tmp_path / "run" / "checkpoints" / EMERGENCY)
    assert server.run(tmp_path / "run", epochs=LONG) == 0
    assert_same(tmp_path / "run", whole_long)


def test_kernel_interrupt(server, whole_long, tmp_path):
    manager, client = jupyter_client.manager.start_new_kernel(
        kernel_name="python3", env=ENVIRONMENT, cwd=str(tmp_path)
    )
    try:
        client.execute(code(tmp_path / "run", LONG))
        wait_for(tmp_path / "run" / "checkpoints" / LATEST)
        manager.interrupt_kernel()
        reply = client.get_shell_msg(timeout=60)["content"]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()
    assert reply["ename"] == "KeyboardInterrupt"
    assert (tmp_path / "run" / "checkpoints" / EMERGENCY).exists()
    assert server.run(tmp_path / "run", epochs=LONG) == 0
    assert_same(tmp_path / "run", whole_long)
