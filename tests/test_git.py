"""What git is asked for: its answer as it is, the files of a commit, and one error in a line where it gives neither."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from compressible.companion import git

WHO = ["-c", "user.name=me", "-c", "user.email=me@example.org"]


@pytest.fixture
def commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The one commit of a checkout, which is the working directory."""
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "compressible-dynamics"\n')
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "ä.bin").write_bytes(b"\x00\xff\r\n")
    monkeypatch.chdir(tmp_path)
    for arguments in (["init", "-q"], ["add", "."], [*WHO, "commit", "-q", "-m", "größer"]):
        subprocess.run(["git", *arguments], check=True)
    return git.text("rev-parse", "HEAD")


def test_git_s_answer_is_given_as_it_is(commit: str) -> None:
    assert len(commit) == 40 and git.output("rev-parse", "HEAD") == f"{commit}\n".encode()
    assert git.output("show", "HEAD:data/ä.bin") == b"\x00\xff\r\n"
    assert git.text("show", "-s", "--format= %s ", "HEAD") == "größer"


def test_a_commit_s_files_are_put_into_a_folder(commit: str) -> None:
    Path("data", "new").write_text("")  # not committed
    git.export("part", commit, "data")
    assert [file.name for file in Path("part").rglob("*") if file.is_file()] == ["ä.bin"]
    assert Path("part", "data", "ä.bin").read_bytes() == b"\x00\xff\r\n"
    git.export("all", "HEAD")
    assert sorted(os.listdir("all")) == ["data", "pyproject.toml"]


def test_what_git_refuses_is_told_in_a_line(commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (("no-such-commit",), ("HEAD", "no-such-folder")):
        with pytest.raises(git.GitError, match=rf"^git archive: \w+: [^\n]*{arguments[-1]}[^\n]*$"):
            git.export("part", *arguments)
    with pytest.raises(git.GitError, match=r"^git diff: exit status 1$"):
        git.output("diff", "--quiet", "HEAD:", "HEAD:data")
    with pytest.raises(git.GitError, match=r"^git log: TimeoutExpired: [^\n]*timed out"):
        git.output("log", seconds=0)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(git.GitError, match=r"^git log: FileNotFoundError: [^\n]*'git'$"):
        git.output("log")


def test_an_option_is_no_commit(commit: str, tmp_path: Path) -> None:
    """Git would write its archive into the file."""
    for name in (f"--output={tmp_path / 'file'}", ""):
        with pytest.raises(git.GitError, match="expected one as git names it"):
            git.export(tmp_path / "folder", name, "figures")
    assert not (tmp_path / "file").exists()


def test_a_folder_without_git_has_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "compressible-dynamics"\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(git.GitError, match=r"^git rev-parse: \w+: [^\n]+$"):
        git.text("rev-parse", "HEAD")
