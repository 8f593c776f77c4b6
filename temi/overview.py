"""What run directories hold, in a table or a few lines: read from their records, without torch."""

import warnings
from pathlib import Path

import pandas as pd

from temi.files import RESULTS, read_json, readable_path


def list_runs(folder: str | Path = "runs") -> pd.DataFrame:
    """The runs of a folder as a table.

    Parameters
    ----------
    folder : path
        Relative to the current folder, else to :func:`temi.files.home`.

    Returns
    -------
    DataFrame
        One row a run, by name: ``dataset``, ``backbone``, the settings in which the runs differ,
        ``acc``, ``nmi``, ``anmi``, ``ari``, ``epochs_done``, ``seconds`` of training,
        ``finished``. Empty where there is no run. One whose record is damaged is left out, with a
        warning.
    """
    rows, settings = {}, {}
    for path in sorted(readable_path(folder).glob(f"[!.]*/{RESULTS}")):  # hidden: not whole yet
        try:
            results = read_json(path)
            config = results["config"]
        except ValueError as error:
            warnings.warn(f"left out: {error}", stacklevel=2)
            continue
        except (KeyError, TypeError):
            warnings.warn(f"left out: {path}: no record of a run", stacklevel=2)
            continue
        settings[path.parent.name] = config
        rows[path.parent.name] = {
            **results["metrics"],
            "epochs_done": len(results["history"]),
            "seconds": round(sum(entry["seconds"] for entry in results["history"]), 1),
            "finished": results["finished"],
        }
    if not rows:
        return pd.DataFrame()
    table = pd.DataFrame.from_dict(settings, orient="index")
    differ = [name for name in table if table[name].map(str).nunique() > 1]
    first = ["dataset", "backbone"]
    table = table[first + [name for name in differ if name not in first]]
    return table.join(pd.DataFrame.from_dict(rows, orient="index")).rename_axis("run")


def summary(run_dir: str | Path) -> str:
    """What a finished run came to, and where its files are, in a few lines.

    The four scores beside those of k-means; of a run without labels the sizes of its clusters, and
    how far its heads agree.

    Parameters
    ----------
    run_dir : path
        Relative to the current folder, else to :func:`temi.files.home`.

    Returns
    -------
    str

    Raises
    ------
    ValueError
        If there is no finished run.
    """
    folder = readable_path(run_dir)
    file = folder / RESULTS
    if not file.exists() or not (results := read_json(file))["finished"]:
        raise ValueError(f"run_dir={str(run_dir)!r}: holds no finished run")
    if results["metrics"]["acc"] is None:
        sizes = pd.Series(results["cluster_statistics"]["sizes"])
        table = pd.DataFrame(
            {"images": sizes.sum(), "clusters": len(sizes), "empty": (sizes == 0).sum(),
             "smallest": sizes.min(), "largest": sizes.max(),
             "mean agreement of heads": round(results["ensemble"]["mean_agreement"], 3)},
            index=["TEMI, vote of all heads"],
        )  # fmt: skip
    else:
        scores = {"TEMI, vote of all heads": results["metrics"]}
        scores |= {f"k-means, {how}": found for how, found in results["kmeans"].items()
                   if found["acc"] is not None}  # fmt: skip
        table = pd.DataFrame(scores).T.round(3)
    files = [str(Path(run_dir) / name) for name in sorted(p.name for p in folder.iterdir())]
    return "\n".join([table.to_string(), *files])
