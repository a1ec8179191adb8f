"""`make setup` in an environment that is not as it should be, and targets of make named together."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """A folder with a name that a shell takes apart, with the Makefile and nothing to install."""
    place = tmp_path / "my (ä) folder"
    place.mkdir()
    shutil.copy(REPOSITORY / "Makefile", place)
    for name in ("pyproject.toml", "constraints.txt"):
        (place / name).write_text("")
    return place


def make(place: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Make, of which nothing is inherited that runs these tests, and without an index for pip."""
    outer = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "PRESET", "LABEL", "JOBS", "GPUS", "ID", "PYTHON")
    known = {name: value for name, value in os.environ.items() if name not in outer} | {"PIP_NO_INDEX": "1"} | more
    command = ["make", f"PYTHON={sys.executable}", "TORCH_INDEX=http://127.0.0.1:9", *words]
    return subprocess.run(command, cwd=place, env=known, capture_output=True, text=True, check=False)


def program(file: Path, lines: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    file.write_text(f"#!/bin/sh\n{lines}\n")
    file.chmod(0o755)


@pytest.mark.parametrize("gone", [False, True], ids=["interrupted before pip came", "its Python was removed"])
def test_an_environment_that_does_not_work_is_mended(gone: bool, beside: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", beside / ".venv"], check=True)
    (beside / ".venv/bin/activate").unlink()
    for link in (beside / ".venv/bin").glob("python*") if gone else ():
        link.unlink()
        link.symlink_to("/gone/bin/python3")
    told = make(beside, "setup")
    pip = subprocess.run([beside / ".venv/bin/python", "-m", "pip", "--version"], capture_output=True, check=False)
    assert pip.returncode == 0 and (beside / ".venv/bin/activate").is_file(), told.stdout + told.stderr


def test_an_environment_of_an_old_python_is_refused_with_what_to_do(beside: Path) -> None:
    old = '"import sys; sys.version_info = (3, 10, 1); exec(sys.argv[1])"'
    program(beside / ".venv/bin/python", f'[ "$1" = -c ] && exec {sys.executable} -c {old} "$2"; exit 0')
    done = make(beside, "setup")
    assert ".venv has Python 3.10, expected 3.11 or later: make distclean removes it" in done.stderr
    assert done.returncode and "install" not in done.stdout + done.stderr


def test_packages_of_another_place_do_not_count_as_installed(beside: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "elsewhere-9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 9\n")
    listed = "list --format=freeze"
    seen = make(beside, f"--eval=show: ; @$(BIN)/python -m pip {listed}", "show", f"VENV={sys.prefix}",
                PYTHONPATH=str(other.parent))  # fmt: skip
    hidden = make(beside, f"--eval=show: ; @$(PIP) {listed}", "show", f"VENV={sys.prefix}",
                  PYTHONPATH=str(other.parent))  # fmt: skip
    assert "elsewhere==9" in seen.stdout.split() and "elsewhere==9" not in hidden.stdout.split()
    assert "torch" in hidden.stdout


@pytest.mark.parametrize("words", ["figures paper", "paper figures", "-j4 paper figures"])
def test_two_batches_named_together_are_both_built(words: str, beside: Path) -> None:
    program(beside / ".venv/bin/python", 'printf "%s\\n" "$@"')
    (beside / ".venv/.stamp").touch()
    told = make(beside, *words.split()).stdout.split()
    assert sorted(word for word in told if word.startswith("--preset")) == ["--preset=paper", "--preset=quick"]
