import dataclasses
import hashlib
import pickle
from http.client import IncompleteRead
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets

from temi import data
from temi.data import ImageSet, load_images


def test_digits():
    images, original = load_images("digits"), load_digits()
    assert images.images.shape == (1797, 8, 8)
    assert images.images.dtype == np.uint8
    np.testing.assert_allclose(images.images / 255 * 16, original.images, atol=0.04)
    np.testing.assert_array_equal(images.labels, original.target)
    assert images.num_classes == 10
    assert len(set(images.ids)) == len(images) == 1797


def test_fingerprint_depends_on_images_and_not_on_labels():
    images = load_images("digits")
    unlabelled = dataclasses.replace(images, labels=None, class_names=())
    assert unlabelled.num_classes is None
    assert unlabelled.fingerprint == images.fingerprint == load_images("digits").fingerprint
    changed = images.images.copy()
    changed[5, 5, 5] ^= 1
    assert dataclasses.replace(images, images=changed).fingerprint != images.fingerprint


def test_keep():
    images = load_images("digits")
    kept = images.keep([images.ids[9], images.ids[4]])
    assert kept.ids == (images.ids[4], images.ids[9])
    np.testing.assert_array_equal(kept.images, images.images[[4, 9]])
    np.testing.assert_array_equal(kept.labels, images.labels[[4, 9]])
    with pytest.raises(ValueError, match="ids: 'nobody' is no image of 'digits'"):
        images.keep(["nobody"])


def test_unknown_names(tmp_path):
    with pytest.raises(ValueError, match="dataset='didgits': one of 'digits', 'fashion-mnist'"):
        load_images("didgits")
    with pytest.raises(
        ValueError, match="split='val': of 'cifar10' one of 'train', 'test', 'both'"
    ):
        load_images("cifar10", split="val")
    with pytest.raises(ValueError, match="split='train': of 'digits' one of None is allowed"):
        load_images("digits", split="train")
    with pytest.raises(ValueError, match="labels='folders': None is allowed"):
        load_images("digits", labels="folders")
    np.save(tmp_path / "x.npy", np.ones((3, 2)))
    with pytest.raises(ValueError, match="holds embeddings"):
        load_images(str(tmp_path / "x.npy"))


RNG = np.random.default_rng(0)
NAMES = {"cifar10": 10, "cifar20": 20, "cifar100": 100}


def write_cifar(root, kind, monkeypatch) -> dict[str, dict]:
    """Small files in CIFAR's form, and their checksums in the place of the real ones."""
    fine = 10 if kind.__name__ == "CIFAR10" else 100
    key = "labels" if fine == 10 else "fine_labels"
    content = {}
    for file, _ in (*kind.train_list, *kind.test_list):
        batch = {"data": RNG.integers(0, 256, (6, 3072), dtype=np.uint8)}
        batch |= {key: RNG.integers(0, fine, 6).tolist()}
        batch |= {"coarse_labels": RNG.integers(0, 20, 6).tolist()} if fine == 100 else {}
        content[file] = batch
    names = {kind.meta["key"]: [f"class {i}" for i in range(fine)]}
    content[kind.meta["filename"]] = names | {
        "coarse_label_names": [f"coarse {i}" for i in range(20)]
    }
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    for file, value in content.items():
        (folder / file).write_bytes(pickle.dumps(value))
    sums = {file: hashlib.md5((folder / file).read_bytes()).hexdigest() for file in content}
    for part in ("train_list", "test_list"):
        monkeypatch.setattr(kind, part, [[file, sums[file]] for file, _ in getattr(kind, part)])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": sums[kind.meta["filename"]]})
    return content


@pytest.mark.parametrize("name", NAMES)
def test_cifar_files(name, tmp_path, monkeypatch):
    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    content = write_cifar(tmp_path, kind, monkeypatch)
    images = load_images(name, split="test", data_dir=tmp_path)
    (batch,) = (content[file] for file, _ in kind.test_list)
    planes = batch["data"].reshape(6, 3, 32, 32)
    np.testing.assert_array_equal(images.images.transpose(0, 3, 1, 2), planes)
    key = {"cifar10": "labels", "cifar20": "coarse_labels", "cifar100": "fine_labels"}[name]
    assert images.labels.tolist() == batch[key]
    assert images.num_classes == NAMES[name]
    assert images.class_names[1] == ("coarse 1" if name == "cifar20" else "class 1")
    assert images.name == f"{name}-test"
    train, both = (load_images(name, split=split, data_dir=tmp_path) for split in (None, "both"))
    assert train.name == name
    assert len(both) == len(train) + 6
    assert len(set(both.ids)) == len(both)


def test_a_damaged_file_and_no_network_are_one_line(tmp_path, monkeypatch):
    write_cifar(tmp_path, datasets.CIFAR10, monkeypatch)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"half a file")

    def refuse(*_, **__):
        raise URLError("no network here")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    for name, address in (
        ("cifar10", "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"),
        ("stl10", "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz"),
    ):
        with pytest.raises(ValueError, match=f"dataset='{name}': it could not be") as error:
            load_images(name, data_dir=tmp_path)
        assert "no network here" in str(error.value)
        assert f"fetch {address} by hand into {tmp_path}" in str(error.value)
        assert "\n" not in str(error.value)


def test_stl10_files(tmp_path, monkeypatch):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    planes = RNG.integers(0, 256, (4, 3, 96, 96), dtype=np.uint8)
    columns_first = planes.transpose(0, 1, 3, 2).tobytes()
    for file in ("train_X.bin", "test_X.bin", "unlabeled_X.bin"):
        (folder / file).write_bytes(columns_first)
    for file in ("train_y.bin", "test_y.bin"):
        (folder / file).write_bytes(bytes([1, 10, 3, 3]))
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    (folder / "fold_indices.txt").write_text("0 1\n")
    monkeypatch.setattr("torchvision.datasets.stl10.check_integrity", lambda *_: True)
    images = load_images("stl10", data_dir=tmp_path)
    np.testing.assert_array_equal(images.images, planes.transpose(0, 2, 3, 1))
    assert images.labels.tolist() == [0, 9, 2, 2]
    assert images.class_names == tuple("abcdefghij")
    assert len(load_images("stl10", split="both", data_dir=tmp_path)) == 8
    unlabeled = load_images("stl10", split="unlabeled", data_dir=tmp_path)
    assert unlabeled.labels is None
    assert unlabeled.num_classes is None


def test_a_broken_file_without_checksum_has_to_be_removed(tmp_path, monkeypatch):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind, magic in (("images-idx3", 3), ("labels-idx1", 1)):
            header = bytes([0, 0, 8, magic]) + bytes([0, 0, 0, 5]) * magic
            (raw / f"{part}-{kind}-ubyte").write_bytes(header + bytes(7))
    with pytest.raises(ValueError, match="dataset='fashion-mnist': it could not be had") as error:
        load_images("fashion-mnist", data_dir=tmp_path)
    assert f"remove {raw} and try again" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_connection_that_breaks_is_one_line(tmp_path, monkeypatch):
    def breaks(*_, **__):
        raise IncompleteRead(b"half")

    monkeypatch.setattr("urllib.request.urlopen", breaks)
    with pytest.raises(ValueError, match=r"IncompleteRead.*; fetch https://www"):
        load_images("cifar100", data_dir=tmp_path)


@pytest.mark.skipif(not data._FASHION_MNIST.is_dir(), reason="dataset-fashion-mnist: not installed")
def test_fashion_mnist_from_its_real_files(tmp_path):
    images = load_images("fashion-mnist", split="both", data_dir=tmp_path)
    assert images.images.shape == (70_000, 28, 28)
    assert np.bincount(images.labels).tolist() == [7000] * 10
    assert images.class_names[9] == "Ankle boot"
    assert images.images[:60_000].mean() == pytest.approx(72.94, abs=0.01)  # as published: 0.2860


def test_imagenet_lies_where_it_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"put it, or a link to it, at .*imagenet/train/WNID"):
        load_images("imagenet", data_dir=tmp_path)
    for wnid in ("n01440764", "n01443537"):
        (tmp_path / "imagenet" / "val" / wnid).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "imagenet" / "val" / wnid / "a.JPEG")
    images = load_images("imagenet", split="val", data_dir=tmp_path)
    assert (images.name, len(images), images.num_classes) == ("imagenet-val", 2, 2)


def test_each_image_has_one_id_and_one_label():
    images = load_images("digits")
    with pytest.raises(ValueError, match="ids: 3 of 1797 images"):
        dataclasses.replace(images, ids=("a", "b", "c"))
    with pytest.raises(ValueError, match="labels: 5 of 1797 images"):
        dataclasses.replace(images, labels=images.labels[:5])


@pytest.mark.parametrize(
    ("images", "ids", "message"),
    [
        (np.zeros((2, 8, 8)), "ab", r"images: float64 of shape \(2, 8, 8\); uint8"),
        (np.zeros((2, 8, 8, 4), np.uint8), "ab", r"uint8 of shape \(2, 8, 8, 4\)"),
        ([np.zeros((8, 8), np.uint8)] * 2, "ab", "images: list of shape"),
        (np.zeros((2, 8, 8), np.uint8), "aa", "ids: each is allowed once"),
        (np.zeros((0, 8, 8), np.uint8), "", "images: 'own' has none"),
    ],
)
def test_images_of_ones_own_are_checked(images, ids, message):
    with pytest.raises(ValueError, match=message):
        ImageSet("own", images, tuple(ids))


def test_the_fingerprint_knows_shape_and_ids():
    images = load_images("digits")
    other = dataclasses.replace(images, images=images.images.reshape(1797, 4, 16))
    assert other.fingerprint != images.fingerprint
    assert dataclasses.replace(images, ids=images.ids[::-1]).fingerprint != images.fingerprint


def test_the_last_image_is_part_of_the_fingerprint():
    images = load_images("digits")
    changed = images.images.copy()
    changed[-1, 5, 5] ^= 1
    assert dataclasses.replace(images, images=changed).fingerprint != images.fingerprint
