"""A notebook's parameters, checked before any work starts."""

import ast
import dataclasses
import difflib
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from temi.backbones import check_backbone
from temi.cache import embed
from temi.config import RunOptions, TrainConfig
from temi.data import ARRAYS, ImageSet, check_dataset, holds_embeddings, load_images
from temi.embeddings import Features, load_features

RELATIVE = "a relative one starts at TEMI_HOME, else the checkout, else the current folder"


def _setting(kind, description, **limits):
    return Annotated[kind, Field(description=description, **limits)]


@dataclass(frozen=True)
class JobConfig(RunOptions):
    """Where a job's images come from, where its files go, and how its run is kept.

    What each setting means in detail is said at :func:`temi.load_images` and
    :func:`temi.load_features` (``dataset``, ``split``, ``labels``), :func:`temi.load_backbone`
    (``backbone``, ``weights``, ``image_size``), :func:`temi.embed`, :func:`temi.train` and
    :class:`temi.RunOptions`.

    Raises
    ------
    ValueError
        One line that names the parameter, its value and what is allowed.
    """

    dataset: _setting(str, "data set, folder of images, or .npy/.npz file of embeddings") = "digits"
    backbone: _setting(
        str, "feature extractor, or several joined by '+'; NAME@112 sees images of 112 pixels"
    ) = "pixels"
    split: _setting(
        str | None, "'train', 'test' or 'both', where the data set has them; None: train"
    ) = None
    labels: _setting(
        Literal["folders"] | None, "'folders': a folder's sub-folders are classes, to score with"
    ) = None
    image_size: _setting(
        int | None, "side in pixels that the backbone sees; None: the backbone's own", ge=1
    ) = None
    weights: _setting(
        str | None, "file of the backbone's weights; None: downloaded, or installed with it"
    ) = None
    data_dir: _setting(str, f"where downloads and embeddings are kept; {RELATIVE}") = "data"
    run_dir: _setting(
        str | None, f"where the run is kept; None: named after the settings; {RELATIVE}"
    ) = None
    force_recompute: _setting(bool, "embed even where the cache holds the embeddings") = False

    def __post_init__(self):
        super().__post_init__()
        check_dataset(self.dataset)
        check_backbone(self.backbone)
        if holds_embeddings(self.dataset):
            for name, value in self.source.items():
                default = getattr(JobConfig, name)
                if name != "dataset" and value != default:
                    raise ValueError(
                        f"{name}={value!r}: {default!r} is allowed, since dataset={self.dataset!r} "
                        "holds embeddings that are there already"
                    )

    def load(self) -> ImageSet | Features:
        """The images; or the embeddings, where the data set is a file of those."""
        if holds_embeddings(self.dataset):
            return load_features(self.dataset)
        return load_images(
            self.dataset, split=self.split, labels=self.labels, data_dir=self.data_dir
        )

    def embed(self, data: ImageSet | Features, config: TrainConfig) -> Features:
        """What :meth:`load` gave, as embeddings, computed on the device of the training.

        Their manifest holds the settings of this job that made them, for the record of the run.
        """
        if isinstance(data, Features):
            return data
        features = embed(
            data,
            self.backbone,
            weights=self.weights,
            image_size=self.image_size,
            data_dir=self.data_dir,
            device=config.device,
            precision=config.precision,
            force_recompute=self.force_recompute,
        )
        return dataclasses.replace(features, manifest=features.manifest | {"job": self.source})

    @property
    def source(self) -> dict[str, Any]:
        """The settings that say where the embeddings come from, but for those left at None."""
        names = ("dataset", "split", "labels", "backbone", "image_size", "weights")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def options(self) -> dict[str, Any]:
        """What :class:`temi.RunOptions` takes: the options of :func:`temi.train`."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(RunOptions)}


def read_parameters(
    namespace: dict, *, takes: Literal["all", "images", "arrays"] = "all"
) -> tuple[JobConfig, TrainConfig]:
    """The parameters of the notebook that calls this, checked.

    papermill writes whatever it is given into a cell of its own, after the notebook's parameters
    cell, and only warns when a name is unknown there. Here that is an error. Both cells are found
    among the executed ones by their first words, ``# Parameters``. nbval, which injects nothing,
    leaves no record of executed cells: then whatever has the name of a parameter is one.

    Parameters
    ----------
    namespace : dict
        ``globals()`` of the notebook.
    takes : {"all", "images", "arrays"}
        What it can do with a data set: ``"images"`` but no file of embeddings; or, as it looks at
        labels and at images of one size, only data sets that are ``"arrays"``.

    Returns
    -------
    JobConfig, TrainConfig
        A parameter that the notebook does not have keeps its default.

    Raises
    ------
    ValueError
        One line that names the parameter, its value and what is allowed.
    """
    cells = [cell for cell in namespace.get("In", []) if cell.startswith("# Parameters")]
    if cells:
        known = _assigned(cells[0])
    else:  # but functions, such as an imported `normalize`
        known = {name: None for name, value in namespace.items() if not callable(value)}
    for name in _assigned(cells[-1]) if cells else ():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(
                f"{name}={namespace[name]!r}: there is no such parameter here{hint}; "
                f"allowed are {', '.join(known)}"
            )
    given = [
        {f.name: namespace[f.name] for f in dataclasses.fields(cls) if f.name in known}
        for cls in (JobConfig, TrainConfig)
    ]
    job, config = JobConfig(**given[0]), TrainConfig(**given[1])
    if takes == "arrays" and job.dataset not in ARRAYS:
        raise ValueError(
            f"dataset={job.dataset!r}: one of {', '.join(map(repr, ARRAYS))} is allowed in this "
            "chapter; 05 and 08 take folders of images, too"
        )
    if takes == "images" and holds_embeddings(job.dataset):
        raise ValueError(
            f"dataset={job.dataset!r}: images are needed in this chapter; 05 takes embeddings, too"
        )
    return job, config


def is_default(job: JobConfig, config: TrainConfig) -> bool:
    """Whether a notebook runs as it is stored, so that what its text claims can be checked.

    Where files go does not matter, nor how they are kept, nor the device.
    """
    same_data = job.source == JobConfig().source
    return same_data and config.recipe == TrainConfig().recipe and not config.changes()


def _assigned(cell: str) -> dict[str, None]:
    """Names that the statements of a cell assign, in order."""
    targets = []
    for statement in ast.parse(cell).body:
        targets += getattr(statement, "targets", [getattr(statement, "target", None)])
    return {target.id: None for target in targets if isinstance(target, ast.Name)}
