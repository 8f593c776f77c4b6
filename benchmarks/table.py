"""Tables of results: CSV files of a row a run, which grow while a benchmark runs."""

from pathlib import Path

import numpy as np
import pandas as pd

from temi.files import write_whole


def alike(table: pd.DataFrame, row: dict, columns: list[str]) -> np.ndarray:
    """Which rows of the table have the same in these columns."""
    return (table[columns].astype(str) == [str(row[name]) for name in columns]).all(axis=1)


def _texts(file: Path, columns: list[str]) -> pd.DataFrame:
    """The rows that are there, as they are written; none with these columns without a file."""
    if not file.exists():
        return pd.DataFrame(columns=columns)
    return pd.read_csv(file, dtype=str, keep_default_na=False)


def has(file: Path, row: dict, columns: list[str]) -> bool:
    """Whether a table has a row that is the same in these columns."""
    return alike(_texts(file, columns), row, columns).any()


def put(file: Path, rows: list[dict], run: list[str], columns: list[str]) -> None:
    """Write rows in the place of those of the same run, which the columns ``run`` name.

    The table is read anew for that, as other runs may have come meanwhile, and written whole.
    """
    table = _texts(file, columns)
    for row in rows:
        table = table[~alike(table, row, run)]
    table = pd.DataFrame([*table.to_dict("records"), *rows], columns=columns)
    write_whole(file, table.to_csv(index=False))
