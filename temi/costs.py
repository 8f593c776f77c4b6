"""What a run costs before it is run: time, memory and disk of each stage, by arithmetic.

Two kinds of numbers, never mixed: counted (operations of a network, bytes of an array) and
measured, on one core of a CPU (:data:`MEASURED`, by ``benchmarks/costs.py``) and on one GPU, an
H200 (:data:`UTILISATION`, :data:`ON_GPU`, by ``benchmarks/gpu.py``). That another GPU is as many
times slower as its peak is lower is assumed.
"""

import dataclasses
from typing import Any, NamedTuple

import pandas as pd

from temi.backbones import BACKBONES, check_patches, named_size, spaces
from temi.checks import is_whole
from temi.config import TrainConfig
from temi.neighbors import EXACT_UP_TO


class Hardware(NamedTuple):
    """Peaks of dense matrix products as the data sheet states them, and memory."""

    bf16: float | None  # TFLOPS without sparsity, sums in fp32; None: products stay in fp32
    fp32: float  # TFLOPS
    memory: float | None  # GB
    source: str


MEASURED: dict[str, Any] = {
    "peak_gflops": 96.4,
    "vit_share": 0.923,
    "efficientnet_share": 0.421,
    "read_seconds": 0.00553,
    "step_seconds": 0.196,
    "step_seconds_per_cluster": 0.000435,
    "embedding_gb": 0.693,
}
"""On one core, in fp32: results/benchmarks/costs.json, rounded, as a test sees to. A step is one of
512 rows of 256 numbers with 16 heads."""

POWER_LAWS = {
    "exact-search": (105.0, 2.01),
    "approximate-search": (38.3, 1.65),
    "labels": (15.3, 0.968),
    "vote": (0.107, 0.968),
}
"""Of the same: seconds for 100,000 images and the exponent of their number; rows of 256 numbers, 16
heads, 100 clusters."""

UTILISATION = {
    "dinov2_vits14": 0.168,
    "dinov2_vitb14": 0.299,
    "dinov2_vitl14": 0.359,
    "dinov2_vitg14": 0.4,
    "efficientnet_lite0": 0.0182,
}
"""Share of the data sheet's peak that a forward pass reached on an H200, in bf16, 256 images of 224
pixels at a time: results/benchmarks/gpu.json, rounded, as a test sees to. A large transformer is
nearly all large matrix products; depthwise convolutions move much memory for few operations."""

ON_GPU = {
    "step_seconds": 0.000663,
    "step_seconds_per_cluster": 1.46e-6,
    "eager_step_seconds": 0.00497,
}
"""Of the same: a training step like that of :data:`MEASURED` as one CUDA graph, most of which is
the kernels' own latency; and one launched kernel by kernel, as several ranks do it."""

HARDWARE = {
    "cpu": Hardware(None, MEASURED["peak_gflops"] / 1e3, None, "one core, measured: costs.json"),
    "t4": Hardware(None, 8.1, 16, "NVIDIA T4 data sheet, no bf16"),
    "l4": Hardware(121, 30.3, 24, "NVIDIA L4 data sheet"),
    "rtx4090": Hardware(165.2, 82.6, 24, "NVIDIA Ada GPU architecture, appendix A"),
    "a100": Hardware(312, 19.5, 80, "NVIDIA A100 data sheet, SXM"),
    "h100": Hardware(989.4, 66.9, 80, "NVIDIA H100 data sheet, SXM"),
    "h200": Hardware(989.4, 66.9, 141, "NVIDIA H200 data sheet, SXM"),
}
"""What :func:`estimate_costs` knows; an estimate for another GPU is that of one with its peaks."""

ARCHITECTURES = {"s": (384, 12), "b": (768, 12), "l": (1024, 24), "g": (1536, 40)}
"""Width and depth of DINOv2's networks (Oquab et al., 2023, appendix B)."""

_LITE0_FLOPS, _LITE0_WEIGHTS, _LITE0_DIM = 2 * 407e6, 4.7e6, 1280  # its authors' README, 224 pixels
_BASE_GB = 0.4  # Python and torch themselves
_SIMILARITIES_GB = 0.27  # a chunk of them, and what is made of it: see neighbors.LARGEST
_HIDDEN, _BOTTLENECK = 512, 256  # of a head


def flops_per_image(backbone: str, image_size: int | None = None) -> float:
    """Floating-point operations of a backbone's forward pass, a product and a sum counted as two.

    Of a transformer of width D and depth L on n tokens, matrix products alone:
    L (24 n D² + 4 n² D), where 24 n D² are the products with weights (4 D² numbers in the
    attention and 8 D² in the perceptron of each block, two operations each) and 4 n² D those of
    the tokens with one another; and 2 · 588 D for each patch of 14 x 14 pixels. Tokens are the
    patches, a class token, and four registers where the name ends in ``_reg``.

    Parameters
    ----------
    backbone : str
        ``"dinov2_vits14"`` to ``"dinov2_vitg14_reg"``, ``"efficientnet_lite0"`` (its authors'
        figure, in proportion to the pixels) or ``"pixels"``, which computes nothing.
    image_size : int, optional
        Side in pixels; None: 224.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If the operations of that backbone are not known here, or it does not take that size.
    """
    if backbone not in BACKBONES:
        known = ", ".join(map(repr, BACKBONES))
        raise ValueError(f"backbone={backbone!r}: the operations of {known} are known, no others")
    side = 224 if image_size is None else image_size
    _check_number("image_size", side)
    if backbone == "pixels":
        return 0.0
    if backbone == "efficientnet_lite0":
        return _LITE0_FLOPS * (side / 224) ** 2
    check_patches(backbone, side)
    width, depth = _architecture(backbone)
    patches = (side // 14) ** 2
    tokens = patches + 1 + 4 * backbone.endswith("_reg")
    blocks = depth * (24 * tokens * width**2 + 4 * tokens**2 * width)
    return float(blocks + 2 * 3 * 14**2 * width * patches)


def estimate_costs(
    num_images: int,
    backbone: str = "dinov2_vitb14",
    hardware: str = "cpu",
    *,
    ranks: int = 1,
    cores: int = 8,
    image_size: int | None = None,
    config: TrainConfig | None = None,
) -> pd.DataFrame:
    """Time, memory and disk that each stage of a run will take.

    To plan with, not to compare with: right within a small factor at best. Times on the CPU are
    measured ones, carried on in a power law beyond 100,000 images. On a GPU forward pass and
    training step are those measured on an H200, search and labels those on the CPU, all in
    proportion to the data sheets' peaks of matrix products. What is sent between ranks is not
    counted.

    Parameters
    ----------
    num_images : int
        N.
    backbone : str
        See :func:`temi.costs.flops_per_image`; several joined by ``+`` add up, and one may have its
        side in pixels after ``@``.
    hardware : str
        One of :data:`temi.costs.HARDWARE`; ``"cpu"`` is one core of the machine that was measured.
    ranks : int
        Processes, one a GPU or one a core, that share the embedding, each training step and the
        neighbour search.
    cores : int
        CPU cores that read and decode images beside each GPU, as many as :func:`temi.embed` takes
        at most by itself. With ``hardware="cpu"`` the one core of a rank does that too.
    image_size : int, optional
        Side in pixels that the backbone sees; None: 224.
    config : TrainConfig, optional
        Of the training; None: the recipe ``fast`` with 100 clusters.

    Returns
    -------
    DataFrame
        A row a stage: ``read``, files of 640 x 480 pixels in JPEG to what the backbone sees;
        ``embed``, its forward pass; ``neighbours``; ``train``; ``label``, the heads' clusters and
        the vote; and ``in all``, in which reading takes no time of its own while a GPU embeds.
        Columns: ``seconds`` and ``hours``; ``memory (GB)`` of each rank; ``disk (GB)`` that stays
        in use (of the embeddings twice that while they are written; images not counted).

    Raises
    ------
    ValueError
        One line that names the argument, its value and what is allowed.
    """
    for name, value in (("num_images", num_images), ("ranks", ranks), ("cores", cores)):
        _check_number(name, value)
    sized = [named_size(part) for part in spaces(backbone)]
    parts = tuple(part for part, _ in sized)
    flops = [flops_per_image(part, side or image_size) for part, side in sized]
    if hardware not in HARDWARE:
        known = ", ".join(map(repr, HARDWARE))
        raise ValueError(f"hardware={hardware!r}: one of {known} is allowed")
    config = config or TrainConfig(num_clusters=100)
    if config.batch_size == "auto":  # the recipe's, unless memory is too small
        config = dataclasses.replace(config, batch_size=None)
    config = config.resolve(num_images)
    dim = sum(_dim(part, side or image_size) for part, side in sized)
    width = min(config.pca_dim or dim, dim)
    on_cpu = hardware == "cpu"

    decoders = 1 if on_cpu else cores
    read = num_images * len(parts) * MEASURED["read_seconds"] / (decoders * ranks)
    embed = num_images * sum(
        operations / _embedding_rate(part, hardware)
        for part, operations in zip(parts, flops, strict=True)
    )
    search = _search_seconds(num_images, width, hardware)
    steps = config.epochs * max(1, num_images // int(config.batch_size))
    step = _step_seconds(config, width, hardware, ranks)
    label = _label_seconds(num_images, config, width, hardware)
    seconds = {"read": read, "embed": embed / ranks, "neighbours": search / ranks,
               "train": steps * step, "label": label}  # fmt: skip
    seconds["in all"] = sum(seconds.values()) - (0 if on_cpu else min(read, embed / ranks))

    table = pd.DataFrame({"seconds": pd.Series(seconds)}).rename_axis("stage")
    table["hours"] = table["seconds"] / 3600
    table["memory (GB)"] = _memory(num_images, parts, config, width, on_cpu)
    table["disk (GB)"] = _disk(num_images, dim, config, width)
    table.loc["in all", "memory (GB)"] = table["memory (GB)"].max()
    table.loc["in all", "disk (GB)"] = table["disk (GB)"].sum()
    return table


def _check_number(name: str, value: Any) -> None:
    if not is_whole(value) or value < 1:
        raise ValueError(f"{name}={value!r}: a whole number from 1 is allowed")


def _architecture(backbone: str) -> tuple[int, int]:
    return ARCHITECTURES[backbone.removeprefix("dinov2_vit")[0]]


def _dim(backbone: str, side: int | None) -> int:
    """Numbers in an embedding; of pixels those of a square in colour, of 224 x 224 if not told."""
    own = {"pixels": 3 * (side or 224) ** 2, "efficientnet_lite0": _LITE0_DIM}
    return own[backbone] if backbone in own else _architecture(backbone)[0]


def _weights(backbone: str) -> float:
    """Numbers that a backbone holds; of a transformer 12 D² in each block, and few besides."""
    own = {"pixels": 0.0, "efficientnet_lite0": _LITE0_WEIGHTS}
    if backbone in own:
        return own[backbone]
    width, depth = _architecture(backbone)
    return 12.0 * depth * width**2


def _embedding_rate(backbone: str, hardware: str) -> float:
    """Operations a second of a forward pass."""
    own = HARDWARE[hardware]
    if hardware == "cpu":
        kind = "efficientnet" if backbone == "efficientnet_lite0" else "vit"
        return MEASURED[f"{kind}_share"] * 1e12 * own.fp32
    share = UTILISATION.get(backbone.removesuffix("_reg"), 1.0)  # of pixels nothing is computed
    return share * 1e12 * (own.bf16 or own.fp32)


def _power_law(stage: str, num_images: int) -> float:
    seconds, exponent = POWER_LAWS[stage]
    return seconds * (num_images / 1e5) ** exponent


def _search_seconds(num_images: int, width: int, hardware: str) -> float:
    """Of all rows, whose numbers are fp32: approximate of many on a CPU, else exact."""
    approximate = hardware == "cpu" and num_images > EXACT_UP_TO
    seconds = _power_law("approximate-search" if approximate else "exact-search", num_images)
    return seconds * width / 256 * HARDWARE["cpu"].fp32 / HARDWARE[hardware].fp32


def _head_flops(config: TrainConfig, width: int) -> float:
    """Operations of all heads' forward pass for one row."""
    inner = _HIDDEN * (width + _BOTTLENECK) + _BOTTLENECK * config.num_clusters
    return 2.0 * config.num_heads * inner


def _step_seconds(config: TrainConfig, width: int, hardware: str, ranks: int) -> float:
    """Of one training step, whose rows the ranks share."""
    rows = int(config.batch_size) * config.group_size
    size = rows / 512 / ranks * config.num_heads / 16
    clusters, own = config.num_clusters, HARDWARE[hardware]
    seconds = MEASURED["step_seconds"] + MEASURED["step_seconds_per_cluster"] * clusters
    seconds *= size * _head_flops(config, width) / _head_flops(config, 256)
    if hardware == "cpu":
        return seconds
    peak = own.bf16 or own.fp32
    seconds *= HARDWARE["cpu"].fp32 / peak
    size *= HARDWARE["h200"].bf16 / peak
    seconds += ON_GPU["step_seconds"] + ON_GPU["step_seconds_per_cluster"] * clusters * size
    return seconds if ranks == 1 else max(seconds, ON_GPU["eager_step_seconds"])


def _label_seconds(num_images: int, config: TrainConfig, width: int, hardware: str) -> float:
    """All heads on all images before the first step and after the last, a vote after each epoch."""
    reference = TrainConfig(num_clusters=100)
    ratio = _head_flops(config, width) / _head_flops(reference, 256)
    ratio *= HARDWARE["cpu"].fp32 / HARDWARE[hardware].fp32
    labels = 2 * _power_law("labels", num_images) * ratio
    return labels + config.epochs * _power_law("vote", num_images) * config.num_heads / 16


def _memory(
    num_images: int, parts: tuple[str, ...], config: TrainConfig, width: int, on_cpu: bool
) -> pd.Series:
    """GB of each stage: what an image has in each of the arrays that stand beside each other."""
    heads, k = config.num_heads, config.num_neighbors
    row = 4 * width
    approximate = on_cpu and num_images > EXACT_UP_TO
    bytes_per_image = {
        # rows, normalised, and padded or in the index; ids and similarities (and copies of them)
        "neighbours": 3 * row + (3 if approximate else 1) * 12 * k,
        # rows, ids of neighbours, a random number for each, pairs, labels and copies of them
        "train": row + 8 * k + 4 * k + 8 * config.group_size + 16 * heads,
        # the same without what an epoch draws; the heads' labels as they come, and aligned
        "label": row + 8 * k + 28 * heads,
    }
    gb = {stage: _BASE_GB + num_images * size / 1e9 for stage, size in bytes_per_image.items()}
    network = 4 * max(map(_weights, parts)) / 1e9
    gb["neighbours"] += 0 if approximate else _SIMILARITIES_GB
    gb |= {"read": MEASURED["embedding_gb"], "embed": MEASURED["embedding_gb"] + network}
    return pd.Series(gb)


def _disk(num_images: int, dim: int, config: TrainConfig, width: int) -> pd.Series:
    """GB of each stage: float16 embeddings with names, three checkpoints, a table of clusters."""
    heads = _head_flops(config, width) / 2  # numbers in their weights
    checkpoint = 16 * heads + 4 * config.num_heads * num_images  # networks, moments; labels
    return pd.Series(
        {"read": 0.0, "embed": num_images * (2 * dim + 30) / 1e9, "neighbours": 0.0,
         "train": 3 * checkpoint / 1e9, "label": 40 * num_images / 1e9}
    )  # fmt: skip
