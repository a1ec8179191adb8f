"""The public names: which there are and where they live, what their docstrings say, and that the examples run."""

from __future__ import annotations

import doctest
import inspect
import os
import re
import subprocess
import sys
from importlib import import_module
from types import ModuleType

import pytest
from conftest import REPOSITORY

import compressible as cd

# What others call; a name goes only with a new major version.
PUBLIC = {
    "recovery": [
        "MatrixCompletion", "MatrixFactorization", "MatrixSensing", "SparseCompletion", "stack_problems",
        "low_rank_target", "random_mask", "sparse_low_rank", "gaussian_operators",
        "orthogonal_factors", "product", "stack_factors", "compress_from_gradient", "compress_spectral",
    ],
    "descent": ["descend", "DivergenceError", "History"],
    "adapters": ["DeepLoraConfig", "DeepLoraModel", "compress_adapters"],
    "finetuning": [
        "FineTuningRun", "RunHistory", "fine_tune", "param_groups", "create_deep_lora_optimizer", "paper_lora_start",
        "save_as_lora",
    ],
    "networks": ["FactoredLinear", "FactoredConv2d", "factorize"],
    "data": [
        "Examples", "Task", "load_task", "load_causal_task", "load_encoder", "load_for_task", "load_causal_lm",
        "load_seq2seq", "load_tokenizer", "head_layers",
    ],
    "experiments": ["compare_starts", "stack_starts"],
}  # fmt: skip
NAMES = [name for names in PUBLIC.values() for name in names]
HEADS = {"function": ("Args", "Returns", "Raises", "Example"), "class": ("Args", "Example")}
FROM_PAPERS = (
    "recovery",
    "descent",
    "adapters",
    "finetuning",
    "networks",
)  # these say which equation or section they are
NO_EQUATION = {"stack_problems", "stack_factors", "product", "random_mask", "sparse_low_rank", "History"}


def room(name: str) -> str:
    return getattr(cd, name).__module__.split(".")[1]


def sections(name: str) -> set[str]:
    return set(
        re.findall(r"^(Args|Returns|Raises|Example|Reference)s?:$", inspect.getdoc(getattr(cd, name)) or "", re.M)
    )


def test_every_public_name_lives_in_its_room():
    found = [name for name in cd.__all__ if not isinstance(getattr(cd, name), ModuleType)]
    assert sorted(found) == sorted(NAMES)
    assert {name: room(name) for name in NAMES} == {name: home for home, names in PUBLIC.items() for name in names}


@pytest.mark.parametrize("name", NAMES)
def test_docstring_says_what_a_caller_must_know(name):
    item = getattr(cd, name)
    wanted = set(HEADS["class" if isinstance(item, type) else "function"])
    wanted |= {"Reference"} if room(name) in FROM_PAPERS and name not in NO_EQUATION else set()
    if isinstance(item, type) and issubclass(item, Exception):
        wanted -= {"Example", "Reference"}
    assert wanted - sections(name) == set()


@pytest.mark.parametrize("name", NAMES)
def test_docstring_names_every_argument(name):
    item = getattr(cd, name)
    taken = [key for key in inspect.signature(item).parameters if key not in ("self", "args", "kwargs")]
    said = inspect.getdoc(item) or ""
    assert [key for key in taken if not re.search(rf"\b{key}\b", said)] == []


@pytest.mark.parametrize("name", NAMES)
def test_example_runs(name):
    item = getattr(cd, name)
    found = doctest.DocTestFinder(recurse=False).find(item, name, globs={}, module=import_module(item.__module__))
    examples = [test for test in found if test.examples]
    assert examples or (isinstance(item, type) and issubclass(item, Exception)), "no example"
    for test in examples:
        output: list[str] = []
        result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(
            test, out=output.append
        )
        assert result.failed == 0, "".join(output)


def test_the_command_line_starts_without_pytorch():
    """The batch asks it for every notebook, and PyTorch takes seconds to import."""
    code = "import compressible.companion.command_line, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_name_is_told_with_the_known_ones():
    with pytest.raises(AttributeError, match=r"no attribute 'decend'.*descend"):
        _ = cd.decend


# As in a set-up of the core: what the extras bring is not found.
CORE_ALONE = """
import sys
from importlib import metadata
from packaging.requirements import Requirement

needs = [Requirement(text) for text in metadata.requires("compressible-dynamics")]
core = {need.name for need in needs if need.marker is None}
hidden = {need.name.replace("-", "_").lower() for need in needs if need.name not in core}

class Hidden:
    def find_spec(name, *_):
        if name.lower() in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden)
"""


def with_the_core_alone(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CORE_ALONE + code, *arguments]
    told = {name: value for name, value in os.environ.items() if name != "COMPRESSIBLE_FIGURES"}  # this checkout's
    return subprocess.run(command, cwd=REPOSITORY, env=told, check=False, capture_output=True, text=True)


def test_a_name_that_an_extra_brings_says_which():
    done = with_the_core_alone("""
import compressible as cd
lacking = set()
for name in cd.__all__:
    try:
        getattr(cd, name)
    except ModuleNotFoundError as error:
        assert error.name == "peft"
        assert str(error) == f"{name} needs more: peft is not installed: pip install 'compressible-dynamics[adapters]'"
        lacking.add(name)
print(*sorted(lacking))
""")
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {*PUBLIC["adapters"], *PUBLIC["finetuning"]}


@pytest.mark.parametrize(
    ("command", "extra"),
    [("data", ""), ("claims", ""), ("list", "papermill batch"), ("redraw a/01_b", "jupyter_client batch")],
)
def test_the_command_line_of_the_core_alone_names_the_extra_that_it_lacks(command, extra):
    code = "from compressible.companion.command_line import main\nsys.exit(main(sys.argv[1:]))"
    done = with_the_core_alone(code, *command.split())
    package, _, extra = extra.partition(" ")
    told = f"error: {package} is not installed: pip install 'compressible-dynamics[{extra}]'\n" if extra else ""
    assert (done.returncode, done.stderr) == (2 if extra else 0, told)
    assert bool(done.stdout) == (not extra)
