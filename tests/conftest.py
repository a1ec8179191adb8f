"""What all tests share: a small checkout of its own for the batch, and kernels that cannot clash."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

# Without a GPU the Triton kernels run in its interpreter, which has to be chosen before triton is first imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

REPOSITORY = Path(__file__).resolve().parent.parent
PYPROJECT = '[project]\nname = "compressible-dynamics"\n'
PARAMETERS = """\
preset: str = "quick"  # label under which figures are saved
rank: int = 2  # true rank of the target, 1 to 10
step_size: float = 0.1  # gradient step, 0.01 to 10
ranks: list = [1, 2]  # ranks to compare
"""
SAVE = """\
import json, os
from pathlib import Path
stem = Path(os.environ["COMPRESSIBLE_FIGURES"]) / preset / "{id}"
stem.parent.mkdir(parents=True, exist_ok=True)
for suffix in (".pdf", ".png", ".npz"):
    stem.with_suffix(suffix).write_bytes(b"picture")
values = dict(rank=rank, step_size=step_size, ranks=ranks, gpus=os.environ.get("CUDA_VISIBLE_DEVICES"))
stem.with_suffix(".json").write_text(json.dumps(values))
"""
ENTRY = """\
{name}:
  quick: {{minutes: 0.1}}
  paper: {{minutes: 2, parameters: {{rank: 5, step_size: 1e-3}}}}
"""


def few(values: Iterable[Any], count: int) -> list[Any]:
    """The first `count` values of a parametrisation, and the rest as slow ones: each is a compilation on a GPU."""
    values = list(values)
    first, rest = values[:count], values[count:]
    return [*first, *(pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.slow) for v in rest)]


def pytest_configure(config: pytest.Config) -> None:
    """Let nbval start its kernels on Unix sockets: free TCP ports are taken by others in parallel runs."""
    try:
        from nbval import kernel
    except ImportError:
        return
    manager, folder = kernel.KernelManager, tempfile.TemporaryDirectory(prefix="kernels-")
    config.add_cleanup(folder.cleanup)

    def on_private_sockets(**settings: object) -> object:
        unique = tempfile.mkdtemp(dir=folder.name)
        return manager(transport="ipc", ip=f"{unique}/socket", **settings)

    kernel.KernelManager = on_private_sockets


def write_notebook(path: Path, *cells: str, parameters: str = PARAMETERS) -> None:
    """Write a notebook of a parameters cell and some code cells."""
    import nbformat  # a GPU host has PyTorch and pytest alone

    kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    tagged = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    notebook.cells = [tagged, *map(nbformat.v4.new_code_cell, cells)]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


@pytest.fixture(autouse=True, scope="module")
def imports_out_of_the_collectors_way() -> None:
    """Keep what is imported by now out of garbage collections: each pass of fine-tuning asks for one, which takes half
    a second among all that transformers and these tests hold."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the place of a test's own manifest of data files free, and as it was when the test is done."""
    monkeypatch.setenv("COMPRESSIBLE_MANIFEST", "")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with a copy of the library and without notebooks, as the working directory."""
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    # A copy, since a library that is edited meanwhile would make figures stale.
    shutil.copytree(REPOSITORY / "lib", tmp_path / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COMPRESSIBLE_FIGURES", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


@pytest.fixture
def add_notebook(checkout: Path) -> Callable[..., str]:
    """Function (name, *cells) that adds a notebook, with presets, and returns its id."""

    def add(name: str, *cells: str, **settings: str) -> str:
        id = f"kwon2024/{name}"
        code = cells or (SAVE.format(id=id),)
        write_notebook(checkout / "notebooks" / f"{id}.ipynb", *code, **settings)
        presets, entry = checkout / "notebooks" / "kwon2024" / "presets.yaml", ENTRY.format(name=name)
        before = presets.read_text() if presets.exists() else ""
        if entry not in before:
            presets.write_text(before + entry)
        return id

    return add
