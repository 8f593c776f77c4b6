"""Figures that are used more than once."""

import base64
import html
import io
import json
import re
import zlib
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from temi.image_files import ImageFiles, needed_at
from temi.runs import Run

TILE = 64  # pixels of a side that a picture in a row has at most

_PALETTE = sns.color_palette("colorblind").as_hex()
COLORS = {  # the same quantity has the same colour in every chapter
    "kmeans": _PALETTE[7],
    "mean_head": _PALETTE[9],
    "best_head": _PALETTE[1],
    "ensemble": _PALETTE[0],
    "right": _PALETTE[2],
    "wrong": _PALETTE[3],
}


def use_style() -> None:
    """The look of all figures: light grid, screen size, white ground in light and dark pages."""
    sns.set_theme(style="whitegrid", context="notebook", palette="colorblind", font_scale=0.9)
    plt.rcParams.update(
        {"figure.dpi": 100, "savefig.dpi": 100, "figure.constrained_layout.use": True}
    )


def training_curves(history: Sequence[dict], num_clusters: int) -> Figure:
    """Loss of each head, and entropy of the marginals, over the epochs of a run.

    Parameters
    ----------
    history : sequence of dict
        The ``history`` of a :class:`temi.Run`.
    num_clusters : int
        For the largest entropy there can be, log K.
    """
    epochs = [entry["epoch"] for entry in history]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
    left.plot(epochs, [entry["head_losses"] for entry in history], lw=1, color=COLORS["mean_head"])
    left.set(title="Every head's loss falls and levels off", xlabel="epoch", ylabel="loss (nats)")
    entropies = [entry["marginal_entropy"] for entry in history]
    right.plot(epochs, entropies, color=COLORS["ensemble"], label="mean over heads")
    right.axhline(np.log(num_clusters), ls="--", lw=1, color="0.3", label="all clusters equal")
    right.set(title="Clusters stay in use", xlabel="epoch", ylabel="marginal entropy (nats)")
    right.set_ylim(0, 1.1 * np.log(num_clusters))
    right.legend(loc="lower right")
    for axis in (left, right):
        axis.xaxis.get_major_locator().set_params(integer=True)
    plt.close(figure)
    return figure


def compare_runs(runs: Sequence[Run], names: Sequence[str]) -> Figure:
    """Loss of the lowest-loss head, and where labels exist accuracy of the vote, of several runs.

    Losses can be compared where data, temperatures and beta are the same.

    Parameters
    ----------
    runs : sequence of Run
    names : sequence of str
        Of the runs, for the legend.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
    for run, name in zip(runs, names, strict=True):
        epochs = [entry["epoch"] for entry in run.history]
        left.plot(epochs, [min(entry["head_losses"]) for entry in run.history], label=name)
        right.plot(epochs, [entry.get("ensemble_acc", np.nan) for entry in run.history], label=name)
    left.set(title="Loss of the lowest-loss head", xlabel="epoch", ylabel="loss (nats)")
    right.set(title="Accuracy of the vote", xlabel="epoch", ylabel="ACC", ylim=(0, 1))
    left.legend()
    for axis in (left, right):
        axis.xaxis.get_major_locator().set_params(integer=True)
    plt.close(figure)
    return figure


def sweeps(runs: pd.DataFrame, score: str = "acc", columns: int = 3) -> Figure:
    """One small picture a setting: what its values do to a score, everything else as in the recipe.

    Parameters
    ----------
    runs : DataFrame
        Of ``results/ablations.csv``, one data set and backbone, ``value`` as str. The rows of the
        recipe ``fast`` stand in each picture at its value of the setting, their mean as a ring; the
        dotted line is the better k-means with as many clusters.
    score : str
        Column drawn; a point a seed, a line through the means.
    columns : int
        Pictures side by side.
    """
    trained, base = runs[runs["method"] == "temi"], runs[runs["value"] == "fast"]
    defaults = json.loads(base["settings"].iloc[0]) | {"recipe": "fast"}
    kmeans = runs[runs["method"] != "temi"].groupby(["value", "method"])[score].mean()
    kmeans = kmeans.groupby("value").max()  # the better one of each number of clusters
    settings = [name for name in trained["setting"].unique() if name != "backbone"]
    lines = -(-len(settings) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3 * columns, 2 * lines), sharey=True, squeeze=False
    )
    for axis, name in zip(axes.flat, settings, strict=False):
        default = str(defaults[name])
        rows = pd.concat([trained[trained["setting"] == name], base.assign(value=default)])
        rows = rows.drop_duplicates(["value", "seed"])
        order = sorted(rows["value"].unique(), key=_by_size)
        places, own = rows["value"].map(order.index), order.index(default)
        axis.plot(rows[score].groupby(places).mean(), color=COLORS["ensemble"], lw=1.5)
        axis.plot(places, rows[score], "o", color=COLORS["ensemble"], ms=4, alpha=0.6)
        axis.plot(own, base[score].mean(), "o", ms=12, mfc="none", color=COLORS["best_head"])
        clusters = order if name == "num_clusters" else [str(defaults["num_clusters"])] * len(order)
        axis.plot(kmeans.reindex(clusters).to_numpy(), ls=":", color=COLORS["kmeans"])
        axis.set(title=name, xticks=range(len(order)), xticklabels=order)
        axis.tick_params(axis="x", labelsize="small")
    for axis in axes.flat[len(settings) :]:
        axis.remove()
    for axis in axes[:, 0]:
        axis.set_ylabel(score.upper())
    plt.close(figure)
    return figure


def _by_size(text: str) -> tuple[float, str]:
    """Sorts numbers by their size, and words after them."""
    return (float(text), "") if re.fullmatch(r"[\d.e+-]+", text) else (np.inf, text)


def agreement_histogram(agreement: np.ndarray, num_heads: int) -> Figure:
    """How many images have the vote of how many heads."""
    figure, axis = plt.subplots(figsize=(6, 2.8))
    votes = np.round(agreement * num_heads).astype(int)
    sns.histplot(x=votes, discrete=True, color=COLORS["ensemble"], ax=axis)
    axis.set(
        title="Most images have nearly every head behind their label",
        xlabel=f"heads that voted with the winner (of {num_heads})",
        ylabel="images",
    )
    plt.close(figure)
    return figure


def image_rows(
    images: Sequence[np.ndarray] | np.ndarray | ImageFiles,
    rows: Sequence[Sequence[int] | np.ndarray],
    titles: Sequence[str],
) -> Figure:
    """Rows of pictures with a title each.

    Parameters
    ----------
    images : sequence of uint8 arrays [height, width] or [height, width, 3]
        Only those that are shown are looked up, or decoded. Where they differ in size or are larger
        than 64 pixels, the middle square of each is shown.
    rows : sequence of sequences of int
        Indices of the images of each row; rows may differ in length.
    titles : sequence of str
        Written to the left of each row.

    Returns
    -------
    Figure
        Not shown yet, and closed for pyplot.
    """
    longest = max([1, *map(len, rows)])
    figure, axes = plt.subplots(
        len(rows), 1, figsize=(0.5 * longest + 1.6, 0.55 * len(rows)), squeeze=False
    )
    tiles = _tiles(images, [index for row in rows for index in row])
    blank = np.full_like(next(iter(tiles.values()), np.zeros((TILE, TILE), np.uint8)), 255)
    edge = [(1, 1), (1, 1)] + [(0, 0)] * (blank.ndim - 2)  # a white line around each picture
    for axis, row, title in zip(axes.flat, rows, titles, strict=True):
        shown = [tiles[index] for index in row] + [blank] * (longest - len(row))
        strip = np.hstack([np.pad(tile, edge, constant_values=255) for tile in shown])
        axis.imshow(strip, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(title, rotation=0, ha="right", va="center")
        sns.despine(ax=axis, left=True, bottom=True)
    plt.close(figure)
    return figure


def _tiles(
    images: Sequence[np.ndarray] | np.ndarray | ImageFiles, indices: Sequence[int]
) -> dict[int, np.ndarray]:
    """Pictures of one size: as they are where they have one, else the middle square of each."""
    small = needed_at(images, TILE)
    pictures = {index: small[index] for index in indices}
    shapes = {picture.shape for picture in pictures.values()}
    if len(shapes) == 1 and max(next(iter(shapes))) <= TILE:
        return pictures
    return {
        index: np.asarray(ImageOps.fit(Image.fromarray(picture).convert("RGB"), (TILE, TILE)))
        for index, picture in pictures.items()
    }


def surest_first(labels: np.ndarray, agreement: np.ndarray, cluster: int) -> np.ndarray:
    """Indices of a cluster's images, those that most heads agree on first."""
    members = np.flatnonzero(labels == cluster)
    return members[np.argsort(-agreement[members], kind="stable")]


def cluster_rows(
    images: Sequence[np.ndarray] | np.ndarray | ImageFiles,
    labels: np.ndarray,
    agreement: np.ndarray,
    per_row: int = 16,
    most: int = 200,
) -> Figure:
    """Each cluster as a row of its surest images, largest cluster first.

    Parameters
    ----------
    images : sequence of uint8 arrays [height, width] or [height, width, 3]
    labels : ndarray [N] of int
        Cluster of each image.
    agreement : ndarray [N]
        Share of heads behind each label.
    per_row : int
        Images of each cluster; 16 fit a page.
    most : int
        Clusters that are shown, the largest; where there are more, a line below says so. A thousand
        would be a picture of 55,000 pixels.
    """
    clusters, sizes = np.unique(labels, return_counts=True)
    order = np.argsort(-sizes, kind="stable")[:most]
    rows = [surest_first(labels, agreement, cluster)[:per_row] for cluster in clusters[order]]
    titles = [f"{clusters[index]}  ({sizes[index]})" for index in order]
    figure = image_rows(images, rows, titles)
    if len(clusters) > most:
        figure.supxlabel(f"the {most} largest of {len(clusters):,} clusters")
    return figure


def planes(points: np.ndarray, grids: np.ndarray, names: Sequence[str], ylabel: str = "") -> Figure:
    """How clusterings divide a plane: a panel each, a colour and an outline for each cluster.

    Parameters
    ----------
    points : ndarray [N, 2]
        Drawn as dots; their range is the range of the panels.
    grids : ndarray [P, R, R] of int
        Cluster of each cell of the square from -1.3 to 1.3, rows from the bottom, for each panel.
    names : sequence of str
        Titles of the P panels.
    ylabel : str
        Said at the left of the first panel.
    """
    figure, axes = plt.subplots(1, len(grids), figsize=(2 * len(grids), 2.2), squeeze=False)
    edge = (-1.3, 1.3)
    cells = np.linspace(*edge, grids.shape[1])
    colors = np.array(sns.color_palette("colorblind", max(10, grids.max() + 1)))
    for axis, grid, name in zip(axes.flat, grids, names, strict=True):
        axis.imshow(0.45 + 0.55 * colors[grid], extent=(*edge, *edge), origin="lower")
        for cluster in np.unique(grid)[1:]:
            axis.contour(cells, cells, grid == cluster, [0.5], colors="0.2", linewidths=0.8)
        axis.scatter(*points.T, s=2, color="0.1")
        axis.set(title=name, xticks=[], yticks=[], xlim=edge, ylim=edge)
    axes[0, 0].set_ylabel(ylabel)
    plt.close(figure)
    return figure


def data_flow(ranks: int = 3) -> Figure:
    """What each of several processes does, and where all of them meet: from files to a run.

    Parameters
    ----------
    ranks : int
        Rows of the drawing.
    """
    figure, axis = plt.subplots(figsize=(9, 0.7 * ranks + 0.9))
    stages = [  # one box for all ranks, or one each, with what it says
        ("files", None), (None, "embeds\nshard {0}/{1}"), ("cache", None),
        (None, "searches for\nits rows"), ("neighbours\nof all", None),
        (None, "its part of\neach batch"), ("run,\nby rank 0", None),
    ]  # fmt: skip
    middle, width = (ranks - 1) / 2, 1.1
    for column, (shared, own) in enumerate(stages):
        texts = [shared] if shared else [own.format(r + 1, ranks) for r in range(ranks)]
        color = COLORS["kmeans" if shared else "ensemble"]
        for row, text in enumerate(texts):
            y, height = (middle, ranks - 0.3) if shared else (ranks - 1 - row, 0.7)
            corner = (1.5 * column - width / 2, y - height / 2)
            box = plt.Rectangle(corner, width, height, fc=color, ec=color, alpha=0.25)
            axis.add_patch(box)
            axis.text(1.5 * column, y, text, ha="center", va="center", size="small")
        for y in range(ranks) if column else ():
            axis.annotate("", (1.5 * column - width / 2, y), (1.5 * column - 0.95, y),
                          arrowprops={"arrowstyle": "->", "color": "0.3"})  # fmt: skip
    for y in range(ranks - 1):
        axis.annotate("", (7.5, y + 0.65), (7.5, y + 0.35),
                      arrowprops={"arrowstyle": "<->", "color": COLORS["wrong"]})  # fmt: skip
    said = "gradients and marginals,\naveraged in each step"
    axis.text(7.5, -0.45, said, ha="center", va="top", size="small", color=COLORS["wrong"])
    axis.set(title="Every rank works on its own rows; all meet at arrays and in each step",
             xlim=(-0.7, 9.7), ylim=(-1.1, ranks - 0.4))  # fmt: skip
    axis.axis("off")
    plt.close(figure)
    return figure


def stack(figures: Sequence[Figure]) -> Image.Image:
    """Figures of one size, one below the other, in 32 colours: a third of the bytes."""
    pictures = []
    for figure in figures:
        file = io.BytesIO()
        figure.savefig(file, dpi=80)
        pictures.append(Image.open(file).convert("RGB"))
    width, height = pictures[0].size
    strip = Image.new("RGB", (width, height * len(pictures)))
    for row, picture in enumerate(pictures):
        strip.paste(picture, (0, row * height))
    return strip.quantize(32, dither=Image.Dither.NONE)


class Page(str):
    """HTML that a notebook shows as such."""

    def __repr__(self) -> str:
        return f"<HTML of {len(self)} characters>"

    def _repr_html_(self) -> str:
        return str(self)


_STEPPER = """<style>
.{id} {{border: 0; margin: 0; padding: 0; min-width: 0}}
.{id} label {{margin: 0 0.8em 0 0.2em; white-space: nowrap}}
.{id} div {{overflow: hidden; aspect-ratio: {width} / {height}; max-width: {width}px}}
.{id} img {{width: 100%; max-width: none; margin: 0; padding: 0 !important; display: block}}
.{id} legend {{font-size: 1em; margin: 0}}
{shifts}
.{id} input.play:checked ~ div img {{animation: {id} {seconds:.1f}s steps({count}) infinite}}
@keyframes {id} {{to {{transform: translateY(-100%)}}}}
</style>
<fieldset class="{id}"><legend>{legend}</legend>
{buttons}
<div><img src="data:image/webp;base64,{data}" alt="{alt}"></div>
</fieldset>"""


def stepper(frames: Sequence[Figure], names: Sequence[str], legend: str, alt: str) -> Page:
    """Figures to step through or to play, in any page: HTML and CSS alone, no script.

    All frames are one picture, of which a window shows a part; buttons (radio buttons, so arrow
    keys work too) move it. Where styles are taken away the frames stand one below the other.

    Parameters
    ----------
    frames : sequence of Figure
        All of one size.
    names : sequence of str
        Of the buttons, one a frame; the last is chosen at first.
    legend : str
        Said above the buttons.
    alt : str
        What the frames show, for those who do not see them.
    """
    strip = stack(frames)
    width, height = strip.width, strip.height // len(frames)
    file = io.BytesIO()
    strip.convert("RGB").save(file, "webp", lossless=True, method=4)
    data = base64.b64encode(file.getvalue()).decode()
    key = f"frames-{zlib.crc32(data.encode()):08x}"  # styles of one stepper are not another's

    button = (
        '<input type="radio" name="{0}" id="{0}-{1}" class="{2}"{3}>'
        '<label for="{0}-{1}">{4}</label>'
    )
    last = len(names) - 1
    buttons = [
        button.format(key, row, f"f{row}", " checked" if row == last else "", html.escape(name))
        for row, name in enumerate(names)
    ]
    buttons.append(button.format(key, "play", "play", "", "play"))
    shift = ".{0} input.f{1}:checked ~ div img {{transform: translateY(-{2:.4f}%)}}"
    shifts = [shift.format(key, row, 100 * row / len(names)) for row in range(len(names))]
    return Page(
        _STEPPER.format(
            id=key, width=width, height=height, count=len(names), seconds=0.8 * len(names),
            legend=html.escape(legend), alt=html.escape(alt), data=data,
            buttons="\n".join(buttons), shifts="\n".join(shifts),
        )
    )  # fmt: skip
