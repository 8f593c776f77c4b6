"""What is done to an image before a network: resizing on the CPU, normalising on the device."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import nn

from temi.image_files import ENOUGH

IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_DECODED = f"JPEG at 1/2, 1/4 or 1/8 where {ENOUGH} times the scaled side remain; RGB; "


@dataclass(frozen=True)
class Prepare:
    """Bring an image, uint8 [height, width] or [height, width, 3], to the size a network needs."""

    steps: tuple[Callable[[Image.Image], Image.Image], ...]
    rgb: bool

    def __call__(self, image: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(image)
        if self.rgb and picture.mode != "RGB":
            picture = picture.convert("RGB")
        for step in self.steps:
            picture = step(picture)
        return np.array(picture)


def shorten(image: Image.Image) -> Image.Image:
    """Cut the ends off an image longer than 20 : 1, which a later crop to the middle would drop.

    Scaled by its shorter side, one of 1 x 20,000 pixels would fill a gigabyte first.
    """
    width, height = image.size
    keep = 20 * min(image.size)
    if max(image.size) <= keep:
        return image
    left, top = max(0, (width - keep) // 2), max(0, (height - keep) // 2)
    return image.crop((left, top, min(width, left + keep), min(height, top + keep)))


class Normalised(nn.Module):
    """A network behind its normalisation: uint8 [B, S, S, 3] -> [B, D].

    ``mean`` and ``deviation`` are those of values from 0 to 1.
    """

    def __init__(self, network: nn.Module, mean: Sequence[float], deviation: Sequence[float]):
        super().__init__()
        self.network = network
        for name, values in (("mean", mean), ("deviation", deviation)):
            values = 255 * torch.tensor(values, dtype=torch.float32).view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.permute(0, 3, 1, 2)  # (B, 3, S, S), a view that is channels-last in memory
        return self.network((x - self.mean) / self.deviation)


class Pixels(nn.Module):
    """The values themselves: uint8 [B, …] -> float32 [B, D], from 0 to 1."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) / 255


def config(side: int, interpolation: str, kept: float) -> dict:
    """Preprocessing in timm's terms: scaled so that the central square is ``kept`` of the image."""
    return {
        "input_size": (3, side, side),
        "interpolation": interpolation,
        "crop_pct": kept,
        "crop_mode": "center",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_DEVIATION,
    }


def prepare(config: dict) -> Prepare:
    """The part of a preprocessing, in timm's terms, that is done to single images."""
    from timm.data import create_transform

    # use_prefetcher leaves only the conversion to a tensor after the crop; images stay arrays here
    *steps, _ = create_transform(**config, use_prefetcher=True).transforms
    if config["crop_mode"] == "center":
        steps.insert(0, shorten)
    return Prepare(tuple(steps), rgb=True)


def scaled(config: dict) -> tuple[int, int]:
    """Height and width to which a preprocessing in timm's terms scales, before it crops."""
    height, width = (math.floor(side / config["crop_pct"]) for side in config["input_size"][1:])
    return height, width


def in_words(config: dict) -> str:
    """All that a preprocessing in timm's terms does."""
    height, width = config["input_size"][1:]
    size = " x ".join(map(str, scaled(config)))
    how = {
        "squash": f"both sides stretched to {size}",
        "border": f"longer side scaled to fit {size}, borders filled with the mean",
    }.get(config["crop_mode"], f"shorter side scaled to fill {size}")
    mean, deviation = ([round(value, 4) for value in config[key]] for key in ("mean", "std"))
    return (
        f"{_DECODED}{how} pixels, {config['interpolation']} (Pillow); central {height} x {width}; "
        f"divided by 255, minus {mean}, over {deviation}"
    )


def prepare_pixels(side: int | None) -> Prepare:
    """Images as they are; or all in RGB, scaled to ``side`` and cut to the central square."""
    if side is None:
        return Prepare((), rgb=False)
    from torchvision.transforms import CenterCrop, InterpolationMode, Resize

    steps = (shorten, Resize(side, InterpolationMode.BICUBIC), CenterCrop(side))
    return Prepare(steps, rgb=True)


def pixels_in_words(side: int | None) -> str:
    """What :func:`prepare_pixels` and :class:`Pixels` do."""
    square = f"{_DECODED}shorter side scaled to {side} pixels, bicubic (Pillow); central square; "
    return square * (side is not None) + "values divided by 255, row by row"
