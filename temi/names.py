"""Names that clusters were given in a gallery, and which were merged there."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from temi.files import readable_path

FORMAT = "temi-names-1"


def read_names(names: str | Path | Mapping) -> tuple[dict[int, str], dict[int, int]]:
    """Names of clusters, and which were merged into which, from a gallery's "Download names".

    Parameters
    ----------
    names : path or mapping
        ``{"format": "temi-names-1", "names": {"0": "cats"}, "merged": {"3": 0}}``, or a JSON file
        that holds it.

    Returns
    -------
    names : dict of int to str
    merged : dict of int to int
        Each merged cluster and the one that it ends in, however many merges lie between.

    Raises
    ------
    ValueError
        In one line, if it is anything else, or clusters are merged in a circle.
    """
    source = "names"
    if isinstance(names, str | os.PathLike):
        source = f"names={str(names)!r}"
        try:
            names = json.loads(readable_path(names).read_bytes())
        except OSError as error:
            raise ValueError(f"{source}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{source}: holds no JSON ({error})") from error
    if not isinstance(names, Mapping) or names.get("format") != FORMAT:
        raise ValueError(f'{source}: a JSON object with "format": "{FORMAT}" is allowed')
    given, merged = {}, {}
    for field, target in (("names", given), ("merged", merged)):
        content = names.get(field, {})
        if not isinstance(content, Mapping):
            raise ValueError(f"{source}: {field!r} is {content!r}; an object is allowed")
        for key, value in content.items():
            target[_cluster(key, source)] = value
    for cluster, name in given.items():
        if not isinstance(name, str) or not name.strip() or not _is_a_line(name):
            raise ValueError(
                f"{source}: cluster {cluster} is named {name!r}; a line of text is allowed"
            )
    merged = {cluster: _cluster(target, source) for cluster, target in merged.items()}
    return given, {cluster: _end(cluster, merged, source) for cluster in merged}


def _cluster(number: Any, source: str) -> int:
    if not re.fullmatch(r"\d{1,9}", str(number), re.ASCII):
        raise ValueError(f"{source}: {number!r} is no cluster; whole numbers from 0 are allowed")
    return int(number)


def _is_a_line(text: str) -> bool:
    """Whether it is one line, and no half of a surrogate pair stands alone, as in JSON it can."""
    return text.splitlines() == [text] and not re.search(r"[\ud800-\udfff]", text)


def _end(cluster: int, merged: dict[int, int], source: str) -> int:
    seen = [cluster]
    while seen[-1] in merged:
        seen.append(merged[seen[-1]])
        if seen[-1] in seen[:-1]:
            circle = " into ".join(map(str, seen))
            raise ValueError(f"{source}: clusters are merged in a circle, {circle}")
    return seen[-1]


def check_columns(table: pd.DataFrame, *names: str) -> None:
    """Raise a ValueError unless a table has these columns as :func:`temi.assignments` has them."""
    if not isinstance(table, pd.DataFrame):
        raise ValueError(
            f"table of type {type(table).__name__}: a DataFrame is needed, as temi.assignments "
            "gives, and pandas.read_csv of a file of temi.write_assignments"
        )
    if missing := [name for name in names if name not in table]:
        raise ValueError(
            f"table: has no {', '.join(missing)}; a table of temi.assignments has, "
            "and so have the files of temi.write_assignments"
        )
    for name in ("cluster", "second_choice"):  # which pandas turns into float where there are gaps
        if name in names and not pd.api.types.is_integer_dtype(table[name]):
            raise ValueError(
                f"table: {name} is {table[name].dtype}; whole numbers are allowed, "
                f"such as table[{name!r}].astype('int64')"
            )
        if name in names and table[name].isna().any():  # as pandas' own Int64 may have
            raise ValueError(f"table: {name} has gaps; whole numbers are allowed, and no others")


def apply_names(
    table: pd.DataFrame, names: str | Path | Mapping, num_clusters: int | None = None
) -> pd.DataFrame:
    """Merge and name clusters as in a gallery.

    Parameters
    ----------
    table : DataFrame
        From :func:`assignments`.
    names : path or mapping
        A gallery's "Download names", or what such a file holds.
    num_clusters : int, optional
        K; for a table of new images, of which some clusters may have none. None: the clusters are
        those of the table.

    Returns
    -------
    DataFrame
        The table with ``cluster`` and ``second_choice`` after the merges, and a column ``name``:
        the name of the cluster, its number where ``names`` has none (names that the table brings
        along are not kept). A second choice that was merged into
        the cluster itself becomes -1.

    Raises
    ------
    ValueError
        In one line, if ``names`` is malformed or names a cluster that there is not, or the table is
        another.
    """
    check_columns(table, "cluster", "second_choice")
    given, merged = read_names(names)
    clusters = table["cluster"], table["second_choice"]
    known = set(range(num_clusters)) if num_clusters else {*clusters[0], *clusters[1]}
    if unknown := {*given, *merged, *merged.values()} - known:
        new = "; for new images give temi.apply_names(table, names, num_clusters) as the table"
        remedy = "" if num_clusters else new
        raise ValueError(f"names: there is no cluster {min(unknown)} in the table{remedy}")
    cluster, second = (
        column.map(lambda c: merged.get(c, c)).astype("int64") for column in clusters
    )
    name = cluster.map(lambda number: given.get(number, str(number))).astype("str")
    return table.assign(
        cluster=cluster, second_choice=second.where(second != cluster, -1), name=name
    )


def names_in(table: pd.DataFrame) -> dict[int, str]:
    """The names that a table brings along, from :func:`apply_names`."""
    if "name" not in table:
        return {}
    first = table.drop_duplicates("cluster")
    first = first[first["name"].notna()]  # read from a file they may be numbers, or missing
    pairs = zip(first["cluster"].tolist(), first["name"].tolist(), strict=True)
    return {
        cluster: f"{name:.0f}" if isinstance(name, float) and name.is_integer() else str(name)
        for cluster, name in pairs
        if name not in (cluster, str(cluster))
    }
