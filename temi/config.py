"""Every setting of a training run, its range and its reason, and the recipes."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from temi.checks import check_types

FAST: dict[str, Any] = dict(
    num_heads=16,
    beta=0.6,
    loss="temi",
    student_temp=0.1,
    teacher_temp=0.1,
    teacher_momentum=0.9,
    learning_rate=4e-3,
    batch_size=128,
    mutual_neighbors=False,
    group_size=4,
    warmup_epochs=1,
    schedule="constant",
    weight_decay=1e-4,
    normalize="center-l2",
    pca_dim=256,
)
RECIPES: dict[str, dict[str, Any]] = {
    "fast": FAST,
    "best": FAST | dict(mutual_neighbors=True),
    "paper": dict(
        num_heads=16,
        beta=0.6,
        loss="temi",
        student_temp=0.1,
        teacher_temp=0.1,
        teacher_momentum=0.996,
        learning_rate=1e-4,
        epochs=100,
        batch_size=512,
        num_neighbors=50,
        mutual_neighbors=False,
        group_size=2,
        warmup_epochs=20,
        schedule="constant",
        weight_decay=1e-4,
        normalize="none",
    ),
}
"""Values of the settings that are not given. ``fast`` is the default; ``best`` adds to it what was
found to better the clusters of photographs (benchmarks/beyond.py); ``paper`` holds the authors'
published settings (they report the head of the lowest loss; a run reports it beside the vote)."""


Device = Annotated[
    str, Field(description="'auto' (cuda, else mps, else cpu), 'cpu', 'cuda', 'cuda:N', 'mps'")
]
Precision = Annotated[
    Literal["auto", "fp32", "bf16"],
    Field(
        description="of matrix products; 'auto': bf16 where the GPU or processor has it, else fp32"
    ),
]


def _number(kind, description, sensible, **limits):
    return Annotated[kind, Field(description=f"{description}; sensible: {sensible}", **limits)]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run.

    A setting that is None takes its value from ``recipe``; after construction no setting is None
    but ``clip_grad`` (no clipping), ``pca_dim`` (of ``paper``: no reduction),
    ``teacher_temp_start`` (no warm-up of the temperature), and what depends on the data and is
    filled in by :meth:`resolve`: ``num_clusters`` and, but for ``paper``, ``epochs`` and
    ``num_neighbors``. Each annotation states the hard limits, and the range that makes sense in
    practice.

    Raises
    ------
    ValueError
        One line that names the setting, its value and what is allowed.
    """

    num_clusters: _number(
        int | None,
        "clusters K; None: the number of classes, where the data set has classes",
        "2 to some thousand",
        ge=2,
    ) = None
    recipe: Annotated[
        Literal["fast", "best", "paper"], Field(description="source of all settings that are None")
    ] = "fast"
    num_heads: _number(int, "clustering heads H", "4 to 32", ge=1) = None
    beta: _number(
        float,
        "exponent of the pair term: 1 is mutual information, lower spreads images over clusters",
        "0.5 to 1",
        gt=0,
        le=1,
    ) = None
    loss: Annotated[
        Literal["temi", "wmi", "pmi", "scan"],
        Field(
            description="pair weight of all heads (temi), of each head (wmi), or none (pmi); or "
            "the loss of SCAN (scan)"
        ),
    ] = None
    student_temp: _number(
        float, "softmax temperature of the student", "0.05 to 0.2", gt=0, le=10
    ) = None
    teacher_temp: _number(
        float, "softmax temperature of the teacher", "0.04 to 0.2", gt=0, le=10
    ) = None
    teacher_temp_start: _number(
        float | None,
        "teacher temperature at first, moved linearly to teacher_temp; None: no move",
        "0.04 to 0.2",
        gt=0,
        le=10,
    ) = None
    temp_warmup_epochs: _number(
        int, "epochs in which the teacher temperature moves", "0 to 30", ge=0
    ) = 0
    teacher_momentum: _number(
        float, "share of the teacher that a step keeps", "0.9 to 0.999", ge=0, lt=1
    ) = None
    learning_rate: _number(
        float,
        "AdamW's learning rate per 256 images, scaled linearly with the batch",
        "1e-5 to 1e-2",
        gt=0,
        le=100,
    ) = None
    epochs: _number(
        int, "passes over the images; None: 4 to 260, the more the fewer images", "4 to 300", ge=1
    ) = None
    batch_size: Annotated[
        Annotated[int, Field(ge=1)] | Literal["auto"],
        Field(
            description="anchors in a step; 'auto': as many as memory allows; sensible: 64 to 1024"
        ),
    ] = None
    num_neighbors: _number(
        int,
        "nearest neighbours that groups are drawn from; None: the root of a cluster's images",
        "5 to 50",
        ge=1,
    ) = None
    mutual_neighbors: Annotated[
        bool,
        Field(
            description="of these neighbours, where they are searched and not given, keep those "
            "that have the image among theirs"
        ),
    ] = None
    group_size: _number(
        int,
        "an anchor and neighbours, so many images in all, every two of them a pair",
        "2 to 8",
        ge=2,
    ) = None
    warmup_epochs: _number(
        int, "epochs in which the learning rate rises linearly from zero", "0 to 20", ge=0
    ) = None
    schedule: Annotated[
        Literal["constant", "cosine"], Field(description="learning rate after the warm-up")
    ] = None
    weight_decay: _number(
        float, "AdamW's decay of weights and gains, not of biases", "0 to 0.1", ge=0, le=1
    ) = None
    clip_grad: _number(
        float | None, "largest norm of a step's gradient; None: no limit", "1 to 10", gt=0
    ) = None
    normalize: Annotated[
        Literal["none", "l2", "center-l2"],
        Field(description="what is done to the embeddings before the heads see them"),
    ] = None
    pca_dim: _number(
        int | None,
        "principal components of the embeddings that are kept, all where there are no more",
        "64 to 512",
        ge=1,
    ) = None
    seed: Annotated[
        int, Field(description="of initial weights, order and pairs", ge=0, lt=2**32)
    ] = 0
    device: Device = "auto"
    precision: Precision = "auto"

    def __post_init__(self):
        check_types(self, "recipe")
        for name, value in RECIPES[self.recipe].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        later = {name for name in ("epochs", "num_neighbors") if getattr(self, name) is None}
        check_types(self, *{field.name for field in dataclasses.fields(self)} - later)
        if (self.teacher_temp_start is None) != (self.temp_warmup_epochs == 0):
            raise ValueError(
                f"temp_warmup_epochs={self.temp_warmup_epochs!r}: goes with teacher_temp_start="
                f"{self.teacher_temp_start!r}; give both, or neither"
            )
        from temi.devices import check_precision, resolve_device  # imports torch

        check_precision(self.precision, resolve_device(self.device))

    def resolve(
        self, num_images: int, num_classes: int | None = None, given_neighbors: int | None = None
    ) -> "TrainConfig":
        """This configuration, held against the size of the data.

        Parameters
        ----------
        num_images : int
            Images that will be trained on.
        num_classes : int, optional
            Taken for ``num_clusters`` where that is None.
        given_neighbors : int, optional
            Neighbours of each image, where they are given and not searched: so many is
            ``num_neighbors`` then, and nothing else but None is allowed.

        Returns
        -------
        TrainConfig
            With the settings that depend on the data: ``num_clusters``; ``num_neighbors``, where
            that is None the root of a cluster's images, sqrt(N / K), as neighbours should be of one
            cluster; ``group_size``, lowered to what these neighbours allow; ``epochs``, where that
            is None as many as visit 40,000 images, but no fewer than 4, and no more than 20 or, if
            that is more, 260 steps take: the heads need some 300.
            ``batch_size``, where it is the recipe's, is at most all images;
            ``batch_size="auto"`` stays: the recipe's batch, or all images where they are fewer,
            halved until :func:`temi.train` has found that a step fits into the device's memory.

        Raises
        ------
        ValueError
            If clusters, neighbours or batch do not fit the number of images, or the number of
            clusters is not known.
        """
        clusters = num_classes if self.num_clusters is None else self.num_clusters
        if clusters is None or clusters < 2:  # classes
            classes = "no known classes" if clusters is None else "one class"
            raise ValueError(
                f"num_clusters=None: these images have {classes}; give a whole number from 2"
            )
        recipes = RECIPES[self.recipe].get("num_neighbors")  # which nobody may have asked for
        allowed = (None, recipes, given_neighbors)
        if given_neighbors is not None and self.num_neighbors not in allowed:
            raise ValueError(
                f"num_neighbors={self.num_neighbors}: {given_neighbors} is allowed, as the "
                "neighbours given are so many"
            )
        batch, usual = self.batch_size, RECIPES[self.recipe]["batch_size"]
        if batch == usual:  # which nobody may have asked for
            batch = min(batch, num_images)
        epochs = self.epochs
        if epochs is None:
            steps = max(1, num_images // (usual if batch == "auto" else batch))  # in an epoch
            most = max(20, math.ceil(260 / steps))
            epochs = min(most, max(4, math.ceil(40_000 / num_images)))
        neighbors = given_neighbors or self.num_neighbors
        if neighbors is None:
            neighbors = max(self.group_size - 1, round(math.sqrt(num_images / clusters)))
            neighbors = min(neighbors, num_images - 1)
        for name, value, largest in (
            ("num_clusters", clusters, num_images),
            ("num_neighbors", neighbors, num_images - 1),
            ("batch_size", batch, num_images),
        ):
            if value != "auto" and value > largest:
                raise ValueError(
                    f"{name}={value}: at most {largest} is allowed with {num_images} images"
                )
        return dataclasses.replace(
            self,
            num_clusters=clusters,
            num_neighbors=neighbors,
            group_size=min(self.group_size, neighbors + 1),
            batch_size=batch,
            epochs=epochs,
        )

    def changes(self) -> dict[str, Any]:
        """Settings, but for the device, that differ from those of the recipe alone."""
        reference = TrainConfig(recipe=self.recipe)
        ignored = {"recipe", "device"}
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ignored
            and getattr(self, field.name) != getattr(reference, field.name)
        }


@dataclass(frozen=True)
class RunOptions:
    """How a run is kept, and what it does in trouble; none of it changes the mathematics.

    But ``keep_rows="file"`` changes the order of the images: a run that goes on from a checkpoint
    keeps to the order in which that was made, wherever its rows are.

    Raises
    ------
    ValueError
        One line that names the option, its value and what is allowed.
    """

    resume: Annotated[
        str | Path | None,
        Field(description="checkpoint to go on from; 'auto': the newest whole one in run_dir"),
    ] = None
    overwrite: Annotated[
        bool, Field(description="replace an unfinished run, or one of other settings, in run_dir")
    ] = False
    on_divergence: Annotated[
        Literal["stop", "retry"],
        Field(
            description="after a non-finite step or a collapse: stop, or go back (to the last good "
            "state, or to the start) at a tenth of the learning rate, up to five times"
        ),
    ] = "stop"
    checkpoint_every: _number(int, "epochs between two checkpoints that stay", "5 to 50", ge=1) = 10
    keep_checkpoints: _number(
        int, "how many of these stay; the oldest go first", "1 to 10", ge=0
    ) = 3
    best_by: Annotated[
        Literal["loss", "accuracy"],
        Field(
            description="what makes a checkpoint the best: the lowest head's loss, or, as an "
            "oracle that reads the labels, the accuracy of the vote"
        ),
    ] = "loss"
    log_every: _number(
        int,
        "steps between two looks at a GPU: logs, progress, search for non-finite steps",
        "10 to 500",
        ge=1,
    ) = 50
    keep_rows: Annotated[
        Literal["auto", "device", "host", "file"],
        Field(
            description="where prepared embeddings are: on the device, in the host's memory, or "
            "still in the file or array they came in, whose blocks then come in random order; "
            "'auto': the first that has twice the memory they take"
        ),
    ] = "auto"
    cuda_graph: Annotated[
        bool,
        Field(
            description="on a GPU, launch a step whole, as a CUDA graph, instead of kernel by "
            "kernel; not where several processes share a batch"
        ),
    ] = True
    baseline: Annotated[
        Literal["auto", "always", "never"],
        Field(
            description="k-means on the same embeddings, to compare with, where there are labels; "
            "'auto': if images x clusters x dimensions are at most 4 billion, which takes minutes"
        ),
    ] = "auto"

    def __post_init__(self):
        check_types(self)
        if self.resume == "auto" and self.overwrite:
            raise ValueError(
                "overwrite=True: would remove what resume='auto' goes on from; give one of the two"
            )
