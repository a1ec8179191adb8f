"""`list --check`: each way in which a record is not what it says is told by its reason, and a true one passes."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compressible.companion import freshness, notebooks, pins, records, verification
from compressible.companion.command_line import main
from compressible.companion.library import notebook_digest

ID = "kwon2024/01_good"
PATH = Path(f"figures/paper/{ID}.json")


def git(*arguments: str) -> str:
    who = ("-c", "user.name=me", "-c", "user.email=me@example.org")
    return subprocess.run(["git", *who, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def keep(record: dict[str, Any]) -> None:
    PATH.parent.mkdir(parents=True, exist_ok=True)
    PATH.write_text(json.dumps(record))


@pytest.fixture
def record(checkout: Path, add_notebook: Callable[..., str]) -> dict[str, Any]:
    """A record as a batch would leave it, of a checkout with one commit."""
    add_notebook("01_good")
    Path("constraints.txt").write_text("numpy==2.5.2\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "all")
    notebook = notebook_digest(Path("notebooks", f"{ID}.ipynb"))
    content, arrays = records.pack({"x": np.array([0.0, np.nan, 2.0])})
    PATH.parent.mkdir(parents=True)
    PATH.with_suffix(".npz").write_bytes(content)
    PATH.with_suffix(".png").write_bytes(b"picture")
    values = notebooks.plan(ID, "paper")
    known = notebooks.defaults(notebooks.notebook_path(ID)) | values
    pinned = {"pinned": "constraints.txt", "sha256": pins.sha256(Path("constraints.txt").read_bytes()), "differs": []}
    made = {
        "id": ID, "preset": "paper", "parameters": {n: v for n, v in known.items() if n != "preset"},
        "commit": git("rev-parse", "HEAD"), "dirty": False, "library": freshness.LIBRARY, "notebook": notebook,
        "computed_in": notebook, "function": "a" * 64, "run": "b" * 64,
        "data": {"mnist-5k/mnist_5k.csv.gz": _known_digest()}, "environment": pinned,
        "metrics": {"x": [0.0, None, 2.0], "best": 0.5}, "not_finite": {"x": "[0.0, NaN, 2.0]"}, "arrays": arrays,
        "pictures": {"png": hashlib.sha256(b"picture").hexdigest()},
    }  # fmt: skip
    made["metrics_digest"] = records.metrics_digest(made)
    keep(made)
    return made


def _known_digest() -> str:
    from compressible.data import manifest

    return manifest.load_manifest()["mnist-5k/mnist_5k.csv.gz"].sha256


def test_a_record_that_is_what_it_says_passes(record, capsys):
    assert verification.reasons(ID, "paper") == []
    assert main(["list", "--check"]) == 0 and capsys.readouterr().out.startswith("1 of 1 records are of this code")


ALTERED = {
    "library": ("f" * 64, "library has changed since"),
    "notebook": ("f" * 64, "notebook has changed since"),
    "function": (None, "does not hold the digest 'function'"),
    "computed_in": ("f" * 64, "computed_in is not the digest of commit"),
    "run": ("", "does not hold the digest 'run'"),
    "parameters": ({"rank": 3, "step_size": 0.001, "ranks": [1, 2]}, "rank was 3, now 5"),
    "data": ({"mnist-5k/mnist_5k.csv.gz": "f" * 64}, "read mnist-5k/mnist_5k.csv.gz ffffffffffff, the manifest has"),
    "environment": ({"pinned": None, "differs": ["torch 2, pinned 1"]}, "in no pinned environment (torch 2, pinned 1)"),
    "commit": ("f" * 40, "its commit ffffffffffff does not lie behind HEAD"),
    "dirty": (True, "with changes that were not committed"),
    "pictures": ({"png": "f" * 64}, "01_good.png is missing, or is not the picture"),
    "not_finite": ({"x": "[0.0, NaN, 2.5]"}, "its metric 'x' is not the array of that name"),
    "metrics": ({"x": [[0.0], 1.0, 2.0]}, "its metric 'x' is not the array of that name"),
    "metrics_digest": (None, "does not hold the digest 'metrics_digest'"),
    "arrays": ({"sha256": "f" * 64, "float32": [], "left_out": []}, "01_good.npz is not the file"),
}


@pytest.mark.parametrize("name", ALTERED)
def test_what_is_altered_in_a_record_is_told(name, record, capsys):
    value, told = ALTERED[name]
    altered = record | ({"not_finite": {}} if name == "metrics" else {}) | {name: value}
    if name in ("metrics", "not_finite"):  # by someone who writes their digest anew
        altered["metrics_digest"] = records.metrics_digest(altered)
    keep(altered)
    assert main(["list", "--check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith(f"{ID}, paper: ") and told in lines[0], lines
    assert lines[1].startswith("0 of 1 records")


@pytest.mark.parametrize("edited", [{"best": 0.51}, {"best": None}, {"more": 1}])
def test_a_metric_that_no_array_mirrors_cannot_be_edited_unseen(edited, record, capsys):
    keep(record | {"metrics": record["metrics"] | edited})
    assert main(["list", "--check"]) == 1
    told = "its metrics are not those that it names by 'metrics_digest'"
    assert capsys.readouterr().out.startswith(f"{ID}, paper: {told}\n")


def test_another_order_and_layout_is_the_same_metrics(record):
    metrics = dict(reversed(record["metrics"].items()))
    PATH.write_text(json.dumps(dict(reversed((record | {"metrics": metrics}).items())), indent=3, ensure_ascii=False))
    assert verification.reasons(ID, "paper") == []


@pytest.mark.parametrize("name", ["environment", "data", "commit"])
def test_what_a_record_lacks_is_told(name, record):
    keep({key: value for key, value in record.items() if key != name})
    (told,) = verification.reasons(ID, "paper")
    assert told.startswith(("does not name", "does not hold"))


def test_another_file_of_pins_and_another_branch_are_told(record):
    Path("constraints.txt").write_text("numpy==2.6\n")
    assert verification.reasons(ID, "paper") == ["was made in another constraints.txt than the one that is here"]
    git("checkout", "-q", "--orphan", "other")
    git("commit", "-q", "-m", "without history")
    told = verification.reasons(ID, "paper")
    assert [reason.startswith(f"its commit {record['commit'][:12]} does not lie") for reason in told] == [False, True]


def test_a_commit_that_a_clone_cannot_know_is_no_other_branch_s(record, tmp_path, monkeypatch):
    git("commit", "-q", "--allow-empty", "-m", "one more")
    git("clone", "-q", "--depth", "1", f"file://{Path.cwd()}", str(tmp_path / "clone"))
    shutil.copytree("figures", tmp_path / "clone/figures", dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path / "clone")
    (told,) = verification.reasons(ID, "paper")
    assert "is not in this shallow clone" in told and "git fetch --unshallow" in told
    shutil.rmtree(".git")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))  # the checkout around it answers else
    (told,) = verification.reasons(ID, "paper")
    assert "is not to be looked up: git rev-parse: fatal: not a git repository" in told


def test_a_file_of_pins_written_since_names_an_environment_only_to_the_last_version(record):
    """Hosts change between readings; the digest of all names and versions says what was there."""
    text = "numpy==2.5.2\npytest==9.1.1\n"
    there = {"installed": pins.sha256(text.encode()), "pinned": None, "sha256": None, "differs": ["numpy 2, pinned 1"]}
    keep(record | {"environment": there})
    Path("constraints-gpu.txt").write_text(f"# read there\n{text.replace('9.1.1', '9.2.0')}")
    assert verification.reasons(ID, "paper") == ["was made in no pinned environment (numpy 2, pinned 1)"]
    Path("constraints-gpu.txt").write_text(f"# read there\n{text}")
    assert verification.reasons(ID, "paper") == []


def test_a_library_that_nobody_committed_is_told(record, monkeypatch):
    """Record and checkout agree, and the commit that the record names has other code than both."""
    monkeypatch.setattr(freshness, "LIBRARY", "e" * 64)
    keep(record | {"library": "e" * 64})
    (told,) = verification.reasons(ID, "paper")
    assert told.startswith("library is not the digest of commit ")


def test_quick_figures_are_not_checked(record):
    quick = Path(f"figures/quick/{ID}.json")
    quick.parent.mkdir(parents=True)
    quick.write_text("{}")
    assert verification.labels(ID) == ["paper"]


def test_no_record_at_all_is_no_proof(
    record: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMPRESSIBLE_FIGURES", str(Path("elsewhere").absolute()))
    assert main(["list", "--check"]) == 1
    assert "there is no record under" in capsys.readouterr().out
