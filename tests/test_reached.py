"""What a notebook reaches of the library by imports: never too little, and a record is stale by that alone."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from compressible.companion import batch, committed, freshness, imports, library, notebooks, reached, runs, verification
from compressible.companion import git as asked
from compressible.companion.command_line import main
from compressible.companion.library import ROOT, computing_sources, library_digest, notebook_digest
from compressible.companion.reached import reached_digest, reached_sources

REPOSITORY = Path(__file__).resolve().parent.parent
TOP = """\
from importlib import import_module
from compressible.runtime.waiting import when_imported

__version__ = "1"
_HOME = {"descend": "descent.steps", "gone": "descent.no_such"}
_MODULES = {"runs": "companion.runs", "theory": "recovery.theory.laws"}

def __getattr__(name):
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    return import_module(f".{_MODULES[name]}", __name__)

when_imported("peft", lambda: import_module(".adapters.model", __name__))
"""
TREE = {
    "__init__": TOP,
    "adapters/__init__": "",
    "adapters/model": "",
    "companion/__init__": "",
    "companion/runs": "def run():\n    from compressible.runtime import devices",
    "companion/maker": "from compressible.companion import runs",
    "data/__init__": "from compressible.data.files import find",
    "data/files": "",
    "data/ratings": "",
    "data/text": "from . import files\nfrom .tables import rows",
    "data/tables": "from ..runtime import devices",
    "data/wanted": "from importlib import import_module\ndef _get(name):\n    return import_module(name)\n"
    "_get('compressible.data.ratings')\n_get('nltk')",
    "data/any": "from importlib import import_module\ndef get(name):\n    return import_module(name)\nget('nltk')",
    "data/handed": "from importlib import import_module\ndef _get(name):\n    return import_module(name)\nx = [_get]",
    "data/lazy": "from importlib import import_module\ndef __getattr__(name):\n    return import_module(name)",
    "data/altered": "from importlib import import_module\ndef _get(name):\n    name = name.lower()\n"
    "    return import_module(name)\n_get('nltk')",
    "data/marked": "from importlib import import_module\n@print\ndef _get(name):\n    return import_module(name)\n"
    "_get('nltk')",
    "data/starred": "from .files import *",
    "data/evaluated": "def value(text): return eval(text, {'__builtins__': {}, 'x': 1})",
    "data/topped": "import compressible",
    "descent/__init__": "",
    "descent/engines/fused": "",  # a folder without a file of its own
    "descent/steps": '"""Example: import compressible as cd; compressible.data.ratings"""\n'
    "def choose():\n    def inner():\n        from compressible.descent.engines.fused import step\n    return inner",
    "recovery/__init__": "from .theory import laws",
    "recovery/theory/__init__": "",
    "recovery/theory/laws": "",
    "runtime/__init__": "",
    "runtime/devices": "NAMES = 'compressible.data.files.find'",
    "runtime/waiting": "",
}
ALWAYS = {"adapters/__init__", "adapters/model", "runtime/__init__", "runtime/waiting"}  # the package's own __init__
DATA = {"data/__init__", "data/files"}
DEVICES = {"runtime/devices", *DATA}  # since it names files by a text
CD = "import compressible as cd\n"
FOUND = {
    "from compressible.data.ratings import split": {"data/ratings", *DATA},
    "from compressible.data import ratings as r": {"data/ratings", *DATA},
    "import compressible.data.ratings as r": {"data/ratings", *DATA},
    "from compressible.data import find": DATA,
    "def f():\n    import compressible.data.ratings as r\n    return r": {"data/ratings", *DATA},
    "from compressible.data.text import x": {"data/text", "data/tables", *DEVICES},
    "from compressible.data.evaluated import value": {"data/evaluated", *DATA},
    "from compressible.data.wanted import x": {"data/wanted", "data/ratings", *DATA},
    "from compressible.companion.maker import make": DEVICES,
    "from compressible import descend": {"descent/__init__", "descent/steps", "descent/engines/fused"},
    "from compressible import data": DATA,
    CD + "cd.descend()": {"descent/__init__", "descent/steps", "descent/engines/fused"},
    CD + "cd.runs.run(cd.theory.law, cd.__version__)": {
        "recovery/__init__", "recovery/theory/__init__", "recovery/theory/laws", *DEVICES,
    },
    CD + "cd.data.find": DATA,
    "import compressible.data.ratings\ncompressible.data.ratings.split": {"data/ratings", *DATA},
    "from importlib import import_module\nimport_module('compressible.data.ratings')": {"data/ratings", *DATA},
    "import importlib\nimportlib.import_module('numpy.linalg')\n" + CD: set(),
    "when_imported('compressible.data.ratings', print)\n" + CD: {"data/ratings", *DATA},
    "import numpy as np\nfrom math import *\n" + CD + "cd.__version__": set(),
}  # fmt: skip
ALL = [
    CD + "tools = cd",
    CD + "getattr(cd, 'descend')",
    CD + "print(vars(cd))",
    CD + "cd.no_such",
    CD + "cd.gone",
    CD + "cd.__dict__['descend']",
    "from compressible import *",
    "from compressible.data import *",
    "from compressible import no_such",
    "from compressible.no_such import x",
    "from compressible.descent.engines import no_such",
    "from . import data",
    "from importlib import import_module\nname = 'data'\nimport_module(f'compressible.{name}')",
    "from importlib import import_module\nimport_module('compressible')",
    "from importlib import import_module\nimport_module('.data', 'compressible')",
    "from importlib import import_module as get\nget('compressible.data')",
    "import importlib\nget = importlib.import_module",
    "import importlib\ngetattr(importlib, 'import_' + 'module')('compressible.data')",
    "__import__('compressible.data.ratings')",
    "exec('x = 1')",
    "eval('x')",
    "import builtins",
    "import runpy\nrunpy.run_module('compressible.data.ratings')",
    "%run other.py",
    "get_ipython().run_cell('x = 1')",
    "import subprocess\nsubprocess.run(['python', '-c', 'from compressible import descend'])",
    "from compressible.data import any",
    "from compressible.data import handed",
    "from compressible.data import topped",
    "from compressible.data import lazy",
    "from compressible.data import altered",
    "from compressible.data import starred",
    "from compressible.data import marked",
]


def write_tree(root: Path) -> Path:
    for name, source in TREE.items():
        file = root / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    return root


def write_cells(file: Path, *sources: str) -> Path:
    words = {"cell_type": "markdown", "source": "import compressible.data.ratings"}
    cells = [{"cell_type": "code", "source": source.splitlines(keepends=True)} for source in sources]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"cells": [words, *cells]}))
    return file


def names(files: Iterable[Path], root: Path) -> set[str]:
    return {file.relative_to(root).with_suffix("").as_posix() for file in files}


@pytest.mark.parametrize("source", FOUND)
def test_what_code_reaches_is_found(source: str, tmp_path: Path) -> None:
    root = write_tree(tmp_path / "compressible")
    found = reached_sources(write_cells(tmp_path / "a.ipynb", "x = 1", source), root)
    assert names(found, root) == ALWAYS | FOUND[source]
    assert [file for file in computing_sources(root) if file in found] == found, "in the order of all"


@pytest.mark.parametrize("source", ALL)
def test_what_cannot_be_told_reaches_all(source: str, tmp_path: Path) -> None:
    root = write_tree(tmp_path / "compressible")
    notebook = write_cells(tmp_path / "a.ipynb", "import os\nfrom compressible.data import find", source)
    assert reached_sources(notebook, root) == computing_sources(root)
    assert reached_digest(notebook, root) == library_digest(root)


def test_where_nothing_is_reached_all_counts_since_the_digest_of_nothing_is_that_of_any_library(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "compressible")
    assert reached_sources(write_cells(tmp_path / "a.ipynb", "import numpy"), root) == computing_sources(root)


def test_a_table_that_is_not_written_out_has_no_names(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "compressible")
    notebook = write_cells(tmp_path / "a.ipynb", CD + "cd.descend")
    assert len(reached_sources(notebook, root)) < len(computing_sources(root))
    (root / "__init__.py").write_text(TOP.replace('"descent.steps"', '"descent." + "steps"'))
    assert reached_sources(notebook, root) == computing_sources(root)


def test_the_digest_is_of_the_syntax_of_what_is_reached(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "compressible")
    notebook = write_cells(tmp_path / "a.ipynb", "from compressible.data import ratings")
    first = reached_digest(notebook, root)
    edits = {"data/ratings": "x = 1", "data/files": "x = 1", "__init__": TOP + "import compressible.descent.steps as s"}
    for name, source in edits.items():
        (root / f"{name}.py").write_text(source)
        assert reached_digest(notebook, root) != first, name
        (root / f"{name}.py").write_text(TREE[name])
    for name, source in {"data/text": "x = 1", "data/ratings": "# why\n", "companion/runs": "x = 1"}.items():
        (root / f"{name}.py").write_text(source)
    assert reached_digest(notebook, root) == first, "neither what is not reached, nor a comment"
    assert reached_digest(tmp_path / "absent.ipynb", root) is None


def imported(notebook: Path) -> set[str]:
    """The library's files that a fresh interpreter has loaded once it imported and looked up what a notebook does."""
    cells = json.loads(notebook.read_text())["cells"]
    tree = ast.parse("\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"))
    lines = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    taken = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    lines += sorted(name for name in taken if name.startswith("cd.") and name.count(".") == 1)
    loaded = "[m.__file__ for n, m in list(sys.modules.items()) if n.partition('.')[0] == 'compressible']"
    code = "\n".join([*lines, "import json, sys", f"print('found', json.dumps({loaded}))"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    return {Path(file) for file in json.loads(done.stdout.rpartition("found ")[2]) if file}


@pytest.mark.parametrize("id", ["kwon2024/08_movielens", "yaras2024/07_deep_lora_compression"])
def test_what_an_interpreter_loads_is_reached(id: str) -> None:
    notebook = REPOSITORY / "notebooks" / f"{id}.ipynb"
    loaded, found = imported(notebook) & set(computing_sources()), reached_sources(notebook)
    assert len(loaded) > 10 and loaded <= set(found) < set(computing_sources())


def test_each_notebook_of_the_repository_reaches_less_than_all_and_together_all() -> None:
    found = {file.stem: names(reached_sources(file), ROOT) for file in REPOSITORY.glob("notebooks/*/*.ipynb")}
    every = names(computing_sources(), ROOT)
    assert found and all(some < every for some in found.values())
    assert "data/ratings" in found["08_movielens"] - found["07_deep_lora_compression"]
    assert "data/tasks" in found["07_deep_lora_compression"] - found["08_movielens"]


def test_no_source_of_the_library_but_the_sites_is_one_that_cannot_be_told() -> None:
    kinds = {file: imports.TOP if file == ROOT / "__init__.py" else imports.MODULE for file in ROOT.rglob("*.py")}
    untold = [file for file, kind in kinds.items() if imports.asked(file.read_text(), kind) is None]
    assert names(untold, ROOT) == {"companion/site/api"}


def git(*arguments: str) -> str:
    who = ("-c", "user.name=me", "-c", "user.email=me@example.org")
    return subprocess.run(["git", *who, *arguments], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def record(checkout: Path, add_notebook: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A record without the digest, of a checkout with one commit whose own library is the one in use."""
    id, root = add_notebook("01_good", IMPORTS), checkout / "lib/compressible"
    shutil.rmtree(root)  # a small one instead, whose digests take no time
    write_tree(root)
    monkeypatch.setattr(committed, "ROOT", root)
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "all")
    code = {"library": library_digest(root), "notebook": notebook_digest(notebooks.notebook_path(id))}
    return {"id": id, "commit": git("rev-parse", "HEAD"), **code, "computed_in": code["notebook"]}


IMPORTS = "from compressible.recovery.theory import laws\nfrom compressible.companion import maker"
UNREACHED, REACHED_ONE = "data/ratings.py", "recovery/theory/laws.py"


def state_after(edited: str, record: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> str:
    """The state of a record's figure when a file of the library has another statement, on top of what it had."""
    file = committed.ROOT / edited
    before = file.read_text()
    file.write_text(before + "\nOTHER = 1\n")
    monkeypatch.setattr(freshness, "LIBRARY", library_digest(committed.ROOT))
    path = notebooks.record_path(record["id"], "mine")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
    state = freshness.state(record["id"], "mine")
    file.write_text(before)
    assert record["library"] != freshness.LIBRARY
    return state


@pytest.mark.parametrize("has_git", [True, False], ids=["git", "no git"])
@pytest.mark.parametrize("has_key", [True, False], ids=["key", "no key"])
def test_only_an_edit_that_the_notebook_reaches_makes_its_figure_stale(has_key, has_git, record, monkeypatch):
    if has_key:
        record["reached"] = reached_digest(notebooks.notebook_path(record["id"]), committed.ROOT)
    if not has_git:
        monkeypatch.setenv("PATH", "")
    assert state_after(UNREACHED, record, monkeypatch) == ("done" if has_key or has_git else "stale")
    assert state_after(REACHED_ONE, record, monkeypatch) == "stale"


OTHER = {
    "library": "f" * 64,  # of code that nobody committed
    "computed_in": "f" * 64,  # in a notebook that nobody committed
    "commit": "f" * 40,
    "reached": "f" * 64,
}


@pytest.mark.parametrize("name", [*OTHER, "an option", "no commit"])
def test_what_no_commit_vouches_for_is_stale(name, record, monkeypatch):
    other = {"an option": {"commit": "--output=/tmp/x"}, "no commit": {"commit": None}}.get(name) or {name: OTHER[name]}
    assert state_after(UNREACHED, record, monkeypatch) == "done"
    assert state_after(UNREACHED, record | other, monkeypatch) == "stale"


def test_a_commit_that_is_not_behind_head_vouches_for_nothing(record, monkeypatch):
    git("checkout", "-q", "--orphan", "other")
    git("commit", "-q", "-m", "without history")
    assert state_after(UNREACHED, record, monkeypatch) == "stale"


def test_what_was_reached_then_and_is_not_now_makes_it_stale(record, monkeypatch):
    """The numbers may have come from it, though no file that is reached today has changed."""
    (committed.ROOT / "companion" / "maker.py").write_text("")
    assert state_after(UNREACHED, record, monkeypatch) == "stale"


def test_another_notebook_is_stale_whatever_it_reaches(record, monkeypatch):
    record["reached"] = reached_digest(notebooks.notebook_path(record["id"]), committed.ROOT)
    assert state_after(UNREACHED, record | {"notebook": "f" * 64}, monkeypatch) == "stale"


def test_the_check_holds_the_digest_against_the_commit(record, monkeypatch):
    reached_then = reached_digest(notebooks.notebook_path(record["id"]), committed.ROOT)
    for digest, told in ((reached_then, []), (None, []), ("e" * 64, ["reached"])):
        reasons = verification._commit(record | {"reached": digest}, compare=True)
        assert reasons == [f"{name} is not the digest of commit {record['commit'][:12]}" for name in told]
    assert verification._commit(record | {"library": "e" * 64}, compare=True)[0].startswith("library is not")


def test_the_archive_of_a_commit_is_made_once(record, monkeypatch):
    calls, whole = [], asked.output
    monkeypatch.setattr(asked, "output", lambda *given, **more: calls.append(given[0]) or whole(*given, **more))
    states = {state_after(UNREACHED, record, monkeypatch) for _ in range(3)}
    assert states == {"done"} and calls.count("archive") == 1


def test_a_record_of_the_present_library_asks_git_for_nothing(record, monkeypatch):
    monkeypatch.setattr(asked, "output", lambda *given, **more: pytest.fail(f"git {given}"))
    monkeypatch.setattr(freshness, "LIBRARY", record["library"])
    assert freshness.differences(record["id"], "mine", record) == []
    assert freshness.differences(record["id"], "mine", record | {"notebook": "f", "library": "f"}) == [
        "notebook has changed since", "library has changed since",
    ]  # fmt: skip


def work(rank: int) -> dict[str, float]:
    return {"value": float(rank)}


def test_a_record_keeps_the_digest_of_what_computed(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESSIBLE_CACHE", str(tmp_path))
    monkeypatch.setenv(library.REACHED, "a" * 64)
    result = runs.run(work, rank=2)
    assert runs.provenance(result, "quick", "kwon2024/05_completion")["reached"] == "a" * 64
    monkeypatch.setenv(library.REACHED, "b" * 64)  # drawn by another notebook, of numbers from the cache
    cached = runs.run(work, rank=2)
    assert cached.cached and runs.provenance(cached, "quick", "kwon2024/05_completion")["reached"] == "a" * 64
    monkeypatch.delenv(library.REACHED)  # an interactive session
    assert runs.provenance(runs.run(work, rank=3), "quick", "kwon2024/05_completion")["reached"] is None


def test_the_batch_tells_the_kernel_what_its_notebook_reaches(add_notebook, checkout):
    cell = "import os, json\nfrom pathlib import Path\nfrom compressible.runtime import paths\n"
    cell += "stem = Path(os.environ['COMPRESSIBLE_FIGURES']) / preset / 'kwon2024/01_good'\n"
    cell += "stem.parent.mkdir(parents=True)\nfor s in ('.pdf', '.png', '.npz'): stem.with_suffix(s).write_text('x')\n"
    cell += f"told = os.environ['{library.REACHED}']\nstem.with_suffix('.json').write_text(json.dumps(dict(told=told)))"
    id = add_notebook("01_good", cell)
    assert main(["run", id]) == 0
    told = json.loads(notebooks.record_path(id, "quick").read_text())["told"]
    assert told == reached_digest(notebooks.notebook_path(id)) != library_digest()
    assert batch.REACHED == library.REACHED and reached.ROOT == ROOT
