"""From the name of a backbone to a feature extractor."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Backbone:
    """A feature extractor with its own preprocessing.

    Attributes
    ----------
    name : str
    preprocessing : str
        What is done to the images first; part of the embedding cache's key.
    extract : callable
        uint8 images [B, height, width] -> float32 embeddings [B, D].
    """

    name: str
    preprocessing: str
    extract: Callable[[np.ndarray], np.ndarray]


def _pixels(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float32) / 255


BACKBONES: dict[str, Backbone] = {
    "pixels": Backbone("pixels", "grey values divided by 255, row by row", _pixels)
}


def load_backbone(name: str) -> Backbone:
    """Look a backbone up.

    Parameters
    ----------
    name : str
        ``"pixels"``: the grey values themselves, the baseline that every learned feature should
        beat.

    Raises
    ------
    ValueError
        If there is no backbone of that name.
    """
    if name not in BACKBONES:
        raise ValueError(f"backbone={name!r}: one of {', '.join(map(repr, BACKBONES))} is allowed")
    return BACKBONES[name]
