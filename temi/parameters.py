"""A notebook's parameters, checked before any work starts."""

import ast
import dataclasses
import difflib
from dataclasses import dataclass

from temi.backbones import check_backbone
from temi.config import TrainConfig, check_types
from temi.data import check_dataset


@dataclass(frozen=True)
class JobConfig:
    """Where a job's images come from and where its files go.

    ``dataset`` and ``backbone`` are the names that :func:`temi.load_images` and
    :func:`temi.load_backbone` know; ``data_dir``, ``force_recompute``: see :func:`temi.embed`;
    ``run_dir``, ``overwrite``: see :func:`temi.train`.

    Raises
    ------
    ValueError
        One line that names the parameter, its value and what is allowed.
    """

    dataset: str = "digits"
    backbone: str = "pixels"
    data_dir: str = "data"
    run_dir: str | None = None
    overwrite: bool = False
    force_recompute: bool = False

    def __post_init__(self):
        check_types(self)
        check_dataset(self.dataset)
        check_backbone(self.backbone)


def read_parameters(namespace: dict) -> tuple[JobConfig, TrainConfig]:
    """The parameters of the notebook that calls this, checked.

    papermill writes whatever it is given into a cell of its own, after the notebook's parameters
    cell, and only warns when a name is unknown there. Here that is an error. Both cells are found
    among the executed ones by their first words, ``# Parameters``.

    Parameters
    ----------
    namespace : dict
        ``globals()`` of the notebook.

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
    known = _assigned(cells[0]) if cells else {}
    for name in _assigned(cells[-1]) if cells else ():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(
                f"{name}={namespace[name]!r}: there is no such parameter here{hint}; "
                f"allowed are {', '.join(known)}"
            )
    return tuple(
        cls(**{f.name: namespace[f.name] for f in dataclasses.fields(cls) if f.name in known})
        for cls in (JobConfig, TrainConfig)
    )


def is_default(job: JobConfig, config: TrainConfig) -> bool:
    """Whether a notebook runs as it is stored, so that what its text claims can be checked.

    Where files go does not matter, nor the device.
    """
    default = JobConfig()
    same_data = (job.dataset, job.backbone) == (default.dataset, default.backbone)
    return same_data and config.recipe == TrainConfig().recipe and not config.changes()


def _assigned(cell: str) -> dict[str, None]:
    """Names that the statements of a cell assign, in order."""
    targets = []
    for statement in ast.parse(cell).body:
        targets += getattr(statement, "targets", [getattr(statement, "target", None)])
    return {target.id: None for target in targets if isinstance(target, ast.Name)}
