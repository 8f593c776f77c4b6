"""Several processes train what one would, and end together, with one message."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from ranks import CASES, outcomes
from sklearn.datasets import load_digits

import temi
from temi import checkpoints, distributed
from temi.checkpoints import EMERGENCY, FOLDER, LATEST

ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("TEMI_KILLS", "2"))
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
OPTIONS = {"num_clusters": 10, "seed": 3, "num_heads": 4, "epochs": 16, "device": "cpu",
           "precision": "fp32"}  # fmt: skip
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not torch.distributed.is_gloo_available(),
    reason="needs gloo, and Linux to find the ranks' processes",
)


def torchrun(processes: int, *command: str, cwd: Path, **options) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += [f"--nproc-per-node={processes}", *command]
    environment = ENVIRONMENT | {"TEMI_HOME": str(cwd)}
    return subprocess.Popen(
        launcher, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def train(processes: int, folder: Path, *options: str) -> subprocess.Popen:
    digits = load_digits()
    x, y = digits.data[:600].astype(np.float32), digits.target[:600]
    np.savez(folder / "digits.npz", X=x, y=y)
    given = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    command = ["-m", "temi", "train", "digits.npz", "--run-dir", "run", *given, *options]
    return torchrun(processes, *command, cwd=folder)


def rank_processes(launcher: subprocess.Popen) -> dict[int, int]:
    """Process id of each rank, once both are there."""
    for _ in range(600):
        found = {}
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        for child in map(int, children):
            try:
                entries = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            except (FileNotFoundError, ProcessLookupError):  # not a rank: one that has just ended
                continue
            found |= {int(e[5:]): child for e in entries if e.startswith(b"RANK=")}
        if len(found) == 2:
            return found
        time.sleep(0.05)
    raise AssertionError(f"no ranks: {launcher.communicate()}")


def wait_for(path: Path, launcher: subprocess.Popen) -> None:
    while not path.exists():
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.05)


def state(folder: Path) -> dict:
    """What the last checkpoint holds, without times."""
    content = checkpoints.load(folder / "run" / FOLDER / LATEST)
    for entry in content["history"]:
        del entry["seconds"]
    return content


def assert_same(found: dict, expected: dict) -> None:
    torch.testing.assert_close(found["student"], expected["student"], rtol=0, atol=0)
    torch.testing.assert_close(found["teacher"], expected["teacher"], rtol=0, atol=0)
    assert found["history"] == expected["history"]
    assert torch.equal(found["labels"], expected["labels"])


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """A folder with a training by two processes, and what they printed."""
    folder = tmp_path_factory.mktemp("two")
    launcher = train(2, folder, "--json-summary")
    out, err = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, err
    (folder / "out.json").write_text(out)
    (folder / "err.txt").write_text(err)
    return folder


@pytest.mark.parametrize("processes", [2, 4])
def test_fifty_steps_are_those_of_one_process(processes, tmp_path):
    launcher = torchrun(processes, str(ROOT / "tests" / "ranks.py"), "found.pt", cwd=tmp_path)
    _, err = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, err
    found = torch.load(tmp_path / "found.pt")
    for case, expected in outcomes().items():
        assert case in CASES
        for name, value in expected.items():
            if name == "labels":
                assert torch.equal(found[case][name], value), case
            else:
                torch.testing.assert_close(found[case][name], value, rtol=1e-9, atol=1e-9)


def test_labels_are_those_of_one_process(two):
    features = temi.load_features(two / "digits.npz")
    expected = temi.train(features, temi.TrainConfig(**OPTIONS), progress=False).labels
    found = pd.read_csv(two / "run" / "assignments.csv")["cluster"]
    assert (found == expected).mean() >= 0.99


def test_one_process_writes_and_speaks(two):
    summary = json.loads((two / "out.json").read_text())  # printed once, and nothing else
    assert summary["metrics"]["acc"] > 0.6
    results = json.loads((two / "run" / "final_results.json").read_text())
    assert results["finished"]
    assert results["provenance"]["processes"] == 2
    assert (two / "err.txt").read_text().count("| 0/16 [") == 1


@pytest.mark.parametrize("kill", range(KILLS))
def test_a_killed_rank_ends_all_and_the_run_goes_on(kill, two, tmp_path):
    launcher = train(2, tmp_path)
    moment = random.Random(kill)
    ranks = rank_processes(launcher)
    if kill % 4 < 3:  # else at any time, imports included
        wait_for(tmp_path / "run" / FOLDER / LATEST, launcher)
    time.sleep(moment.uniform(0, 2) if kill % 4 < 3 else moment.uniform(0, 8))
    if launcher.poll() is None:
        os.kill(ranks[kill % 2], signal.SIGKILL)
        clock = time.monotonic()
        _, err = launcher.communicate(timeout=60)
        assert time.monotonic() - clock < 30
        assert err.count("a process of this run was ended") == 1, err
        assert err.index("a process of this run was ended") < err.index("Root Cause"), err
        assert "Error:" not in err[: err.index("a process of this run")], err
    again = train(2, tmp_path, "--resume", "auto")
    _, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert_same(state(tmp_path), state(two))


def test_ctrl_c_ends_all_with_one_checkpoint(two, tmp_path):
    launcher = train(2, tmp_path)
    ranks = rank_processes(launcher)
    wait_for(tmp_path / "run" / FOLDER / LATEST, launcher)
    os.kill(ranks[1], signal.SIGINT)  # the launcher passes it to all, at moments that differ
    out, err = launcher.communicate(timeout=60)
    assert err.count("stopped; the same command with --resume auto goes on") == 1, err
    assert out.count(f"goes on from {EMERGENCY}") == 1, out
    one = train(1, tmp_path, "--resume", "auto")  # the checkpoint is any number of processes'
    _, err = one.communicate(timeout=300)
    assert one.returncode == 0, err
    found = pd.read_csv(tmp_path / "run" / "assignments.csv")["cluster"]
    expected = pd.read_csv(two / "run" / "assignments.csv")["cluster"]
    assert (found == expected).mean() >= 0.99


def test_a_batch_that_cannot_be_shared_is_said_once(tmp_path):
    launcher = train(2, tmp_path, "--batch-size", "129")
    _, err = launcher.communicate(timeout=120)
    expected = "error: batch_size=129: 2 processes share it equally, so a multiple of 2 is needed"
    assert err.count(expected) == 1
    assert "Traceback" not in err[: err.index(expected)]


def test_one_process_is_given_back_what_it_gives():
    values = torch.rand(3, 2, requires_grad=True)
    module = torch.nn.Linear(2, 2)
    assert (distributed.rank(), distributed.count(), distributed.is_first()) == (0, 1, True)
    assert distributed.share(5) == slice(0, 5)
    assert distributed.mean(values) is values
    assert distributed.gather_rows(values, 3) is values
    assert distributed.averaged(module) is module
    assert distributed.any_of(True)
    assert not distributed.any_of(False)
    assert distributed.from_first(lambda: 7) == distributed.first_ahead(lambda: 7) == 7
    assert not distributed.is_lost(RuntimeError("Connection closed by peer"))


def test_shares_are_all_rows_in_order(monkeypatch):
    for length, count in ((10, 4), (3, 4), (8, 2), (0, 3)):
        parts = []
        for rank in range(count):
            monkeypatch.setattr(
                distributed, "_join", lambda rank=rank, count=count: (rank, count, None)
            )
            parts.append(np.arange(length)[distributed.share(length)])
        assert np.array_equal(np.concatenate(parts), np.arange(length))
