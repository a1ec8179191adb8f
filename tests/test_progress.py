"""The progress line: cheap, quiet in pipes, and gone from saved notebooks and from nbval's sight."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import pytest
from conftest import REPOSITORY
from nbclient import NotebookClient

from compressible.runtime.progress import progress

LOOP = """\
import time
from IPython.display import DisplayHandle
from compressible.runtime.progress import progress
shown, update = [], DisplayHandle.update
def spy(self, content, **settings):
    shown.append(content["text/plain"])
    return update(self, content, **settings)
DisplayHandle.update = spy
began = time.time()
with progress(14, "outer") as bar:
    for _ in progress(range(14), "inner"):
        time.sleep(0.1)
        bar.update(1)
seconds = time.time() - began
"""
SPEAK = "print(len(shown) > 0, all(text.startswith('outer') for text in shown), len(shown) <= 5 * seconds)"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let other processes import this checkout's library."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY / "lib"))


@pytest.fixture
def notebook(tmp_path: Path) -> Path:
    """A notebook with a loop that is long enough for the line to show."""
    cells = [nbformat.v4.new_code_cell(source) for source in (LOOP, SPEAK)]
    kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
    path = tmp_path / "loop.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def outputs(notebook: nbformat.NotebookNode) -> list[list]:
    return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]


def test_line_shows_and_leaves_nothing_in_a_saved_notebook(notebook: Path, tmp_path: Path) -> None:
    executed = nbformat.read(notebook, 4)
    NotebookClient(executed, timeout=60).execute()
    loop, speak = outputs(executed)
    assert loop == []
    assert speak[0].text == "True True True\n"
    nbformat.write(executed, notebook)
    command = [sys.executable, "-m", "pytest", "--nbval", str(notebook), "-q", "-p", "no:cacheprovider"]
    checked = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=120)
    assert checked.returncode == 0, checked.stdout
    assert "2 passed" in checked.stdout


def test_line_leaves_nothing_under_papermill(notebook: Path, tmp_path: Path) -> None:
    executed = papermill.execute_notebook(notebook, tmp_path / "out.ipynb", progress_bar=False)
    assert outputs(executed)[0] == []
    assert outputs(nbformat.read(tmp_path / "out.ipynb", 4))[0] == []


def test_nothing_is_written_into_a_pipe() -> None:
    loop = "for _ in progress(range(12)): time.sleep(0.1)"
    code = f"import time\nfrom compressible.runtime.progress import progress\n{loop}"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_iterates_and_counts() -> None:
    assert list(progress([3, 1, 2])) == [3, 1, 2]
    assert list(progress(iter("ab"), "letters", enabled=False)) == ["a", "b"]
    with progress(10, enabled=True) as bar:
        bar.update(4)
        assert bar.n == 4


def test_short_loops_show_nothing_and_long_ones_do(capsys: pytest.CaptureFixture[str]) -> None:
    list(progress(range(1000), "short", enabled=True))
    assert "short" not in capsys.readouterr().err
    for _ in progress(range(13), "long", enabled=True):
        time.sleep(0.1)
    shown = capsys.readouterr().err
    assert "long" in shown
    assert shown.rstrip("\r").rpartition("\r")[2].strip() == ""  # the line was wiped at the end


def test_without_tqdm_loops_run_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "compressible.runtime.kernel_bar", None)
    with progress(3, "steps") as bar:
        bar.update(2)
    assert list(progress(range(3))) == [0, 1, 2]
