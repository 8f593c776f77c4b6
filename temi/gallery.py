"""One page to look at clusters in a browser, name them and merge them."""

import base64
import hashlib
import io
import json
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from temi.checks import is_whole
from temi.data import ImageSet, check_image_set
from temi.files import absolute, expanded, whole_file
from temi.image_files import UnreadableImageError, needed_at
from temi.names import apply_names, check_columns, names_in, read_names

INLINE = 20_000  # images; at some 1.7 kB each, of photographs, a page of 34 MB
PACK = 200  # thumbnails that are read together
_WHOLE = ("path", "cluster", "second_choice")  # columns of the table, as the next
_ROUNDED = ("confidence", "agreement", "distance")
LOSSLESS = 16  # pixels of a side up to which each one counts, and costs next to nothing


def write_gallery(
    path: str | Path,
    table: pd.DataFrame,
    images: ImageSet,
    *,
    title: str = "Clusters",
    names: str | Path | Mapping | None = None,
    points: np.ndarray | None = None,
    thumbnail: int = 64,
) -> None:
    """Write an HTML page of all clusters that needs no server and no network.

    It shows the clusters, largest first, with their images, surest first; sorts and searches them;
    and lets its reader name and merge clusters, which it remembers in the browser and gives out as
    a file for :func:`temi.apply_names`.

    Up to 20,000 images everything is in the page itself. Of more the thumbnails lie beside it, 200
    a file, in ``NAME_files/`` for a page ``NAME.html``: move both together.

    Parameters
    ----------
    path : path
        Of the page; its folder is made where it is missing.
    table : DataFrame
        From :func:`temi.assignments` or :func:`temi.apply_names`; at least one image.
    images : ImageSet
        Holds at least the images of the table.
    title : str
        Heading of the page.
    names : path or mapping, optional
        A gallery's "Download names", to begin with; None: names that the table brings along.
    points : ndarray [N, 2], optional
        A place for each row of the table, by t-SNE for one: adds a map.
    thumbnail : int
        Pixels of a thumbnail's longer side at most, 16 to 512. 64 shows what a photograph is of, in
        some 1.7 kB; an image of 32 pixels takes 0.6 kB. None is enlarged in the file.

    Raises
    ------
    ValueError
        In one line: an argument that does not fit, an image that the set does not hold. (One that
        cannot be read any more stays white, with a warning.)
    OSError
        If a file cannot be written, or the images' folder is gone: the page that stood there before
        is as it was.
    """
    if not is_whole(thumbnail) or not 16 <= thumbnail <= 512:
        raise ValueError(f"thumbnail={thumbnail!r}: a whole number from 16 to 512 is allowed")
    thumbnail = int(thumbnail)  # NumPy's are no JSON
    check_columns(table, *_WHOLE, *_ROUNDED)
    check_image_set(images)
    if not len(table):
        raise ValueError("table: holds no image; one or more are allowed")
    if points is not None:
        points = np.asarray(points, dtype=np.float64)
        if points.shape != (len(table), 2) or not np.isfinite(points).all():
            raise ValueError(
                f"points: shape {points.shape}; {(len(table), 2)} is allowed, all numbers finite"
            )
    if names is None:
        given, merged = names_in(table), {}
    else:
        apply_names(table, names)  # refuses a cluster that there is not
        given, merged = read_names(names)
    path = absolute(expanded(path))
    sizes = table["cluster"].map(table["cluster"].value_counts())
    order = np.lexsort((-table["confidence"], table["cluster"], -sizes))
    table = table.iloc[order]
    rows = images.rows(table["path"])
    data: dict[str, Any] = _columns(table) | _places(points, order)
    data |= {"title": title, "names": given, "merged": merged, "pack": PACK}
    data["thumbnail"] = thumbnail
    key = hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]
    beside = path.with_name(f"{path.stem}_files")
    inline = len(table) <= INLINE
    data |= {"key": key, "files": None if inline else f"{beside.name}/{key}"}
    packs = _packs(images, rows, thumbnail)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not inline:
        (beside / key).mkdir(parents=True, exist_ok=True)
        for number, pack in enumerate(packs):
            with whole_file(beside / key / f"{number}.js") as file:
                file.write(f'receive({number}, "{pack}")\n'.encode())
    head, tail = _template(inline)
    with whole_file(path) as file:
        file.write(f"{head}{_block('application/json', 'data', _json(data))}".encode())
        for number, pack in enumerate(packs):  # none are left where they lie beside the page
            file.write(_block("text/plain", f"pack-{number}", pack).encode())
        file.write(tail.encode())
    for old in beside.glob("*"):  # of the page that this one replaces
        if re.fullmatch(r"[0-9a-f]{16}", old.name) and (inline or old.name != key):
            shutil.rmtree(old)


def _columns(table: pd.DataFrame) -> dict[str, list]:
    """The table as lists; numbers to four digits, None for NaN, which JSON has not."""
    columns = {name: table[name].tolist() for name in _WHOLE}
    for name in _ROUNDED:
        values = table[name].round(4)
        columns[name] = values.astype(object).where(values.notna(), None).tolist()
    return columns


def _places(points: np.ndarray | None, order: np.ndarray) -> dict[str, list]:
    """Coordinates as whole numbers from 0 to 65,535, one scale for both."""
    if points is None:
        return {}
    low, high = points.min(axis=0), points.max(axis=0)
    places = np.round((points - low) / max((high - low).max(), 1e-300) * 65535).astype(int)
    return {"x": places[order, 0].tolist(), "y": places[order, 1].tolist()}


def _json(data: dict) -> str:
    """JSON that ends no script element, whatever it holds."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _block(kind: str, name: str, content: str) -> str:
    return f'<script type="{kind}" id="{name}">{content}</script>\n'


def _template(inline: bool) -> tuple[str, str]:
    """The page before and after its data, with a policy under which only its own script runs."""
    page = Path(__file__).with_name("gallery.html").read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    scripts = f"'sha256-{digest}'" + ("" if inline else " 'self' file:")
    head, tail = page.replace("{{scripts}}", scripts).split("{{data}}\n")
    return head, tail


def _packs(images: ImageSet, rows: list[int], side: int) -> Iterator[str]:
    """Thumbnails in base64, separated by spaces, so many at a time."""
    progress = tqdm(
        total=len(rows), desc="thumbnails", unit="image", file=sys.stdout, delay=2, mininterval=1
    )
    with progress:
        for start in range(0, len(rows), PACK):
            part = rows[start : start + PACK]
            yield " ".join(_thumbnail(images, row, side) for row in part)
            progress.update(len(part))


def _thumbnail(images: ImageSet, row: int, side: int) -> str:
    """A WebP file in base64; JPEG, with its longer headers, takes half as much again or twice."""
    try:
        image = Image.fromarray(needed_at(images.images, side)[row])
    except UnreadableImageError as error:  # it could be read when it was embedded
        # the same words for all of one reason, of which Python shows one
        warnings.warn(f"what cannot be read any more stays white ({error.reason})", stacklevel=2)
        image = Image.new("L", (side, side), "white")
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=max(image.size) <= LOSSLESS, quality=85)
    return base64.b64encode(file.getvalue()).decode()
