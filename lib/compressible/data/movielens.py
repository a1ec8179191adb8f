"""The files of the MovieLens sets: several forms of the same ratings, two forms of MovieLens-100K's official folds.

Everything here is a table with the columns of COLUMNS, ratings as float64 (some sets have half stars), the others as
int64 with original ids, in the order of the file; a set without timestamps has zeros.
"""

from __future__ import annotations

import io
import warnings
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from compressible.data.manifest import DataError, fetch, fetch_first, find, load_manifest, load_sets
from compressible.runtime.checks import one_line

COLUMNS = ["user_id", "item_id", "rating", "timestamp"]
TYPES = {"user_id": "int64", "item_id": "int64", "rating": "float64", "timestamp": "int64"}
EXACT = 2**53  # where floats stop telling integers apart
FOLDS = ("u1", "u2", "u3", "u4", "u5")
ARCHIVE = "ml-100k.zip"
MEMBERS = {  # the ratings in GroupLens' archives and what separates columns; "::" is read as two separators
    ARCHIVE: ("ml-100k/u.data", "\t"),
    "ml-1m.zip": ("ml-1m/ratings.dat", ":"),
    "ml-latest-small.zip": ("ml-latest-small/ratings.csv", ","),
    "ml-25m.zip": ("ml-25m/ratings.csv", ","),
}
# Local copies, GroupLens, the copy in a package.
FORMS = ("ratings.csv.gz", "ratings_cold_users.csv.gz", *MEMBERS, "ml-100k.inter")


def read_ratings(name: str) -> tuple[pd.DataFrame, Path]:
    """All ratings in the first form to be had, and its path; DataError if there is none."""
    path = _fetch(name)
    return (_read_member(path, *MEMBERS[path.name]) if path.name in MEMBERS else _read_table(path)), path


def reachable(names: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Fetch the sets `names`; return {name: sha256} of those to be had and {name: reason} of the others.

    The digest is the set's or, where the manifest has none, its file's.
    """
    found, skipped, sets = {}, {}, load_sets()
    for name in names:
        try:
            path = _fetch(name)
            found[name] = sets[name].sha256 or load_manifest()[f"{name}/{path.name}"].sha256
        except DataError as error:
            skipped[name] = " ".join(str(error).split("\nwhat to do")[0].split())
    return found, skipped


def read_fold(name: str, fold: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(training, test) ratings of an official fold; DataError naming what is needed if absent."""
    paths = local_fold(name, fold) or [_fetch_archive(name, fold)]
    if len(paths) == 1:
        return _read_member(paths[0], f"ml-100k/{fold}.base"), _read_member(paths[0], f"ml-100k/{fold}.test")
    return _read_table(paths[0]), _read_table(paths[1])


def local_fold(name: str, fold: str) -> list[Path]:
    """The two files of a fold, or the archive, if they are on this machine already; else []."""
    known = load_manifest()
    for files in (_pair(name, fold), [f"{name}/{ARCHIVE}"]):
        found = [find(file) for file in files if file in known]
        paths = [path for path in found if path is not None]
        if len(paths) == len(files):
            return paths
    return []


def _fetch(name: str) -> Path:
    known = load_manifest()
    return fetch_first([f"{name}/{form}" for form in FORMS if f"{name}/{form}" in known])


def _pair(name: str, fold: str) -> list[str]:
    return [f"{name}/{fold}_{part}.csv.gz" for part in ("train", "test")]


def _fetch_archive(name: str, fold: str) -> Path:
    archive = f"{name}/{ARCHIVE}"
    try:
        return fetch(archive)
    except DataError as error:
        raise DataError(
            f"the official split {fold} needs {archive}, or {' and '.join(_pair(name, fold))} in "
            f"COMPRESSIBLE_DATA; the splits seed0, seed1, ... need neither\n{error}"
        ) from None


def _read_table(path: Path) -> pd.DataFrame:
    try:
        with warnings.catch_warnings():
            # Of rows that are longer than the head, as decimal commas make them, pandas drops a part.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(path, sep="\t" if path.suffix == ".inter" else ",", index_col=False)
    except (ValueError, Warning, EOFError, OSError, zlib.error) as error:  # pandas' errors of parsing are ValueErrors
        raise DataError(f"{path} cannot be read as a table: {one_line(error)}") from error
    frame.columns = [str(column).partition(":")[0] for column in frame.columns]
    if list(frame.columns) == COLUMNS[:3]:
        frame["timestamp"] = 0
    if list(frame.columns) != COLUMNS:
        raise DataError(f"{path}: columns are {list(frame.columns)}, expected {COLUMNS}")
    return _typed(frame, path)


def _typed(frame: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The table in TYPES; DataError naming column, row and value of the first that is none of its column's kind."""
    for column, kind in TYPES.items():
        known = frame[column].astype(str) if frame[column].dtype == bool else frame[column]  # "True" is no id
        numbers = _numbers(known)
        whole = kind == "int64"
        fine = np.isfinite(numbers)
        if whole:
            fine &= np.abs(numbers) < EXACT
            fine[fine] = numbers[fine] % 1 == 0
        if not fine.all():
            row = int(np.argmin(fine))
            expected = f"an integer of size below 2^{EXACT.bit_length() - 1}" if whole else "a finite number"
            told = f"column {column} holds {frame[column].tolist()[row]!r} in row {row + 1} below the head"
            raise DataError(f"{path}: {told}, expected {expected}")
    return frame.astype(TYPES)


def _numbers(column: pd.Series) -> np.ndarray:
    """A column as floats, NaN for what is none; infinite where an integer is too large for any."""
    try:
        return pd.to_numeric(column, errors="coerce").to_numpy(float)
    except OverflowError:
        return np.array([_number(value) for value in column.tolist()])


def _number(value: object) -> float:
    try:
        return float(str(value))
    except ValueError:
        return float("nan")


def _read_member(path: Path, member: str, separator: str = "\t") -> pd.DataFrame:
    columns = [0, 2, 4, 6] if separator == ":" else [0, 1, 2, 3]
    first = 1 if member.endswith(".csv") else 0
    try:
        with zipfile.ZipFile(path) as archive:
            text = io.BytesIO(archive.read(member))
        frame = pd.read_csv(text, sep=separator, header=None, usecols=columns, skiprows=first)
    except (ValueError, KeyError, EOFError, OSError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
        # RuntimeError: an encrypted member, or one packed in a way that zipfile does not know
        raise DataError(f"{member} of {path} cannot be read as a table: {one_line(error)}") from error
    return _typed(frame.set_axis(COLUMNS, axis=1), path)
