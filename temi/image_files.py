"""A folder of image files, listed at once and decoded one by one."""

import dataclasses
import errno
import os
import re
import stat
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # no others: EPS would run Ghostscript
# Times the side that is needed, which a JPEG decoded smaller still has: from three on Pillow's
# documentation (Image.resize, reducing_gap) calls what is then scaled down indistinguishable.
ENOUGH = 3
# What fails for want of something, and may succeed the next time: the image stays in.
_NOT_OF_THE_FILE = (
    errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT,
    errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH,
)  # fmt: skip


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
    side : int or None
        Shorter side in pixels at which the pictures are needed; None: whole.
    """

    root: str
    names: tuple[str, ...]
    side: int | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> np.ndarray:
        """Picture ``index``; see :func:`decode`."""
        return decode(os.path.join(self.root, self.names[index]), self.side)

    def opens(self, index: int) -> bool:
        """Whether file ``index`` can be opened; ``os.access`` knows not all that forbids it."""
        try:
            with open(os.path.join(self.root, self.names[index]), "rb") as file:
                file.read(1)
        except OSError:
            return False
        return True

    def states(self) -> Iterator[tuple[str, int, int]]:
        """Name, bytes and time of change in ns of each file, for a fingerprint; 0 if it is gone."""
        for name in self.names:
            try:
                state = os.stat(os.path.join(self.root, name))
            except OSError:  # decoding it will say why
                yield name, 0, 0
            else:
                yield name, state.st_size, state.st_mtime_ns


def needed_at(images: Sequence[np.ndarray] | np.ndarray | ImageFiles, side: int | None):
    """The same pictures, which will be scaled down to a shorter side of ``side`` pixels, if any."""
    return dataclasses.replace(images, side=side) if isinstance(images, ImageFiles) else images


def list_images(root: Path) -> list[str]:
    """Paths of all image files below a folder, sorted, with forward slashes.

    An image file is whatever has a known suffix, in any case, and is no folder. Hidden files and
    folders are passed over, and so is what macOS adds to archives. Links are followed; a folder
    that several paths lead to is read once, by the path without links where there is one.

    Raises
    ------
    OSError
        If a folder cannot be listed.
    """
    found, seen = [], set()
    folders, links = [""], []
    while folders or links:
        prefix = folders.pop() if folders else links.pop()
        folder = os.stat(os.path.join(root, prefix))
        if (folder.st_dev, folder.st_ino) in seen:
            continue
        seen.add((folder.st_dev, folder.st_ino))
        with os.scandir(os.path.join(root, prefix)) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name, reverse=True):
                name = prefix + entry.name
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    continue
                if entry.is_symlink() and os.path.isdir(entry.path):  # False where links go round
                    links.append(f"{name}/")
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(f"{name}/")
                elif name.lower().endswith(SUFFIXES):
                    found.append(name)
    return sorted(found)


def readable_name(name: str) -> str:
    """A file name that any table and message can hold, different for different names.

    Bytes that are no UTF-8 become ``\\xNN``, control characters and line breaks ``\\uNNNN``, and a
    backslash two.
    """
    escaped = re.sub(
        r"[\x00-\x1f\x7f-\x9f\u2028\u2029]",
        lambda character: f"\\u{ord(character[0]):04x}",
        name.replace("\\", "\\\\"),
    )
    return os.fsencode(escaped).decode("utf-8", "backslashreplace")


def decode(path: str, side: int | None = None) -> np.ndarray:
    """The picture in an image file, upright.

    Of an animation the first frame; 16 bits are scaled to 8 (32 are refused: what is white among
    them no file says); what is transparent lies on white;
    CMYK and palettes become RGB; the camera's rotation (EXIF) is applied.

    Parameters
    ----------
    path : str
    side : int, optional
        Shorter side in pixels at which the picture is needed: a JPEG is decoded at a half, a
        quarter or an eighth of its size where three times that side remain, which takes about half
        as long and changes embeddings less than half precision (benchmarks/large_photographs.py).
        None: whole.

    Returns
    -------
    ndarray [height, width] or [height, width, 3], uint8
        Grey values where the file holds nothing else, else RGB.

    Raises
    ------
    UnreadableImageError
        If the file is gone, no file, empty, no image, broken, or has more than twice the pixels of
        ``PIL.Image.MAX_IMAGE_PIXELS`` (179 million), as a decompression bomb has.
    MemoryError, OSError
        If memory or open files run out, or the file's folder is gone or empty, as that of a network
        folder that went away: not for want of the file.
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
                if side is not None:
                    image.draft(None, (ENOUGH * side, ENOUGH * side))  # does nothing but to JPEG
                image.load()
                return np.array(_eight_bit(_upright(image)))
    except (UnreadableImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise UnreadableImageError("not an image in a known format") from None
    except Image.DecompressionBombError:
        raise UnreadableImageError(
            f"too large: more than {2 * Image.MAX_IMAGE_PIXELS // 10**6} million pixels"
        ) from None
    except OSError as error:
        if error.errno in _NOT_OF_THE_FILE:
            raise
        if error.errno and _is_empty(os.path.dirname(path)):
            reason = f"{error.strerror}, nor anything else there: bring the folder back, and go on"
            raise OSError(error.errno, reason, path) from error
        raise UnreadableImageError(error.strerror or f"broken: {error}") from error
    except Exception as error:  # what the decoders raise at broken content has no common class
        raise UnreadableImageError(f"broken: {type(error).__name__}: {error}") from error


def _is_empty(folder: str) -> bool:
    """Whether a folder holds nothing, or is gone: as that of a drive or share that is."""
    try:
        with os.scandir(folder or os.curdir) as entries:
            return next(entries, None) is None
    except OSError:
        return True


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as the camera held it; as stored where what says so is damaged."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the picture itself is whole; Pillow's errors here have no common class
        return image


def _eight_bit(image: Image.Image) -> Image.Image:
    """The image in mode L or RGB."""
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image
    if image.mode == "F" or (image.mode == "I" and not _is_16_bit(image)):
        raise UnreadableImageError("32-bit values, of no known range: convert it to 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        grey = np.round(values / 257).astype(np.uint8)
        grey[values == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey)
    if image.has_transparency_data:
        grey = image.mode in ("1", "L", "LA", "La")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("L" if grey else "RGB")
    return image.convert("L" if image.mode == "1" else "RGB")


def _is_16_bit(image: Image.Image) -> bool:
    """Whether the values fit into 16 bits, which some files of 16 bits store in 32."""
    least, largest = image.getextrema()
    return least >= 0 and largest < 2**16  # type: ignore[operator]  # of one channel: numbers
