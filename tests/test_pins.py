"""Pinned environments: which of them the installed packages are, and what the command and the records say of it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from conftest import REPOSITORY
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from compressible.companion import pins, provenance
from compressible.companion.command_line import main


@pytest.fixture
def found(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What is installed, as a test says it."""
    packages = {"torch": "2.13.0+cpu", "numpy": "2.5.2", "pip": "25.0"}
    monkeypatch.setattr(pins, "installed", lambda: packages)
    return packages


def test_the_installed_packages_are_those_of_the_file_that_pins_them(found: dict[str, str], capsys) -> None:
    Path("constraints.txt").write_text("# tested together\nnumpy==2.5.2\ntorch==2.13.0  # any build\nscipy==1.0\n")
    Path("constraints-gpu.txt").write_text("numpy==2.5.2\ntorch==2.11.0\n")
    state = pins.state(["torch", "numpy"])
    assert (state["pinned"], state["differs"]) == ("constraints.txt", [])
    assert state["sha256"] == pins.sha256(Path("constraints.txt").read_bytes())
    assert main(["environment"]) == 0 and "are those of constraints.txt" in capsys.readouterr().out
    found["torch"] = "2.11.0+cu130"
    assert pins.state(["torch", "numpy"])["pinned"] == "constraints-gpu.txt"
    assert pins.state(["torch"])["installed"] != state["installed"]


def test_a_difference_is_told_with_both_versions_and_the_nearest_file(found: dict[str, str], capsys) -> None:
    Path("constraints.txt").write_text("numpy==2.4\ntorch==2.13.0\nfilelock==3\n")
    Path("constraints-gpu.txt").write_text("numpy==2.4\ntorch==2.11.0\n")
    assert pins.state(["torch"])["differs"] == ["constraints.txt: numpy 2.5.2, pinned 2.4"]
    assert main(["environment"]) == 1
    assert capsys.readouterr().out.splitlines()[1:] == ["constraints.txt: numpy 2.5.2, pinned 2.4"]


def test_what_moves_numbers_must_be_pinned_and_other_packages_need_not_be(found: dict[str, str]) -> None:
    Path("constraints.txt").write_text("torch==2.13.0\n")
    assert pins.state(["torch"])["pinned"] == "constraints.txt"
    assert pins.state(["torch", "numpy", "peft"])["differs"] == ["constraints.txt: numpy 2.5.2 is not pinned"]


def test_a_pin_with_a_local_part_is_that_build_alone(found: dict[str, str]) -> None:
    assert pins.differences({"torch": "2.13.0+cu130"}, found) == ["torch 2.13.0+cpu, pinned 2.13.0+cu130"]
    assert pins.differences({"torch": "2.13.0+cpu"}, found) == []


def test_without_a_file_nothing_is_pinned(found: dict[str, str], capsys) -> None:
    state = pins.state(["torch"])
    assert state["pinned"] is None and re.fullmatch("[0-9a-f]{64}", state["installed"])
    assert main(["environment"]) == 1 and "there is no file of pins here" in capsys.readouterr().out


def test_what_is_printed_as_pins_is_read_as_what_is_installed(capsys) -> None:
    assert main(["environment", "--freeze"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# Python 3.")
    packages = dict(line.split("==") for line in text.splitlines()[1:])
    assert packages == pins.installed() and "torch" in packages and "compressible-dynamics" not in packages


def test_a_record_s_provenance_names_the_environment() -> None:
    assert provenance.environment()["environment"].keys() == {"installed", "pinned", "sha256", "differs"}


@pytest.mark.parametrize("file", pins.files(REPOSITORY), ids=lambda file: file.name)
def test_a_pinned_environment_is_within_the_declared_ranges(file: Path) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    of = project["optional-dependencies"]
    wanted = [Requirement(text) for text in [*project["dependencies"], *of["batch"], *of["adapters"]]]
    have = pins.read(file)
    ranges = {need.name: (str(need.specifier), have.get(canonicalize_name(need.name))) for need in wanted}
    assert {name for name, (_, pin) in ranges.items() if pin is None} <= {
        "snakemake"
    }  # a cluster's nodes run notebooks
    outside = {need.name for need in wanted if (pin := ranges[need.name][1]) and not need.specifier.contains(pin)}
    assert outside == set()
