"""The pages in docs: their code runs; that of README and usage, which takes minutes or a hub, names what exists."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from compressible.companion import pins

DOCS = sorted((Path(__file__).parent.parent / "docs").glob("*.md"))
ROOT = Path(__file__).parent.parent
USAGE = Path(__file__).parent.parent / "docs" / "usage.md"
README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def code() -> list:
    found = [(path, block) for path in DOCS if path != USAGE for block in BLOCK.findall(path.read_text())]
    return [pytest.param(block, id=f"{path.stem}-{i}") for i, (path, block) in enumerate(found)]


@pytest.mark.parametrize("block", code())
def test_code_of_a_page_runs(block):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    exec(compile(block, "a page in docs", "exec"), {"__name__": "page"})


def test_code_of_readme_and_usage_compiles_and_names_what_exists():
    import compressible as cd

    blocks = BLOCK.findall(README.read_text() + USAGE.read_text())
    for block in blocks:
        compile(block, "README.md", "exec")
    names = set(re.findall(r"\bcd\.(\w+)", "".join(blocks)))
    assert {"DeepLoraConfig", "fine_tune", "descend"} <= names <= set(cd.__all__)


def test_the_page_for_users_of_peft_names_fields_and_functions_that_exist():
    pytest.importorskip("peft")
    import compressible as cd

    text = (Path(__file__).parent.parent / "docs" / "deep_lora_for_users_of_peft.md").read_text()
    names = set(re.findall(r"cd\.(\w+)", text))
    assert names >= {
        "DeepLoraConfig",
        "compress_adapters",
        "save_as_lora",
        "param_groups",
        "create_deep_lora_optimizer",
    }
    assert names <= set(cd.__all__)
    options = re.search(r"cd\.DeepLoraConfig\(([^)]*), \.\.\.\)", text)[1].split(", ")
    assert set(options) <= set(cd.DeepLoraConfig.__dataclass_fields__)


@pytest.mark.parametrize("name", ["constraints-gpu.txt", "constraints-gpu-gemma.txt"])
def test_a_host_is_set_up_by_one_command_wherever_it_is_told(name):
    """pins' heads and usage name the same packages, which the file pins, and extras without what it cannot have."""
    told = re.compile(rf'pip install -c {name} -e "\.\[([a-z,]+)\]" ([a-z ]+)')
    extras, packages = told.search((ROOT / name).read_text()).groups()
    assert (extras, packages) == re.compile(told.pattern.replace("-gemma", "")).search(USAGE.read_text()).groups()
    pinned = pins.read(ROOT / name)
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    needed = [Requirement(each) for extra in extras.split(",") for each in wanted[extra]]
    needed += map(Requirement, packages.split())
    assert needed and all(each.specifier.contains(pinned[canonicalize_name(each.name)]) for each in needed)
