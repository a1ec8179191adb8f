"""Runs are computed once, kept whole, and computed again whenever anything that moves a number changed."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import compressible
from compressible.companion import freshness, library, notebooks, provenance, run_cache, run_key, runs
from compressible.companion.code_digest import source_digest
from compressible.companion.library import notebook_digest
from compressible.companion.parameters import ParameterError
from compressible.runtime import devices, paths

CALLS: list[int] = []


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for each test."""
    monkeypatch.setenv("COMPRESSIBLE_CACHE", str(tmp_path / "cache"))
    CALLS.clear()
    return tmp_path / "cache"


def work(rank: int, step_size: float = 0.5, seed: int = 0) -> dict[str, Any]:
    sys.modules[__name__].CALLS.append(rank)  # read by its name, it would be part of the key
    loss = np.linspace(step_size, 0, rank + 1)
    return {
        "loss/full": loss,
        "file": torch.arange(rank, dtype=torch.bfloat16, requires_grad=True),
        "empty": np.zeros((0, 3)),
        "complex": np.array([1 + 2j]),
        "names": np.array(["a", "bc"]),
        "half": torch.tensor(0.25),
        "last": loss[-1],
        "reached": np.bool_(True),
        "split": "u1",
        "widths": (10, 20),
        "never": float("nan"),
    }


def entries(cache: Path) -> list[Path]:
    return [path for path in (cache / "results").rglob("*") if path.is_file()]


def interrupted(rank: int) -> dict[str, Any]:
    """Work in two passes, which leave a file each; killed after the very first."""
    kept, calls = runs.checkpoint(every=0), sys.modules[__name__].CALLS  # as in `work`
    for number in (0, 1):
        file = Path(f"{kept['checkpoint']}.{number}")
        calls.append(int(file.exists()))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        if len(calls) == 1:
            raise KeyboardInterrupt
    return {"every": kept["checkpoint_every"]}


def test_a_killed_run_finds_its_checkpoint_which_goes_when_the_result_is_there(cache: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        runs.run(interrupted, rank=2)
    assert runs.checkpoint(1) == {} and len(list((cache / "checkpoints").rglob("*.0"))) == 1
    assert runs.run(interrupted, rank=2)["every"] == 1 and CALLS == [0, 1, 0]
    assert [file for file in (cache / "checkpoints").rglob("*") if file.is_file()] == []
    with pytest.raises(KeyError, match="checkpoint"):  # nothing is kept where the result is not
        runs.run(interrupted, cache=False, rank=2)


def test_second_run_comes_from_the_cache_and_is_the_same(cache: Path) -> None:
    first, second = (runs.run(work, rank=4, preset="quick") for _ in range(2))
    assert CALLS == [4]
    assert (first.cached, second.cached) == (False, True)
    assert first.arrays.keys() == second.arrays.keys() == {"loss/full", "file", "empty", "complex", "names"}
    for name, array in first.arrays.items():
        assert array.dtype == second.arrays[name].dtype
        np.testing.assert_array_equal(array, second.arrays[name])
    assert str(first.metrics) == str(second.metrics)
    assert first.parameters == second.parameters == {"rank": 4, "step_size": 0.5, "seed": 0}
    assert (first.key, first.seconds, first.started) == (second.key, second.seconds, second.started)
    assert [path.name for path in entries(cache)] == [f"{first.key}.npz"]


def part(rank: int) -> dict[str, Any]:
    sys.modules[__name__].CALLS.append(rank)
    time.sleep(0.5)
    return {"rank of it": rank}


def parts(rank_guesses: list) -> dict[str, Any]:
    return {"sum": sum(runs.run(part, rank=rank)["rank of it"] for rank in rank_guesses)}


def halves(rank_guesses: list) -> dict[str, Any]:
    return {"both": [runs.run(parts, rank_guesses=[rank])["sum"] for rank in rank_guesses]}


def test_seconds_of_parts_that_were_in_the_cache_count_for_the_whole(cache: Path) -> None:
    runs.run(part, rank=1)
    assert runs.run(parts, rank_guesses=[1]).seconds >= 0.5  # none of which it took this time
    assert runs.run(parts, rank_guesses=[1, 2]).seconds >= 1
    assert runs.run(halves, rank_guesses=[1, 2]).seconds >= 1  # two levels down, too
    assert runs.run(parts, rank_guesses=[1, 2], cache=False).seconds >= 1
    assert CALLS == [1, 2]


def test_metrics_are_plain_values() -> None:
    result = runs.run(work, rank=4)
    expected = {"half": 0.25, "last": 0.0, "reached": True, "split": "u1", "widths": [10, 20]}
    assert {name: result[name] for name in expected} == expected
    assert type(result["reached"]) is bool
    assert result["file"].tolist() == [0, 1, 2, 3]
    assert result.peak_memory_bytes > 1e6
    with pytest.raises(KeyError, match="expected one of loss/full"):
        result["lost"]


def test_the_key_follows_values_not_their_spelling() -> None:
    spellings = ({"rank": 4}, {"seed": 0, "rank": 4, "step_size": 0.5})
    keys = {runs.run(work, **values).key for values in spellings}
    assert len(keys) == 1
    assert runs.run(work, rank=4, seed=1).key not in keys
    assert CALLS == [4, 4]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 4, "width": 3}, "width: got 3"),
        ({"rank": -4}, "rank: got -4"),
        ({"step_size": 1.0}, "expected a value for rank"),
        ({"rank": 4, "stepsize": 1.0}, "'step_size'"),
    ],
)
def test_bad_parameters_stop_before_the_work(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        runs.run(work, **values)
    assert CALLS == []


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ([1, 2], "got list, expected a flat dict"),
        ({"model": object()}, "output 'model': got object"),
        ({"nested": {"a": 1}}, "output 'nested': got dict"),
        ({"nothing": None}, "output 'nothing': got NoneType"),
        ({"mixed": [1, {}]}, "output 'mixed': got dict"),
        ({"objects": np.array([{}, []], object)}, "output 'objects'"),
    ],
)
def test_outputs_that_cannot_be_kept_are_refused(
    output: Any, message: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "OUTPUT", output, raising=False)

    def unkeepable(rank: int) -> Any:
        return sys.modules[__name__].OUTPUT

    with pytest.raises(TypeError, match=message):
        runs.run(unkeepable, rank=1)
    assert entries(cache) == []


def test_failed_runs_leave_nothing(cache: Path) -> None:
    def failing(rank: int) -> dict[str, Any]:
        raise ArithmeticError("diverged")

    with pytest.raises(ArithmeticError):
        runs.run(failing, rank=1)
    assert entries(cache) == []


def test_without_cache_nothing_is_kept(cache: Path) -> None:
    for _ in range(2):
        assert not runs.run(work, cache=False, rank=2).cached
    assert (CALLS, entries(cache)) == ([2, 2], [])


def test_damaged_entries_are_dropped_and_computed_again(cache: Path) -> None:
    good = runs.run(work, rank=300)
    path = entries(cache)[0]
    whole = path.read_bytes()
    places = np.random.default_rng(0).integers(0, len(whole), 25)
    flipped = [whole[:i] + bytes([whole[i] ^ 0xFF]) + whole[i + 1 :] for i in places]
    for content in (b"", b"PK", whole[: len(whole) // 2], whole[:-1], b"x" * 1000, *flipped):
        path.write_bytes(content)
        check_recovery(good, path)
    assert len(entries(cache)) == 1


def check_recovery(good: runs.Result, path: Path) -> None:
    """Damage is noticed, said and replaced, unless nothing reads it; the numbers are right always."""
    CALLS.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = runs.run(work, rank=300)
    assert [300] * len(caught) == CALLS == [300] * (not result.cached)
    np.testing.assert_array_equal(result["loss/full"], good["loss/full"])
    assert str(result.metrics) == str(good.metrics)


def test_an_array_that_was_swapped_is_noticed(cache: Path) -> None:
    runs.run(work, rank=3)
    path = entries(cache)[0]
    with np.load(path) as stored:
        members = dict(stored)
    members["array:loss/full"] = members["array:loss/full"] + 1e-12
    np.savez(path, **members)
    with pytest.warns(RuntimeWarning, match="digest of array 'loss/full'"):
        assert not runs.run(work, rank=3).cached


def test_an_entry_under_a_foreign_key_is_noticed(cache: Path) -> None:
    first = runs.run(work, rank=3)
    path = entries(cache)[0]
    other = runs.run(work, rank=4)
    target = cache / "results" / other.key[:2] / f"{other.key}.npz"
    target.write_bytes(path.read_bytes())
    with pytest.warns(RuntimeWarning, match="key does not match"):
        assert runs.run(work, rank=4).key != first.key


def load(folder: Path, source: str) -> ModuleType:
    """A fresh module with that source."""
    path = folder / f"module_{len(list(folder.glob('module_*')))}.py"
    path.write_text(source)
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


SOURCE = """
BASE = 2
def helper(x):
    return BASE * x
def unrelated(x):
    return x
def run(rank):
    return {"value": [helper(i) for i in range(rank)]}
"""


OUTSIDE = """
import functools
import math
import numpy as np
import torch
from compressible import DeepLoraConfig
from compressible.recovery import factors

FACTOR = 2
CONFIG = DeepLoraConfig(r=8)
TABLE = {"sizes": [1, (2, 3)], "type": torch.float32, "function": lambda x: FACTOR * x}
unread = object()

def decorated(function):
    @functools.wraps(function)
    def inner(*args):
        return function(*args)
    return inner

@torch.no_grad()
@decorated
def helper(x, scale=FACTOR):
    return scale * x

def run(rank):
    unread = [TABLE["function"](rank), helper(rank), math.sqrt(rank), np.exp(0), factors.__name__]
    return {"value": len(unread) + CONFIG.r, "unread": torch.ones(1).unread}
"""


@pytest.mark.parametrize(
    ("source", "old", "new", "same"),
    [
        (SOURCE, "    return {", "    # a remark\n\n    return {", True),
        (SOURCE, "def run(rank):\n", 'def run(rank):\n    """A docstring."""\n', True),
        (SOURCE, "    return x\n", "    return x + 1\n", True),
        (SOURCE, "range(rank)", "range(rank + 1)", False),
        (SOURCE, "BASE * x", "BASE * x * x", False),
        (SOURCE, "BASE = 2", "BASE = 3", False),
        (OUTSIDE, "unread = object()", "unread = torch.ones(1)", True),
        (OUTSIDE, "DeepLoraConfig(r=8)", "DeepLoraConfig(r=2)", False),
        (OUTSIDE, "DeepLoraConfig(r=8)", "DeepLoraConfig(r=8, init_scale=0.3)", False),
        (OUTSIDE, "(2, 3)", "(2, 4)", False),
        (OUTSIDE, "(2, 3)", "[2, 3]", False),
        (OUTSIDE, "torch.float32", "torch.float64", False),
        (OUTSIDE, "lambda x: FACTOR * x", "lambda x: FACTOR + x", False),
        (OUTSIDE, "FACTOR = 2", "FACTOR = 3", False),
        (OUTSIDE, "return scale * x", "return scale * x * x", False),
        (OUTSIDE, "return function(*args)", "return -function(*args)", False),
    ],
)
def test_the_key_follows_the_code_that_runs_and_what_it_reads(
    source: str, old: str, new: str, same: bool, tmp_path: Path
) -> None:
    before, after = load(tmp_path, source), load(tmp_path, source.replace(old, new))
    assert (source_digest(before.run) == source_digest(after.run)) is same


def test_the_digest_of_a_record_knows_configurations_of_other_versions_of_peft(tmp_path: Path) -> None:
    """Peft's configurations hold the version that made them; records come from machines with others."""
    there = load(tmp_path, OUTSIDE.replace("DeepLoraConfig(r=8)", "DeepLoraConfig(r=8, peft_version='0.1.0')")).run
    here = load(tmp_path, OUTSIDE).run
    versions = {"peft": "0.1.0", "torch": "2.11.0"}
    assert source_digest(here) != source_digest(there)
    assert source_digest(here, None, versions) == source_digest(there) == source_digest(there, None, versions)


def test_a_digest_is_the_same_in_every_version_of_python() -> None:
    digest = hashlib.sha256(library.normal_form(SOURCE + OUTSIDE).encode()).hexdigest()
    assert digest[:16] == "74b1849c508f2fd2"  # of Python 3.10 to 3.13; ast.dump's differ from 3.11 to 3.12


@pytest.mark.parametrize(
    ("read", "named"),
    [
        ("torch.nn.Linear(2, 2)", "run reads base, a Linear"),
        ("torch.ones(2)", "run reads base, a Tensor"),
        ("np.ones(2)", "run reads base, a ndarray"),
        ('{"model": [object()]}', r"run reads base\[0\]\[1\]\[0\], a object"),
        ("Task(2)", "run reads base, a Task"),
        ("Task", "run reads base, a type"),
        ("helpers", "run reads base, a module"),
    ],
)
def test_what_cannot_be_told_from_another_is_refused(
    read: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "helpers.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    kind = "import dataclasses\n@dataclasses.dataclass\nclass Task:\n    rows: object\n"
    source = f"{kind}import torch, helpers\nimport numpy as np\nbase = {read}\ndef run(rank):\n    return "
    found = load(tmp_path, source + "{'value': rank, 'used': str(base)}\n")
    with pytest.raises(TypeError, match=f"{named}.*parameters.*cache=False"):
        runs.run(found.run, rank=2)
    assert runs.run(found.run, rank=2, cache=False)["value"] == 2
    keys = [runs.run(found.run, rank=2, reads={"base": version}).key for version in ("1", "2", "1")]
    assert keys[0] == keys[2] != keys[1]


def test_a_closure_counts() -> None:
    def make(factor: int) -> Any:
        def scaled(rank: int) -> dict[str, Any]:
            return {"value": factor * rank}

        return scaled

    assert [runs.run(make(factor), rank=2)["value"] for factor in (1, 3, 1)] == [2, 6, 2]


def test_a_function_without_source_is_refused() -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec("def run(rank): return {'value': rank}", namespace)
    with pytest.raises(OSError, match="could not get source code"):
        runs.run(namespace["run"], rank=2)


def test_data_digests_are_part_of_the_key_and_of_the_record() -> None:
    digests = ["a" * 64, "b" * 64]
    results = [runs.run(work, data={"ratings": digest}, rank=2) for digest in digests]
    assert results[0].key != results[1].key
    assert results[0].data == {"ratings": digests[0]}
    assert runs.run(work, data=(digests[1],), rank=2).cached
    with pytest.raises(ParameterError, match=r"data: got 'movielens-100k/u1_tset\.csv\.gz'"):
        runs.run(work, data="movielens-100k/u1_tset.csv.gz", rank=2)


def test_parallel_runs_of_one_key_do_not_damage_each_other(cache: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: runs.run(work, rank=50), range(24)))
    assert len({result.key for result in results}) == 1
    assert len(entries(cache)) == 1
    assert runs.run(work, rank=50).cached


def test_a_source_is_parsed_again_where_another_thread_spoilt_the_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, calls = library.ast.parse, []

    def spoilt(source: str) -> Any:
        calls.append(source)
        if len(calls) == 1:
            raise SystemError("AST constructor recursion depth mismatch (before=36, after=40)")
        return whole(source)

    expected = library.normal_form("a = 1  # one")
    monkeypatch.setattr(library.ast, "parse", spoilt)
    assert library.normal_form("a = 1  # one") == expected and len(calls) == 2


def test_a_process_killed_while_storing_leaves_no_entry(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.savez

    def killed(file: Path, **members: Any) -> None:
        whole(file, **members)
        os._exit(9)

    monkeypatch.setattr(np, "savez", killed)
    child = multiprocessing.get_context("fork").Process(target=runs.run, args=(work,), kwargs={"rank": 9})
    child.start()
    child.join(30)
    monkeypatch.setattr(np, "savez", whole)
    assert child.exitcode == 9
    assert not runs.run(work, rank=9).cached
    assert runs.run(work, rank=9).cached


def unwritable(cache: Path, how: str) -> None:
    """A cache in which nothing can be written, for the superuser too."""
    if how == "a file in its place":
        cache.write_text("")
    elif how == "a file in the place of the results":
        cache.mkdir()
        (cache / "results").write_text("")
    else:
        cache.symlink_to("/dev/full")


@pytest.mark.parametrize("how", ["a file in its place", "a file in the place of the results", "a device"])
def test_a_cache_that_cannot_be_written_is_said_before_the_work_and_the_result_returned(how: str, cache: Path) -> None:
    unwritable(cache, how)

    def told_first(rank: int) -> dict[str, Any]:
        assert caught and not runs.checkpoint(10)
        return {"value": rank}

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = [runs.run(told_first, rank=3, reads={"caught": ""}) for _ in range(2)]
    assert [result["value"] for result in results] == [3, 3] and not results[1].cached
    assert [str(warning.message).count(f"cache {cache} cannot be written") for warning in caught] == [1, 1]


def test_a_cache_that_may_only_be_read_gives_what_it_has(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.run(work, rank=3)
    monkeypatch.setattr(paths, "unwritable", lambda folder: "PermissionError: Permission denied")
    assert runs.run(work, rank=3).cached
    with pytest.warns(RuntimeWarning, match="cannot be written"):
        assert not runs.run(work, rank=4).cached
    assert len(entries(cache)) == 1


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process grows beyond 2 kB, as on a disk that became full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_a_result_survives_a_disk_that_is_full(cache: Path) -> None:
    with full_disk(), pytest.warns(RuntimeWarning, match=r"cannot be written \(OSError: File too large"):
        assert runs.run(work, rank=3)["split"] == "u1"
    assert [file for file in cache.rglob("*") if file.is_file()] == []
    assert not runs.run(work, rank=3).cached


def test_a_result_survives_a_disk_that_becomes_full_meanwhile(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = run_cache.store

    def store_on_full_disk(*arguments: Any) -> None:
        with full_disk():
            store(*arguments)

    monkeypatch.setattr(run_cache, "store", store_on_full_disk)
    with pytest.warns(RuntimeWarning, match=r"could not be kept .*File too large"):
        assert runs.run(work, rank=3000)["split"] == "u1"
    assert [file for file in cache.rglob("*") if file.is_file()] == []


def git(folder: Path, *words: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
    subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A committed under git, as the working directory."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "pyproject.toml").write_text('[project]\nname = "compressible-dynamics"\n')
    monkeypatch.chdir(folder)
    monkeypatch.delenv("COMPRESSIBLE_COMMIT", raising=False)
    monkeypatch.delenv("COMPRESSIBLE_FIGURES", raising=False)
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def test_a_record_names_the_commit_at_which_the_numbers_were_computed(committed: Path) -> None:
    first, computed = provenance.git_state(), runs.run(work, rank=2)
    (committed / "more.py").write_text("x = 1\n")
    git(committed, "add", "-A")
    git(committed, "commit", "-q", "-m", "second")
    (committed / "more.py").write_text("x = 2\n")
    assert provenance.git_state()["commit"] != first["commit"] and provenance.git_state()["dirty"]
    records = [
        runs.provenance(result, "quick", "kwon2024/05_completion") for result in (computed, runs.run(work, rank=2))
    ]
    assert [record["cached"] for record in records] == [False, True]
    for record in records:
        assert {name: record[name] for name in first} == first == {"commit": first["commit"], "dirty": False}
        assert record["function"] == source_digest(work) and record["library"] == provenance.LIBRARY
        assert computed.started == record["started"] <= record["ended"] == computed.ended


def test_the_notebook_of_a_record_is_the_one_that_draws(committed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    id = "kwon2024/05_completion"
    file = committed / "notebooks" / f"{id}.ipynb"
    file.parent.mkdir(parents=True)
    file.write_text('{"cells": [{"cell_type": "code", "source": ["x = 1"]}]}')
    monkeypatch.setenv("COMPRESSIBLE_NOTEBOOK", "a" * 64)  # as the batch does
    record = runs.provenance(runs.run(work, rank=2), "quick", id)
    assert record["notebook"] == record["computed_in"] == "a" * 64
    monkeypatch.delenv("COMPRESSIBLE_NOTEBOOK")  # an interactive session draws from the cache
    record = runs.provenance(runs.run(work, rank=2), "quick", id)
    assert (record["notebook"], record["computed_in"]) == (notebook_digest(file), "a" * 64)


def test_an_edit_of_the_library_makes_a_figure_stale_and_the_run_another(
    checkout: Path, add_notebook: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    id, root = add_notebook("01_good"), checkout / "lib" / "compressible"

    def use_library() -> None:
        for module in (runs, run_key, freshness):
            monkeypatch.setattr(module, "LIBRARY", library.library_digest(root))

    use_library()
    record = runs.provenance(runs.run(work, rank=2), "quick", id)
    record.pop("parameters")  # they are another notebook's
    path = notebooks.record_path(id, "quick")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
    assert freshness.state(id, "quick") == "done"
    (root / "recovery" / "compression.py").write_text("def compress_spectral(): return 0")
    use_library()
    assert freshness.state(id, "quick") == "stale"
    assert not runs.run(work, rank=2).cached


def test_an_entry_that_does_not_say_how_it_was_made_is_computed_again(cache: Path) -> None:
    runs.run(work, rank=3)
    path = entries(cache)[0]
    with np.load(path) as stored:
        members = dict(stored)
    meta = json.loads(members["meta"].tobytes())
    del meta["made"]
    text = json.dumps(meta).encode()
    members["meta"] = np.frombuffer(text, np.uint8)
    members["meta_sha256"] = np.frombuffer(hashlib.sha256(text).digest(), np.uint8)
    np.savez(path, **members)
    with pytest.warns(RuntimeWarning, match="dropped a damaged cache entry.*made"):
        assert not runs.run(work, rank=3).cached


def test_provenance_of_a_cached_run_tells_how_it_was_computed() -> None:
    for _ in range(2):
        result = runs.run(work, rank=2)
    record = runs.provenance(result, "quick", "kwon2024/05_completion")
    assert json.loads(json.dumps(record)) == record
    assert record["cached"] is True
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert record["versions"]["compressible"] == compressible.__version__
    assert record["threads"] == torch.get_num_threads()
    assert record["wall_seconds"] == result.seconds
    assert {"id", "preset", "parameters", "commit", "dirty", "data", "device", "cpu"} <= record.keys()
    assert {"peak_memory_bytes", "run", "created", "started", "omp_num_threads"} <= record.keys()


def test_the_library_digest_sees_every_folder_and_is_never_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "recovery").mkdir()
    (tmp_path / "__main__.py").write_text("x = 1")
    with pytest.raises(FileNotFoundError, match="holds no source that computes"):
        library.library_digest(tmp_path)
    file = tmp_path / "recovery" / "compression.py"
    digests = []
    for source in ("def f(): return 1", "def f(): return 0", "def f():  # why\n    return 0"):
        file.write_text(source)
        digests.append(library.library_digest(tmp_path))
    assert library.computing_sources(tmp_path) == [file]
    assert digests[0] != digests[1] == digests[2]


def test_every_room_counts_as_computing_except_the_companion() -> None:
    rooms = {folder.name for folder in library.ROOT.iterdir() if (folder / "__init__.py").exists()}
    assert {"recovery", "descent", "finetuning"} < rooms
    counted = {file.relative_to(library.ROOT).parts[0] for file in library.computing_sources()}
    assert counted == rooms - {"companion"}


def test_git_state(committed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (committed / "figures").mkdir()
    (committed / "figures" / "new.png").write_text("")
    state = provenance.git_state()
    assert len(state["commit"]) == 40
    assert state["dirty"] is False
    (committed / "pyproject.toml").write_text('[project]\nname = "compressible-dynamics"\nversion = "1"\n')
    assert provenance.git_state()["dirty"] is True
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy("pyproject.toml", bare)
    monkeypatch.chdir(bare)
    assert provenance.git_state() == {"commit": None, "dirty": None}


@pytest.mark.parametrize(("cuda", "way"), [(None, "; it is the CPU build: `make .*`, then `make .*`"), ("13.0", "")])
def test_a_missing_gpu_is_told_with_the_way_out(cuda: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(ValueError, match=f"device is 'cuda', expected cpu or auto: .* sees no CUDA device.*{way}$"):
        devices.resolve_device("cuda")
