"""Places and atomic writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from compressible.runtime import paths, process_identity

PYPROJECT = '[project]\nname = "compressible-dynamics"\n'
HALF = """
import sys
from compressible.runtime import paths
with paths.atomic_path(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print(temporary, flush=True)
    input()
"""


def test_repository_is_found_from_deep_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    deep = tmp_path / "notebooks" / "kwon2024"
    deep.mkdir(parents=True)
    (deep / "pyproject.toml").write_text('[project]\nname = "another"\n')
    monkeypatch.chdir(deep)
    assert paths.repository() == tmp_path


def test_repository_falls_back_to_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyproject.toml").write_text("not [ toml")
    monkeypatch.chdir(tmp_path)
    assert paths.repository() == Path(__file__).resolve().parents[1]


def test_no_checkout_anywhere_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paths, "__file__", str(tmp_path / "paths.py"))
    with pytest.raises(FileNotFoundError, match=f"above {tmp_path}"):
        paths.repository()


def test_variables_name_the_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESSIBLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COMPRESSIBLE_FIGURES", str(tmp_path / "figures"))
    assert (paths.cache_dir(), paths.figures_dir()) == (tmp_path / "cache", tmp_path / "figures")
    monkeypatch.delenv("COMPRESSIBLE_CACHE")
    monkeypatch.delenv("COMPRESSIBLE_FIGURES")
    assert paths.cache_dir().name == "compressible"
    assert paths.figures_dir() == paths.repository() / "figures"


def test_relative_places_are_made_absolute_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in paths.PLACES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", "hub")
    given = {"DATA": "own", "CACHE": str(tmp_path / "kept"), "FIGURES": "~/figures", "MANIFEST": "", "MODELS": "../m"}
    for name, value in given.items():
        monkeypatch.setenv(f"COMPRESSIBLE_{name}", value)
    monkeypatch.setenv("PYTHONPATH", f"lib{os.pathsep}/other")
    home = Path.home()
    assert paths.absolute_places() == {
        "COMPRESSIBLE_DATA": str(tmp_path / "own"),
        "COMPRESSIBLE_CACHE": str(tmp_path / "kept"),
        "COMPRESSIBLE_FIGURES": str(home / "figures"),
        "COMPRESSIBLE_MODELS": str(tmp_path.parent / "m"),
        "HF_HOME": str(tmp_path / "hub"),
        "PYTHONPATH": f"{tmp_path / 'lib'}{os.pathsep}/other",
    }
    monkeypatch.delenv("PYTHONPATH")
    assert "PYTHONPATH" not in paths.absolute_places()


def test_write_atomic_replaces_and_leaves_one_file(tmp_path: Path) -> None:
    target = tmp_path / "new" / "note.txt"
    paths.write_atomic(target, "first")
    assert paths.write_atomic(target, "zweite ü").read_text(encoding="utf-8") == "zweite ü"
    assert paths.write_atomic(target, b"\x00\xff").read_bytes() == b"\x00\xff"
    assert os.listdir(target.parent) == ["note.txt"]


def test_a_failing_writer_leaves_the_old_file(tmp_path: Path) -> None:
    target = paths.write_atomic(tmp_path / "data.npz", "old")
    with pytest.raises(RuntimeError, match="half way"), paths.atomic_path(target) as temporary:
        assert (temporary.parent, temporary.suffix) == (tmp_path, ".npz")
        temporary.write_text("ne")
        raise RuntimeError("half way")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["data.npz"]


def test_a_writer_that_wrote_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), paths.atomic_path(tmp_path / "data.npz"):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not process_identity.system(), reason="this system does not say which one it is")
def test_what_a_killed_writer_left_goes_with_the_next_process_that_writes_there(tmp_path: Path) -> None:
    asked = [sys.executable, "-c", HALF, tmp_path / f"state.{'safe' * 40}.1"]
    killed, alive = (subprocess.Popen(asked, stdin=-1, stdout=-1, text=True) for _ in "ab")
    try:
        half, other = (Path(writer.stdout.readline().strip()) for writer in (killed, alive))  # type: ignore[union-attr]
        killed.kill()
        killed.wait()
        assert {half, other} == set(tmp_path.iterdir()) and half.suffix == ".1"
        paths.write_atomic(tmp_path / "another", "")
        assert {other, tmp_path / "another"} == set(tmp_path.iterdir())
        alive.communicate("\n")
        assert sorted(os.listdir(tmp_path)) == sorted(["another", asked[-1].name])
    finally:
        for writer in (killed, alive):
            writer.kill()
            writer.communicate()


def test_what_others_write_stays_and_a_process_looks_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, pid, start = process_identity.identity().split("-")
    gone = f"{here}-{pid}-{int(start) - 1}"  # this process has the number of one before it
    names = [
        f".data.{here}-{pid}-{start}-{'a' * 12}.npz",
        f".data.{'0' * 16}-{pid}-{int(start) - 1}-{'a' * 12}.npz",  # another host's, on a shared file system
        f".data.{'a' * 12}.npz",  # an earlier version's, which did not say whose it is
        f"data.{gone}-{'a' * 12}.npz",
        f".data.{gone}-{'a' * 12}.npz.npz",
    ]
    for name in names:
        (tmp_path / name).write_text("half")
    looked: list[str] = []
    listing = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: looked.append(folder) or listing(folder))
    for _ in range(3):
        paths.write_atomic(tmp_path / "data.npz", "whole")
    assert looked == [str(tmp_path)] and sorted(listing(tmp_path)) == sorted([*names, "data.npz"])


def test_a_folder_that_takes_no_file_says_why(tmp_path: Path) -> None:
    assert paths.unwritable(tmp_path / "new" / "folder") == "" and not os.listdir(tmp_path / "new" / "folder")
    (tmp_path / "file").write_text("")
    assert paths.unwritable(tmp_path / "file") == "FileExistsError: File exists"
    assert paths.unwritable(tmp_path / "file" / "below") == "NotADirectoryError: Not a directory"


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    assert paths.write_atomic(tmp_path / "atomic", "").stat().st_mode == plain.stat().st_mode
