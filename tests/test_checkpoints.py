import errno
import os
import pickle

import pytest
import torch

from temi import checkpoints
from temi.checkpoints import BEST, LATEST, PREVIOUS, CheckpointError, Position

CONTENT = {"weights": torch.arange(2000.0), "epoch": 3, "history": [{"loss": 0.5, "name": "a"}]}


@pytest.fixture
def path(tmp_path):
    file = tmp_path / LATEST
    checkpoints.save(file, CONTENT, Position(0, 3, 7))
    return file


def test_comes_back_as_it_was(path):
    content = checkpoints.load(path)
    assert torch.equal(content.pop("weights"), CONTENT["weights"])
    assert content == {"epoch": 3, "history": [{"loss": 0.5, "name": "a"}]}
    assert checkpoints.position_of(path) == (0, 3, 7)
    assert [p.name for p in path.parent.iterdir()] == [LATEST]


def test_torch_itself_can_read_it(path):
    assert torch.load(path, weights_only=True)["epoch"] == 3


def test_every_flipped_bit_is_noticed(path):
    whole = path.read_bytes()
    for place in {*range(0, len(whole), 97), len(whole) - 1}:
        flipped = bytearray(whole)
        flipped[place] ^= 4
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError):
            checkpoints.load(path)


@pytest.mark.parametrize("length", [0, 1, 100, -1, -64, -200])
def test_cut_short(path, length):
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="empty" if length == 0 else "cut short"):
        checkpoints.load(path)


def test_foreign_files(path, tmp_path):
    torch.save(CONTENT, tmp_path / "foreign.pth")
    with pytest.raises(CheckpointError, match="no checkpoint of temi"):
        checkpoints.load(tmp_path / "foreign.pth")
    path.write_bytes(path.read_bytes().replace(b"checkpoint v0001", b"checkpoint v0002"))
    with pytest.raises(CheckpointError, match="format 2; this version of temi reads 1"):
        checkpoints.load(path)


class CreatesFile:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    trap = tmp_path / "trap"
    checkpoints.save(tmp_path / "evil.pth", {"weights": CreatesFile(trap)}, Position(0, 0, 0))
    with pytest.raises(CheckpointError, match="holds more than tensors, numbers and texts"):
        checkpoints.load(tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(CreatesFile(trap)))
    with pytest.raises(CheckpointError, match="no checkpoint of temi"):
        checkpoints.load(tmp_path / "plain.pth")
    assert not trap.exists()


def test_full_disk(path, monkeypatch):
    def write(self, block):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints._HashingFile, "write", write)
    with pytest.raises(OSError, match=f"No space left on device; what stood there.*{LATEST}"):
        checkpoints.save(path, CONTENT, Position(0, 4, 0))
    monkeypatch.undo()
    assert checkpoints.load(path)["epoch"] == 3
    assert [p.name for p in path.parent.iterdir()] == [LATEST]


def test_newest_whole_one(path, tmp_path):
    checkpoints.save(tmp_path / PREVIOUS, {"epoch": 2}, Position(0, 2, 0))
    checkpoints.save(tmp_path / "checkpoint_epoch_0009.pth", {"epoch": 1}, Position(0, 1, 0))
    assert checkpoints.newest(tmp_path)[0] == path
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.warns(UserWarning, match=f"{LATEST}: damaged.*; going on from {PREVIOUS}"):
        found, content = checkpoints.newest(tmp_path)
    assert (found.name, content) == (PREVIOUS, {"epoch": 2})
    for file in tmp_path.iterdir():
        file.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole: .*the file is empty; "):
        checkpoints.newest(tmp_path)


def test_a_retry_is_later_than_what_it_went_back_from(tmp_path):
    checkpoints.save(tmp_path / PREVIOUS, {}, Position(0, 9, 0))
    checkpoints.save(tmp_path / LATEST, {}, Position(1, 2, 0))
    assert checkpoints.newest(tmp_path)[0].name == LATEST


def test_nothing_there(tmp_path):
    assert checkpoints.newest(tmp_path) is None
    assert checkpoints.newest(tmp_path / "gone") is None


def epochs(folder, **options):
    options = {"every": 2, "limit": 2} | options
    for epoch in range(1, 9):
        checkpoints.save_latest(folder, {"epoch": epoch}, Position(0, epoch, 0))
        checkpoints.keep_latest(folder, epoch, best=epoch == 5, **options)


def test_names(tmp_path):
    epochs(tmp_path)
    held = {p.name: checkpoints.load(p)["epoch"] for p in tmp_path.iterdir()}
    assert held == {
        LATEST: 8, PREVIOUS: 7, BEST: 5,
        "checkpoint_epoch_0006.pth": 6, "checkpoint_epoch_0008.pth": 8,
    }  # fmt: skip
    assert (tmp_path / LATEST).samefile(tmp_path / "checkpoint_epoch_0008.pth")


def test_without_hard_links_there_are_copies(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    epochs(tmp_path, limit=0)
    held = {p.name: checkpoints.load(p)["epoch"] for p in tmp_path.iterdir()}
    assert held == {LATEST: 8, PREVIOUS: 7, BEST: 5}
    assert not (tmp_path / LATEST).samefile(tmp_path / PREVIOUS)


def test_the_emergency_checkpoint_stays_until_the_next_one_is_whole(path, monkeypatch):
    emergency = path.with_name(checkpoints.EMERGENCY)
    checkpoints.save(emergency, CONTENT, Position(0, 3, 9))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", full)
        with pytest.raises(OSError, match="No space"):
            checkpoints.save_latest(path.parent, CONTENT, Position(0, 4, 0))
    assert emergency.exists()
    checkpoints.save_latest(path.parent, CONTENT, Position(0, 4, 0))
    assert not emergency.exists()


def test_what_is_kept_after_a_retry_is_of_the_retry(path):
    for retries, last in ((0, 4), (1, 3)):
        for epoch in range(1, last + 1):
            checkpoints.save_latest(path.parent, CONTENT, Position(retries, epoch, 0))
            checkpoints.keep_latest(path.parent, epoch, best=False, every=1, limit=2)
    kept = sorted(path.parent.glob("checkpoint_epoch_*"))
    assert [checkpoints.position_of(p) for p in kept] == [(1, 2, 0), (1, 3, 0)]
    kept[1].write_bytes(b"damaged")
    checkpoints.save_latest(path.parent, CONTENT, Position(1, 4, 0))
    checkpoints.keep_latest(path.parent, 4, best=False, every=1, limit=2)
    kept = sorted(path.parent.glob("checkpoint_epoch_*"))
    assert [checkpoints.position_of(p) for p in kept] == [(1, 2, 0), (1, 4, 0)]


def test_the_oldest_go_first_past_ten_thousand_epochs_too(path):
    for epoch in (9998, 9999, 10000):
        checkpoints.keep_latest(path.parent, epoch, best=False, every=1, limit=2)
    left = sorted(p.name for p in path.parent.glob("checkpoint_epoch_*"))
    assert left == ["checkpoint_epoch_10000.pth", "checkpoint_epoch_9999.pth"]
