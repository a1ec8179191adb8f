"""What must hold for the checkout as a whole: notebooks, presets, claims, packages, ignored files."""

from __future__ import annotations

import ast
import hashlib
import json
import linecache
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import papermill
import pytest
import yaml
from conftest import REPOSITORY
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from compressible.companion import claims, notebooks, parameters
from compressible.companion.code_digest import source_digest

NOTEBOOKS = REPOSITORY / "notebooks"
IDS = sorted(file.relative_to(NOTEBOOKS).with_suffix("").as_posix() for file in NOTEBOOKS.glob("*/*.ipynb"))
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
CODE_LINES, CELL_LINES, DEF_LINES, BYTES = 150, 30, 12, 300_000


@pytest.fixture(params=IDS)
def id(request, monkeypatch) -> str:
    monkeypatch.chdir(REPOSITORY)
    return request.param


@pytest.fixture
def code(id) -> list[nbformat.NotebookNode]:
    notebook = nbformat.read(NOTEBOOKS / f"{id}.ipynb", as_version=4)
    nbformat.validate(notebook)
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


# notebooks


def test_there_are_notebooks_and_their_ids_are_well_formed():
    assert IDS
    assert [id for id in IDS if not re.fullmatch(r"[a-z]+\d*/(\d\d|table\d)_[a-z0-9_]+", id)] == []


def test_notebook_is_committed_executed_from_top_to_bottom(code):
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any(cell.outputs for cell in code)


def test_notebook_shows_no_error_and_no_warning(code):
    outputs = [output for cell in code for output in cell.outputs]
    assert [output for output in outputs if output.output_type == "error"] == []
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []


def test_notebook_is_small(id, code):
    """All lines of its code cells count, those of comments and empty ones too, as a reader sees them."""
    lines = [len(cell.source.splitlines()) for cell in code]
    assert (NOTEBOOKS / f"{id}.ipynb").stat().st_size < BYTES
    assert sum(lines) <= CODE_LINES
    assert max(lines) <= CELL_LINES


def test_notebook_holds_no_long_function(code):
    trees = [ast.parse(re.sub(r"^\s*[%!].*$", "pass", cell.source, flags=re.M)) for cell in code]
    found = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert {f.name: f.end_lineno - f.lineno + 1 for f in found if f.end_lineno - f.lineno >= DEF_LINES} == {}


def test_cached_functions_read_only_what_a_key_can_hold(id, code, monkeypatch):
    """Definitions are executed; what a cell computes is an object here, which the digest of a function refuses."""
    space = {"__name__": "__main__"}
    for number, cell in enumerate(code):
        name, tree = f"<{id}, cell {number}>", ast.parse(cell.source)
        monkeypatch.setitem(linecache.cache, name, (len(cell.source), None, cell.source.splitlines(True), name))
        for node in tree.body:
            define(node, name, space)
        if called := {call.args[0].id for call in ast.walk(tree) if is_cached_call(call)}:
            break
    for function in called:
        assert len(source_digest(space[function])) == 64


def is_cached_call(node):
    return isinstance(node, ast.Call) and ast.unparse(node.func) in ("cd.runs.run", "runs.run")


PLAIN_CALLS = re.compile(r"(cd\.Deep)?LoraConfig|devices\.resolve_device|range|list|tuple|dict|set|sorted|len|min|max")


def define(node, name, space):
    """Execute a definition or a plain assignment of a notebook; any other assignment gives objects."""
    later = {call for function in ast.walk(node) if isinstance(function, ast.Lambda) for call in ast.walk(function)}
    calls = [ast.unparse(call.func) for call in {*ast.walk(node)} - later if isinstance(call, ast.Call)]
    stored = [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    assigned = isinstance(node, ast.Assign | ast.AnnAssign) and all(map(PLAIN_CALLS.fullmatch, calls))
    if assigned or isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef):
        try:
            exec(compile(ast.Module([node], []), name, "exec"), space)
            return
        except TypeError:  # it takes what another cell computes
            assert assigned
    if not isinstance(node, ast.FunctionDef | ast.ClassDef):
        space.update({key: object() for key in stored})


def test_nbval_compares_at_least_one_output(code):
    ignored = ("NBVAL_IGNORE_OUTPUT", "NBVAL_SKIP", "nbval-ignore-output", "nbval-skip")
    compared = [c for c in code if not any(m in c.source or m in c.metadata.get("tags", []) for m in ignored)]
    assert any("text/plain" in o.get("data", {}) or o.get("text") for c in compared for o in c.outputs)


# parameters


def test_papermill_reads_every_parameter_with_its_help(id, code):
    (cell,) = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assigned = [node for node in ast.parse(cell.source).body if isinstance(node, ast.AnnAssign)]
    found = papermill.inspect_notebook(str(NOTEBOOKS / f"{id}.ipynb"))
    assert set(found) == {node.target.id for node in assigned}
    assert len(assigned) == len(ast.parse(cell.source).body)
    assert [name for name, entry in found.items() if not entry["help"].strip()] == []
    assert [name for name in found if name not in parameters.VOCABULARY] == []


def test_every_parameter_can_be_overridden_with_its_own_default(id):
    known = notebooks.defaults(NOTEBOOKS / f"{id}.ipynb")
    assert known["preset"] == "quick"
    overrides = {name: str(value) for name, value in known.items() if name != "preset"}
    assert notebooks.plan(id, overrides=overrides) == parameters.validate(known)


def test_notebook_has_valid_presets_quick_and_paper(id):
    assert {"quick", "paper"} <= set(notebooks.presets(id))
    for preset in notebooks.presets(id):
        notebooks.plan(id, preset)


def test_presets_name_only_notebooks_that_exist():
    files = sorted(NOTEBOOKS.glob("*/presets.yaml"))
    named = {f"{file.parent.name}/{name}" for file in files for name in notebooks.read_yaml(file)}
    assert named == set(IDS)


def test_claims_are_judged_on_presets_that_their_figures_have(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    lacking = [c.id for c in claims.load_claims() if c.preset not in notebooks.presets(c.figure)]
    assert lacking == []


def test_claims_and_notebooks_name_each_other(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    judged = {claim.figure for claim in claims.load_claims()}
    assert judged == set(IDS)


def test_counts_of_the_authors_records_are_drawn_without_the_initial_one(code):
    """They hold it, so that iterations are (records - 1) * record_every."""
    nodes = [node for cell in code for node in ast.walk(ast.parse(cell.source))]
    less = [node.left for node in nodes if isinstance(node, ast.BinOp) and ast.unparse(node).endswith(" - 1")]
    right = {part for left in less for part in ast.walk(left)}
    assert [ast.unparse(node) for node in nodes if is_count_of_records(node) and node not in right] == []


def is_count_of_records(node):
    counted = isinstance(node, ast.Subscript) and ast.unparse(node.value) == "authors"
    return counted and "records" in ast.unparse(node.slice)


def test_notebook_runs_saves_and_judges_under_its_own_id(id, code):
    source = "\n".join(cell.source for cell in code)
    others = [other for other in IDS if other != id and f'"{other}"' in source]
    assert f'"{id}"' in source and others == []


# packages and tools


def requirements(extras: list[str]) -> list[Requirement]:
    optional = PYPROJECT["project"]["optional-dependencies"]
    named = [*PYPROJECT["project"]["dependencies"], *(text for extra in extras for text in optional[extra])]
    return [Requirement(text) for text in named]


def conda() -> tuple[list[str], list[str]]:
    listed = yaml.safe_load((REPOSITORY / "environment.yml").read_text())["dependencies"]
    (by_pip,) = [entry["pip"] for entry in listed if isinstance(entry, dict)]
    return [entry for entry in listed if isinstance(entry, str)], by_pip


def installed_extras() -> list[str]:
    return re.search(r"^EXTRAS \?= (.+)$", (REPOSITORY / "Makefile").read_text(), re.M).group(1).split(",")


def test_what_the_second_round_of_ci_leaves_out_is_there():
    (left,) = re.findall(r'make tests LEAVE="([^"]+)"', (REPOSITORY / ".ci/run").read_text())
    assert [name for name in left.split() if not (REPOSITORY / f"tests/test_{name}.py").is_file()] == []
    asked = subprocess.check_output(["make", "-n", "tests", f"LEAVE={left}"], cwd=REPOSITORY, text=True)
    assert re.findall(r"--ignore=tests/test_(\w+)\.py", asked) == left.split()


def test_conda_environment_installs_what_make_installs():
    packages, by_pip = conda()
    assert by_pip == ["-c constraints.txt", f"-e .[{','.join(installed_extras())}]"]
    assert {re.split("[=<>]", package)[0] for package in packages} == {"python", "pip"}
    (python,) = [package.split("=")[1] for package in packages if package.startswith("python=")]
    assert Requirement(f"python{PYPROJECT['project']['requires-python']}").specifier.contains(python)


def test_every_package_is_pinned_within_its_range():
    text = (REPOSITORY / "constraints.txt").read_text()
    pins = {canonicalize_name(n): v for n, v in re.findall(r"^([\w.-]+)==(\S+)$", text, re.M)}
    wanted = requirements(installed_extras())
    pinned = {str(need): (need.specifier, pins.get(canonicalize_name(need.name))) for need in wanted}
    assert [name for name, (_, pin) in pinned.items() if pin is None] == []
    assert [name for name, (wide, pin) in pinned.items() if not wide.contains(pin)] == []
    assert "+cpu" not in text


def test_imports_of_the_library_are_declared():
    declared = {canonicalize_name(need.name) for need in requirements(installed_extras())}
    called = {"scikit-learn": "sklearn", "pyyaml": "yaml", "ipython": "IPython", "pillow": "PIL"}
    modules = {called.get(name, name.replace("-", "_")) for name in declared}
    # A source of one kind asks for its hub's client only when a data file comes from there.
    # JAX is measured against where it is installed, and no dependency.
    modules |= {"compressible", "huggingface_hub", "jax", "pydantic_core", *sys.stdlib_module_names}
    found = {name for file in (REPOSITORY / "lib").rglob("*.py") for name in imported(file)}
    assert sorted(found - modules) == []


def imported(file: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(file.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {name.split(".")[0] for name in plain} | {
        node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom) and not node.level
    }


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
@pytest.mark.parametrize(
    ("path", "ignored"),
    [
        ("lib/compressible/new.py", False),
        ("figures/paper/kwon2024/05_completion.pdf", False),
        ("figures/quick/kwon2024/05_completion.pdf", True),
        (".venv/bin/python", True),
        ("figures/paper/failed/kwon2024/05_completion.txt", True),
        ("data/movielens-100k/u.data", True),
    ],
)
def test_git_ignores_what_is_made_and_not_what_is_written(path, ignored, tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    shutil.copy(REPOSITORY / ".gitignore", tmp_path)
    asked = subprocess.run(["git", "-C", tmp_path, "check-ignore", "-q", path], check=False)
    assert (asked.returncode == 0) is ignored


@pytest.mark.parametrize(
    ("words", "build"), [("", "cpu"), ("GPUS=0", "cpu"), ("GPUS=2", "gpu"), ("GPU=1", "gpu"), ("GPU=0 GPUS=1", "cpu")]
)
def test_a_fresh_set_up_with_gpus_takes_the_cuda_build(words, build, tmp_path):
    command = ["make", "-n", f"VENV={tmp_path}", "figure", "ID=yaras2024/08_few_shot", *words.split()]
    known = {name: value for name, value in os.environ.items() if name not in ("GPU", "GPUS", "MAKEFLAGS")}
    planned = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=known, check=False)
    assert set(re.findall(r"--no-print-directory torch-(\w+)", planned.stdout)) == {build}, planned.stderr


def test_make_lists_every_target_it_declares():
    listed = subprocess.run(["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    shown = set(re.findall(r"^  make ([\w-]+)", listed.stdout, re.M))
    assert shown == {
        "help", "setup", "figures", "figure", "paper", "lint", "test", "test-gpu", "lab", "site", "list", "claims",
        "notebooks", "nbval", "clean", "distclean", "everything", "verify", "release",
    }  # fmt: skip


def committed_labels(id: str) -> list[str]:
    """Presets whose figures are committed: paper, or where that needs models from a hub, any with another one."""
    known = notebooks.presets(id)
    if not known["paper"].needs:
        return ["paper"]
    return [label for label in known if (REPOSITORY / "figures" / label / f"{id}.json").is_file() and label != "quick"]


def test_every_full_figure_is_committed_whole(id):
    if not committed_labels(id):
        page = (REPOSITORY / "CLAIMS.md").read_text()
        mine = [claim.id for claim in claims.load_claims() if claim.figure == id]
        untested = re.findall(rf"`({id}\.\w+)`[ †]*<br>[^\n]*NOT TESTED", page)
        assert mine and sorted(untested) == sorted(mine)  # no figure was made, and every claim of it says so
    for label in committed_labels(id):
        stem = REPOSITORY / "figures" / label / id
        record = json.loads(stem.with_suffix(".json").read_text())
        arrays = {"npz": record["arrays"]["sha256"]} if "arrays" in record else {}
        for suffix, digest in (record["pictures"] | arrays).items():
            assert hashlib.sha256(stem.with_suffix(f".{suffix}").read_bytes()).hexdigest() == digest
        assert record["id"] == id and record["preset"] == label and record["commit"] and record["dirty"] is False
