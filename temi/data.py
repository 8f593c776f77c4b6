"""From the name of a data set to images, with labels kept apart for scoring."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ImageSet:
    """Images in a fixed order, and what is known about them.

    Attributes
    ----------
    name : str
        Name of the data set.
    images : ndarray [N, height, width], uint8
        Grey values, 0 black to 255 white.
    ids : tuple of str
        One stable name an image.
    labels : ndarray [N], int64, or None
        Class of each image. Nothing that trains or chooses reads them: they only score.
    class_names : tuple of str
        Name of each class; empty without labels.
    """

    name: str
    images: np.ndarray
    ids: tuple[str, ...]
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int | None:
        """Number of classes, or None without labels."""
        return len(self.class_names) or None

    @property
    def fingerprint(self) -> str:
        """Hash of the images and ids, without the labels."""
        digest = hashlib.sha256("\n".join(self.ids).encode())
        digest.update(repr((self.images.shape, self.images.dtype.str)).encode())
        digest.update(np.ascontiguousarray(self.images))
        return digest.hexdigest()


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


DATASETS: dict[str, Callable[[], ImageSet]] = {"digits": _digits}


def check_dataset(name: str) -> None:
    """Raise a ValueError that lists the data sets if there is none of that name."""
    if name not in DATASETS:
        raise ValueError(f"dataset={name!r}: one of {', '.join(map(repr, DATASETS))} is allowed")


def load_images(name: str) -> ImageSet:
    """Load a data set.

    Parameters
    ----------
    name : str
        ``"digits"``: 1,797 handwritten digits of 8 x 8 pixels (Alpaydin and Kaynak, 1998), which
        come with scikit-learn.

    Returns
    -------
    ImageSet

    Raises
    ------
    ValueError
        If there is no data set of that name.
    """
    check_dataset(name)
    return DATASETS[name]()
