"""A folder of image files, listed at once and decoded one by one."""

import os
import stat
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # no others: EPS would run Ghostscript


class UnreadableImageError(ValueError):
    """An image file that gives no picture.

    Attributes
    ----------
    reason : str
        Why, in one line and without the path.
    """

    def __init__(self, reason: str):
        self.reason = " ".join(reason.split())
        super().__init__(self.reason)


@dataclass(frozen=True)
class ImageFiles:
    """Image files below a folder: a sequence of pictures that are decoded when asked for.

    Attributes
    ----------
    root : str
    names : tuple of str
        Paths below ``root``, with forward slashes.
    """

    root: str
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> np.ndarray:
        """Picture ``index``; see :func:`decode`."""
        return decode(os.path.join(self.root, self.names[index]))

    def states(self) -> Iterator[tuple[str, int, int]]:
        """Name, bytes and time of change in ns of each file, for a fingerprint; 0 if it is gone."""
        for name in self.names:
            try:
                state = os.stat(os.path.join(self.root, name))
            except OSError:  # decoding it will say why
                yield name, 0, 0
            else:
                yield name, state.st_size, state.st_mtime_ns


def list_images(root: Path) -> list[str]:
    """Paths of all image files below a folder, sorted, with forward slashes.

    An image file is whatever has a known suffix, in any case, and is no folder. Hidden files and
    folders are passed over, and so is what macOS adds to archives. Links to files are followed,
    links to folders are not: they may lead in circles.
    """
    found, folders = [], [""]
    while folders:
        prefix = folders.pop()
        with os.scandir(os.path.join(root, prefix)) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{name}/")
                elif name.lower().endswith(SUFFIXES) and not os.path.isdir(entry.path):
                    found.append(name)
    return sorted(found)


def readable_name(name: str) -> str:
    """A file name that any table can hold: bytes that are no UTF-8 become ``\\xNN``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def decode(path: str) -> np.ndarray:
    """The picture in an image file, upright.

    Of an animation the first frame; 16 bits are scaled to 8; what is transparent lies on white;
    CMYK and palettes become RGB; the camera's rotation (EXIF) is applied.

    Parameters
    ----------
    path : str

    Returns
    -------
    ndarray [height, width] or [height, width, 3], uint8
        Grey values where the file holds nothing else, else RGB.

    Raises
    ------
    UnreadableImageError
        If the file is gone, no file, empty, no image, broken, or has more than twice the pixels of
        ``PIL.Image.MAX_IMAGE_PIXELS`` (179 million), as a decompression bomb has.
    """
    try:
        state = os.stat(path)
        if not stat.S_ISREG(state.st_mode):
            raise UnreadableImageError("not a file")
        if not state.st_size:
            raise UnreadableImageError("an empty file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata, and large photographs
            with Image.open(path, formats=FORMATS) as image:
                image.load()
                return np.array(_eight_bit(ImageOps.exif_transpose(image)))
    except UnreadableImageError:
        raise
    except UnidentifiedImageError:
        raise UnreadableImageError("not an image in a known format") from None
    except Image.DecompressionBombError:
        raise UnreadableImageError(
            f"too large: more than {2 * Image.MAX_IMAGE_PIXELS // 10**6} million pixels"
        ) from None
    except OSError as error:
        raise UnreadableImageError(error.strerror or f"broken: {error}") from error
    except Exception as error:  # what the decoders raise at broken content has no common class
        raise UnreadableImageError(f"broken: {type(error).__name__}: {error}") from error


def _eight_bit(image: Image.Image) -> Image.Image:
    """The image in mode L or RGB."""
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image
    if image.mode == "1":
        return image.convert("L")
    if image.mode.startswith("I"):  # whole numbers of 16 bits, some stored in 32
        values = np.asarray(image).astype(np.float64).clip(0, 65535)
        return Image.fromarray(np.round(values / 257).astype(np.uint8))
    if image.mode == "F":  # any range: black is the least value, white the largest
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        values = (values - values.min()) / max(np.ptp(values), np.finfo(np.float64).tiny)
        return Image.fromarray(np.round(255 * values).astype(np.uint8))
    if image.has_transparency_data:
        grey = image.mode in ("L", "LA", "La")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("L" if grey else "RGB")
    return image.convert("RGB")
