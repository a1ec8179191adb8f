"""The files of MovieLens-100K: three forms of the same ratings, two forms of the official folds.

Everything here is a table with the columns of COLUMNS as int64, original ids, in the order of the file.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pandas as pd

from . import data

COLUMNS = ["user_id", "item_id", "rating", "timestamp"]
FOLDS = ("u1", "u2", "u3", "u4", "u5")
ARCHIVE = "ml-100k.zip"
FORMS = ("ratings.csv.gz", ARCHIVE, "ml-100k.inter")  # local copy, GroupLens, the copy in a package


def read_ratings(name: str, manifest: str | Path | None = None) -> tuple[pd.DataFrame, Path]:
    """All ratings in the first form to be had, and its path; data.DataError if there is none."""
    known = data.load_manifest(manifest)
    path = data.fetch_first([f"{name}/{form}" for form in FORMS if f"{name}/{form}" in known], manifest)
    return (_read_member(path, "u.data") if path.name == ARCHIVE else _read_table(path)), path


def read_fold(name: str, fold: str, manifest: str | Path | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(training, test) ratings of an official fold; DataError naming what is needed if absent."""
    paths = local_fold(name, fold, manifest) or [_fetch_archive(name, fold, manifest)]
    if len(paths) == 1:
        return _read_member(paths[0], f"{fold}.base"), _read_member(paths[0], f"{fold}.test")
    return _read_table(paths[0]), _read_table(paths[1])


def local_fold(name: str, fold: str, manifest: str | Path | None = None) -> list[Path]:
    """The two files of a fold, or the archive, if they are on this machine already; else []."""
    known = data.load_manifest(manifest)
    for files in (_pair(name, fold), [f"{name}/{ARCHIVE}"]):
        found = [data.find(file, manifest) for file in files if file in known]
        paths = [path for path in found if path is not None]
        if len(paths) == len(files):
            return paths
    return []


def _pair(name: str, fold: str) -> list[str]:
    return [f"{name}/{fold}_{part}.csv.gz" for part in ("train", "test")]


def _fetch_archive(name: str, fold: str, manifest: str | Path | None) -> Path:
    archive = f"{name}/{ARCHIVE}"
    try:
        return data.fetch(archive, manifest)
    except data.DataError as error:
        raise data.DataError(
            f"the official split {fold} needs {archive}, or {' and '.join(_pair(name, fold))} in "
            f"COMPRESSIBLE_DATA; the splits seed0, seed1, ... need neither\n{error}"
        ) from None


def _read_table(path: Path) -> pd.DataFrame:
    frame = pd.read_csv(path, sep="\t" if path.suffix == ".inter" else ",")
    frame.columns = [str(column).partition(":")[0] for column in frame.columns]
    if list(frame.columns) != COLUMNS:
        raise data.DataError(f"{path}: columns are {list(frame.columns)}, expected {COLUMNS}")
    return frame.astype("int64")


def _read_member(path: Path, member: str) -> pd.DataFrame:
    with zipfile.ZipFile(path) as archive:
        text = io.BytesIO(archive.read(f"ml-100k/{member}"))
    return pd.read_csv(text, sep="\t", names=COLUMNS, dtype="int64")
