"""Nearest neighbours by cosine similarity, and what is so near that it is the same."""

import hashlib
import importlib.util
import math

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.nn import functional as F

from temi import distributed
from temi.embeddings import CHUNK
from temi.rows import Rows

LARGEST = 2**25  # similarities in memory at a time: 128 MiB in fp32
ROUNDING = 1e-6  # of a cosine in fp32
EXACT_UP_TO = 250_000  # rows that a CPU compares with all others in some minutes; 5 million: days
PROBES = 64  # cells looked into; see approximate_neighbors
COMPARED = 2**22  # numbers of rows held against others at a time: 32 MiB
PARTS = 20  # of an exact search, at most, between which its progress is shown
LOOKED_UP = 2**14  # rows of an approximate one


def check_tensor(x: Tensor) -> None:
    """Raise a ValueError that names the remedy if ``x`` is no Tensor."""
    if not isinstance(x, Tensor):
        raise ValueError(f"x of type {type(x).__name__}: torch.from_numpy(x) is needed")


def nearest_neighbors(
    x: Tensor, k: int, chunk_size: int | None = None, rows: slice = slice(None)
) -> tuple[Tensor, Tensor]:
    """The k most similar other rows of each row.

    Works through ``chunk_size`` rows at a time, so that the N x N similarities never stand in
    memory together. A row is never its own neighbour, but an exact copy of it may be.

    Parameters
    ----------
    x : Tensor [N, D], floating point
        Embeddings; they need not be normalised.
    k : int
        Neighbours of each row, 1 to N - 1.
    chunk_size : int, optional
        Rows compared with all others at a time; None: as many as keep their similarities under
        128 MiB in fp32, whatever N and D. Beside these stand ``x`` once more, normalised, and the
        result.
    rows : slice
        Rows whose neighbours are wanted, among all: M of them; by default N.

    Returns
    -------
    indices : Tensor [M, k], int64
        Most similar first.
    similarities : Tensor [M, k]
        Cosine similarities, of the dtype of ``x``; float32 for half precision.

    Raises
    ------
    ValueError
        If ``k`` does not fit the number of rows, or ``chunk_size`` is below 1.

    Notes
    -----
    Choosing k of N numbers takes longer than computing them. So the columns are dealt out to
    groups, and the k largest are looked for in the k groups of the largest maxima alone: no other
    group can hold one, as each of these k holds something larger. Groups of sqrt(N / k) columns
    make the two choices together the smallest.
    """
    check_tensor(x)
    count = len(x)
    if not 1 <= k < count:
        raise ValueError(f"num_neighbors={k}: 1 to {count - 1} is allowed with {count} rows")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: a whole number from 1, or None, is allowed")
    chunk_size = chunk_size or max(1, LARGEST // count)
    members = math.isqrt(count // k)
    groups = -(-count // members)
    x = F.normalize(x.float() if x.dtype.itemsize < 4 else x, dim=1)
    x = F.pad(x, (0, 0, 0, groups * members - count))  # rows of zeros
    steps = torch.arange(members, device=x.device).unsqueeze(1) * groups  # (members, 1)
    wanted = torch.arange(count, device=x.device)[rows]
    indices = torch.empty(len(wanted), k, dtype=torch.int64, device=x.device)
    similarities = torch.empty(len(wanted), k, dtype=x.dtype, device=x.device)
    for start in range(0, len(wanted), chunk_size):
        chunk = wanted[start : start + chunk_size]
        similarity = x[chunk] @ x.T  # (chunk, members * groups)
        similarity[:, count:] = -torch.inf
        similarity[torch.arange(len(chunk), device=x.device), chunk] = -torch.inf
        maxima = similarity.unflatten(1, (members, groups)).amax(dim=1)  # (chunk, groups)
        best = maxima.topk(k, sorted=False).indices  # (chunk, k)
        columns = (best.unsqueeze(1) + steps).flatten(1)  # (chunk, members * k)
        found = slice(start, start + len(chunk))
        similarities[found], chosen = similarity.gather(1, columns).topk(k)
        indices[found] = columns.gather(1, chosen)
    return indices, similarities


def approximate_neighbors(x: Tensor, k: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Most of the k most similar other rows of each row, in far less time than all of them.

    An inverted file of faiss (the extra ``large``): k-means deals the rows out to
    4 sqrt(N) cells (fewer below 24,000 rows), and a row is compared with those of the 64 cells
    nearest to it. Of 35,000 photographs (256 principal components of EfficientNet-Lite0's features)
    98.6% of the 25 nearest are found, in a third of the time (``benchmarks/neighbors.py``); the
    advantage grows with the square root of N. The same rows give the same result. On a CPU,
    whatever the device of ``x``.

    Parameters
    ----------
    x : Tensor [N, D], floating point
        Embeddings; they need not be normalised.
    k : int
        Neighbours of each row.
    rows : slice
        Rows whose neighbours are wanted, among all: M of them; by default N.

    Returns
    -------
    indices : Tensor [M, k], int64
        Most similar first.
    similarities : Tensor [M, k], float32
        Cosine similarities.

    Raises
    ------
    ValueError
        If ``k`` does not fit the number of rows, or the cells looked into hold fewer.
    ModuleNotFoundError
        If faiss is not installed.
    """
    try:
        import faiss
    except ModuleNotFoundError as error:
        remedy = "approximate neighbours need faiss; run pip install faiss-cpu"
        raise ModuleNotFoundError(remedy, name="faiss") from error

    check_tensor(x)
    count = len(x)
    if not 1 <= k < count:
        raise ValueError(f"num_neighbors={k}: 1 to {count - 1} is allowed with {count} rows")
    vectors = F.normalize(x.float(), dim=1).cpu().numpy()
    cells = min(math.isqrt(16 * count), count // 39)  # faiss wants 39 rows a cell to learn from
    width = vectors.shape[1]
    centers = faiss.IndexFlatIP(width)
    index = faiss.IndexIVFFlat(centers, width, max(1, cells), faiss.METRIC_INNER_PRODUCT)
    wanted = vectors[rows]
    shown = count > EXACT_UP_TO
    with distributed.image_bar(len(wanted), "neighbours", shown=shown, delay=0) as bar:
        bar.set_postfix_str("first the cells")
        index.train(vectors)
        index.add(vectors)
        index.nprobe = PROBES
        bar.set_postfix_str("")
        found = []
        for part in np.split(wanted, range(LOOKED_UP, len(wanted), LOOKED_UP)):
            found.append(index.search(part, k + 1))
            bar.update(len(part))
    similarities, indices = map(torch.from_numpy, map(np.concatenate, zip(*found, strict=True)))
    if (indices < 0).any():
        raise ValueError(
            f"num_neighbors={k}: the cells that were searched hold fewer; a smaller number, or "
            "nearest_neighbors, which is exact, is needed"
        )
    own = indices == torch.arange(count)[rows].unsqueeze(1)
    own[~own.any(dim=1), -1] = True  # where copies of a row have taken its place
    keep = ~own
    indices, similarities = indices[keep].view(-1, k), similarities[keep].view(-1, k)
    return indices.to(x.device), similarities.to(x.device)


def mutual_neighbors(neighbors: Tensor) -> Tensor:
    """Of each row's neighbours those that have the row among theirs.

    A row at the edge of a crowd has its neighbours there, but is no neighbour of theirs: such
    pairs share a class less often. A list that gets shorter is repeated until it is k long again,
    so that a training draws all that are left equally often, or nearly so. A row that nobody has
    among its neighbours keeps the first of its own.

    Parameters
    ----------
    neighbors : Tensor [N, k], int64
        Row numbers, the most similar first.

    Returns
    -------
    Tensor [N, k], int64

    References
    ----------
    Qin, Gammeter, Bossard, Quack and Van Gool, Hello neighbor: accurate object retrieval with
    k-reciprocal nearest neighbors, CVPR 2011.
    """
    count, k = neighbors.shape
    places = torch.arange(k, device=neighbors.device)
    kept = torch.empty_like(neighbors)
    for rows in torch.arange(count, device=neighbors.device).split(max(1, COMPARED // k**2)):
        near = neighbors[rows]  # (chunk, k)
        mutual = (neighbors[near] == rows.view(-1, 1, 1)).any(dim=-1)  # (chunk, k)
        left = mutual.sum(dim=1, keepdim=True).clamp_min(1)
        first = mutual.int().argsort(dim=1, descending=True, stable=True)  # places of those left
        kept[rows] = near.gather(1, first.gather(1, places % left))
    return kept


def check_neighbors(neighbors: np.ndarray, count: int, chunk_size: int = 2**16) -> str:
    """Hold neighbours that somebody else has found against the number of rows.

    Parameters
    ----------
    neighbors : ndarray [N, k], int32 or int64
        May be mapped from a file.
    count : int
        N.
    chunk_size : int
        Rows looked at together.

    Returns
    -------
    str
        SHA-256 of the numbers as int64, in hexadecimal.

    Raises
    ------
    ValueError
        In one line, if shape or dtype are others, or a row names itself or one that there is not.
    """
    if not isinstance(neighbors, np.ndarray) or neighbors.dtype not in (np.int32, np.int64):
        is_array = isinstance(neighbors, np.ndarray)
        kind = neighbors.dtype if is_array else type(neighbors).__name__
        raise ValueError(f"neighbors of {kind}: a NumPy array of int32 or int64 is allowed")
    if neighbors.ndim != 2 or len(neighbors) != count or not 1 <= neighbors.shape[1] < count:
        raise ValueError(
            f"neighbors of shape {neighbors.shape}: [{count}, k] is allowed, k from 1 to "
            f"{count - 1}, since there are {count} embeddings"
        )
    digest = hashlib.sha256()
    for start in range(0, count, chunk_size):
        rows = neighbors[start : start + chunk_size].astype(np.int64)
        own = np.arange(start, start + len(rows))[:, None]
        for wrong, what, remedy in (
            ((rows < 0) | (rows >= count), "names", f"0 to {count - 1} is allowed"),
            (rows == own, "names itself,", "leave that column out"),
        ):
            if wrong.any():
                row, column = np.argwhere(wrong)[0]
                raise ValueError(
                    f"neighbors: row {start + row} {what} {rows[row, column]}; {remedy}"
                )
        digest.update(np.ascontiguousarray(rows).data)
    return digest.hexdigest()


def search_neighbors(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Neighbours and similarities: exact, or approximate of many rows on a CPU that has faiss.

    Several processes share the rows; each ends with the neighbours of all.
    """
    many = len(x) > EXACT_UP_TO and x.device.type == "cpu"
    approximate = many and importlib.util.find_spec("faiss") is not None
    search = approximate_neighbors if approximate else _exact_in_parts
    found = search(x, k, rows=distributed.share(len(x)))
    indices, similarities = (distributed.gather_rows(part, len(x)) for part in found)
    return indices, similarities


def _exact_in_parts(x: Tensor, k: int, rows: slice) -> tuple[Tensor, Tensor]:
    """What :func:`nearest_neighbors` gives, with progress.

    A part is several of its chunks, beside which normalising all rows again takes little.
    """
    count, chunk_size = rows.stop - rows.start, max(1, LARGEST // len(x))
    part = chunk_size * max(10, count // (chunk_size * PARTS))
    indices = torch.empty(count, k, dtype=torch.int64, device=x.device)
    similarities = torch.empty(count, k, dtype=torch.promote_types(x.dtype, torch.float32),
                               device=x.device)  # fmt: skip
    with distributed.image_bar(count, "neighbours") as bar:
        for start in range(0, count, part):
            own = slice(start, min(start + part, count))
            among_all = slice(rows.start + own.start, rows.start + own.stop)
            indices[own], similarities[own] = nearest_neighbors(x, k, rows=among_all)
            bar.update(own.stop - own.start)
    return indices, similarities


def nearest_similarities(queries: Tensor | Rows, x: Tensor | Rows, k: int) -> Tensor:
    """Cosine similarities [M, k] of queries [M, D] to their nearest rows of ``x`` [N, D].

    The largest first. Some thousand queries are held against some thousand rows at a time, so that
    neither need fit in memory.
    """
    compared = LARGEST // CHUNK  # queries
    found = []
    with distributed.image_bar(-(-len(queries) // compared) * len(x), "similarities") as bar:
        for chunk in queries.split(compared):
            chunk, nearest = F.normalize(chunk, dim=1), chunk.new_empty(len(chunk), 0)
            for part in x.split(CHUNK):
                similarities = torch.cat([nearest, chunk @ F.normalize(part, dim=1).T], dim=1)
                nearest = similarities.topk(min(k, similarities.shape[1])).values
                bar.update(len(part))
            found.append(nearest)
    return torch.cat(found)


def near_duplicates(x: Tensor, similarity: float = 0.97, k: int = 10) -> list[np.ndarray]:
    """Groups of images that are nearly the same: copies, frames of a burst, the same shot resaved.

    Two images are joined where their cosine similarity is at least ``similarity`` and one is among
    the ``k`` nearest of the other; a group is all that hang together.

    Parameters
    ----------
    x : Tensor [N, D]
        Embeddings, best as the heads are given them (:meth:`temi.Run.inputs`): centred, two images
        of one object seldom come near 1.
    similarity : float
        Up to 1, which only copies reach, but for rounding. How much is nearly the same depends on
        the backbone: look at what is found.
    k : int
        Cut to N - 1.

    Returns
    -------
    list of ndarray
        Rows of each group of two or more, the largest first.

    Raises
    ------
    ValueError
        If ``x`` is no Tensor, or no cosine can be ``similarity``.
    """
    check_tensor(x)
    if not -1 <= similarity <= 1:
        raise ValueError(f"similarity={similarity!r}: a cosine, -1 to 1, is allowed")
    count = len(x)
    if count < 2:
        return []
    near, values = (part.cpu() for part in search_neighbors(x, min(k, count - 1)))
    rows, places = (values >= similarity - ROUNDING).nonzero(as_tuple=True)
    columns = near[rows, places]
    links = coo_array((np.ones(len(rows)), (rows.numpy(), columns.numpy())), shape=(count, count))
    group = connected_components(links, directed=False)[1]
    members = np.argsort(group, kind="stable")
    groups = np.split(members, np.flatnonzero(np.diff(group[members])) + 1)
    return sorted((rows for rows in groups if len(rows) > 1), key=len, reverse=True)
