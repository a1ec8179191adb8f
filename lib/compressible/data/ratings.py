"""Film ratings as partly observed matrices: loading, splits, centring and the usual errors.

m users, n items, N ratings. Rows are always sorted by (user, item, timestamp), so that an index means the
same rating whichever source the data came from. Training, validation and test sets are arrays of indices.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass

import numpy as np
import pandas as pd
from torch import Tensor

from compressible.data import movielens
from compressible.data.manifest import DataError, load_sets
from compressible.data.movielens import COLUMNS, EXACT, FOLDS
from compressible.runtime.checks import expect


@dataclass(frozen=True, eq=False)
class Ratings:
    """N ratings; users and items are positions (0-based, int64) in the sorted original ids."""

    name: str
    users: np.ndarray  # (N,)
    items: np.ndarray  # (N,)
    ratings: np.ndarray  # (N,) float64, usually 1 to 5
    timestamps: np.ndarray  # (N,) seconds since 1970
    user_ids: np.ndarray  # (m,) original ids
    item_ids: np.ndarray  # (n,)
    # Of the rows as int64 (user id, item id, rating, timestamp), ratings doubled where some are half stars, or
    # their bits where some are neither: the same for every source.
    sha256: str
    source: str  # manifest name of the file that was read
    scale: tuple[float, float] = (1.0, 5.0)  # the lowest and the highest rating of the whole set

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n): users, items."""
        return len(self.user_ids), len(self.item_ids)

    def __len__(self) -> int:
        return len(self.ratings)


@dataclass(frozen=True, eq=False)
class Split:
    """A disjoint, complete split: its resolved name, int64 indices of the training and the test ratings."""

    name: str
    train: np.ndarray
    test: np.ndarray


def load(name: str = "movielens-100k") -> Ratings:
    """All ratings of a data set, from the first source to be had and checked against the manifest.

    Raises DataError if the set is unknown, cannot be had, or is not what the manifest says.
    """
    sets = load_sets()
    if name not in sets:
        raise DataError(f"unknown data set {name!r}, expected one of {sorted(sets)}")
    table, path = movielens.read_ratings(name)
    ratings = _ratings(name, table, f"{name}/{path.name}")
    found, wanted = (len(ratings), *ratings.shape, ratings.sha256), sets[name]
    expected = (wanted.rows, wanted.users, wanted.items, wanted.sha256 or ratings.sha256)
    if found != expected:
        raise DataError(f"{path}: (rows, users, items, sha256) are {found}, expected {expected}")
    return ratings


def densest(ratings: Ratings, users: int, items: int) -> Ratings:
    """The `items` most rated items, then the `users` users with most ratings of those; ties go to lower ids.

    Items and users that are left without a rating are dropped, so the shape may be smaller than asked.
    Raises ValueError if more is asked for than there is, or less than 1.
    """
    for label, asked, there in (("users", users, ratings.shape[0]), ("items", items, ratings.shape[1])):
        expect(label, asked, 1 <= asked <= there, f"1 to {there}")
    keep_items = _most(ratings.items, ratings.shape[1], items)
    inside = np.isin(ratings.items, keep_items)
    keep_users = _most(ratings.users[inside], ratings.shape[0], users)
    keep = inside & np.isin(ratings.users, keep_users)
    return _ratings(ratings.name, _frame(ratings)[keep], ratings.source, ratings.scale)


def resolve_split(name: str, data_set: str = "movielens-100k") -> str:
    """Turn "auto" into "u1" if the set's official folds are in the local folder or the cache, else into "seed0".

    Any other name is returned as it is; ValueError if it is no split name.
    """
    if name == "auto":
        return "u1" if movielens.local_fold(data_set, "u1") else "seed0"
    if name in FOLDS or (name.startswith("seed") and name[4:].isdecimal()):
        return name
    raise ValueError(f"split is {name!r}, expected one of {', '.join(FOLDS)}, seed0, seed1, ... or auto")


def split(ratings: Ratings, name: str = "auto") -> Split:
    """An official fold (u1 to u5), a seeded 80/20 split (seed0, seed1, ...), or auto (see resolve_split).

    Official folds go by original ids and so also split a densest() subset. Raises ValueError for an unknown
    name, DataError if the files of a fold cannot be had.
    """
    name = resolve_split(name, ratings.name)
    if name.startswith("seed"):
        order = _shuffled(len(ratings), int(name[4:]))
        cut = len(ratings) - len(ratings) // 5
        return Split(name, np.sort(order[:cut]), np.sort(order[cut:]))
    return _official(ratings, name)


def validation_slice(parts: Split, fraction: float = 0.1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(fit, validation) indices: a seeded slice of the training ratings; ValueError if a part is empty."""
    count = round(fraction * len(parts.train)) if 0 < fraction < 1 else 0
    expect("fraction", fraction, 0 < count < len(parts.train), f"one that fills both parts of {len(parts.train)}")
    order = parts.train[_shuffled(len(parts.train), seed)]
    return np.sort(order[count:]), np.sort(order[:count])


@dataclass(frozen=True, eq=False)
class Offsets:
    """The part of a rating that needs no interaction, in stars: overall + user[i] + item[j]."""

    overall: float
    user: np.ndarray  # (m,)
    item: np.ndarray  # (n,)

    def at(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Offsets of the given (user, item) pairs."""
        return self.overall + self.user[users] + self.item[items]


def center(
    ratings: Ratings,
    fit_index: np.ndarray,
    by: str = "user_item",
    shrinkage: tuple[float, float] = (15.0, 10.0),
    sweeps: int = 20,
) -> Offsets:
    """Offsets of the indexed ratings: "none" (all 0), "global" (their mean) or "user_item" (mean and biases).

    A bias is the mean of its residuals, shrunk as if `shrinkage` (users, items) further residuals were 0;
    users and items take turns for `sweeps` rounds. Raises ValueError for another `by`, a negative shrinkage.
    """
    expect("by", by, by in ("none", "global", "user_item"), "none, global or user_item")
    expect("shrinkage", shrinkage, min(shrinkage) >= 0, "two numbers >= 0")
    index = _checked(ratings, fit_index)
    expect("fit_index", index, len(index) > 0 or by == "none", "at least one rating")
    overall = 0.0 if by == "none" else float(ratings.ratings[index].mean())
    user, item = np.zeros(ratings.shape[0]), np.zeros(ratings.shape[1])
    users, items, rest = ratings.users[index], ratings.items[index], ratings.ratings[index] - overall
    for _ in range(sweeps if by == "user_item" else 0):
        item = _shrunk_means(items, rest - user[users], len(item), shrinkage[1])
        user = _shrunk_means(users, rest - item[items], len(user), shrinkage[0])
    return Offsets(overall, user, item)


def rmse(
    predicted: np.ndarray, actual: np.ndarray, users: np.ndarray | None = None, clip: tuple[float, float] | None = None
) -> dict[str, float]:
    """Errors of N predictions in stars: rmse, mae and, given N users, user_rmse (mean of the users' RMSEs).

    `clip` limits the predictions first; a rating is in (1, 5). Raises ValueError for unequal or no N.
    """
    predicted, actual = np.asarray(predicted, float), np.asarray(actual, float)
    if predicted.shape != actual.shape or predicted.ndim != 1 or not len(actual):
        raise ValueError(f"rmse: shapes {predicted.shape} and {actual.shape}, expected the same (N,) with N > 0")
    error = (np.clip(predicted, *clip) if clip else predicted) - actual
    result = {"rmse": float(np.sqrt(np.mean(error**2))), "mae": float(np.mean(np.abs(error)))}
    if users is not None:
        counts = np.bincount(users)
        squares = np.bincount(users, error**2)
        result["user_rmse"] = float(np.mean(np.sqrt(squares[counts > 0] / counts[counts > 0])))
    return result


def rating_metrics(prediction: np.ndarray | Tensor, ratings: Ratings, index: np.ndarray) -> dict[str, float]:
    """Errors of a prediction matrix (m, n), or of the k indexed values of it, with and without clipping to the scale.

    Keys: rmse, rmse_clipped, user_rmse, user_rmse_clipped and, both unclipped, mae and half_mse (half the
    mean squared error). Raises ValueError if the shape is neither (m, n) nor (k,).
    """
    matrix = prediction.detach().cpu().numpy() if isinstance(prediction, Tensor) else np.asarray(prediction)
    index = _checked(ratings, index)
    if matrix.shape not in (ratings.shape, index.shape):
        raise ValueError(f"prediction has shape {matrix.shape}, expected {ratings.shape} or {index.shape}")
    users, actual = ratings.users[index], ratings.ratings[index]
    values = matrix if matrix.shape == index.shape else matrix[users, ratings.items[index]]
    free, clipped = rmse(values, actual, users), rmse(values, actual, users, ratings.scale)
    limited = {f"{key}_clipped": clipped[key] for key in ("rmse", "user_rmse")}
    return free | limited | {"half_mse": 0.5 * free["rmse"] ** 2}


def _ratings(name: str, frame: pd.DataFrame, source: str, scale: tuple[float, float] | None = None) -> Ratings:
    frame = _last_of_each(frame.sort_values(["user_id", "item_id", "timestamp"], kind="stable")[COLUMNS], source)
    stars = frame["rating"].to_numpy(float)
    mark, whole = _as_integers(stars)
    rows = frame.assign(rating=whole).to_numpy("<i8")
    user_ids, users = np.unique(rows[:, 0], return_inverse=True)
    item_ids, items = np.unique(rows[:, 1], return_inverse=True)
    digest = hashlib.sha256(mark + np.ascontiguousarray(rows).tobytes()).hexdigest()
    if scale is None and len(stars):
        scale = float(stars.min()), float(stars.max())
    known = (name, users, items, stars, rows[:, 3].copy(), user_ids, item_ids, digest, source)
    return Ratings(*known, scale or (1.0, 5.0))


def _last_of_each(frame: pd.DataFrame, source: str) -> pd.DataFrame:
    """One rating of a user and an item, the last: of two, one in the test part would be trained on as the other."""
    again = frame.duplicated(["user_id", "item_id"], keep="last").to_numpy()
    if not again.any():
        return frame
    user, item = frame.loc[again, ["user_id", "item_id"]].iloc[0]
    told = f"{source}: {again.sum()} ratings are of a user and an item that are rated again later, user {user} and item"
    warnings.warn(f"{told} {item} first; only the last of each pair is kept", stacklevel=4)
    return frame[~again]


def _as_integers(stars: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Ratings as different integers, and a mark of how: as they are, doubled where some are half stars, or their bits.

    Without the mark .5, 1, 1.5 would have the digest of 1, 2, 3, and one's cached result would be found for the other.
    """
    for factor, mark in ((1, b""), (2, b"halves")):
        if (np.abs(stars) < EXACT / factor).all() and not (factor * stars % 1).any():
            return mark, (factor * stars).astype("<i8")
    return b"bits", np.ascontiguousarray(stars, "<f8").view("<i8")


def _frame(ratings: Ratings) -> pd.DataFrame:
    ids = ratings.user_ids[ratings.users], ratings.item_ids[ratings.items]
    columns = (*ids, ratings.ratings, ratings.timestamps)
    return pd.DataFrame(dict(zip(COLUMNS, columns, strict=True)))


def _most(values: np.ndarray, size: int, count: int) -> np.ndarray:
    return np.argsort(-np.bincount(values, minlength=size), kind="stable")[:count]


def _shuffled(count: int, seed: int) -> np.ndarray:
    # The raw stream of a bit generator never changes; Generator.permutation may, between versions of numpy.
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")


def _shrunk_means(groups: np.ndarray, values: np.ndarray, size: int, shrinkage: float) -> np.ndarray:
    counts = np.bincount(groups, minlength=size) + shrinkage
    return np.bincount(groups, values, minlength=size) / np.maximum(counts, 1e-300)


def _checked(ratings: Ratings, index: np.ndarray) -> np.ndarray:
    index = np.asarray(index)
    if index.ndim != 1 or not (np.issubdtype(index.dtype, np.integer) or not len(index)):
        raise ValueError(f"index has shape {index.shape} and type {index.dtype}, expected (k,) integers")
    if len(index) and (index.min() < 0 or index.max() >= len(ratings)):
        raise ValueError(f"index runs from {index.min()} to {index.max()}, expected 0 to {len(ratings) - 1}")
    return index.astype(np.int64)


def _official(ratings: Ratings, fold: str) -> Split:
    own = _pairs(_frame(ratings))
    tables = movielens.read_fold(ratings.name, fold)
    train, test = (np.flatnonzero(own.isin(_pairs(table))) for table in tables)
    if len(train) + len(test) != len(ratings) or np.intersect1d(train, test).size:
        raise DataError(f"{fold}: {len(train)} + {len(test)} ratings are not a split of {len(ratings)}")
    return Split(fold, train, test)


def _pairs(frame: pd.DataFrame) -> pd.MultiIndex:
    return pd.MultiIndex.from_frame(frame[["user_id", "item_id"]])
