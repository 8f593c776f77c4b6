"""From the name of a data set or a folder to images, with labels kept apart for scoring."""

import dataclasses
import hashlib
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np

from temi.files import readable_path, writable_path
from temi.image_files import ImageFiles, list_images, readable_name

BOTH = "train+test"  # sub-folders of a folder whose images are taken together
SPLITS: dict[str, tuple[str, ...]] = {  # the first is taken where none is asked for
    "digits": (),
    "fashion-mnist": ("train", "test", "both"),
    "cifar10": ("train", "test", "both"),
    "cifar20": ("train", "test", "both"),
    "cifar100": ("train", "test", "both"),
    "stl10": ("train", "test", "both", "unlabeled"),
    "imagenet": ("train", "val"),
}
"""Data sets and their splits. Clusters are learned on ``train``, as in the TEMI paper."""
ARRAYS = tuple(name for name in SPLITS if name != "imagenet")  # labelled images of one size

_BROKEN = (  # what a failed download and a broken file raise
    OSError, RuntimeError, ValueError, AssertionError, EOFError, tarfile.TarError, HTTPException,
)  # fmt: skip
_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian: dataset-fashion-mnist


@dataclass(frozen=True)
class ImageSet:
    """Images in a fixed order, and what is known about them.

    Attributes
    ----------
    name : str
        Name of the data set, with its split where that is not the usual one; a folder's path.
    images : ndarray [N, height, width] or [N, height, width, 3], uint8, or ImageFiles
        Grey values (0 black to 255 white) or RGB. Those of a folder are decoded one by one, when
        they are asked for, and differ in size; whatever holds the images, ``images[i]`` is one.
    ids : tuple of str
        One stable name an image: of a folder's images the path below it.
    labels : ndarray [N], int64, or None
        Class of each image. Nothing that trains or chooses reads them: they only score.
    class_names : tuple of str
        Name of each class; empty without labels.

    Raises
    ------
    ValueError
        If there are no images, more or fewer ids or labels than images, ids twice, or images of
        another shape or dtype.
    """

    name: str
    images: np.ndarray | ImageFiles
    ids: tuple[str, ...]
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("ids", "labels"):
            given = getattr(self, name)
            if given is not None and len(given) != len(self.images):
                raise ValueError(f"{name}: {len(given)} of {len(self.images)} images")
        if not len(self.images):
            raise ValueError(f"images: {self.name!r} has none")
        if len(set(self.ids)) < len(self.ids):
            raise ValueError("ids: each is allowed once")
        if isinstance(self.images, ImageFiles):
            return
        kind = getattr(self.images, "dtype", type(self.images).__name__)
        shape = getattr(self.images, "shape", ())
        if kind != np.uint8 or len(shape) not in (3, 4) or shape[3:] not in ((), (3,)):
            raise ValueError(
                f"images: {kind} of shape {shape}; uint8 [N, height, width] or [N, height, width, "
                "3] is needed"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int | None:
        """Number of classes, or None without labels."""
        return len(self.class_names) or None

    @property
    def fingerprint(self) -> str:
        """Hash of the images and ids, without the labels.

        Of files the names, sizes and times of change stand for the content, so that a million of
        them need not be read.
        """
        digest = hashlib.sha256(json.dumps(self.ids).encode())
        if isinstance(self.images, ImageFiles):
            for state in self.images.states():
                digest.update(repr(state).encode())
        else:
            digest.update(repr((self.images.shape, self.images.dtype.str)).encode())
            for start in range(0, len(self.images), 1024):  # STL-10 is copied to hash it
                digest.update(np.ascontiguousarray(self.images[start : start + 1024]).data)
        return digest.hexdigest()

    def rows(self, ids: Sequence[str]) -> list[int]:
        """Row of each of these ids.

        Parameters
        ----------
        ids : sequence of str

        Returns
        -------
        list of int

        Raises
        ------
        ValueError
            If there is no image of such an id.
        """
        place = {name: row for row, name in enumerate(self.ids)}
        missing = next((name for name in ids if name not in place), None)
        if missing is not None:
            raise ValueError(f"ids: {missing!r} is no image of {self.name!r}")
        return [place[name] for name in ids]

    def keep(self, ids: Sequence[str]) -> "ImageSet":
        """Only the images of these ids, in the order in which they stand here.

        Parameters
        ----------
        ids : sequence of str

        Returns
        -------
        ImageSet

        Raises
        ------
        ValueError
            If there is no image of such an id.
        """
        rows = sorted(set(self.rows(ids)))
        if isinstance(self.images, ImageFiles):
            names = tuple(self.images.names[row] for row in rows)
            images = dataclasses.replace(self.images, names=names)
        else:
            images = self.images[rows]
        labels = None if self.labels is None else self.labels[rows]
        kept = tuple(self.ids[row] for row in rows)
        return dataclasses.replace(self, images=images, ids=kept, labels=labels)


def check_image_set(images: object) -> None:
    """Raise a ValueError unless it is an :class:`ImageSet`."""
    if not isinstance(images, ImageSet):
        raise ValueError(
            f"images of type {type(images).__name__}: an ImageSet is needed, as temi.load_images "
            "makes of a name or a folder"
        )


def holds_embeddings(name: str) -> bool:
    """Whether a data set of this name is a file of embeddings, so that there are no images."""
    return name.endswith((".npy", ".npz"))


def check_dataset(name: str) -> None:
    """Raise a ValueError that lists the data sets if ``name`` is none, nor a folder or file."""
    if name in SPLITS or (name and readable_path(name).is_dir()):
        return
    if not (holds_embeddings(name) and readable_path(name).is_file()):
        raise ValueError(
            f"dataset={name!r}: one of {', '.join(map(repr, SPLITS))}, an existing folder of "
            "images, or an existing .npy or .npz file of embeddings is allowed"
        )


def load_images(
    name: str | Path,
    *,
    split: str | None = None,
    labels: str | None = None,
    data_dir: str | Path = "data",
) -> ImageSet:
    """Load a data set by name, or the images of a folder.

    Parameters
    ----------
    name : str or path
        A data set, downloaded into ``data_dir`` when it is not there:

        - ``"digits"``: 1,797 handwritten digits of 8 x 8 pixels (Alpaydin and Kaynak, 1998), which
          come with scikit-learn;
        - ``"fashion-mnist"``: 70,000 articles of clothing, 28 x 28 (Xiao et al., 2017; MIT
          licence);
        - ``"cifar10"``, ``"cifar100"``: 60,000 photographs, 32 x 32 (Krizhevsky, 2009); and
          ``"cifar20"``, the second with its 20 super-classes;
        - ``"stl10"``: 13,000 photographs, 96 x 96, and 100,000 without labels (Coates et al.,
          2011);
        - ``"imagenet"``: ILSVRC 2012, which has to be there already, as
          ``DATA_DIR/imagenet/{train,val}/WNID/NAME.JPEG`` (Russakovsky et al., 2015; for research).

        Or the path of a folder with jpg, png, webp, bmp, tiff or gif files, flat or nested, looked
        up in the current folder and then below :func:`temi.files.home`.
    split : str, optional
        ``"train"``, ``"test"`` or ``"both"`` where the data set has them, ``"val"`` for ImageNet,
        ``"unlabeled"`` for STL-10; None: train. Of a folder, a sub-folder of that name, or
        ``"both"`` of ``train`` and ``test``; None: all that is in it.
    labels : {"folders"}, optional
        Of a folder: its sub-folders are classes, to score with. None: nothing is known.
    data_dir : path
        A relative one starts at :func:`temi.files.home`.

    Returns
    -------
    ImageSet

    Raises
    ------
    ValueError
        In one line: no such data set, folder, split or image; a download that failed, and where to
        put the file by hand.
    """
    name = str(name)
    check_dataset(name)
    if holds_embeddings(name):
        raise ValueError(
            f"dataset={name!r}: holds embeddings and no images; temi.load_features reads them, "
            "'python -m temi train' trains on them"
        )
    if name not in SPLITS:
        return _folder(name, readable_path(name), split, labels)
    if labels is not None:
        raise ValueError(f"labels={labels!r}: None is allowed; {name!r} brings its classes along")
    if split is not None and split not in SPLITS[name]:
        allowed = ", ".join(map(repr, (*SPLITS[name], None)))
        raise ValueError(f"split={split!r}: of {name!r} one of {allowed} is allowed")
    if name == "digits":
        return _digits()
    split = split or SPLITS[name][0]
    full_name = name if split == SPLITS[name][0] else f"{name}-{split}"
    if name == "imagenet":
        root = writable_path(data_dir) / "imagenet" / split
        if not root.is_dir():
            raise ValueError(
                f"dataset='imagenet': put it, or a link to it, at {root}/WNID/NAME.JPEG"
            )
        return dataclasses.replace(_folder(name, root, None, "folders"), name=full_name)
    parts = ("train", "test") if split == "both" else (split,)
    loaded = [_from_torchvision(name, part, writable_path(data_dir)) for part in parts]
    images = np.concatenate([part[0] for part in loaded])
    classes = None if split == "unlabeled" else np.concatenate([part[1] for part in loaded])
    ids = tuple(
        f"{name}/{part}/{row:05d}"
        for part, (pictures, *_) in zip(parts, loaded, strict=True)
        for row in range(len(pictures))
    )
    class_names = () if classes is None else tuple(loaded[0][2])
    return ImageSet(full_name, images, ids, classes, class_names)


def _digits() -> ImageSet:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return ImageSet(
        name="digits",
        images=np.round(digits.images * (255 / 16)).astype(np.uint8),  # stored as 0 to 16
        ids=tuple(f"digits/{index:04d}" for index in range(len(digits.images))),
        labels=digits.target.astype(np.int64),
        class_names=tuple(str(name) for name in digits.target_names),
    )


def _folder(name: str, root: Path, split: str | None, labels: str | None) -> ImageSet:
    if labels not in (None, "folders"):
        raise ValueError(f"labels={labels!r}: 'folders' or None is allowed")
    parts = {None: (), "both": ("train", "test")}.get(split, (split,))
    for part in parts:
        outside = part in ("", ".", "..") or part != Path(part).name
        if outside or not (root / part).is_dir():
            raise ValueError(f"split={split!r}: {name!r} has no sub-folder of the name {part!r}")
    if split not in (None, "both"):
        root = root / split
    try:
        files = list_images(root)
    except OSError as error:
        raise ValueError(f"dataset={name!r}: {error.filename}: {error.strerror}") from error
    if split == "both":
        files = [file for file in files if file.split("/")[0] in parts]
    if not files:
        raise ValueError(f"dataset={name!r}: there is no image in this folder or below it")
    images = ImageFiles(str(root), tuple(files))
    ids = tuple(map(readable_name, files))
    full_name = str(root / BOTH if split == "both" else root)
    if labels is None:
        return ImageSet(full_name, images, ids)
    depth = int(split == "both")  # of the folders that are classes
    loose = next((name for name in ids if name.count("/") <= depth), None)
    if loose is not None:
        raise ValueError(f"labels='folders': image {loose!r} lies in no sub-folder")
    class_names, classes = np.unique([name.split("/")[depth] for name in ids], return_inverse=True)
    if split is None and {"train", "test"} <= set(class_names.tolist()):
        raise ValueError(
            f"labels='folders': 'train' and 'test' in {name!r} are no classes; "
            "give split='train', 'test' or 'both', whose sub-folders are"
        )
    return ImageSet(full_name, images, ids, classes.astype(np.int64), tuple(class_names.tolist()))


def _from_torchvision(name: str, split: str, folder: Path) -> tuple[np.ndarray, np.ndarray, list]:
    """Images, classes and names of the classes, read by torchvision after its checksums."""
    from torchvision import datasets

    kinds = {
        "fashion-mnist": datasets.FashionMNIST,
        "cifar10": datasets.CIFAR10,
        "cifar20": datasets.CIFAR100,
        "cifar100": datasets.CIFAR100,
        "stl10": datasets.STL10,
    }
    kind = kinds[name]
    if name == "fashion-mnist":
        _unpack_fashion_mnist(folder)
    choice = {"split": split} if name == "stl10" else {"train": split == "train"}
    try:
        data = kind(folder, download=True, **choice)
    except _BROKEN as error:
        reason = " ".join(str(error).split())
        if name == "fashion-mnist":  # no checksum finds a broken file there, so it has to go
            raw = folder / "FashionMNIST" / "raw"
            advice = f"remove {raw} and try again, or fetch {kind.mirrors[0]} by hand into it"
        else:
            advice = f"fetch {kind.url} by hand into {folder}, or try again"
        raise ValueError(f"dataset={name!r}: it could not be had ({reason}); {advice}") from error
    if name == "stl10":
        return data.data.transpose(0, 2, 3, 1), data.labels.astype(np.int64), data.classes
    if name == "cifar20":
        return data.data, *_super_classes(Path(data.root) / data.base_folder, split)
    return np.asarray(data.data), np.asarray(data.targets, dtype=np.int64), data.classes


def _super_classes(folder: Path, split: str) -> tuple[np.ndarray, list]:
    """The 20 coarse labels of CIFAR-100, which torchvision leaves in files that it has checked."""
    import pickle

    train = pickle.loads((folder / split).read_bytes(), encoding="latin1")
    names = pickle.loads((folder / "meta").read_bytes(), encoding="latin1")["coarse_label_names"]
    return np.asarray(train["coarse_labels"], dtype=np.int64), names


def _unpack_fashion_mnist(folder: Path) -> None:
    """Take the files of Debian's package where they are installed, instead of a download."""
    from torchvision.datasets.utils import extract_archive

    raw = folder / "FashionMNIST" / "raw"
    if _FASHION_MNIST.is_dir() and not raw.exists():
        part = raw.with_name("raw.part")
        part.mkdir(parents=True, exist_ok=True)
        for file in sorted(_FASHION_MNIST.glob("*.gz")):
            extract_archive(str(file), str(part))
        os.replace(part, raw)
