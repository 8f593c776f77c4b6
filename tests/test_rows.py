import dataclasses
import mmap

import numpy as np
import pytest
import torch
from sklearn.datasets import make_blobs

from temi import checkpoints, rows, training
from temi.config import RunOptions, TrainConfig
from temi.embeddings import mean_embedding, normalize, principal_axes
from temi.neighbors import check_neighbors, nearest_neighbors
from temi.rows import (
    Rows,
    ask_for,
    available_memory,
    block_order,
    choose_place,
    prepared_rows,
    rows_per_block,
)
from temi.steps import draw_pairs, training_step
from temi.training import train

CPU = torch.device("cpu")
BLOBS, _ = make_blobs(240, 8, centers=4, random_state=0)
SMALL = TrainConfig(num_clusters=4, num_heads=3, epochs=3, batch_size=40, num_neighbors=5)
NEAR = nearest_neighbors(torch.from_numpy(normalize(BLOBS, "center-l2")), 5)[0].numpy()


@pytest.fixture
def mapped(tmp_path):
    """The blobs in a file."""
    np.save(tmp_path / "x.npy", BLOBS)
    return np.load(tmp_path / "x.npy", mmap_mode="r")


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 7 rows, 5 of which are mixed."""
    monkeypatch.setattr(training, "rows_per_block", lambda _: 7)
    monkeypatch.setattr(rows, "WINDOW", 5)


def assert_same(run, other) -> None:
    for (name, weight), theirs in zip(
        run.teacher.named_parameters(), other.teacher.parameters(), strict=True
    ):
        assert torch.equal(weight, theirs), name
    np.testing.assert_array_equal(run.head_losses, other.head_losses)
    np.testing.assert_array_equal(run.labels, other.labels)
    np.testing.assert_array_equal(run.head_labels, other.head_labels)


@pytest.mark.parametrize("size", [131, 1024, 8192, 20_000, 30_000])
def test_rows_made_when_asked_for_split_as_a_tensor_does_to_the_bit(size):
    x = np.random.default_rng(0).normal(size=(20_011, 96)).astype(np.float16)
    mean = mean_embedding(x, "center-l2")
    axes = principal_axes(x, mean, 40)  # products of other numbers of rows round differently
    whole = prepared_rows(x, "center-l2", mean, axes, CPU, "device", None, 4)
    found = prepared_rows(x, "center-l2", mean, axes, CPU, "file", 1, 4).split(size)
    for ours, theirs in zip(found, whole.split(size), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("how", ["none", "l2", "center-l2"])
@pytest.mark.parametrize("place", ["device", "host", "file"])
def test_rows_are_those_of_everything_normalised(tmp_path, how, place):
    x = np.random.default_rng(0).normal(1, 2, (500, 24)).astype(np.float16)
    np.save(tmp_path / "x.npy", x)
    mean = mean_embedding(x, how)
    for axes in (None, principal_axes(x, mean, 5)):
        expected = torch.from_numpy(normalize(x, how, mean, axes))
        for source in (x, np.load(tmp_path / "x.npy", mmap_mode="r")):
            found = prepared_rows(source, how, mean, axes, CPU, place, 16, 4)
            assert isinstance(found, torch.Tensor if place == "device" else Rows)
            assert (len(found), tuple(found.shape)) == (500, tuple(expected.shape))
            close = {"rtol": 0, "atol": 0 if axes is None else 1e-5}
            some = torch.randint(500, (80,))
            torch.testing.assert_close(found[some], expected[some], **close)
            torch.testing.assert_close(torch.cat(list(found.split(33))), expected, **close)


def test_asks_for_the_pages_of_rows_and_blocks_and_no_others(tmp_path):
    class Recording(mmap.mmap):
        asked: list

        def madvise(self, advice, start, length):
            assert advice == mmap.MADV_WILLNEED
            self.asked.append((start, length))

    count, width, offset = 4000, 100, 3  # rows of 200 bytes: some lie across two pages
    file = tmp_path / "x.bin"
    file.write_bytes(bytes(range(250)) * (count * 200 // 250 + 10))
    with open(file, "rb") as opened:
        memory = Recording(opened.fileno(), 0, access=mmap.ACCESS_READ)
    values = np.frombuffer(memory, np.float16, (count + offset) * width)
    x = values.reshape(-1, width)[offset:].view(np.memmap)
    x._mmap = memory
    wanted = np.random.default_rng(0).integers(count, size=60)
    for block in (1, 7, 64):
        memory.asked = []
        ask_for(x, wanted, block)
        pages = set()
        for row in wanted:
            for other in range(row // block * block, min(count, row // block * block + block)):
                first = (other + offset) * 200
                pages |= {byte // mmap.PAGESIZE for byte in (first, first + 199)}
        found = [page // mmap.PAGESIZE for start, length in memory.asked
                 for page in range(start, start + length, mmap.PAGESIZE)]  # fmt: skip
        assert sorted(found) == sorted(pages)  # each once
        assert all(start % mmap.PAGESIZE == 0 for start, _ in memory.asked)
    ask_for(x[:, :50], wanted)  # what is not contiguous is simply read
    ask_for(np.asarray(x), wanted)


@pytest.mark.parametrize(("count", "block", "window"), [(100, 7, 4), (64, 8, 3), (50, 60, 2)])
def test_block_order_against_a_plain_one(monkeypatch, count, block, window):
    monkeypatch.setattr(rows, "WINDOW", window)
    order = block_order(count, block, torch.Generator().manual_seed(3)).tolist()
    assert order == block_order(count, block, torch.Generator().manual_seed(3)).tolist()

    generator, plain = torch.Generator().manual_seed(3), []
    blocks = torch.randperm(-(-count // block), generator=generator).tolist()
    while blocks:
        together = []
        for number in blocks[:window]:
            together += range(number * block, min(count, (number + 1) * block))
        places = torch.randperm(len(together), generator=generator).tolist()
        plain += [together[place] for place in places]
        blocks = blocks[window:]
    assert order == plain
    assert sorted(order) == list(range(count))


def test_batches_of_a_sorted_file_hold_many_classes():
    classes = torch.arange(100_000) // 100  # a thousand, one after the other
    order = block_order(100_000, 32, torch.Generator().manual_seed(0))
    kinds = [len(set(batch.tolist())) for batch in classes[order].split(128)[:-1]]
    mixed = [len(set(batch.tolist())) for batch in classes[torch.randperm(100_000)].split(128)]
    assert min(kinds) > 100  # of 128; 120.4 on average where all are mixed
    assert np.mean(kinds) == pytest.approx(np.mean(mixed[:-1]), rel=0.03)


def test_pairs_drawn_in_parts_are_those_drawn_at_once(monkeypatch):
    near = torch.randint(1000, (1000, 9), generator=torch.Generator().manual_seed(1))

    def draw(neighbors, **options):
        generator = torch.Generator().manual_seed(0)
        return draw_pairs(neighbors, 30, generator, 4, **options), generator.get_state()

    # as it was written before parts were drawn
    generator = torch.Generator().manual_seed(0)
    anchors = torch.randperm(1000, generator=generator)[:990].unsqueeze(1)
    choice = torch.rand(990, 9, generator=generator).topk(3).indices
    groups = torch.cat([anchors, near.flatten()[anchors * 9 + choice]], dim=1)
    expected = groups.view(33, 30, 4).transpose(1, 2).flatten(1)
    for drawn in (2**24, 9 * 30 * 4, 1):
        monkeypatch.setattr("temi.steps.DRAWN", drawn)
        for neighbors in (near, near.numpy(), near.numpy().astype(np.int32)):
            pairs, state = draw(neighbors)
            assert torch.equal(pairs, expected)
            assert torch.equal(state, generator.get_state())
    blocks, _ = draw(near, block=7)
    order = block_order(1000, 7, torch.Generator().manual_seed(0))
    assert torch.equal(blocks.view(33, 4, 30)[:, 0].flatten(), order[:990])


@pytest.fixture(scope="module")
def in_memory():
    return train(BLOBS, SMALL, progress=False)


def test_given_neighbors_equal_those_that_are_found(in_memory):
    for near in (NEAR, NEAR.astype(np.int32)):
        run = train(BLOBS, SMALL, neighbors=near, progress=False)
        assert_same(run, in_memory)
    none = dataclasses.replace(SMALL, num_neighbors=None)
    assert_same(train(BLOBS, none, neighbors=NEAR, progress=False), in_memory)
    assert train(BLOBS, none, neighbors=NEAR, progress=False).config.num_neighbors == 5


def test_rows_from_a_file_in_full_order_equal_those_in_memory(mapped, in_memory, monkeypatch):
    monkeypatch.setattr(training, "rows_per_block", lambda _: None)
    run = train(mapped, SMALL, neighbors=NEAR, keep_rows="file", progress=False)
    np.testing.assert_array_equal(run.labels, in_memory.labels)
    np.testing.assert_allclose(run.head_losses, in_memory.head_losses, rtol=1e-5)
    assert_same(train(BLOBS, SMALL, keep_rows="host", progress=False), in_memory)


def test_blocks_change_the_order_but_not_the_clusters(mapped, in_memory, small_blocks):
    options = {"neighbors": NEAR, "keep_rows": "file", "progress": False}
    run = train(mapped, SMALL, **options)
    assert_same(train(mapped, SMALL, **options), run)
    assert not torch.equal(run.teacher.weight1, in_memory.teacher.weight1)


@pytest.mark.parametrize("place", ["file", "device"])
def test_a_stopped_run_goes_on_in_the_same_order(
    mapped, small_blocks, monkeypatch, tmp_path, place
):
    options = {"neighbors": NEAR, "progress": False, "resume": "auto"}
    whole = train(mapped, SMALL, **options, run_dir=tmp_path / "whole", keep_rows="file")
    steps = []

    def stopping(*arguments):
        steps.append(arguments)
        if len(steps) == 9:  # the third of the second epoch
            raise KeyboardInterrupt
        return training_step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("temi.state.training_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(mapped, SMALL, **options, run_dir=tmp_path / "run", keep_rows="file")
    stopped = checkpoints.load(tmp_path / "run" / "checkpoints" / checkpoints.EMERGENCY)
    assert (stopped["epoch"], stopped["step"], stopped["block"]) == (1, 2, 7)
    run = train(mapped, SMALL, **options, run_dir=tmp_path / "run", keep_rows=place)
    assert_same(run, whole)
    theirs, ours = (checkpoints.load(tmp_path / name / "checkpoints" / checkpoints.LATEST)
                    for name in ("whole", "run"))  # fmt: skip
    assert torch.equal(ours["labels"], theirs["labels"])
    assert torch.equal(ours["random"], theirs["random"])


def test_a_run_goes_on_with_its_own_neighbors_alone(tmp_path):
    train(BLOBS, SMALL, neighbors=NEAR, run_dir=tmp_path / "run", progress=False)
    longer = dataclasses.replace(SMALL, epochs=4)
    other = NEAR.copy()
    other[3, 1] = (other[3] + 1).max() % 240
    options = {"run_dir": tmp_path / "run", "resume": "auto", "progress": False}
    for near in (other, None):
        with pytest.raises(ValueError, match="a run with other neighbours; give overwrite=True"):
            train(BLOBS, longer, neighbors=near, **options)
    run = train(BLOBS, longer, neighbors=NEAR.astype(np.int32), **options)
    assert len(run.history) == 4


def changed(row: int, column: int, value: int) -> np.ndarray:
    near = NEAR.copy()
    near[row, column] = value
    return near


@pytest.mark.parametrize(
    ("near", "message"),
    [
        (NEAR.tolist(), "neighbors of list: a NumPy array of int32 or int64 is allowed"),
        (torch.from_numpy(NEAR), "neighbors of Tensor: a NumPy array of int32 or int64 is allowed"),
        (NEAR.astype(float), "neighbors of float64: a NumPy array of int32 or int64 is allowed"),
        (NEAR[:9], "neighbors of shape (9, 5): [240, k] is allowed, k from 1 to 239, since there "
                   "are 240 embeddings"),
        (NEAR[:, 0], "neighbors of shape (240,): [240, k] is allowed, k from 1 to 239, since "
                     "there are 240 embeddings"),
        (changed(200, 3, 240), "neighbors: row 200 names 240; 0 to 239 is allowed"),
        (changed(7, 0, -1), "neighbors: row 7 names -1; 0 to 239 is allowed"),
        (changed(30, 4, 30), "neighbors: row 30 names itself, 30; leave that column out"),
        (NEAR[:, :4], "num_neighbors=5: 4 is allowed, as the neighbours given are so many"),
    ],
)  # fmt: skip
def test_wrong_neighbors_are_named_before_any_work(near, message, tmp_path):
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the whole message is compared
        train(BLOBS, SMALL, neighbors=near, run_dir=tmp_path / "run", progress=False)
    assert str(error.value) == message
    assert not (tmp_path / "run").exists()


def test_given_neighbors_take_the_place_of_the_recipes_number():
    assert TrainConfig(recipe="paper", num_clusters=4).resolve(240, None, 10).num_neighbors == 10


def test_neighbors_are_checked_in_parts():
    assert check_neighbors(NEAR, 240, 7) == check_neighbors(NEAR.astype(np.int32), 240)
    assert check_neighbors(NEAR, 240) != check_neighbors(NEAR[:, ::-1], 240)
    with pytest.raises(ValueError, match="row 200 names 240"):
        check_neighbors(changed(200, 3, 240), 240, 7)
    with pytest.raises(ValueError, match="row 200 names itself, 200"):
        check_neighbors(changed(200, 3, 200), 240, 7)


def test_rows_in_a_file_are_not_searched(mapped, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"neighbors=None: .*; give neighbors \[240, k\] or keep"):
        train(mapped, SMALL, keep_rows="file", run_dir=tmp_path / "run")
    monkeypatch.setattr(rows, "available_memory", lambda _: 2 * 240 * 8 * 4 - 1)
    with pytest.raises(ValueError, match=r"prepared they take 7.7e-06 GB; 1.5e-05 GB are availab"):
        train(mapped, SMALL, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("device", "gpu", "host", "pca_dim", "expected"),
    [
        ("cpu", 0, 8000, None, "device"),
        ("cpu", 8000, 7999, None, "file"),
        ("cpu", 0, 7999, 9, "device"),
        ("cpu", 0, 7999, 20, "file"),
        ("cuda", 8000, 0, None, "device"),
        ("cuda", 7999, 8000, None, "host"),
        ("cuda", 7999, 7999, None, "file"),
    ],
)
def test_rows_are_where_they_take_half_of_what_is_left(
    monkeypatch, device, gpu, host, pca_dim, expected
):
    x = np.zeros((100, 10), dtype=np.float16)  # 4,000 bytes in float32
    left = {"cuda": gpu, "cpu": host}
    monkeypatch.setattr(rows, "available_memory", lambda device: left[device.type])
    assert choose_place("auto", x, pca_dim, torch.device(device), False) == expected
    assert choose_place("host", x, pca_dim, torch.device(device), False) == "host"


def test_blocks_are_of_64_kilobytes():
    assert rows_per_block(np.zeros((3, 256), dtype=np.float16)) == 128
    assert rows_per_block(np.zeros((3, 2**18), dtype=np.float32)) == 1
    assert RunOptions().keep_rows == "auto"


def group(folder, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def test_memory_that_control_groups_leave(tmp_path, monkeypatch):
    class Machine:
        available = 10_000

    monkeypatch.setattr("psutil.virtual_memory", Machine)
    assert available_memory(CPU, tmp_path) == 10_000  # no groups, as on a Mac
    group(tmp_path / "proc" / "self", {"cgroup": "0::/user/job\n"})
    second = tmp_path / "sys" / "fs" / "cgroup"
    assert available_memory(CPU, tmp_path) == 10_000
    group(second / "user" / "job", {"memory.max": "max\n", "memory.stat": "anon 9\nfile 5\n"})
    group(second / "user", {"memory.max": "3000\n", "memory.stat": "anon 500\nfile 2400\n"})
    assert available_memory(CPU, tmp_path) == 2500  # a limit of the group above; files make room
    group(second / "user" / "job", {"memory.max": "1000\n"})
    assert available_memory(CPU, tmp_path) == 991

    text = "12:cpu,cpuacct:/a\n4:memory:/docker/abc\n1:name=systemd:/b\n"
    group(tmp_path / "proc" / "self", {"cgroup": text})
    assert available_memory(CPU, tmp_path) == 10_000
    limit = {"memory.limit_in_bytes": "4000\n", "memory.stat": "rss 1\ntotal_rss 700\n"}
    group(second / "memory" / "docker" / "abc", limit)
    assert available_memory(CPU, tmp_path) == 3300
    unlimited = {"memory.limit_in_bytes": "9223372036854771712\n"}
    group(second / "memory" / "docker" / "abc", unlimited)
    assert available_memory(CPU, tmp_path) == 10_000
    group(second / "memory", limit)  # a container sees its own group as the root
    assert available_memory(CPU, tmp_path) == 3300
